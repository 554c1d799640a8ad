"""Sums and moments over the steps of a batch that count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Stats:
    """Sums and moments over the valid steps of a batch [*B]. What stands in other steps, NaN included, has no effect.

    Args:
        valid: bool [*B], or None where every step counts.
        like: a tensor [*B]: its device and its number of elements.

    Attributes:
        count: number of valid steps, a scalar tensor.
    """

    def __init__(self, valid: Tensor | None, like: Tensor) -> None:
        self._valid = valid
        self.count = torch.full((), float(like.numel()), device=like.device) if valid is None else valid.sum().float()
        self._number: Any = like.numel() if valid is None else self.count.clamp(min=1)

    def sum(self, x: Tensor) -> Tensor:
        """Scalar, of ``x`` [*B]."""
        return x.sum() if self._valid is None else torch.where(self._valid, x, 0).sum()

    def mean(self, x: Tensor) -> Tensor:
        """Scalar, of ``x`` [*B] or [*B, K]; 0 where no step is valid."""
        if self._valid is None:
            return x.mean()
        return self.sum(x if x.ndim == self._valid.ndim else x.mean(-1)) / self._number

    def means(self, x: Tensor) -> Tensor:
        """[D], of ``x`` [*B, D]."""
        if self._valid is not None:
            x = torch.where(self._valid.unsqueeze(-1), x, 0)
        return x.flatten(0, -2).sum(0) / self._number

    def variance(self, x: Tensor) -> Tensor:
        """Scalar, divided by the count."""
        if self._valid is None:
            return x.var(correction=0)
        return self.mean((x - self.mean(x)).square())

    def std(self, x: Tensor) -> Tensor:
        """Scalar."""
        return self.variance(x).sqrt()

    @torch.no_grad()
    def moments_of_all_ranks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the batches of all ranks of ``torch.distributed``; own ones where alone.

        Every rank must call it as often as the others.
        """
        mean, variance = self.mean(x), self.variance(x)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return mean, variance.sqrt()
        count = self.count.to(mean)
        sums = torch.stack([count, count * mean, count * (variance + mean.square())]).double()
        torch.distributed.all_reduce(sums)
        _, mean, squares = sums / sums[0].clamp(min=1)
        return mean.to(x.dtype), (squares - mean.square()).clamp(min=0).sqrt().to(x.dtype)
