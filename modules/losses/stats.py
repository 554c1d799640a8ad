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
        reduction: how a loss's terms become one number, ``"mean"`` or ``"sum"``.

    Attributes:
        count: number of valid steps, a scalar tensor.
    """

    def __init__(self, valid: Tensor | None, like: Tensor, reduction: str = "mean") -> None:
        self._valid = valid
        self._reduction = reduction
        self.count = torch.full((), float(like.numel()), device=like.device) if valid is None else valid.sum().float()
        self._number: Any = like.numel() if valid is None else self.count.clamp(min=1)

    def reduce(self, x: Tensor) -> Tensor:
        """Scalar, of ``x`` [*B]: the mean or the sum, by ``reduction``."""
        return self.sum(x) if self._reduction == "sum" else self.mean(x)

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

    def root_mean_square(self, x: Tensor) -> Tensor:
        """Scalar, of ``x`` [*B] over the valid steps of all ranks, at least 1e-8.

        The ranks are those of ``torch.distributed``; every rank must call it as often as the others.
        """
        with torch.no_grad():
            y = x.double()
            sums = torch.stack([self.sum(y * y), self.sum(torch.ones_like(y))])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            squares, count = sums.unbind()
            return (squares / count.clamp(min=1)).sqrt().clamp(min=1e-8).to(x.dtype)

    def standardised(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` - m ``weight`` [*B], of mean zero and standard deviation one over the valid steps of all ranks.

        For ``x`` a product with ``weight``, m is the weighted mean of the other factor: what has no weight stays 0. The
        ranks are those of ``torch.distributed``; every rank must call it as often as the others.
        """
        with torch.no_grad():  # as a decorator it would stop a compiler
            y, w = x.double(), weight.double()
            sums = torch.stack([self.sum(z) for z in (torch.ones_like(y), y, w, y * y, y * w, w * w)])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            count, total, mass, squares, products, masses = sums.unbind()
            mean = total / mass.clamp(min=torch.finfo(x.dtype).tiny)
            variance = (squares - 2 * mean * products + mean.square() * masses).clamp(min=0) / count.clamp(min=1)
            return (x - mean.to(x.dtype) * weight) / (variance.sqrt().to(x.dtype) + 1e-8)
