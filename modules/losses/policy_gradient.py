"""What the policy-gradient losses on rollouts share: one call of the network, the three terms, the trust region."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor
from torch.distributions import Distribution

from offtrace.modules.losses.offpolicy import check_arguments, cleared
from offtrace.modules.losses.rollout import Reading, RolloutLoss
from offtrace.modules.losses.stats import Stats
from offtrace.modules.returns import importance_trace
from offtrace.modules.returns.checks import check_clips

_DIAGNOSTICS = (
    "ratio_mean",
    "entropy",
    "kl",
    "explained_variance",
    "advantage_std",
    "policy_clipped",
    "valid_count",
)


class Estimate(NamedTuple):
    """What the critic says, with gradient, and should say; the advantage; diagnostics. [B, T], advantage 0 if invalid.

    ``told`` are detached scalars by their names.
    """

    prediction: Tensor
    target: Tensor
    advantage: Tensor
    told: dict[str, Tensor]


class PolicyGradientLoss(RolloutLoss):
    """Terms of policy, critic and entropy over one shared network; subclasses say what the critic learns.

    Args are those of the subclasses.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        told: list[str],
        gamma: float,
        lmbda: float,
        value_coef: float,
        entropy_coef: float,
        reduction: str,
        pg_rho_clip: float,
        reward_clip: float | None,
        normalize_advantage: bool,
        policy_clip: float | None,
    ) -> None:
        super().__init__(policy)
        check_arguments(reduction=reduction, gamma=gamma, lmbda=lmbda)
        check_clips(rho_clip=math.inf, c_clip=1.0, pg_rho_clip=pg_rho_clip)
        for name, value in {"reward_clip": reward_clip, "policy_clip": policy_clip}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive or None, got {value}")
        self.gamma, self.lmbda, self.pg_rho_clip = gamma, lmbda, pg_rho_clip
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.reward_clip, self.normalize_advantage, self.policy_clip = reward_clip, normalize_advantage, policy_clip
        self.out_keys = ["loss_policy", "loss_value", "loss_entropy", *_DIAGNOSTICS, *told]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        reading = self._read(tensordict)
        prediction, target, advantage, told = self._estimate(reading)
        entropy, log_rho = reading.dist.entropy(), reading.log_rho
        stats = Stats(reading.batch.valid, reading.batch.reward)
        spread = stats.std(advantage)
        if self.normalize_advantage:
            advantage = stats.standardised(advantage, cleared(self._weight(reading), reading.batch.valid))
        advantage, outside = self._trust_region(advantage, log_rho)
        reduce = stats.sum if self.reduction == "sum" else stats.mean
        error, mean_entropy = target - prediction, stats.mean(entropy)
        out = {
            "loss_policy": -reduce(advantage * reading.log_pi),
            "loss_value": (0.5 * self.value_coef) * reduce(error.square()),
            "loss_entropy": -self.entropy_coef * (mean_entropy if self.reduction == "mean" else stats.sum(entropy)),
            "entropy": mean_entropy.detach(),
            "advantage_std": spread,
            "policy_clipped": stats.count.new_zeros(()) if outside is None else stats.mean(outside),
            "valid_count": stats.count,
            **told,
        }
        with torch.no_grad():
            out["kl"] = stats.mean(self._kl(tensordict, reading.dist, log_rho))
            out["ratio_mean"] = stats.mean(log_rho.exp())
            out["explained_variance"] = 1 - stats.variance(error) / stats.variance(target).clamp(min=1e-8)
        return TensorDict(out, [])

    def _estimate(self, reading: Reading) -> Estimate:
        """What subclasses define; the one place where time changes its dimension."""
        raise NotImplementedError

    def _read(self, tensordict: TensorDictBase) -> Reading:
        reading = super()._read(tensordict)
        if self.reward_clip is None:
            return reading
        clipped = reading.batch.reward.clamp(-self.reward_clip, self.reward_clip)
        return reading._replace(batch=reading.batch._replace(reward=clipped))

    def _weight(self, reading: Reading) -> Tensor:
        """What multiplies an advantage in the policy gradient, min(pg_rho_clip, rho), [B, T]."""
        return importance_trace(log_rho=reading.log_rho).clamp(max=self.pg_rho_clip)

    def _weighted(self, advantage: Tensor, reading: Reading) -> Tensor:
        """That times ``advantage`` [B, T], 0 where not valid."""
        return cleared(self._weight(reading).to(advantage.dtype) * advantage, reading.batch.valid)

    def _trust_region(self, advantage: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor | None]:
        """The advantage, 0 where the ratio left the trust region in its direction; and those steps as 0 and 1."""
        if self.policy_clip is None:
            return advantage, None
        moved = torch.where(advantage > 0, log_rho, -log_rho)
        limit = torch.where(advantage > 0, math.log1p(self.policy_clip), -math.log1p(-min(self.policy_clip, 1 - 1e-6)))
        outside = moved > limit
        return advantage.masked_fill(outside, 0), outside.to(advantage.dtype)

    def _kl(self, tensordict: TensorDictBase, dist: Distribution, log_rho: Tensor) -> Tensor:
        """KL of behaviour to target at each step [B, T], from the stored parameters, or one sample of it each."""
        sampler = self.policy[-1]
        params = {key: tensordict.get(key, None) for key in sampler.in_keys}
        if any(param is None for param in params.values()):
            return -log_rho
        behaviour = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
        return torch.distributions.kl_divergence(behaviour, dist)
