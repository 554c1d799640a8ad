"""The loss of an actor-critic whose critic values actions."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.estimators.names import check_ranges
from offtrace.modules.losses.arguments import check_arguments, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics, trust_region
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry
from offtrace.modules.losses.unroll import check_action_values, evaluate_action_values
from offtrace.modules.returns import clipped_fraction, importance_trace


class QActorCriticLoss(Loss):
    """Policy gradient, action value and entropy terms over one shared network, on rollouts of discrete actions.

    With V(x) = sum over a of pi(a|x) Q(x, a), and over the valid steps of a rollout [B, T]::

        loss_policy  = sum of  -min(pg_rho_clip, rho) (G - V(x)) log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (G - Q(x, a))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    where G is the target of an estimator of action values, from the network's own Q; G, V and rho are constant. The
    total loss is the sum of the three; under ``"mean"`` each is divided by the number of valid steps.

    With ``"retrace"`` these are critic and policy gradient of ACER (Wang et al. 2017, arXiv 1611.01224) without
    its bias correction, average network and replay; the operator: Munos et al. 2016, arXiv 1606.02647. Unlike V-trace's
    value, which moves by min(1, rho) of an error, Q(x, a) learns from every action taken as much as from any other.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives for ``critic="q"``: its deterministic part
            writes the parameters of a distribution over discrete actions and ``"action_value"`` [*B, 1, A].
        estimator: of action values, of every step of a rollout: a name with options, ``"retrace(lmbda=0.9)"``,
            ``"q_lambda"`` (ACER's Q^opc), ``"tree_backup"``; an import path, or an object.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        pg_rho_clip: clip of the ratio in the policy gradient; ACER's c.
        reward_clip, normalize_advantage, policy_clip: as of :class:`ImpalaLoss`.

    Reads what :class:`ImpalaLoss` reads. Where actions can be illegal the mask is read behind a step as well, for the
    policy's values there.

    Returns the three losses and the detached scalars of :class:`ImpalaLoss`, with these differences: of the clips,
    ``pg_rho_clipped`` and, for Retrace, ``c_clipped``; ``contraction`` is that of the action values' operator, and left
    out for ``"q_lambda"``, which need not contract; ``explained_variance`` is of the targets by Q(x, a).

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | ActionValueEstimator = "retrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "sum",
        pg_rho_clip: float = 1.0,
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        policy_clip: float | None = None,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_positive_or_none(reward_clip=reward_clip, policy_clip=policy_clip)
        check_ranges(pg_rho_clip=pg_rho_clip)
        check_action_values(policy, "QActorCriticLoss")
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, every_step=True)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.bind_networks()
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.pg_rho_clip, self.reward_clip = pg_rho_clip, reward_clip
        self.normalize_advantage, self.policy_clip = normalize_advantage, policy_clip
        losses = ["loss_policy", "loss_value", "loss_entropy", "pg_rho_clipped"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "policy_clipped"]
        self.out_keys = [*losses, *diagnostics, "valid_count", *self.estimator.diagnostic_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        # one call of the network over the steps and their successors
        policy, log_rho = evaluate_action_values(self, tensordict, reward_clip=self.reward_clip)
        valid = policy.outcome.valid
        stats = Stats(valid, policy.outcome.reward, self.reduction)
        q_values = entry(self, policy.output, self.tensor_keys.action_value).squeeze(-2)
        q_value = policy.unroll.steps(q_values).gather(-1, policy.action.unsqueeze(-1)).squeeze(-1)

        # target, constant
        with torch.no_grad():
            values = (policy.output.get(k.LOGITS).softmax(-1) * q_values).sum(-1)
            value, next_value = policy.unroll.steps(values), policy.unroll.successors(values)
            estimate = self.estimator.estimate(
                self.estimator.select(policy.outcome, gamma=self.gamma),
                q_value=q_value.flatten(),
                next_value=next_value.flatten(),
                log_pi=policy.log_pi.flatten(),
                log_rho=log_rho.flatten(),
            )
            target = estimate.target.view_as(q_value)

            # advantage, weighted by the clipped ratio
            weight = importance_trace(log_rho=log_rho).clamp(max=self.pg_rho_clip)
            plain = zero_invalid(weight.to(target.dtype) * (target - value), valid)
            advantage = plain
            if self.normalize_advantage:
                advantage = stats.standardised(plain, zero_invalid(weight, valid))
            advantage, outside = trust_region(advantage, log_rho, self.policy_clip)

        # the three terms
        entropy, error = policy.dist.entropy(), target - q_value
        out = {
            "loss_policy": -stats.reduce(advantage * policy.log_pi),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(error.square()),
            "loss_entropy": -self.entropy_coef * stats.reduce(entropy),
        }

        # diagnostics
        out["policy_clipped"] = stats.mean(outside)
        out["pg_rho_clipped"] = clipped_fraction(log_rho, self.pg_rho_clip, valid=valid)
        out |= rollout_diagnostics(stats, entropy=entropy, advantage=plain, target=target, error=error)
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])
