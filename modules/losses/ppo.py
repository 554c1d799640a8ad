"""The loss of proximal policy optimisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor
from torchrl.modules import set_recurrent_mode

from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.estimators.state_values import StateValueEstimator
from offtrace.modules.keys import IS_INIT
from offtrace.modules.losses.arguments import check_arguments, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry
from offtrace.modules.losses.unroll import EvaluatedPolicy, evaluate_rollout, state_values
from offtrace.modules.losses.views import check_entropy, recurrent_keys
from offtrace.modules.networks.normalise import RewardNormalizer
from offtrace.modules.returns import effective_sample_size
from offtrace.modules.returns.checks import ratio


class RolloutEstimate(NamedTuple):
    """What does not change between the passes over a rollout, [B, T]: the advantage A, the return R, and V_old."""

    advantage: Tensor
    target: Tensor
    old_value: Tensor


class PPOLoss(Loss):
    """Clipped ratio surrogate, value and entropy terms over one shared actor-critic, for several passes over a rollout.

    With rho = pi(a|x) / mu(a|x), and the return R and the advantage A held constant, over the valid steps::

        loss_policy  = mean of  -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)
        loss_value   = mean of  value_coef * 1/2 (R - V(x))^2
        loss_entropy = mean of  -entropy_coef * H(pi(.|x))

    Schulman et al. 2017, arXiv 1707.06347. The total loss is the sum of the three. With ``value_clip``, c, the squared
    error of the value is the greater of two, (R - V)^2 and (R - V_old - clip(V - V_old, -c, c))^2, as in baselines.

    R and A are computed once per rollout, by :meth:`prepare`, before it is dealt into minibatches: they do not change
    between the passes while the weights do. Minibatches are then rows [B, T] of the rollout or single steps [M]. A
    rollout [B, T] that was not prepared is evaluated with the weights of the moment.

    Args:
        policy: as of :class:`ImpalaLoss`. A recurrent one needs rollouts [B, T].
        estimator: of state values, gives R and A: ``"gae(lmbda=0.95)"``, ``"vtrace"`` ..., an import path, or an
            object; see :mod:`offtrace.modules.estimators`.
        gamma: discount per step.
        clip_epsilon: how far the ratio may be from 1.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        normalize_advantage: (A - mean) / (std + 1e-8) over the valid steps of each minibatch, of all ranks.
        value_clip: how far the value may be from what it was; None does not clip.
        anneal_clip: both clips shrink linearly to 0 as :meth:`set_progress` goes from 0 to 1.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_reward: rewards are divided by the running standard deviation of the discounted return, see
            :class:`offtrace.modules.networks.RewardNormalizer`; :meth:`prepare` takes a rollout into it. ``value_clip``
            is then in its units. Not with ``reward_clip``.

    Reads (names change by :meth:`set_keys`) what :class:`ImpalaLoss` reads, and what :meth:`prepare` writes:
    ``"advantage"``, ``"value_target"``, and with ``value_clip`` ``"state_value"``, [B, T, 1]. Where the advantage is
    there, nothing of the observations behind the steps is read.

    Returns the three losses and, detached scalars over the valid steps: ``entropy`` in nats; ``kl`` of behaviour to
    target in nats; ``ratio_mean`` of pi/mu; ``ess``, the effective sample size of pi/mu as a fraction;
    ``explained_variance`` of the targets by the value; ``advantage_std``, before normalisation; ``policy_clipped``,
    fraction of steps to whose policy term the clip leaves no gradient; ``value_clipped``, fraction of values beyond
    their clip, if there is one; ``clip_epsilon``, as it is now; ``valid_count``. Those of the estimator are what
    :meth:`prepare` returns, which PPO's agent logs as ``rollout/...``.

    Raises:
        ValueError: on an argument out of range, an estimator or policy that does not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    clip_scale: Tensor
    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | StateValueEstimator = "gae(lmbda=0.95)",
        gamma: float = 0.99,
        clip_epsilon: float = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "mean",
        normalize_advantage: bool = True,
        value_clip: float | None = None,
        anneal_clip: bool = False,
        reward_clip: float | None = None,
        normalize_reward: bool = False,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_entropy(self, policy)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_positive_or_none(reward_clip=reward_clip, value_clip=value_clip)
        if normalize_reward and reward_clip is not None:
            raise ValueError(f"normalize_reward is True and reward_clip {reward_clip}; only one of them can be given")
        if not 0 < clip_epsilon < 1:
            raise ValueError(f"clip_epsilon must be in (0, 1), got {clip_epsilon}")
        super().__init__()
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.is_recurrent = bool(recurrent_keys(policy))
        self.bind_networks()
        self.clip_epsilon, self.value_clip, self.anneal_clip = clip_epsilon, value_clip, anneal_clip
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.normalize_advantage, self.reward_clip = normalize_advantage, reward_clip
        self.reward_normalizer = RewardNormalizer(gamma) if normalize_reward else None
        # a tensor, so that compiled and captured updates follow it; its precision is its own
        self.register_buffer("clip_scale", torch.ones((), dtype=torch.float64), persistent=False)
        diagnostics = ["entropy", "kl", "ratio_mean", "ess", "explained_variance", "advantage_std", "policy_clipped"]
        diagnostics += [] if value_clip is None else ["value_clipped"]
        self.out_keys = ["loss_policy", "loss_value", "loss_entropy", *diagnostics, "clip_epsilon", "valid_count"]

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the training is done, 0 to 1: with ``anneal_clip`` the clips shrink by it.

        Raises:
            ValueError: on another number.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"the progress must be in [0, 1], got {fraction}")
        if self.anneal_clip:
            self.clip_scale.fill_(1 - fraction)

    @torch.no_grad()
    def prepare(self, tensordict: TensorDictBase, environments: tuple[Tensor, int] | None = None) -> dict[str, Tensor]:
        """Write into a whole rollout [B, T] what must not change between the passes over it.

        ``"advantage"``, ``"value_target"`` and ``"state_value"``, the value as it is now, [B, T, 1] each.

        Args:
            tensordict: the rollout, which goes on where the last one ended, if rewards are normalised.
            environments: as of :meth:`RewardNormalizer.update`, by which that is told.

        Returns:
            The estimator's diagnostics of the rollout, scalars by their names; with ``normalize_reward`` also
            ``return_std``, by which its rewards were divided.

        Raises:
            KeyError, TypeError, ValueError: as :meth:`forward`.
        """
        with set_recurrent_mode(True):  # as in forward: a recurrent policy unrolls
            policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip)
        if self.reward_normalizer is not None:
            outcome, first = policy.outcome, tensordict.get(IS_INIT, None)
            self.reward_normalizer.update(
                outcome.reward, outcome.done, first=None if first is None else first[:, 0].view(-1),
                valid=outcome.valid, environments=environments,
            )  # fmt: skip
        estimate, diagnostics = self._estimate(policy, *state_values(self, policy))
        if self.reward_normalizer is not None:
            diagnostics = {**diagnostics, "return_std": self.reward_normalizer.variance.sqrt()}
        names = self.tensor_keys
        for key, x in zip((names.advantage, names.value_target, names.value), estimate, strict=True):
            tensordict.set(key, x.unsqueeze(-1))
        return diagnostics

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of rows [B, T] of a rollout or of single steps [M]."""
        prepared = tensordict.get(self.tensor_keys.advantage, None) is not None
        tensordict = self._rows(tensordict, prepared)

        # one call of the network; return and advantage are those of the rollout
        policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip, successors=not prepared)
        valid, log_rho = policy.outcome.valid, policy.log_rho
        assert log_rho is not None
        value, next_value = state_values(self, policy)
        if prepared:
            estimate = self._read_estimate(tensordict, value, valid)
        else:
            estimate, _ = self._estimate(policy, value, next_value)
        target, advantage = estimate.target, estimate.advantage
        stats = Stats(valid, policy.outcome.reward, self.reduction)
        if self.normalize_advantage:
            advantage = stats.standardised(advantage, zero_invalid(torch.ones_like(advantage), valid))

        # policy: the worse of the surrogate and the clipped one
        epsilon = self.clip_epsilon * self.clip_scale
        log_ratio = log_rho + (policy.log_pi - policy.log_pi.detach())  # the gradient is that of log pi
        rho = ratio(zero_invalid(log_ratio, valid))
        surrogate, clipped = rho * advantage, rho.clamp(1 - epsilon, 1 + epsilon) * advantage
        out = {"loss_policy": -stats.reduce(torch.minimum(surrogate, clipped))}

        # value: the worse of the error and the clipped one
        error = target - value
        square = error.square()
        if self.value_clip is not None:
            limit = self.value_clip * self.clip_scale
            moved = value - estimate.old_value
            square = torch.maximum(square, (target - estimate.old_value - moved.clamp(-limit, limit)).square())
            out["value_clipped"] = stats.mean((moved.abs() > limit).to(value.dtype))
        out["loss_value"] = (0.5 * self.value_coef) * stats.reduce(square)

        # entropy
        entropy = policy.dist.entropy()
        out["loss_entropy"] = -self.entropy_coef * stats.reduce(entropy)

        # diagnostics
        out["policy_clipped"] = stats.mean((clipped < surrogate).to(value.dtype))
        out["ess"] = effective_sample_size(log_rho.t(), valid=None if valid is None else valid.t())
        out["clip_epsilon"] = epsilon.to(value.dtype)
        out |= rollout_diagnostics(stats, entropy=entropy, advantage=estimate.advantage, target=target, error=error)
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats), [])

    def _rows(self, tensordict: TensorDictBase, prepared: bool) -> TensorDictBase:
        """Single steps [M] as rows of one step each, [M, 1]."""
        if len(tensordict.batch_size) != 1:
            return tensordict
        if self.is_recurrent:
            raise ValueError(f"a recurrent policy needs rows [B, T] of a rollout, got {list(tensordict.batch_size)}")
        if not prepared:
            raise KeyError(
                f"PPOLoss reads {self.tensor_keys.advantage!r} of single steps {list(tensordict.batch_size)}, which "
                "the batch lacks: call prepare on the whole rollout before it is dealt"
            )
        return tensordict.unsqueeze(1)

    def _estimate(
        self, policy: EvaluatedPolicy, value: Tensor, next_value: Tensor
    ) -> tuple[RolloutEstimate, dict[str, Tensor]]:
        """That of a rollout by the weights as they are, and the estimator's diagnostics."""
        outcome = policy.outcome
        if self.reward_normalizer is not None:
            outcome = outcome._replace(reward=self.reward_normalizer(outcome.reward))
        estimate = self.estimator.estimate(outcome, value=value, next_value=next_value, log_rho=policy.log_rho)
        # the surrogate has the ratio itself: an estimator's weight would count it twice; where it is 0, so is the ratio
        weighted = estimate.weight != 0
        advantage = torch.where(weighted, estimate.advantage / estimate.weight, estimate.advantage)
        return RolloutEstimate(advantage, estimate.target, value.detach()), estimate.diagnostics

    def _read_estimate(self, tensordict: TensorDictBase, value: Tensor, valid: Tensor | None) -> RolloutEstimate:
        """What :meth:`prepare` wrote; the old value is read where it is clipped."""
        names, shape = self.tensor_keys, tensordict.batch_size

        def read(key: Any) -> Tensor:
            return zero_invalid(entry(self, tensordict, key, shape).detach(), valid).to(value.dtype)

        old_value = value.detach() if self.value_clip is None else read(names.value)
        return RolloutEstimate(read(names.advantage), read(names.value_target), old_value)
