"""The one recurrence under every return, and the order in which its rows are visited.

``y_t = b_t + a_t y_{t+1}`` has two good ways to be computed. A loop over time does the least arithmetic and pays one
kernel call a row: best for wide batches. A scan in log2(T) levels (Hillis and Steele 1986) pays a few calls a level and
does log2(T) times the arithmetic: best for long and narrow ones, on devices where a call is dear, and under
``torch.compile`` and ``vmap``, which would unroll the loop.

On the CPU, wide batches are visited in blocks of rows that fit the cache, the last block first, so that the twenty-odd
elementwise steps around the recurrence do not each travel to memory and back.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offtrace.modules.returns.checks import narrowed

BLOCK = 1 << 17
"""Elements of a block: a few buffers of this size fit the second-level cache."""

_PAGE = 1 << 21
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None

Rows = list[Any]
"""Tensors ``[rows, *B]``, or None where an argument was not given."""
Step = Callable[[Rows, "tuple[Tensor, ...] | None"], "tuple[tuple[Tensor, ...], tuple[Tensor, ...]]"]


def linear_recurrence(b: Tensor, a: Tensor, last: Tensor | None = None, *, bounded: bool = True) -> Tensor:
    """``y_t = b_t + a_t y_{t+1}`` for t = T - 1, ..., 0.

    Args:
        b, a: ``[T, *B]``.
        last: y_T, ``[1, *B]``; 0 by default.
        bounded: whether products of ``a`` cannot overflow. If not, every intermediate result is saturated at the
            largest finite number, so that an overflow never meets a zero and becomes NaN.

    Returns:
        y, ``[T, *B]``.
    """
    length = len(b)
    if length == 1:
        return b if last is None else _limited(torch.addcmul(b, a, last), bounded)
    if not _eager_cpu(b, a):
        return _scan(b, a, last, bounded)
    width = b.numel() // length
    # microseconds: a call of the loop and of a level of the scan, then what an element costs in them
    loop = length * (1.6 + 0.0003 * width)
    scan = math.ceil(math.log2(length)) * (8.0 + 0.0011 * width * length)
    return _loop(b, a, last, bounded) if loop < scan else _scan(b, a, last, bounded)


def backwards(step: Step, tensors: Sequence[Tensor | None], outputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Apply ``step`` to blocks of rows, the last block first.

    Args:
        step: ``(rows, carry) -> (outputs, carry)``; ``carry`` is None at the end of the rollout, then what the call on
            the later rows returned.
        tensors: each ``[T, *B]`` or None.
        outputs: how many tensors ``step`` returns.
        dtype: of the results.

    Returns:
        The outputs, ``[T, *B]``.
    """
    present = [x for x in tensors if x is not None]
    first = present[0]
    length = len(first)
    rows = max(1, BLOCK // max(1, first.numel() // length))
    if rows >= length or not _eager_cpu(*present):
        out, _ = step(list(tensors), None)
        return [narrowed(x, dtype) for x in out]
    results = [_huge(torch.empty(first.shape, dtype=dtype, device=first.device)) for _ in range(outputs)]
    carry = None
    for end in range(length, 0, -rows):
        start = max(0, end - rows)
        pieces, carry = step([None if x is None else x[start:end] for x in tensors], carry)
        for result, piece in zip(results, pieces, strict=True):
            result[start:end] = narrowed(piece, dtype)
    return results


def _loop(b: Tensor, a: Tensor, last: Tensor | None, bounded: bool) -> Tensor:
    out = torch.empty_like(b)
    y = torch.zeros_like(b[0]) if last is None else last[0]
    for b_t, a_t, out_t in zip(reversed(b.unbind()), reversed(a.unbind()), reversed(out.unbind()), strict=True):
        y = torch.addcmul(b_t, a_t, y, out=out_t)
        if not bounded:
            limit = torch.finfo(y.dtype).max
            y.clamp_(-limit, limit)
    return out


def _scan(b: Tensor, a: Tensor, last: Tensor | None, bounded: bool) -> Tensor:
    """After the level of a shift, b_t is the sum of the first 2 shift terms of y_t, and a_t the product behind them."""
    length, shift = len(b), 1
    if last is not None:
        b = torch.cat([b[:-1], _limited(torch.addcmul(b[-1:], a[-1:], last), bounded)])
    while shift < length:
        rest = length - shift
        b = torch.cat([_limited(torch.addcmul(b[:rest], a[:rest], b[shift:]), bounded), b[rest:]])
        a = _limited(a[: max(0, rest - shift)] * a[shift:rest], bounded)
        shift *= 2
    return b


def _limited(x: Tensor, bounded: bool) -> Tensor:
    if bounded:
        return x
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


def _huge(x: Tensor) -> Tensor:
    """``x``, its fresh memory asked for in pages of 2 MiB: to touch it first in pages of 4 KiB costs as much as a third
    of the arithmetic. Advice to the system, on Linux; nothing depends on it."""
    start, end = (-(-x.data_ptr() // _PAGE) * _PAGE, (x.data_ptr() + x.nbytes) // _PAGE * _PAGE)
    if _madvise is not None and end > start:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE
    return x


def _eager_cpu(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(x.device.type == "cpu" and not wrapped(x) for x in tensors)
