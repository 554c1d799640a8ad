"""Returns that correct action values: one operator, and the traces that make it Retrace, tree backup, ..."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from offtrace.modules.returns import fused
from offtrace.modules.returns.checks import (
    check,
    check_float,
    check_numbers,
    computing_dtype,
    discount,
    narrowed,
    ratio,
)
from offtrace.modules.returns.recurrence import Rows, backwards, linear_recurrence
from offtrace.modules.returns.state_values import bootstrapped, onward


@torch.no_grad()
def q_return(
    *,
    reward: Tensor,
    q_value: Tensor,
    next_state_value: Tensor,
    trace: Tensor | float,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The general operator for action values, ``[T, *B]``.

    With g_t = gamma (1 - terminated_t) and k_t = 1 unless done_t or t = T - 1::

        delta_t = r_t + g_t E_pi Q(x'_t, .) - Q(x_t, a_t)
        G_t - Q(x_t, a_t) = delta_t + gamma k_t c_{t+1} (G_{t+1} - Q(x_{t+1}, a_{t+1}))

    The first action is never re-weighted: c_t only carries what comes after t to earlier steps, and c_0, as every c
    at the start of an episode, is never read.

    Args:
        reward: r_t.
        q_value: Q(x_t, a_t).
        next_state_value: E_pi Q(x'_t, .) at the true successor; for entropy-regularised values E_pi [Q - alpha log pi].
        trace: c_t of the action at t, from one of the functions below; or one number for all.
        terminated: bool, no bootstrap; an episode that terminated is also done.
        done: bool, terminated or truncated: the trace is cut.
        gamma: discount, a number or a tensor that broadcasts to ``[T, *B]``.
        valid: bool; False where the successor is unknown: TD error 0, trace cut, target the step's own value.

    Returns:
        G, in the dtype of ``q_value``; no gradient flows. Half precision is computed in float32. Products of traces
        that overflow saturate at the largest finite number of that precision: never NaN.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Munos et al. 2016, arXiv 1606.02647, equation 3.
    """
    floats = {"q_value": q_value, "reward": reward, "next_state_value": next_state_value}
    if isinstance(trace, Tensor):
        floats["trace"] = trace
    else:
        check_numbers(trace=trace)
    check(floats, {"terminated": terminated, "done": done, "valid": valid})
    number, discounts = discount(gamma, q_value)
    if number is not None and fused.usable(*floats.values(), terminated, done, valid):
        target = fused.q_return(reward, q_value, next_state_value, trace, terminated, done, valid, number)
        return narrowed(target, q_value.dtype)
    coefficient, traces = (None, trace) if isinstance(trace, Tensor) else (float(trace), None)
    rows = (q_value, reward, next_state_value, traces, terminated, done, valid, discounts)
    step = functools.partial(_q_rows, gamma=number, trace=coefficient)
    return backwards(step, rows, 1, q_value.dtype)[0]


