"""The loss of IMPALA."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch

from offtrace.modules.estimators.state_values import StateValueEstimator
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics, trust_region
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import check_arguments, check_positive
from offtrace.modules.losses.unroll import evaluate_rollout, state_values


class ImpalaLoss(Loss):
    """V-trace policy gradient, value and entropy terms over one shared actor-critic, called once per batch.

    Over the valid steps of a rollout [B, T], with the target v and advantage A held constant::

        loss_policy  = sum of  -A log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (v - V(x))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    Espeholt et al. 2018, arXiv 1802.01561. The total loss is the sum of the three. The paper sums; under ``"mean"``
    each is divided by the number of valid steps: learning rate, gradient clip and RMSProp's epsilon then have another
    scale.

    v and A are those of an estimator of state values; table 2 of the paper compares ``"vtrace"``,
    ``"importance_sampling"`` (plain ratios, no clip), ``"one_step"`` (values of the behaviour policy, gradient weighted
    by the step's own ratio) and ``"gae"`` (every ratio is 1).

    The network runs once over x_0, ..., x_{T-1} and the successor of the last step; the final observation of a step
    truncated inside the rollout is inserted behind it, so a recurrent net meets it with the state after x_t.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives: its deterministic part writes the
            parameters of the distribution and the state value.
        estimator: of state values: a name with options, ``"vtrace(lmbda=0.95, c_clip=0.9)"``, an import path, or an
            object; see :mod:`offtrace.modules.estimators`.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: (A - m w) / (std + 1e-8) over the valid steps of the batch passed in, with w the ratio that
            multiplies the advantage in A, and m = sum A / sum w: of the advantages before their ratio the weighted
            mean is taken away, so that an action which the policy has left keeps its weight of 0. On-policy, the usual.
        policy_clip: where pi/mu has already moved beyond 1 +- policy_clip in the direction the advantage asks for, the
            step gives no policy gradient: the trust region of PPO (Schulman et al. 2017, arXiv 1707.06347) on V-trace
            advantages, which makes several passes over a rollout safe. None: as in the paper.

    Reads (names change by :meth:`set_keys`) the inputs of the policy, ``"action"``, ``"action_log_prob"`` [B, T] and
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; ``"valid"`` [B, T, 1] where there is one,
    and TorchRL's own masks. Parameters of the behaviour distribution give the exact KL; without them it is estimated
    from the actions.

    Returns the three losses and, detached scalars over the valid steps, those of the estimator (``ess``, effective
    sample size as a fraction in (0, 1]; ``trace_length`` in steps and ``contraction`` of the value's operator, by
    :func:`offtrace.modules.returns.trace_reach`; ``rho_clipped``, ``c_clipped`` and ``pg_rho_clipped``, fractions of
    ratios above the clips that it has); ``ratio_mean`` of pi/mu, ``inf`` where it overflows; ``entropy`` in nats;
    ``kl`` of behaviour to target in nats; ``explained_variance`` of the targets by the value; ``advantage_std``, before
    normalisation; ``policy_clipped``, fraction of steps outside the trust region; ``valid_count``.

    Raises:
        ValueError: on an argument out of range, an estimator that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | StateValueEstimator = "vtrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "sum",
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        policy_clip: float | None = None,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_positive(reward_clip=reward_clip, policy_clip=policy_clip)
        super().__init__()
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.bind_networks()
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.reward_clip, self.normalize_advantage, self.policy_clip = reward_clip, normalize_advantage, policy_clip
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "policy_clipped"]
        self.out_keys = [*losses, *diagnostics, "valid_count", *self.estimator.diagnostic_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        # one call of the network over the steps and their successors
        policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip)
        value, next_value = state_values(self, policy)
        stats = Stats(policy.outcome.valid, policy.outcome.reward, self.reduction)

        # target and advantage, constant
        log_rho = policy.log_rho
        assert log_rho is not None
        estimate = self.estimator.estimate(policy.outcome, value=value, next_value=next_value, log_rho=log_rho)
        advantage = estimate.advantage
        if self.normalize_advantage:
            advantage = stats.standardised(advantage, estimate.weight)
        advantage, outside = trust_region(advantage, log_rho, self.policy_clip)

        # the three terms
        entropy, error = policy.dist.entropy(), estimate.target - value
        out = {
            "loss_policy": -stats.reduce(advantage * policy.log_pi),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(error.square()),
            "loss_entropy": -self.entropy_coef * stats.reduce(entropy),
        }

        # diagnostics
        out["policy_clipped"] = stats.mean(outside)
        out |= rollout_diagnostics(
            stats, entropy=entropy, advantage=estimate.advantage, target=estimate.target, error=error
        )
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])
