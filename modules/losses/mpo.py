"""The loss of MPO for continuous actions, with scalar or categorical critics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.arguments import check_action_bounds, check_arguments, check_count, check_positive
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import categorical_terms, divergence, min_critic
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import States, Steps, log_ratio, read_log_prob, read_steps, weighted, write_priority
from offtrace.modules.losses.views import (
    check_feed_forward,
    is_squashed,
    parameters_of,
    state_keys_of,
    support_of,
    values_of,
)
from offtrace.modules.networks.distributions import product

LOSSES = ("loss_policy", "loss_dual", "loss_critic")
VALUES = ("q_value", "target_value", "td_error")
_WRITES = (k.VALUE_LOGITS, k.STATE_ACTION_VALUE)
_PARAMETERS = {"diagonal": [k.LOC, k.SCALE], "full": [k.LOC, k.SCALE_TRIL]}
_DUALS = ("temperature", "alpha_mean", "alpha_cov", "kl_improved", "kl_mean", "kl_cov", "scale", "out_of_bounds")
# The multipliers move by hundredths in an update: one that starts far off its bound spends the run on the way.
_PER_DIMENSION = {"epsilon_mean": 1e-2, "epsilon_cov": 1e-6, "raw_alpha_cov": 1000.0}
_JOINT = {"epsilon_mean": 0.1, "epsilon_cov": 1e-4, "raw_alpha_cov": 10.0}


class SampledActions(NamedTuple):
    """S actions sampled in each of R states: their smallest Q, ``value`` [S, R], and what the critic bootstraps from.

    ``bootstrap``: [R] or [R, atoms]; ``noise`` [S, R, A], which the actions were made of; their ``cost`` [S, R].
    """

    value: Tensor
    bootstrap: Tensor
    noise: Tensor
    cost: Tensor

    def from_state(self, start: int) -> SampledActions:
        """Those in the states from ``start`` on."""
        return SampledActions(
            self.value[:, start:], self.bootstrap[start:], self.noise[:, start:], self.cost[:, start:]
        )


class MPOLoss(Loss):
    """Maximum a posteriori policy optimisation: sampled E-step, decoupled M-step, and the critic.

    Over M states, with S actions a_ij drawn from the target policy and valued by the target critic (the smallest of its
    K values; actions clipped to the bounds)::

        w_ij = softmax_j(Q_ij / eta), plus the same of the action cost with its own temperature
        loss_policy = mean_i [ -sum_j w_ij (log N(a_ij; mu, Sigma_t) + log N(a_ij; mu_t, Sigma))
                               + alpha_mu KL_mu + alpha_Sigma KL_Sigma ]
        loss_dual   = g(eta) + g_cost(eta_cost) + mean_i [ alpha_mu (epsilon_mu - KL_mu) + the same of Sigma ]
        loss_critic = mean of 1/2 (y - Q_k)^2, summed over k; or the cross entropy of a categorical critic (DMPO)

    Each reaches its own parameters only, and their sum is the total loss. Abdolmaleki et al. 2018, arXiv 1806.06920;
    the decoupled form arXiv 1812.02256; the action penalty arXiv 2005.07513; DMPO as in Acme.

    Args:
        policy: unsquashed Gaussian policy; writes ``"loc"`` [*, A] and ``"scale"`` [*, A], or ``"scale_tril"``
            [*, A, A] for ``covariance="full"``.
        critic: reads the observation and ``"action"``; writes ``"state_action_value"`` [*, K], or ``"value_logits"``
            [*, K, atoms] beside a buffer ``support`` [atoms], which makes this DMPO.
        estimator: of action values, by its name or an object: ``"one_step"``; ``"n_step(n=5)"``, uncorrected; or a
            trace, ``"retrace(lmbda=1.0)"``, ``"importance_sampling"`` or ``"q_lambda"``, with the ratio of the *target*
            policy, whose value the samples estimate, to the stored ``"action_log_prob"``. (Tree backup needs
            probabilities of discrete actions.)
        gamma: discount per step.
        action_dim: A; needed with ``per_dimension``, where the policy has no attribute of that name.
        covariance: of the policy, ``"diagonal"`` or ``"full"``.
        per_dimension: one multiplier and one whole bound for each action dimension; by default with a diagonal
            covariance. Otherwise the KL is summed over dimensions and has one.
        epsilon: bound of the E-step in nats.
        epsilon_mean, epsilon_cov: bounds of the M-step; default 0.01 and 1e-6 per dimension (Acme's control scripts),
            0.1 and 1e-4 jointly (the paper).
        action_penalty: penalise samples outside the bounds.
        epsilon_penalty: bound of the penalty's own E-step.
        num_samples: S.
        policy_states: where the policy is improved: ``"next"``, the states where the critic bootstraps, so that one
            call of the target critic serves both (behind a terminal step there is none, and the step's own state takes
            its place); ``"root"``, the steps' own states, at twice the critic's work. Acme's JAX learner takes both.
        action_bounds: lowest and highest action.
        raw_temperature, raw_alpha_mean, raw_alpha_cov: initial multipliers before the softplus; that of the covariance
            1000 per dimension (Acme), 10 jointly, where the bound is a hundred times as wide.
        reduction: ``"mean"`` or ``"sum"`` over valid steps; the sum is the mean times ``valid_count``.
        priorities: write the mean absolute TD error of each item into the batch, as ``"td_error"``; of a categorical
            critic the divergence from its target.

    Reads transitions [N] (one-step targets only) or sequences [N, T]. Of n steps the value of the *first* step of each
    sequence is learnt, from a window that ends early at a done or before an invalid step; else that of every valid
    step. Entries (names change by :meth:`set_keys`): the inputs of the networks, ``"action"`` as it was sampled,
    ``"action_log_prob"`` for a trace, ``("next", ...)`` observation, ``"reward"``, ``"terminated"``, ``"done"``; where
    there are any, ``"valid"``, and ``"weight"`` [*B]: divided by the largest of the batch, it multiplies the terms of
    critic and policy.

    Returns the three losses and, detached: ``temperature``, ``penalty_temperature``, ``alpha_mean``, ``alpha_cov``
    (mean over dimensions), ``kl_improved`` (of the weights to uniform; compare ``epsilon``), ``kl_mean``, ``kl_cov``
    (largest over dimensions of the mean over states; compare the bounds), ``scale`` (mean standard deviation),
    ``out_of_bounds`` (fraction of sampled actions with a component outside), ``q_value``, ``target_value``,
    ``td_error`` (mean absolute), ``valid_count``; ``ess``, the effective sample size of the ratios as a fraction (NaN
    for one-step and n-step targets of a batch without ``"action_log_prob"``); ``trace_length``, steps that a trace, or
    an n-step window, carries beyond the first; ``contraction`` of the critic's operator (not for ``"q_lambda"``, which
    need not contract); for Retrace ``c_clipped``, the fraction of ratios above its clip, 1.

    Raises:
        ValueError: on an argument out of range, networks that do not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    critic: TensorDictModule
    critic_params: TensorDictParams
    target_critic_params: TensorDictParams
    support: Tensor | None

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        estimator: str | ActionValueEstimator = "n_step(n=5)",
        gamma: float = 0.99,
        action_dim: int | None = None,
        covariance: str = "diagonal",
        per_dimension: bool | None = None,
        epsilon: float = 0.1,
        epsilon_mean: float | None = None,
        epsilon_cov: float | None = None,
        action_penalty: bool = True,
        epsilon_penalty: float = 1e-3,
        num_samples: int = 20,
        policy_states: str = "next",
        action_bounds: tuple[float, float] = (-1.0, 1.0),
        raw_temperature: float = 10.0,
        raw_alpha_mean: float = 10.0,
        raw_alpha_cov: float | None = None,
        reduction: str = "mean",
        priorities: bool = False,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        _check_gaussian(policy, covariance)
        check_feed_forward(self, policy, critic)
        per_dimension = covariance == "diagonal" if per_dimension is None else per_dimension
        multipliers = _multipliers(policy, covariance, per_dimension=per_dimension, action_dim=action_dim)
        given = {"epsilon_mean": epsilon_mean, "epsilon_cov": epsilon_cov, "raw_alpha_cov": raw_alpha_cov}
        options = dict(_PER_DIMENSION if per_dimension else _JOINT)
        options |= {name: value for name, value in given.items() if value is not None}
        raw_alpha_cov = options.pop("raw_alpha_cov")
        bounds = {"epsilon": epsilon, "epsilon_penalty": epsilon_penalty, **options}
        value_key = check_mpo(self, critic, _WRITES, policy_states=policy_states, **bounds)
        _check_samples(num_samples, action_bounds)
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, discrete=False)
        self._add_networks(policy, critic, _PARAMETERS[covariance], value_key)
        self.bounds = bounds
        self.full, self.per_dimension = covariance == "full", per_dimension
        self.num_samples, self.policy_states, self.action_bounds = num_samples, policy_states, action_bounds
        self.temperature = m.Multiplier(raw_temperature)
        self.penalty_temperature = m.Multiplier(raw_temperature) if action_penalty else None
        self.alpha_mean = m.Multiplier(raw_alpha_mean, multipliers)
        self.alpha_cov = m.Multiplier(raw_alpha_cov, multipliers)
        self.reduction = reduction
        self.priorities = priorities
        duals = [*_DUALS, *(["penalty_temperature"] if action_penalty else [])]
        self.out_keys = [*LOSSES, *duals, *VALUES, *self.estimator.diagnostic_keys, "valid_count"]

    def _add_networks(self, policy: Any, critic: Any, parameters: list[str], value_key: str) -> None:
        self.add_network("policy", policy, target=True)
        self.add_network("critic", critic, target=True)
        self.register_buffer("support", support_of(critic) if value_key == k.VALUE_LOGITS else None)
        self._policy_at, self._target_policy = (
            parameters_of(network, parameters) for network in (self.policy, self.target("policy"))
        )
        self._q, self._target_q = (values_of(network, value_key) for network in (self.critic, self.target("critic")))
        # of a policy only the part before the sampling runs here: what else it reads when it acts is of no concern
        self.state_keys = state_keys_of(policy.det_part, critic)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to, for different learning rates: ``"actor"``, ``"critic"``, ``"duals"``."""
        return groups_with_duals(self)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        steps = read_steps(self, tensordict, discrete=False)
        x, next_x, inside = steps.observation, steps.next_observation, steps.action.clamp(*self.action_bounds)
        size, stats = len(inside), Stats(steps.valid, steps.selection.reward, self.reduction)
        at_steps = self.policy_states == "root"

        with torch.no_grad():
            # the target policy where the critic bootstraps, and at the steps where something needs it
            log_mu = read_log_prob(self, tensordict, steps)
            needs_steps = at_steps or log_mu is not None or self.estimator.uses_log_pi
            both = {key: torch.cat([next_x[key], x[key]]) for key in x} if needs_steps else next_x
            target_both = self._target_policy(both)
            target = target_both if at_steps else tuple(p[:size] for p in target_both)
            # actions sampled there, and what the target critic expects of them
            sampled = self._sample_actions(both if at_steps else next_x, target)
            log_pi = self._log_prob(steps.action, *(p[size:] for p in target_both)) if needs_steps else None
            # target
            estimate = self.estimator.estimate(
                steps.selection,
                next_value=sampled.bootstrap[:size],
                q_value=min_critic(self._target_q(x, inside), self.support).bootstrap
                if self.estimator.uses_q_value
                else None,
                log_pi=log_pi,
                log_rho=log_ratio(log_pi, log_mu),
                support=self.support,
            )

        # critics
        terms, priority = critic_terms(self, self._q(x, inside), estimate.target, steps, stats)
        if self.priorities:
            write_priority(self, tensordict, priority, steps.valid)

        # E-step, M-step and duals, in the states where the policy is improved
        if at_steps:
            target, sampled = tuple(p[size:] for p in target), sampled.from_state(size)
        duals = self._improve(self._policy_at(x if at_steps else next_x), target, sampled, steps, stats)
        return TensorDict({**terms, **duals, **estimate.diagnostics, "valid_count": stats.count}, [])

    def _sample_actions(self, states: States, target: Sequence[Tensor]) -> SampledActions:
        """S actions of the target policy, of parameters ``target`` [R, ...], in states [R]."""
        loc, scale = target
        noise = torch.randn(self.num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
        action = loc + (product(scale, noise.unsqueeze(-1)).squeeze(-1) if self.full else scale * noise)
        inside = action.clamp(*self.action_bounds)
        critic = min_critic(self._target_q(states, inside), self.support)
        return SampledActions(critic.q_value, critic.bootstrap.mean(0), noise, m.action_cost(action, inside))

    def _log_prob(self, action: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return (m.full_log_prob if self.full else m.diagonal_log_prob)(action.unsqueeze(0), loc, scale).squeeze(0)

    def _improve(
        self, online: Sequence[Tensor], target: Sequence[Tensor], sampled: SampledActions, steps: Steps, stats: Stats
    ) -> dict[str, Tensor]:
        """``loss_policy``, ``loss_dual`` and diagnostics, of policies with parameters ``online`` and ``target``."""
        # E-step: how much better the sampled actions are
        temperature, bounds = self.temperature(), self.bounds
        step = m.e_step(value=sampled.value, temperature=temperature, epsilon=bounds["epsilon"])
        weights, dual, out = step.weights, step.dual, {}
        if self.penalty_temperature is not None:
            cost_temperature = self.penalty_temperature()
            penalty = m.e_step(value=sampled.cost, temperature=cost_temperature, epsilon=bounds["epsilon_penalty"])
            weights, dual = weights + penalty.weights, dual + penalty.dual
            out["penalty_temperature"] = cost_temperature.detach().squeeze()
        # M-step: the policy moves to them, no further than the bounds
        fit, kl = (m.full_m_step if self.full else m.diagonal_m_step)(sampled.noise, weights, *online, *target)
        if not self.per_dimension:
            kl = m.DecoupledKL(*(part.sum(-1, keepdim=True) for part in kl))
        alpha_mean, alpha_cov = self.alpha_mean(), self.alpha_cov()
        mean = m.kl_penalty(kl=kl.mean, alpha=alpha_mean, epsilon=bounds["epsilon_mean"])
        cov = m.kl_penalty(kl=kl.covariance, alpha=alpha_cov, epsilon=bounds["epsilon_cov"])
        out["loss_policy"] = stats.reduce(weighted(mean.penalty + cov.penalty - fit, steps.weight))
        out["loss_dual"] = stats.reduce(dual + mean.dual + cov.dual)
        with torch.no_grad():
            out["temperature"] = temperature.detach().squeeze()
            out["alpha_mean"], out["alpha_cov"] = alpha_mean.detach().mean(), alpha_cov.detach().mean()
            out["kl_improved"] = stats.mean(step.kl)
            out["kl_mean"], out["kl_cov"] = (stats.means(part).amax() for part in kl)
            scale = online[1].square().sum(-1).sqrt() if self.full else online[1]
            out["scale"] = stats.mean(scale.mean(-1))
            out["out_of_bounds"] = stats.mean((sampled.cost < 0).to(scale.dtype).mean(0))
        return out


def critic_terms(
    loss: Any, outputs: Tensor, target: Tensor, steps: Steps, stats: Stats
) -> tuple[dict[str, Tensor], Tensor]:
    """``loss_critic``, summed over K critics, and its diagnostics; and the error of each step, [M].

    Args:
        loss: an MPO loss.
        outputs: values [M, K] or logits [M, K, atoms] of the batch's actions.
        target: [M] or [M, atoms].
    """
    if loss.support is None:
        value = outputs.detach()
        terms = 0.5 * (target.unsqueeze(-1) - outputs).square().sum(-1)
    else:
        terms, value, mean = categorical_terms(outputs, target, loss.support)
    with torch.no_grad():
        if loss.support is None:
            error = priority = (target.unsqueeze(-1) - value).abs().mean(-1)
        else:
            error, priority = (mean.unsqueeze(-1) - value).abs().mean(-1), divergence(terms, target, value.shape[-1])
            target = mean
        out = {"q_value": stats.mean(value.mean(-1)), "target_value": stats.mean(target), "td_error": stats.mean(error)}
    out["loss_critic"] = stats.reduce(weighted(terms, steps.weight))
    return out, priority


def groups_with_duals(loss: Any) -> dict[str, list[nn.Parameter]]:
    """Parameters of an MPO loss: of the ``"actor"``, of the ``"critic"``, and the other ones, its ``"duals"``."""
    groups = {"actor": list(loss.policy_params.parameters()), "critic": list(loss.critic_params.parameters())}
    taken = {id(p) for parameters in groups.values() for p in parameters}
    return groups | {"duals": [p for p in loss.parameters() if id(p) not in taken]}


def check_mpo(loss: object, critic: Any, value_keys: Sequence[str], *, policy_states: str, **bounds: float) -> str:
    """Refuse what no MPO loss takes; which of ``value_keys`` the critic writes.

    Raises:
        ValueError: one sentence.
    """
    if policy_states not in ("next", "root"):
        raise ValueError(f"policy_states must be 'next' or 'root', got {policy_states!r}")
    check_positive(**bounds)
    for key in value_keys:
        if key in critic.out_keys:
            return key
    raise ValueError(f"{type(loss).__name__} needs a critic that writes {value_keys}, got {critic.out_keys}")


def _multipliers(policy: Any, covariance: str, *, per_dimension: bool, action_dim: int | None) -> int:
    """How many there are for each part of the KL."""
    own = getattr(policy, "action_dim", None)
    if own is not None and action_dim not in (None, own):
        raise ValueError(f"action_dim is {action_dim}, and the policy's actions have {own} dimensions")
    if not per_dimension:
        return 1
    if covariance == "full":
        raise ValueError(
            "per_dimension=True needs covariance='diagonal': the KL between normals with full covariance is not a sum "
            "over dimensions, so there is nothing to bound in each"
        )
    action_dim = own if action_dim is None else action_dim
    if not action_dim:
        raise ValueError(f"per_dimension=True needs action_dim, the number of action dimensions; got {action_dim}")
    return action_dim


def _check_samples(num_samples: int, action_bounds: tuple[float, float]) -> None:
    check_count(num_samples=num_samples)
    check_action_bounds(action_bounds)


def _check_gaussian(policy: ProbabilisticTensorDictSequential, covariance: str) -> None:
    if covariance not in _PARAMETERS:
        raise ValueError(f"covariance must be one of {tuple(_PARAMETERS)}, got {covariance!r}")
    wanted, found = _PARAMETERS[covariance], list(policy[-1].in_keys)
    if k.LOGITS in found:
        raise ValueError("MPOLoss needs a continuous policy, got one over discrete actions; use DiscreteMPOLoss")
    if sorted(found) != sorted(wanted):
        raise ValueError(f"covariance={covariance!r} needs a policy with parameters {wanted}, got {found}")
    if is_squashed(policy):
        raise ValueError("MPOLoss needs an unsquashed Gaussian policy; got one with a tanh or another transform")
