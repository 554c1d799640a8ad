"""Returns that correct state values: V-trace and its on-policy relatives."""

from __future__ import annotations

import functools
import math
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offtrace.modules.returns import fused
from offtrace.modules.returns.checks import check, check_numbers, computing_dtype, discount, narrowed, ratio
from offtrace.modules.returns.recurrence import Rows, backwards, linear_recurrence


class VTraceOutput(NamedTuple):
    """``target`` v_s and policy-gradient ``advantage`` A_s, both ``[T, *B]``."""

    target: Tensor
    advantage: Tensor


class GAEOutput(NamedTuple):
    """TD(lambda) ``target`` and ``advantage`` = target - value, both ``[T, *B]``."""

    target: Tensor
    advantage: Tensor


@torch.no_grad()
def vtrace(
    *,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    log_rho: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lmbda: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    pg_rho_clip: float = 1.0,
    leak: float = 1.0,
    valid: Tensor | None = None,
) -> VTraceOutput:
    """V-trace targets and advantages.

    With rho_t = exp(log_rho_t), g_t = gamma (1 - terminated_t), k_t = 1 unless done_t or t = T - 1::

        rho'_t = min(rho_clip, rho_t)    c_t = lmbda min(c_clip, rho_t)    rho''_t = min(pg_rho_clip, rho_t)
        delta_t = rho'_t (r_t + g_t V(x'_t) - V(x_t))
        v_t - V(x_t) = delta_t + gamma k_t c_t (v_{t+1} - V(x_{t+1}))
        B_t = lmbda v_{t+1} + (1 - lmbda) V(x_{t+1})  if k_t  else  V(x'_t)
        A_t = rho''_t (r_t + g_t B_t - V(x_t))

    Args:
        reward: r_t.
        value: V(x_t).
        next_value: V(x'_t) of the true successor: the final observation where an episode ends.
        log_rho: log pi(a_t|x_t) - log mu(a_t|x_t).
        terminated: bool, no bootstrap; an episode that terminated is also done.
        done: bool, terminated or truncated: the trace is cut.
        gamma: discount, a number or a tensor that broadcasts to ``[T, *B]``.
        lmbda: trace decay in [0, 1].
        rho_clip, c_clip, pg_rho_clip: clips, ``inf`` for none; all ``inf`` is plain importance sampling.
        leak: every clipped ratio becomes ``leak min(clip, rho) + (1 - leak) rho`` (Zahavy et al. 2020, 2002.12928).
        valid: bool; False where the successor is unknown: TD error 0, trace cut, target the step's own value,
            advantage 0. What stands there, NaN included, reaches no other step: B_t is V(x'_t) before it.

    Returns:
        :class:`VTraceOutput`, in the dtype of ``value``; no gradient flows. Half precision is computed in float32.
        Where a ratio is not clipped (``inf``, ``leak`` below 1) it saturates at exp(88) in float32, exp(700) in
        float64, and results at the largest finite number of their precision: never NaN.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Espeholt et al. 2018, arXiv 1802.01561; the lambda mixture of B_t as in rlax.
    """
    floats = {"value": value, "reward": reward, "next_value": next_value, "log_rho": log_rho}
    check(floats, {"terminated": terminated, "done": done, "valid": valid})
    check_numbers(lmbda=lmbda, rho_clip=rho_clip, c_clip=c_clip, pg_rho_clip=pg_rho_clip, leak=leak)
    number, discounts = discount(gamma, value)
    options: dict[str, Any] = {
        "lmbda": lmbda,
        "rho_clip": rho_clip,
        "c_clip": c_clip,
        "pg_rho_clip": pg_rho_clip,
        "leak": leak,
    }
    if number is not None and fused.usable(value, reward, next_value, log_rho, terminated, done, valid):
        return VTraceOutput(
            *fused.vtrace(reward, value, next_value, log_rho, terminated, done, valid, gamma=number, **options)
        )
    step = functools.partial(_vtrace_rows, gamma=number, **options)
    rows = (value, reward, next_value, log_rho, terminated, done, valid, discounts)
    target, advantage = backwards(step, rows, 2, value.dtype)
    return VTraceOutput(target, advantage)


