"""Which steps of a batch are learnt from, and where they bootstrap: named before any network runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offtrace.modules.estimators.base import Outcome, zero_invalid


class Selection(NamedTuple):
    """The M steps learnt from. One-step and n-step targets are ``reward + discount * value of the successor``.

    Attributes:
        outcome: of all steps of the batch, [N, T]; of transitions T is 1.
        reward: [M], 0 where not valid: of the step, or of the whole window.
        discount: [M], of the value where the step bootstraps; 0 where it does not.
        bootstraps: bool [M], False behind a termination and where not valid: what stands there may be anything.
        valid: bool [M], or None where all are.
        length: steps of the window, [M], or None where all are 1.
        first: whether the first step of each sequence is learnt from; else all.
        dims: of the batch, 2 for sequences [N, T], 1 for transitions [N].
    """

    outcome: Outcome
    reward: Tensor
    discount: Tensor
    bootstraps: Tensor
    valid: Tensor | None
    length: Tensor | None = None
    first: bool = False
    dims: int = 2

    def at(self, x: Tensor) -> Tensor:
        """Of an entry ``x`` of the batch, [N, T, ...] or [N, ...], the steps learnt from, [M, ...]."""
        return x[:, 0] if self.first else x.flatten(0, self.dims - 1)

    def successor(self, x: Tensor) -> Tensor:
        """Of an entry ``x`` under ``"next"``, [N, T, ...] or [N, ...], what stands where they bootstrap, [M, ...]."""
        if self.length is None:
            return self.at(x)
        return x[torch.arange(len(self.length), device=self.length.device), self.length - 1]


def every_step(outcome: Outcome, *, gamma: float) -> Selection:
    """All steps of the batch, each of which bootstraps from its own successor."""
    reward, bootstraps = outcome.reward.flatten(), ~outcome.terminated.flatten()
    discount = bootstraps.to(reward.dtype) * gamma
    if outcome.valid is None:
        return Selection(outcome, reward, discount, bootstraps, None)
    valid = outcome.valid.flatten()
    return Selection(outcome, zero_invalid(reward, valid), discount, bootstraps & valid, valid)


def first_window(outcome: Outcome, *, gamma: float, n: int) -> Selection:
    """The window of at most ``n`` steps that starts at the first step of each sequence.

    It is shortened at a done, before a step that is not valid, and at T. Where the first step itself is not valid the
    reward is 0 and one step is looked at.
    """
    reward, terminated, done = (x[:, :n] for x in (outcome.reward, outcome.terminated, outcome.done))
    inside = torch.cat([torch.ones_like(done[:, :1]), ~(done | terminated)[:, :-1]], 1)
    valid = None
    if outcome.valid is not None:
        valid = outcome.valid[:, 0]
        inside = inside & outcome.valid[:, :n]
        reward = reward.masked_fill(~outcome.valid[:, :n], 0)
    inside = inside.cumprod(1)
    length = inside.sum(1)
    powers = gamma ** torch.arange(reward.shape[1] + 1, dtype=reward.dtype, device=reward.device)
    total = (reward * inside * powers[:-1]).sum(1)  # autocast would round a product of matrices
    bootstraps = ~(terminated & (inside > 0)).any(1)
    discount = powers[length] * bootstraps
    if valid is not None:
        bootstraps = bootstraps & valid
        total = zero_invalid(total, valid)
    return Selection(outcome, total, discount, bootstraps, valid, length.clamp(min=1), first=True)
