"""The loss of MPO for continuous actions, with scalar or categorical critics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.mpo_base import MPOBase, Proposal, States
from offtrace.modules.losses.offpolicy import squashed
from offtrace.modules.losses.stats import Stats

_PARAMETERS = {"diagonal": [k.LOC, k.SCALE], "full": [k.LOC, k.SCALE_TRIL]}
_DIAGNOSTICS = (
    "temperature",
    "alpha_mean",
    "alpha_cov",
    "kl_improved",
    "kl_mean",
    "kl_cov",
    "scale",
    "out_of_bounds",
)
# The multipliers move by hundredths in an update: one that starts far off its bound spends the run on the way.
_PER_DIMENSION = {"epsilon_mean": 1e-2, "epsilon_cov": 1e-6, "raw_alpha_cov": 1000.0}
_JOINT = {"epsilon_mean": 0.1, "epsilon_cov": 1e-4, "raw_alpha_cov": 10.0}


class MPOLoss(MPOBase):
    """Maximum a posteriori policy optimisation: sampled E-step, decoupled M-step, and the critic.

    Over M states, with S actions a_ij drawn from the target policy and valued by the target critic (the least of its K
    values; actions clipped to the bounds)::

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
        action_dim: A; needed with ``per_dimension``, where the policy has no attribute of that name.
        gamma: discount per step.
        covariance: of the policy, ``"diagonal"`` or ``"full"``.
        per_dimension: one multiplier and one whole bound for each action dimension; by default with a diagonal
            covariance. Otherwise the KL is summed over dimensions and has one.
        epsilon: bound of the E-step in nats.
        epsilon_mean, epsilon_cov: bounds of the M-step; default 0.01 and 1e-6 per dimension (Acme's control scripts),
            0.1 and 1e-4 jointly (the paper).
        action_penalty: penalise samples outside the bounds.
        epsilon_penalty: bound of the penalty's own E-step.
        num_samples: S.
        target: ``"one_step"``; ``"n_step"``, uncorrected; or the name of a trace, ``"retrace"``,
            ``"importance_sampling"`` or ``"q_lambda"``, with the ratio of the *target* policy, whose value the samples
            estimate, to the stored ``"action_log_prob"``. (Tree backup needs probabilities of discrete actions.)
        n_step: length of the n-step windows.
        lmbda: decay of the trace.
        policy_states: where the policy is improved: ``"next"``, the states where the critic bootstraps, so that one
            call of the target critic serves both (behind a terminal step there is none, and the step's own state takes
            its place); ``"root"``, the steps' own states, at twice the critic's work. Acme's JAX learner takes both.
        action_bounds: lowest and highest action.
        raw_temperature, raw_alpha_mean, raw_alpha_cov: initial multipliers before the softplus; that of the covariance
            1000 per dimension (Acme), 10 jointly, where the bound is a hundred times as wide.
        reduction: ``"mean"`` or ``"sum"`` over valid steps; the sum is the mean times ``valid_count``.

    Reads transitions [N] (one-step targets only) or sequences [N, T]. ``"n_step"`` learns the value of the *first* step
    of each sequence, from a window that ends early at a done or before an invalid step; the others learn that of every
    valid step. Entries (names change by :meth:`set_keys`): the inputs of the networks, ``"action"`` as it was sampled,
    ``"action_log_prob"`` for a trace, ``("next", ...)`` observation, ``"reward"``, ``"terminated"``, ``"done"``, and
    ``"valid"`` where there is one.

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

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        action_dim: int | None = None,
        gamma: float = 0.99,
        covariance: str = "diagonal",
        per_dimension: bool | None = None,
        epsilon: float = 0.1,
        epsilon_mean: float | None = None,
        epsilon_cov: float | None = None,
        action_penalty: bool = True,
        epsilon_penalty: float = 1e-3,
        num_samples: int = 20,
        target: str = "n_step",
        n_step: int = 5,
        lmbda: float = 0.95,
        policy_states: str = "next",
        action_bounds: tuple[float, float] = (-1.0, 1.0),
        raw_temperature: float = 10.0,
        raw_alpha_mean: float = 10.0,
        raw_alpha_cov: float | None = None,
        reduction: str = "mean",
    ) -> None:
        if covariance not in _PARAMETERS:
            raise ValueError(f"covariance must be one of {tuple(_PARAMETERS)}, got {covariance!r}")
        _check_gaussian(policy, covariance)
        per_dimension = covariance == "diagonal" if per_dimension is None else per_dimension
        if per_dimension and covariance == "full":
            raise ValueError(
                "per_dimension=True needs covariance='diagonal': the KL between normals with full covariance is not a "
                "sum over dimensions, so there is nothing to bound in each"
            )
        own = getattr(policy, "action_dim", None)
        if own is not None and action_dim not in (None, own):
            raise ValueError(f"action_dim is {action_dim}, and the policy's actions have {own} dimensions")
        action_dim = own if action_dim is None else action_dim
        if per_dimension and not action_dim:
            raise ValueError(f"per_dimension=True needs action_dim, the number of action dimensions; got {action_dim}")
        default = _PER_DIMENSION if per_dimension else _JOINT
        bounds = {
            "epsilon": epsilon,
            "epsilon_mean": default["epsilon_mean"] if epsilon_mean is None else epsilon_mean,
            "epsilon_cov": default["epsilon_cov"] if epsilon_cov is None else epsilon_cov,
            "epsilon_penalty": epsilon_penalty,
        }
        for name, value in bounds.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        if not action_bounds[0] < action_bounds[1]:
            raise ValueError(f"action_bounds must be (low, high) with low < high, got {action_bounds}")
        super().__init__(
            policy,
            critic,
            value_keys=(k.VALUE_LOGITS, k.STATE_ACTION_VALUE),
            diagnostics=[*_DIAGNOSTICS, *(["penalty_temperature"] if action_penalty else [])],
            gamma=gamma,
            target=target,
            n_step=n_step,
            lmbda=lmbda,
            policy_states=policy_states,
            reduction=reduction,
        )
        self._epsilon = bounds
        self._full = covariance == "full"
        self._dist_keys = _PARAMETERS[covariance]
        self.per_dimension = per_dimension
        self.num_samples = num_samples
        self.action_bounds = action_bounds
        self.temperature = m.Dual(raw_temperature)
        self.penalty_temperature = m.Dual(raw_temperature) if action_penalty else None
        size = int(action_dim) if per_dimension and action_dim else 1
        self.alpha_mean = m.Dual(raw_alpha_mean, size)
        self.alpha_cov = m.Dual(default["raw_alpha_cov"] if raw_alpha_cov is None else raw_alpha_cov, size)

    def _propose(self, states: States, policy: Sequence[Tensor]) -> Proposal:
        loc, scale = policy
        noise = torch.randn(self.num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
        action = loc + ((scale @ noise.unsqueeze(-1)).squeeze(-1) if self._full else scale * noise)
        inside = action.clamp(*self.action_bounds)
        value, estimate = self._pessimist(self._critic_at(self.target("critic"), states, inside))
        return Proposal(value, estimate.mean(0), noise, m.action_cost(action, inside))

    def _chosen(self, critic: Any, states: States, action: Tensor) -> Tensor:
        return self._critic_at(critic, states, action.clamp(*self.action_bounds))

    def _log_prob(self, policy: Sequence[Tensor], action: Tensor) -> Tensor:
        return (m.full_log_prob if self._full else m.diagonal_log_prob)(action.unsqueeze(0), *policy).squeeze(0)

    def _add_policy(
        self,
        out: dict[str, Tensor],
        online: Sequence[Tensor],
        target: Sequence[Tensor],
        proposal: Proposal,
        stats: Stats,
    ) -> None:
        """Adds ``loss_policy``, ``loss_dual`` and their diagnostics."""
        noise, cost = proposal.noise, proposal.cost
        assert noise is not None
        assert cost is not None
        temperature = self.temperature()
        step = m.e_step(value=proposal.value, temperature=temperature, epsilon=self._epsilon["epsilon"])
        weights, dual = step.weights, step.dual
        if self.penalty_temperature is not None:
            penalty_temperature = self.penalty_temperature()
            penalty = m.e_step(value=cost, temperature=penalty_temperature, epsilon=self._epsilon["epsilon_penalty"])
            weights, dual = weights + penalty.weights, dual + penalty.dual
            out["penalty_temperature"] = penalty_temperature.detach().squeeze()
        fit, kl = (m.full_m_step if self._full else m.diagonal_m_step)(noise, weights, *online, *target)
        if not self.per_dimension:
            kl = m.DecoupledKL(*(part.sum(-1, keepdim=True) for part in kl))
        alpha_mean, alpha_cov = self.alpha_mean(), self.alpha_cov()
        mean = m.kl_penalty(kl=kl.mean, alpha=alpha_mean, epsilon=self._epsilon["epsilon_mean"])
        cov = m.kl_penalty(kl=kl.covariance, alpha=alpha_cov, epsilon=self._epsilon["epsilon_cov"])
        out["loss_policy"] = self._reduce(mean.penalty + cov.penalty - fit, stats)
        out["loss_dual"] = self._reduce(dual + mean.dual + cov.dual, stats)
        with torch.no_grad():
            out["temperature"] = temperature.detach().squeeze()
            out["alpha_mean"], out["alpha_cov"] = alpha_mean.detach().mean(), alpha_cov.detach().mean()
            out["kl_improved"] = stats.mean(step.kl)
            out["kl_mean"], out["kl_cov"] = (stats.means(part).amax() for part in kl)
            scale = online[1].square().sum(-1).sqrt() if self._full else online[1]
            out["scale"] = stats.mean(scale.mean(-1))
            out["out_of_bounds"] = stats.mean((cost < 0).to(scale.dtype).mean(0))


def _check_gaussian(policy: ProbabilisticTensorDictSequential, covariance: str) -> None:
    wanted, found = _PARAMETERS[covariance], list(policy[-1].in_keys)
    if k.LOGITS in found:
        raise ValueError("MPOLoss needs a continuous policy, got one over discrete actions; use DiscreteMPOLoss")
    if sorted(found) != sorted(wanted):
        raise ValueError(f"covariance={covariance!r} needs a policy with parameters {wanted}, got {found}")
    if squashed(policy):
        raise ValueError("MPOLoss needs an unsquashed Gaussian policy; got one with a tanh or another transform")
