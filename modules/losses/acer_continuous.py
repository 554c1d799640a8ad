"""ACER's loss on continuous actions: a stochastic dueling critic, Q^ret and Q^opc, a trust region of Gaussians."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictParams, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator, QLambda
from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.estimators.names import parse_spec
from offtrace.modules.losses.acer import (
    average_parameters,
    behaviour_parameter,
    is_changed,
    truncated_weights,
    trust_region,
)
from offtrace.modules.losses.arguments import (
    check_action_bounds,
    check_arguments,
    check_clip,
    check_count,
    check_not_negative,
    check_positive_or_none,
)
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import EvaluatedPolicy, evaluate_rollout
from offtrace.modules.networks import Critic, DiagonalNormal, StateValue
from offtrace.modules.returns import clipped_fraction


@torch.no_grad()
def gaussian_score(*, action: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """grad log f(a) with respect to the statistics of f = N(loc, scale^2), its mean and the log of its scale.

    Args:
        action: a, ``[*B, D]``.
        loc, scale: ``[*B, D]``.

    Returns:
        ``[*B, 2 D]``: of the means, then of the logs of the scales.
    """
    error = (action - loc) / scale
    return torch.cat([error / scale, error.square() - 1], -1)


@torch.no_grad()
def gaussian_kl_gradient(*, average_loc: Tensor, average_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """k = grad KL(f_avg || f) with respect to the statistics of f, its mean and the log of its scale.

    Of the means it is (loc - average_loc) / scale^2: section 4 of Wang et al. 2017, arXiv 1611.01224, which fixes the
    scale.

    Args:
        average_loc, average_scale: of f_avg, ``[*B, D]``.
        loc, scale: of f, ``[*B, D]``.

    Returns:
        ``[*B, 2 D]``.
    """
    distance = (loc - average_loc) / scale
    ratio = average_scale / scale
    return torch.cat([distance / scale, 1 - ratio.square() - distance.square()], -1)


class _Critic(NamedTuple):
    """V of the steps and of their successors, Q~ of the action and of a new one of the policy; all [B, T]."""

    value: Tensor
    next_value: Tensor
    q_value: Tensor
    q_fresh: Tensor


class ContinuousACERLoss(Loss):
    """Critic and policy gradient of ACER on continuous actions (Wang et al. 2017, arXiv 1611.01224, section 4).

    The critic is a stochastic dueling network: with n actions u_j drawn from the policy,
    Q~(x, a) = V(x) + A(x, a) - 1/n sum over j of A(x, u_j). Over the valid steps of a rollout [B, T]::

        loss_policy  = sum of  -z . phi(x) + bound_coef * 1/2 |mean(x) - clip(mean(x), low, high)|^2
        loss_value   = sum of  value_coef * 1/2 ((Q^ret - Q~(x, a))^2 + (V^target - V(x))^2)
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    phi are the policy's statistics, mean and log of the scale. z is constant: with a' drawn from the policy,

        g = min(c, rho) (Q^opc - V) grad_phi log f(a) + [1 - c / rho']_+ (Q~(x, a') - V) grad_phi log f(a')

    projected by :func:`offtrace.modules.losses.acer.trust_region` against the average policy, ``target("policy")``,
    which has to follow after every update. Q^ret is the target of the estimator, Q^opc that of Q(lambda), with
    the lambda of the estimator where it has one, the paper's being 1;
    V^target = min(1, rho) (Q^ret - Q~) + V. All three are constant.

    Args:
        policy: of ``build_policy(..., action_dim=D, critic=None)``, a diagonal normal that writes ``"loc"`` and
            ``"scale"``.
        value: V, of ``build_value``.
        advantage: A, of ``build_critic(critics=1)``.
        estimator: of action values, of every step of a rollout. ``"retrace"`` without the option ``root`` has the
            paper's trace, min(1, rho^(1/D)).
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        clip: c, of the importance weights in the policy gradient; the paper's is 5 here.
        delta: bound of the trust region; None for none, and then no average policy.
        num_samples: n.
        learn_scale: False leaves the scale as it is at the start, as in the paper; the entropy, which is that of the
            scale alone, then has no gradient, and ``entropy_coef`` must be 0.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: divide g by the root mean square of Q^opc - V over the valid steps, before the projection:
            then ``delta`` does not depend on the size of the rewards. The paper does not.
        action_bounds: lowest and highest action; what lies beyond acts as the bound does, and A reads the bound.
        bound_coef: weight of half the squared distance of the policy's mean to the bounds, summed over the actions'
            entries. Beyond the bounds no return tells the mean to come back, and noise carries it away: the paper has
            none.
        average_critic: Q^ret, Q^opc, V^target and the V that the policy is compared with come from averages of the two
            networks, ``target("value")`` and ``target("advantage")``, which have to follow after every update. The
            paper's come from the networks that learn.

    Reads (names change by :meth:`set_keys`) what the networks read, also under ``"next"``; ``"action"`` [B, T, D]; of
    the behaviour policy ``"action_log_prob"`` [B, T], ``"loc"`` and ``"scale"`` [B, T, D]; ``("next", ...)``
    ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; where there is one, ``"valid"`` [B, T, 1].

    Returns the scalars of :class:`ACERLoss`; ``bias_correction`` is the mean of [1 - c / rho']_+, and ``projected``
    the share of steps at which the trust region changes g by more than 1 % of its norm: every direction of a normal's
    statistics moves it.

    Raises:
        ValueError: on an argument out of range, a network that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    value: StateValue
    value_params: TensorDictParams
    target_value_params: TensorDictParams
    advantage: Critic
    advantage_params: TensorDictParams
    target_advantage_params: TensorDictParams
    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        value: StateValue,
        advantage: Critic,
        *,
        estimator: str | ActionValueEstimator = "retrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        reduction: str = "mean",
        clip: float = 10.0,
        delta: float | None = 1.0,
        num_samples: int = 5,
        learn_scale: bool = False,
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        action_bounds: tuple[float, float] = (-1.0, 1.0),
        bound_coef: float = 0.0,
        average_critic: bool = False,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef, bound_coef=bound_coef)
        check_clip(clip=clip)
        check_positive_or_none(reward_clip=reward_clip, delta=delta)
        check_count(num_samples=num_samples)
        check_action_bounds(action_bounds)
        if entropy_coef and not learn_scale:
            raise ValueError(
                f"entropy_coef is {entropy_coef}; the entropy of a normal is that of its scale, which "
                "learn_scale=False fixes: it must be 0, or learn_scale True"
            )
        if list(policy[-1].in_keys) != [k.LOC, k.SCALE] or policy[-1].distribution_class is not DiagonalNormal:
            raise ValueError(
                f"ContinuousACERLoss needs a policy that writes {k.LOC!r} and {k.SCALE!r} of a diagonal normal, got "
                f"one that writes {policy.out_keys}: use build_policy(..., action_dim=..., critic=None)"
            )
        _check_critics(value, advantage)
        super().__init__()
        self.add_network("policy", policy, target=delta is not None)
        self.bind_estimator(estimator, "action", gamma=gamma, discrete=False, every_step=True)
        self.state_keys = list(policy.in_keys)
        self.add_network("value", value, target=average_critic)
        self.add_network("advantage", advantage, target=average_critic)
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.clip, self.delta, self.reward_clip = clip, delta, reward_clip
        self.num_samples, self.learn_scale = num_samples, learn_scale
        self.normalize_advantage, self.average_critic = normalize_advantage, average_critic
        self.action_bounds, self.bound_coef = action_bounds, bound_coef
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "pg_rho_clipped"]
        average = ["projected", "kl_average"] if delta is not None else []
        own = ["bias_correction", *average, "valid_count", *self.estimator.diagnostic_keys]
        self.out_keys = [*losses, *diagnostics, *own]

    def bind_estimator(self, spec: Any, kind: str, *, gamma: float, **options: Any) -> None:
        """As :meth:`Loss.bind_estimator`; ``"retrace"`` has the paper's root where no other is given.

        ``options`` are those of :meth:`Loss.bind_estimator` and of the estimator that is named.
        """
        if isinstance(spec, str):
            name, given = parse_spec(spec)
            if name == "retrace" and "root" not in given and "root" not in options:
                options["root"] = self.policy.action_dim
        super().bind_estimator(spec, kind, gamma=gamma, **options)
        lmbda = getattr(self.estimator, "lmbda", 1.0)
        self.__dict__["uncorrected"] = QLambda(lmbda=lmbda, gamma=gamma)  # no submodule: state_dict knows nothing of it

    def read_keys(self) -> list[Any]:
        """Entries that are read."""
        return [*super().read_keys(), k.LOC, k.SCALE]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        behaviour = DiagonalNormal(*(behaviour_parameter(self, tensordict, key) for key in (k.LOC, k.SCALE)))

        # the policy over the steps and their successors, and new actions of it at the steps: a', u_1 to u_n
        policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip)
        valid, log_rho = policy.outcome.valid, policy.log_rho
        assert log_rho is not None
        stats = Stats(valid, policy.outcome.reward, self.reduction)
        loc, scale = policy.params[k.LOC], policy.params[k.SCALE]
        with torch.no_grad():
            drawn = loc + scale * torch.randn(1 + self.num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
            fresh, centre = drawn[0], drawn[1:]

        # the stochastic dueling critic of a and a'
        critic = self._critic(policy, fresh, centre, self.value, self.advantage)
        q_value = critic.q_value

        # Q^ret, Q^opc and V^target, constant
        with torch.no_grad():
            known = critic
            if self.average_critic:
                known = self._critic(policy, fresh, centre, self.target("value"), self.target("advantage"))
            value = known.value
            selection = self.estimator.select(policy.outcome, gamma=self.gamma)
            given: dict[str, Any] = {"q_value": known.q_value.flatten(), "next_value": known.next_value.flatten()}
            given |= {"log_pi": policy.log_pi.flatten(), "log_rho": log_rho.flatten()}
            estimate = self.estimator.estimate(selection, **given)
            q_return = estimate.target.view_as(q_value)
            q_opc = self.uncorrected.estimate(selection, **given).target.view_as(q_value)
            target = log_rho.exp().clamp(max=1) * (q_return - known.q_value) + value

            # truncated gradient with its bias correction, then the trust region
            weight, _ = truncated_weights(log_rho=log_rho, clip=self.clip)
            fresh_rho = policy.dist.log_prob(fresh) - behaviour.log_prob(fresh)
            _, correction = truncated_weights(log_rho=fresh_rho, clip=self.clip)
            score = gaussian_score(action=policy.action, loc=loc, scale=scale)
            fresh_score = gaussian_score(action=fresh, loc=loc, scale=scale)
            gradient = (weight * (q_opc - value)).unsqueeze(-1) * score
            gradient = gradient + (correction * (known.q_fresh - value)).unsqueeze(-1) * fresh_score
            gradient = self._learnt(gradient)
            if self.normalize_advantage:
                gradient = gradient / stats.root_mean_square(q_opc - value)
            projected = gradient
            if self.delta is not None:
                average = DiagonalNormal(*average_parameters(self, policy))
                against = gaussian_kl_gradient(
                    average_loc=average.base_dist.loc, average_scale=average.base_dist.scale, loc=loc, scale=scale
                )
                projected = trust_region(gradient=gradient, kl_gradient=self._learnt(against), delta=self.delta)

        # the three terms
        entropy, error = policy.dist.entropy(), q_return - q_value
        statistics = torch.cat([loc, scale.log()], -1)
        beyond = (loc - loc.clamp(*self.action_bounds)).square().sum(-1)
        out = {
            "loss_policy": stats.reduce(
                0.5 * self.bound_coef * beyond - (zero_invalid(projected, valid) * statistics).sum(-1)
            ),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(error.square() + (target - critic.value).square()),
            "loss_entropy": -self.entropy_coef * stats.reduce(entropy),
        }

        # diagnostics
        with torch.no_grad():
            out |= rollout_diagnostics(stats, entropy=entropy, advantage=q_opc - value, target=q_return, error=error)
            out["pg_rho_clipped"] = clipped_fraction(log_rho, self.clip, valid=valid)
            out["bias_correction"] = stats.mean(correction)
            if self.delta is not None:
                out["projected"] = stats.mean(is_changed(before=gradient, change=projected - gradient))
                out["kl_average"] = stats.mean(torch.distributions.kl_divergence(average, policy.dist))
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])

    def _critic(self, policy: EvaluatedPolicy, fresh: Tensor, centre: Tensor, value: Any, advantage: Any) -> _Critic:
        """By networks ``value`` and ``advantage``; ``fresh`` [B, T, D] is a', ``centre`` [n, B, T, D] are the u."""
        inputs, unroll = policy.unroll.inputs, policy.unroll
        values = value(inputs.select(*value.in_keys)).get(self.tensor_keys.value).squeeze(-1)
        states = {key: unroll.steps(inputs.get(key)).flatten(0, 1) for key in advantage.in_keys if key != k.ACTION}

        def of(actions: Tensor) -> Tensor:
            inside = actions.clamp(*self.action_bounds).flatten(1, 2)
            found: Tensor = advantage.values(states, inside).view(actions.shape[:-1])
            return found

        now = unroll.steps(values)
        of_action = of(torch.cat([policy.action.unsqueeze(0), centre]))
        baseline = of_action[1:].mean(0)
        with torch.no_grad():
            q_fresh = now + of(fresh.unsqueeze(0))[0] - baseline
        return _Critic(now, unroll.successors(values).detach(), now + of_action[0] - baseline, q_fresh)

    def _learnt(self, statistics: Tensor) -> Tensor:
        """Of means and logs of the scales [*B, 2 D] those that are learnt; zero in place of the others."""
        if self.learn_scale:
            return statistics
        means, scales = statistics.chunk(2, -1)
        return torch.cat([means, torch.zeros_like(scales)], -1)


def _check_critics(value: Any, advantage: Any) -> None:
    """Refuse networks of which the loss cannot make V and A."""
    if not isinstance(value, StateValue):
        raise ValueError(f"ContinuousACERLoss needs a value of build_value, got {type(value).__name__}")
    if not isinstance(advantage, Critic):
        raise ValueError(f"ContinuousACERLoss needs an advantage of build_critic, got {type(advantage).__name__}")
    critics = advantage.ensemble.last.members
    if critics != 1:
        raise ValueError(f"ContinuousACERLoss needs one advantage, got {critics}: use build_critic(critics=1)")
