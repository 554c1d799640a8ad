"""How far off-policy is this batch, and how far does a correction still reach?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offtrace.modules.returns.checks import check
from offtrace.modules.returns.recurrence import linear_recurrence


@torch.no_grad()
def effective_sample_size(log_rho: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """(sum rho)^2 / (n sum rho^2), a scalar in (0, 1]: the fraction of the steps that the weighted batch is worth.

    Args:
        log_rho: log pi(a|x) - log mu(a|x), any shape; of any size, since sums are taken of logarithms.
        valid: bool of the same shape; other steps do not count. No valid step at all: 1.

    Source: Kong 1992.
    """
    flat = _flat(log_rho, valid, -math.inf)
    count = flat.numel() if valid is None else valid.sum()
    log_count = torch.as_tensor(count, device=flat.device, dtype=flat.dtype).log()
    size = (2 * flat.logsumexp(0) - (2 * flat).logsumexp(0) - log_count).exp()
    return size.nan_to_num(1.0, posinf=1.0).clamp(max=1.0)


@torch.no_grad()
def clipped_fraction(log_rho: Tensor, clip: float, *, valid: Tensor | None = None) -> Tensor:
    """Fraction of the ratios above ``clip``, a scalar; arguments as of :func:`effective_sample_size`."""
    return _mean((log_rho > math.log(clip)).to(torch.float32), valid)


@torch.no_grad()
def mean_trace_length(*, trace: Tensor, done: Tensor, valid: Tensor | None = None, from_first: bool = False) -> Tensor:
    """How many steps ahead a trace really carries, a scalar: the mean over s of c_{s+1} + c_{s+1} c_{s+2} + ...

    0 is one-step learning; without discount and cuts, lambda / (1 - lambda) for a constant c = lambda.

    Args:
        trace: c_t of the action at t, ``[T, *B]``.
        done: bool; the trace is cut behind the step, as at the end of the rollout.
        valid: bool; other steps cut the trace and do not count.
        from_first: the products begin with c_s itself, as V-trace's do.
    """
    return _mean(_carried(trace, done, valid, 1.0, from_first), valid)


@torch.no_grad()
def contraction_coefficient(*, trace: Tensor, done: Tensor, gamma: float, valid: Tensor | None = None) -> Tensor:
    """eta = gamma - (1 - gamma) E[sum_{t>=1} gamma^t c_1 ... c_t], a scalar in [0, gamma]: smaller is faster.

    Estimated from every valid step of the batch as a start. A trace that the rollout's end cuts counts as ended there,
    so short rollouts give too large a number.

    Args:
        trace: c_t of the action at t, ``[T, *B]``, of an operator with 0 <= c <= rho.
        done: bool; the trace is cut behind the step.
        gamma: discount.
        valid: bool; other steps cut the trace and do not count.

    Source: Munos et al. 2016, arXiv 1606.02647, section 3.2.
    """
    return gamma - (1 - gamma) * _mean(_carried(trace, done, valid, gamma, False), valid)


def _carried(trace: Tensor, done: Tensor, valid: Tensor | None, gamma: float, from_first: bool) -> Tensor:
    check({"trace": trace}, {"done": done, "valid": valid})
    if valid is not None:
        done = done | ~valid
        trace = trace.masked_fill(~valid, 0)
    following = trace if from_first else torch.cat([trace[1:], torch.zeros_like(trace[:1])])
    step = torch.where(done, 0, gamma * following)
    if from_first:  # the last action's coefficient has nothing left to carry
        step = torch.cat([step[:-1], torch.zeros_like(step[:1])])
    return linear_recurrence(step, step, bounded=False)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean()
    return torch.where(valid, x, 0).sum() / valid.sum().clamp(min=1)


def _flat(x: Tensor, valid: Tensor | None, fill: float) -> Tensor:
    return (x if valid is None else x.masked_fill(~valid, fill)).flatten()
