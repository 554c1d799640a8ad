"""Smoothing of the actions that are executed."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer

from offtrace.modules.keys import IS_INIT, NEXT, SMOOTHED_ACTION


class ActionSmoother(nn.Module):
    """First-order low pass over the actions of an episode: executed_t = beta executed_{t-1} + (1 - beta) sampled_t.

    The first action of an episode is executed as sampled. The state travels in the TensorDict: ``"smoothed_action"`` is
    read and written under ``"next"``; TorchRL's collectors find :meth:`make_tensordict_primer`.

    Args:
        action_dim: A.
        beta: in [0, 1); 0 would be no smoothing.
    """

    def __init__(self, action_dim: int, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {beta}")
        self.action_dim = action_dim
        self.beta = beta
        self.log_volume = action_dim * math.log1p(-beta)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform by which an environment carries the last executed action."""
        return TensorDictPrimer({SMOOTHED_ACTION: Unbounded(shape=(self.action_dim,))}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase, action: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Executed action [*B, A], its log-density [*B] given the one before, and bool [*B, 1] where nothing changed.

        Raises:
            KeyError: when the state is missing in mid-episode.
        """
        first = tensordict.get(IS_INIT)
        before = tensordict.get(SMOOTHED_ACTION, None)
        if before is None:
            if not bool(first.all()):
                raise KeyError(
                    f"{SMOOTHED_ACTION!r} is missing in mid-episode: the environment does not carry the last action; "
                    "append torchrl.modules.utils.get_env_transforms_from_module(policy) to the environment"
                )
            before = torch.zeros_like(action)
        executed = torch.where(first, action, self.beta * before + (1 - self.beta) * action)
        tensordict.set((NEXT, SMOOTHED_ACTION), executed)
        return executed, torch.where(first.squeeze(-1), log_prob, log_prob - self.log_volume), first