def _vtrace_rows(
    rows: Rows,
    carry: tuple[Tensor, ...] | None,
    *,
    gamma: float | None,
    lmbda: float,
    rho_clip: float,
    c_clip: float,
    pg_rho_clip: float,
    leak: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    value, reward, next_value, log_rho, done, valid, discounts = _prepared(rows)
    limits = {rho_clip, c_clip, pg_rho_clip}
    if leak == 1 and limits == {1.0}:  # the usual, in one operation less
        clipped = {1.0: log_rho.clamp(max=0).exp()}
    else:
        rho = ratio(log_rho)
        clipped = {limit: rho.clamp(max=limit) for limit in limits}
        if leak != 1:
            clipped = {limit: leak * cut + (1 - leak) * rho for limit, cut in clipped.items()}
    bounded = leak == 1 and c_clip * lmbda <= 1 and rho_clip < math.inf
    error = bootstrapped(reward, gamma, discounts, next_value) - value
    delta = clipped[rho_clip] * error
    if valid is not None:
        delta = torch.where(valid, delta, 0)
    going = onward(done, gamma, discounts, value.dtype)
    decay = clipped[c_clip] * going
    if lmbda != 1:
        decay = decay * lmbda
    if not bounded:
        delta = saturated(delta)
    correction = linear_recurrence(delta, decay, None if carry is None else carry[0], bounded=bounded)
    target = value + correction
    mixed = target if lmbda == 1 else torch.add(value, correction, alpha=lmbda)
    behind = torch.cat([mixed[1:], next_value[-1:] if carry is None else carry[1]])
    carried: tuple[Tensor, ...] = correction[:1], mixed[:1]
    if valid is not None:  # an unknown step's value may be anything, and 0 times NaN is NaN
        unknown = torch.cat([~valid[1:], torch.ones_like(valid[:1]) if carry is None else carry[2]])
        behind = torch.where(done | unknown, next_value, behind)
        carried = (*carried, ~valid[:1])
    # the mixture in place of V(x') where the trace goes on; cheaper than to select one of the two
    advantage = clipped[pg_rho_clip] * torch.addcmul(error, going, behind - next_value)
    if not bounded or pg_rho_clip == math.inf:
        target, advantage = saturated(target), saturated(advantage)
    if valid is not None:
        advantage = torch.where(valid, advantage, 0)
    return (target, advantage), carried


@torch.no_grad()
def gae(
    *,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lmbda: float,
    valid: Tensor | None = None,
) -> GAEOutput:
    """On-policy TD(lambda) targets and generalised advantages; arguments as of :func:`vtrace`.

    ::

        delta_t = r_t + g_t V(x'_t) - V(x_t)        A_t = delta_t + gamma lmbda k_t A_{t+1}        target = V + A

    Returns:
        :class:`GAEOutput`, in the dtype of ``value``; no gradient flows.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Schulman et al. 2016, arXiv 1506.02438; Sutton 1988 for TD(lambda).
    """
    floats = {"value": value, "reward": reward, "next_value": next_value}
    check(floats, {"terminated": terminated, "done": done, "valid": valid})
    check_numbers(lmbda=lmbda)
    number, discounts = discount(gamma, value)
    if number is not None and fused.usable(value, reward, next_value, terminated, done, valid):
        target = fused.q_return(reward, value, next_value, lmbda, terminated, done, valid, number)
        advantage = target - value
        if valid is not None:
            advantage = torch.where(valid, advantage, 0)
        return GAEOutput(narrowed(target, value.dtype), narrowed(advantage, value.dtype))
    rows = (value, reward, next_value, None, terminated, done, valid, discounts)
    target, advantage = backwards(functools.partial(_gae_rows, gamma=number, lmbda=lmbda), rows, 2, value.dtype)
    return GAEOutput(target, advantage)


def _gae_rows(
    rows: Rows, carry: tuple[Tensor, ...] | None, *, gamma: float | None, lmbda: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    value, reward, next_value, _, done, valid, discounts = _prepared(rows)
    delta = bootstrapped(reward, gamma, discounts, next_value) - value
    if valid is not None:
        delta = torch.where(valid, delta, 0)
    decay = onward(done, gamma, discounts, value.dtype, lmbda)
    advantage = linear_recurrence(delta, decay, None if carry is None else carry[0])
    return (value + advantage, advantage), (advantage[:1],)


@torch.no_grad()
def lambda_return(
    *,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    lmbda: float,
    valid: Tensor | None = None,
) -> Tensor:
    """The target of :func:`gae` alone, ``[T, *B]``: V-trace with every ratio 1."""
    return gae(
        reward=reward, value=value, next_value=next_value, terminated=terminated, done=done, gamma=gamma, lmbda=lmbda,
        valid=valid,
    ).target  # fmt: skip


@torch.no_grad()
def n_step_return(
    *,
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    n: int,
    valid: Tensor | None = None,
) -> Tensor:
    """n-step returns ``[T, *B]``; arguments as of :func:`vtrace`.

    ::

        y_t = sum_{i<m} gamma^i r_{t+i} + gamma^m V(x'_{t+m-1})

    where m is ``n``, or less where the episode, the rollout or the known steps end before; no V behind a termination.
    Computed in ``n`` passes.

    Args:
        n: number of steps, at least 1.
        valid: bool; False where the successor is unknown: the return there is 0, and earlier ones stop before it.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name; on ``n`` below 1.

    Source: Sutton 1988; Watkins 1989.
    """
    check({"reward": reward, "next_value": next_value}, {"terminated": terminated, "done": done, "valid": valid})
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n must be at least 1, and whole, got {n!r}")
    number, discounts = discount(gamma, reward)
    dtype = reward.dtype
    rows = [reward, reward, next_value, None, terminated, done, valid, discounts]
    _, reward, next_value, _, done, _, discounts = _prepared(rows)
    stops = done
    if valid is not None:  # nothing is taken from a step whose successor is unknown
        stops = done | torch.cat([~valid[1:], torch.ones_like(valid[:1])])
    out = bootstrapped(reward, number, discounts, next_value)
    for _ in range(min(n, len(reward)) - 1):
        behind = torch.where(stops, next_value, torch.cat([out[1:], next_value[-1:]]))
        out = bootstrapped(reward, number, discounts, behind)
    if valid is not None:
        out = torch.where(valid, out, 0)
    return narrowed(out, dtype)


def bootstrapped(reward: Tensor, gamma: float | None, discounts: Tensor | None, value: Tensor) -> Tensor:
    """reward + gamma value, with the discount as :func:`discount` gives it."""
    if gamma is not None:
        return torch.add(reward, value, alpha=gamma)
    assert discounts is not None
    return torch.addcmul(reward, discounts, value)


def onward(
    done: Tensor, gamma: float | None, discounts: Tensor | None, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    """factor gamma where the trace goes on, else 0."""
    if gamma is not None:
        if dtype == torch.get_default_dtype():  # what two plain numbers give
            return torch.where(done, 0.0, gamma * factor)
        return torch.where(done, 0.0, torch.full((), gamma * factor, dtype=dtype, device=done.device))
    assert discounts is not None
    return torch.where(done, 0.0, discounts * factor)


def saturated(x: Tensor) -> Tensor:
    """Infinities become the largest finite number, so that none meets a zero."""
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


def _prepared(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computing dtype; 0 where not valid; no successor value behind an end of the MDP; done where nothing follows."""
    value, reward, next_value, log_rho, terminated, done, valid, discounts = rows
    dtype = computing_dtype(value)
    if value.dtype != dtype:
        value, reward, next_value = value.to(dtype), reward.to(dtype), next_value.to(dtype)
        log_rho = None if log_rho is None else log_rho.to(dtype)
        discounts = None if discounts is None else discounts.to(dtype)
    unknown = terminated
    done = done | terminated
    if valid is not None:
        invalid = ~valid
        reward = torch.where(valid, reward, 0)
        log_rho = None if log_rho is None else torch.where(valid, log_rho, 0)
        unknown = terminated | invalid
        done = done | invalid
    # whatever stands behind the end of an MDP is not a value
    next_value = torch.where(unknown, 0, next_value)
    return value, reward, next_value, log_rho, done, valid, discounts
