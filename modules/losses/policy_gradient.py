"""What the policy-gradient losses on rollouts share: checks, the trust region, diagnostics."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import EvaluatedPolicy


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not above 0; None is none.

    Raises:
        ValueError: by the argument's name.
    """
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive or None, got {value}")


def trust_region(advantage: Tensor, log_rho: Tensor, clip: float | None) -> tuple[Tensor, Tensor | None]:
    """The advantage [B, T], 0 where the ratio has left 1 +- ``clip`` in its direction; and those steps as 0 and 1.

    Schulman et al. 2017, arXiv 1707.06347: where the gradient of the clipped surrogate is 0.
    """
    if clip is None:
        return advantage, None
    moved = torch.where(advantage > 0, log_rho, -log_rho)
    limit = torch.where(advantage > 0, math.log1p(clip), -math.log1p(-min(clip, 1 - 1e-6)))
    outside = moved > limit
    return advantage.masked_fill(outside, 0), outside.to(advantage.dtype)


def behaviour_kl(policy: Any, tensordict: TensorDictBase, evaluated: EvaluatedPolicy, log_rho: Tensor) -> Tensor:
    """KL of behaviour to target at each step [B, T], from the stored parameters, or one sample of it each."""
    sampler = policy[-1]
    params = {key: tensordict.get(key, None) for key in sampler.in_keys}
    if any(param is None for param in params.values()):
        return -log_rho
    behaviour = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
    return torch.distributions.kl_divergence(behaviour, evaluated.dist)


@torch.no_grad()
def ratio_diagnostics(
    policy: Any, tensordict: TensorDictBase, evaluated: EvaluatedPolicy, stats: Stats
) -> dict[str, Tensor]:
    """``kl`` of behaviour to target in nats and ``ratio_mean`` of pi/mu, over the valid steps; nothing without mu."""
    log_rho = evaluated.log_rho
    if log_rho is None:
        return {}
    kl = behaviour_kl(policy, tensordict, evaluated, log_rho)
    return {"kl": stats.mean(kl), "ratio_mean": stats.mean(log_rho.exp())}


@torch.no_grad()
def explained_variance(target: Tensor, error: Tensor, stats: Stats) -> Tensor:
    """1 - var(target - prediction) / var(target) over the valid steps, a scalar."""
    return 1 - stats.variance(error) / stats.variance(target).clamp(min=1e-8)
