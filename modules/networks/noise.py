"""Exploration by noise that lasts."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer

from offtrace.modules.keys import ACTION_NOISE, IS_INIT, NEXT


class CorrelatedNoise(nn.Module):
    """Standard normal noise that is correlated over an episode: noise_t = rho noise_{t-1} + sqrt(1 - rho^2) new_t.

    Each of them by itself is standard normal, as independent noise is. Given the state of the environment it is not:
    the state remembers what the noise before did. So the policy as it is learnt is no density of what was done; the one
    given the noise before is. That one is narrower, by sqrt(1 - rho^2), so ratios pi/mu are far from 1 even where
    nothing is stale, and from rho = 0.71 on their variance is infinite. One-step and n-step targets read no ratio.

    Independent noise averages out within a few steps of a fast task, and moves little. An Ornstein-Uhlenbeck process in
    discrete time (Lillicrap et al. 2016, arXiv 1509.02971); coloured noise of the policy's own scale in SAC and MPO:
    Eberhard et al. 2023, ICLR, "Pink noise is all you need".

    The first noise of an episode is independent. The state travels in the TensorDict: ``"action_noise"`` is read and
    written under ``"next"``; TorchRL's collectors find :meth:`make_tensordict_primer`. Where an environment does not
    carry it, noise is independent.

    Args:
        action_dim: A.
        correlation: rho, in [0, 1); 0 would be independent noise.

    Raises:
        ValueError: ``correlation`` is out of range.
    """

    def __init__(self, action_dim: int, correlation: float) -> None:
        super().__init__()
        if not 0 <= correlation < 1:
            raise ValueError(f"noise_correlation must be in [0, 1), got {correlation}")
        self.action_dim = action_dim
        self.correlation = correlation
        self.new = math.sqrt(1 - correlation**2)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform by which an environment carries the noise."""
        return TensorDictPrimer({ACTION_NOISE: Unbounded(shape=(self.action_dim,))}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase, like: Tensor, *, random: bool = True) -> tuple[Tensor, Tensor]:
        """Noise [*B, A] like ``like``, and its surplus [*B]: log p(noise | noise before) - log N(noise; 0, 1).

        Not ``random``: both are 0, and so is the state.
        """
        if not random:
            noise = torch.zeros_like(like)
            tensordict.set((NEXT, ACTION_NOISE), noise)
            return noise, noise.sum(-1)
        new = torch.randn_like(like)
        before = tensordict.get(ACTION_NOISE, None)
        if before is None:
            tensordict.set((NEXT, ACTION_NOISE), new)
            return new, new.new_zeros(new.shape[:-1])
        first = tensordict.get(IS_INIT)
        noise = torch.where(first, new, self.correlation * before + self.new * new)
        tensordict.set((NEXT, ACTION_NOISE), noise)
        surplus = 0.5 * (noise.square() - new.square()).sum(-1) - self.action_dim * math.log(self.new)
        return noise, torch.where(first.squeeze(-1), torch.zeros_like(surplus), surplus)