def _q_rows(
    rows: Rows, carry: tuple[Tensor, ...] | None, *, gamma: float | None, trace: float | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    q_value, reward, next_value, traces, terminated, done, valid, discounts = rows
    dtype = computing_dtype(q_value)
    if q_value.dtype != dtype:
        q_value, reward, next_value = q_value.to(dtype), reward.to(dtype), next_value.to(dtype)
        traces = None if traces is None else traces.to(dtype)
        discounts = None if discounts is None else discounts.to(dtype)
    done = done | terminated
    # whatever stands behind the end of an MDP is not a value
    delta = bootstrapped(reward, gamma, discounts, torch.where(terminated, 0, next_value)) - q_value
    if valid is not None:
        done = done | ~valid
        delta = torch.where(valid, delta, 0)
        traces = None if traces is None else torch.where(valid, traces, 0)
    last = None if carry is None else carry[0]
    if traces is None:
        assert trace is not None
        decay = onward(done, gamma, discounts, dtype, trace)
        error = linear_recurrence(delta, decay, last, bounded=abs(trace) <= 1)
        return (q_value + error,), (error[:1],)
    following = torch.cat([traces[1:], torch.zeros_like(traces[:1]) if carry is None else carry[1]])
    decay = torch.where(done, 0, following * (discounts if gamma is None else gamma))
    error = linear_recurrence(delta, decay, last, bounded=False)
    return (q_value + error,), (error[:1], traces[:1])


TraceName = Literal["retrace", "importance_sampling", "tree_backup", "q_lambda"]


def make_trace(
    name: TraceName, *, log_rho: Tensor | None, log_pi: Tensor | None, lmbda: float = 1.0, action_dim: int = 1
) -> Tensor | float:
    """The trace coefficients of the estimator ``name``; what it does not need may be None.

    Raises:
        ValueError: on an unknown name, or log-probabilities that are needed and missing.
    """
    if name == "q_lambda":
        return lmbda
    if name == "tree_backup":
        if log_pi is None:
            raise ValueError("tree_backup needs log_pi")
        return tree_backup_trace(log_pi=log_pi, lmbda=lmbda)
    if name not in ("retrace", "importance_sampling"):
        raise ValueError(f"name must be one of {get_args(TraceName)}, got {name!r}")
    if log_rho is None:
        raise ValueError(f"{name} needs log_rho")
    if name == "retrace":
        return retrace_trace(log_rho=log_rho, lmbda=lmbda, action_dim=action_dim)
    return importance_trace(log_rho=log_rho, lmbda=lmbda)


@torch.no_grad()
def retrace_trace(*, log_rho: Tensor, lmbda: float = 1.0, action_dim: int = 1) -> Tensor:
    """Retrace's c = lmbda min(1, rho^(1/d)), in the shape of ``log_rho``.

    Args:
        log_rho: log pi(a|x) - log mu(a|x), joint over the dimensions of an action.
        lmbda: trace decay in [0, 1].
        action_dim: d. 1 is Retrace. More is ACER's root for continuous actions, whose joint ratios are tiny; c may then
            be above rho, and the contraction theorem no longer covers it.

    Source: Munos et al. 2016, arXiv 1606.02647; Wang et al. 2017, arXiv 1611.01224 for the root.
    """
    check_numbers(lmbda=lmbda)
    check_float("log_rho", log_rho)
    if action_dim < 1:
        raise ValueError(f"action_dim must be at least 1, got {action_dim}")
    return lmbda * (log_rho.clamp(max=0) / action_dim).exp()


@torch.no_grad()
def importance_trace(*, log_rho: Tensor, lmbda: float = 1.0) -> Tensor:
    """Per-decision importance sampling, c = lmbda rho: unbiased, its variance has no bound.

    Saturates at exp(88) in float32, exp(700) in float64, exp(11) in float16.

    Source: Precup, Sutton and Singh 2000.
    """
    check_numbers(lmbda=lmbda)
    check_float("log_rho", log_rho)
    return lmbda * ratio(log_rho)


@torch.no_grad()
def q_lambda_trace(*, log_rho: Tensor, lmbda: float) -> Tensor:
    """Q(lambda), c = lmbda whatever the policies do; with 1 it is ACER's Q^opc.

    Converges only where the policies are close: lmbda below (1 - gamma) / (gamma eps), eps the largest L1 distance.

    Source: Harutyunyan et al. 2016, arXiv 1602.04951.
    """
    check_numbers(lmbda=lmbda)
    check_float("log_rho", log_rho)
    return torch.full_like(log_rho, lmbda)


@torch.no_grad()
def tree_backup_trace(*, log_pi: Tensor, lmbda: float = 1.0) -> Tensor:
    """Tree backup, c = lmbda pi(a|x): needs no behaviour policy, and cuts traces even on-policy.

    Args:
        log_pi: log-probability of a discrete action. A density is no probability, and c may not exceed 1.
        lmbda: trace decay in [0, 1].

    Source: Precup, Sutton and Singh 2000.
    """
    check_numbers(lmbda=lmbda)
    check_float("log_pi", log_pi)
    return lmbda * log_pi.exp()
