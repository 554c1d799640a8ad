"""The loss of advantage actor-critic."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch

from offtrace.modules.estimators.state_values import StateValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import evaluate_rollout, state_values
from offtrace.modules.losses.views import check_entropy


class A2CLoss(Loss):
    """Policy gradient, value and entropy terms over one shared actor-critic, called once per batch.

    Over the valid steps of a rollout [B, T], with the return R and the advantage A held constant::

        loss_policy  = mean of  -A log pi(a|x)
        loss_value   = mean of  value_coef * 1/2 (R - V(x))^2
        loss_entropy = mean of  -entropy_coef * H(pi(.|x))

    Mnih et al. 2016, arXiv 1602.01783: there R is the n-step return up to the end of the rollout, which is ``"gae"``
    with a lmbda of 1, and A = R - V(x). The total loss is the sum of the three. The network runs once over the rollout,
    as in :class:`ImpalaLoss`, of which this is the member without ratios.

    Args:
        policy: as of :class:`ImpalaLoss`.
        estimator: of state values, gives R and A: ``"gae(lmbda=0.95)"``, ``"n_step(n=5)"``, ``"vtrace"`` ..., an import
            path, or an object; see :mod:`offtrace.modules.estimators`.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: as of :class:`ImpalaLoss`.

    Reads what :class:`ImpalaLoss` reads; ``"action_log_prob"`` is needed by an estimator with ratios alone, and read
    where it is there.

    Returns the three losses and, detached scalars over the valid steps, those of the estimator; ``entropy`` in nats;
    ``explained_variance`` of the targets by the value; ``advantage_std``, before normalisation; ``valid_count``; and
    ``ess``, ``kl`` and ``ratio_mean``, as :class:`ImpalaLoss`: of data from this very policy 1, 0 and 1, and NaN where
    the behaviour policy's log-probabilities are missing.

    Raises:
        ValueError: on an argument out of range, an estimator or policy that does not fit, or a batch that is not
            [B, T].
        KeyError: when an entry is missing, by its name.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | StateValueEstimator = "gae",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "mean",
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_entropy(self, policy)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_positive_or_none(reward_clip=reward_clip)
        super().__init__()
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.bind_networks()
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.reward_clip, self.normalize_advantage = reward_clip, normalize_advantage
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "valid_count"]
        self.out_keys = [*losses, *diagnostics, *self.estimator.diagnostic_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        # one call of the network over the steps and their successors
        policy = evaluate_rollout(
            self, tensordict, reward_clip=self.reward_clip, needs_behaviour=self.estimator.uses_behaviour
        )
        value, next_value = state_values(self, policy)
        stats = Stats(policy.outcome.valid, policy.outcome.reward, self.reduction)

        # return and advantage, constant
        estimate = self.estimator.estimate(policy.outcome, value=value, next_value=next_value, log_rho=policy.log_rho)
        advantage = estimate.advantage
        if self.normalize_advantage:
            advantage = stats.standardised(advantage, estimate.weight)

        # the three terms
        entropy, error = policy.dist.entropy(), estimate.target - value
        out = {
            "loss_policy": -stats.reduce(advantage * policy.log_pi),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(error.square()),
            "loss_entropy": -self.entropy_coef * stats.reduce(entropy),
        }

        # diagnostics
        out |= rollout_diagnostics(
            stats, entropy=entropy, advantage=estimate.advantage, target=estimate.target, error=error
        )
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])
