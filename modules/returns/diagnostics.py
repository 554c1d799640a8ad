"""How far off-policy is this batch, and how far does a correction still reach?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from offtrace.modules.returns.checks import check, check_float, check_mask, check_numbers, computing_dtype
from offtrace.modules.returns.recurrence import linear_recurrence


@torch.no_grad()
def effective_sample_size(log_rho: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """(sum rho)^2 / (n sum rho^2), a scalar in [0, 1]: the fraction of the steps that the weighted batch is worth.

    Args:
        log_rho: log pi(a|x) - log mu(a|x), any shape; of any size, since the largest is taken out of the sums.
        valid: bool of the same shape; other steps do not count. No valid step at all: 1. Every ratio 0: 0.

    Raises:
        TypeError, ValueError: on a dtype or a shape that does not fit, by the argument's name.

    Source: Kong 1992.
    """
    _check(log_rho, valid)
    flat = (log_rho if valid is None else log_rho.masked_fill(~valid, -math.inf)).flatten()
    flat = flat.to(computing_dtype(flat))
    limits = torch.finfo(flat.dtype)
    rho = (flat - flat.amax().clamp(min=limits.min)).exp()  # its scale cancels
    size = rho.sum().square() / rho.dot(rho).clamp(min=limits.tiny)
    if valid is None:
        return (size / flat.numel()).clamp(max=1.0)
    count = valid.sum()
    return torch.where(count == 0, 1.0, (size / count).clamp(max=1.0))


@torch.no_grad()
def clipped_fraction(log_rho: Tensor, clip: float, *, valid: Tensor | None = None) -> Tensor:
    """Fraction of the ratios above ``clip``, a scalar; arguments as of :func:`effective_sample_size`."""
    _check(log_rho, valid)
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    above = (log_rho > math.log(clip)).to(torch.float32).flatten()
    return _mean(above, None if valid is None else valid.flatten())


class TraceReach(NamedTuple):
    """``length``, steps ahead that a trace carries, and ``contraction``, the modulus of its operator; scalars."""

    length: Tensor
    contraction: Tensor


@torch.no_grad()
def trace_reach(
    *,
    trace: Tensor,
    done: Tensor,
    gamma: float,
    rho: Tensor | None = None,
    valid: Tensor | None = None,
    bounded: bool = False,
) -> TraceReach:
    """How many steps ahead a trace really carries, and how fast the operator that it makes contracts.

    Means over the steps s of a batch, the products cut behind a done and at the end of the rollout::

        length      = mean of  c_{s+1} + c_{s+1} c_{s+2} + ...
        contraction = 1 - (1 - gamma) mean of  1 + gamma c_{s+1} + gamma^2 c_{s+1} c_{s+2} + ...

    and for V-trace, whose trace begins with c_s itself and whose TD errors are weighted by rho'_s::

        length      = mean of  c_s + c_s c_{s+1} + ...
        contraction = 1 - (1 - gamma) mean of  rho'_s + gamma c_s rho'_{s+1} + gamma^2 c_s c_{s+1} rho'_{s+2} + ...

    Length 0 is one-step learning; a constant c = lambda gives lambda / (1 - lambda) in long episodes. The contraction
    is gamma for on-policy one-step learning, and smaller is faster. It is estimated from the batch, where a trace that
    the rollout's end cuts counts as ended, so short rollouts give too large a number. It means what it says for
    operators with 0 <= c <= rho, in V-trace 0 <= c <= rho'.

    Args:
        trace: c_t of the action at t, lambda included, ``[T, *B]``.
        done: bool, the trace is cut behind the step.
        gamma: discount.
        rho: V-trace's clipped ratio rho'_t; None for the operators on action values.
        valid: bool; other steps cut the trace and do not count. No valid step at all: length 0, contraction 1.
        bounded: no c is above 1, so products cannot overflow; faster. Otherwise they saturate.

    Source: Munos et al. 2016, arXiv 1606.02647, section 3.2; Espeholt et al. 2018, arXiv 1802.01561, appendix A.
    """
    floats = {"trace": trace} if rho is None else {"trace": trace, "rho": rho}
    check(floats, {"done": done, "valid": valid})
    check_numbers(gamma=gamma)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    trace = trace.to(computing_dtype(trace))
    rho = None if rho is None else rho.to(trace.dtype)
    if valid is not None:
        done = done | ~valid
        trace = trace.masked_fill(~valid, 0)
        rho = None if rho is None else rho.masked_fill(~valid, 0)
    # c of the step itself, or of the next one; nothing behind the end of an episode and of the rollout
    carried = torch.where(done, 0, trace if rho is not None else trace.roll(-1, 0))
    if rho is not None and valid is not None:  # the next step's own trace is 0 there, and this step's is not
        carried = torch.where(valid.roll(-1, 0), carried, 0)
    carried[-1].zero_()
    # both sums in one recurrence: its calls, not its elements, are what it costs
    weight = torch.stack([carried, gamma * carried], 1)
    first = torch.stack([carried, torch.ones_like(carried) if rho is None else rho], 1)
    sums = linear_recurrence(first, weight, bounded=bounded).transpose(0, 1).flatten(1)
    length, total = _mean(sums, None if valid is None else valid.flatten()).unbind()
    return TraceReach(length, 1 - (1 - gamma) * total)


def _check(log_rho: Tensor, valid: Tensor | None) -> None:
    check_float("log_rho", log_rho)
    if not log_rho.numel():
        raise ValueError(f"log_rho must have at least one element, got {list(log_rho.shape)}")
    check_mask(valid, "log_rho", log_rho)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Over the last dimension of ``x`` [*, N]."""
    if valid is None:
        return x.mean(-1)
    return torch.where(valid, x, 0).sum(-1) / valid.sum().clamp(min=1)
