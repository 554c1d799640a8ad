"""What the policy-gradient losses on rollouts share: the trust region and the diagnostics."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import EvaluatedPolicy


def trust_region(advantage: Tensor, log_rho: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """The advantage [B, T], 0 where the ratio has left 1 +- ``clip`` in its direction; and those steps as 0 and 1.

    Schulman et al. 2017, arXiv 1707.06347: where the gradient of the clipped surrogate is 0. None has no limit.
    """
    if clip is None:
        return advantage, torch.zeros_like(advantage)
    moved = torch.where(advantage > 0, log_rho, -log_rho)
    below = -math.log1p(-clip) if clip < 1 else math.inf  # no ratio is below 0
    limit = torch.where(advantage > 0, math.log1p(clip), below)
    outside = moved > limit
    return advantage.masked_fill(outside, 0), outside.to(advantage.dtype)


@torch.no_grad()
def rollout_diagnostics(
    stats: Stats, *, entropy: Tensor, advantage: Tensor, target: Tensor, error: Tensor
) -> dict[str, Tensor]:
    """``entropy``, ``advantage_std``, ``explained_variance`` and ``valid_count``, over the valid steps.

    Args:
        stats: of the valid steps.
        entropy: of the policy, in nats.
        advantage: before normalisation.
        target: of the value.
        error: target minus prediction; the explained variance is 1 - var(error) / var(target).
    """
    explained = 1 - stats.variance(error) / stats.variance(target).clamp(min=1e-8)
    return {
        "entropy": stats.mean(entropy),
        "advantage_std": stats.std(advantage),
        "explained_variance": explained,
        "valid_count": stats.count,
    }


@torch.no_grad()
def ratio_diagnostics(
    policy: Any, tensordict: TensorDictBase, evaluated: EvaluatedPolicy, stats: Stats
) -> dict[str, Tensor]:
    """``kl`` of behaviour to target in nats and ``ratio_mean`` of pi/mu, over the valid steps; NaN without mu."""
    log_rho = evaluated.log_rho
    if log_rho is None:
        unknown = stats.count.new_full((), math.nan)
        return {"kl": unknown, "ratio_mean": unknown}
    kl = _behaviour_kl(policy, tensordict, evaluated, log_rho)
    return {"kl": stats.mean(kl), "ratio_mean": stats.mean(log_rho.exp())}


def _behaviour_kl(policy: Any, tensordict: TensorDictBase, evaluated: EvaluatedPolicy, log_rho: Tensor) -> Tensor:
    """KL of behaviour to target at each step [B, T], from the stored parameters, or one sample of it each."""
    sampler = policy[-1]
    params = {key: tensordict.get(key, None) for key in sampler.in_keys}
    if any(param is None for param in params.values()):
        return -log_rho
    behaviour = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
    return torch.distributions.kl_divergence(behaviour, evaluated.dist)
