"""Exploration by noise that lasts."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer

from offtrace.modules.keys import ACTION_NOISE, IS_INIT, NEXT
from offtrace.modules.networks.smoothing import carried


class CorrelatedNoise(nn.Module):
    """Standard normal noise that is correlated over an episode: noise_t = rho noise_{t-1} + sqrt(1 - rho^2) new_t.

    Each of them is standard normal, so a policy loc + scale noise has the same distribution at every step as with
    independent noise; only what follows on what changes. Independent noise averages out within a few steps of a fast
    task, and moves little. An Ornstein-Uhlenbeck process in discrete time (Lillicrap et al. 2016, arXiv 1509.02971);
    coloured noise of the policy's own scale in SAC and MPO: Eberhard et al. 2023, ICLR, "Pink noise is all you need".

    The first noise of an episode is independent. The state travels in the TensorDict: ``"action_noise"`` is read and
    written under ``"next"``; TorchRL's collectors find :meth:`make_tensordict_primer`.

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

        Raises:
            KeyError: when the state is missing in mid-episode.
        """
        if not random:
            noise = torch.zeros_like(like)
            tensordict.set((NEXT, ACTION_NOISE), noise)
            return noise, noise.sum(-1)
        first = tensordict.get(IS_INIT)
        before = carried(tensordict, ACTION_NOISE, first, like)
        new = torch.randn_like(like)
        noise = torch.where(first, new, self.correlation * before + self.new * new)
        tensordict.set((NEXT, ACTION_NOISE), noise)
        surplus = 0.5 * (noise.square() - new.square()).sum(-1) - self.action_dim * math.log(self.new)
        return noise, torch.where(first.squeeze(-1), torch.zeros_like(surplus), surplus)
