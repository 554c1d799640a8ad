"""Off-policy returns as pure functions of tensors, time first ``[T, *B]``.

Every one of them is the linear recurrence ``y_t = b_t + a_t y_{t+1}`` with ``y_T = 0``, written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VTraceOutput(NamedTuple):
    """``target`` v_s and policy-gradient ``advantage`` A_s, both ``[T, *B]``."""

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
        terminated: bool, no bootstrap.
        done: bool, terminated or truncated: the trace is cut.
        gamma: discount, a number or a tensor that broadcasts to ``[T, *B]``.
        lmbda: trace decay in [0, 1].
        rho_clip, c_clip, pg_rho_clip: clips, ``inf`` for none; all ``inf`` is plain importance sampling.
        leak: every clipped ratio becomes ``leak min(clip, rho) + (1 - leak) rho`` (Zahavy et al. 2020, 2002.12928).
        valid: bool; False where the successor is unknown: TD error 0, trace cut, target the step's own value,
            advantage 0. Whatever stands there, NaN included, reaches nothing.

    Returns:
        :class:`VTraceOutput`, in the dtype of ``value``; no gradient flows.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Espeholt et al. 2018, arXiv 1802.01561; the lambda mixture of B_t as in rlax.
    """
    floats = {"reward": reward, "value": value, "next_value": next_value, "log_rho": log_rho}
    _check(floats, {"terminated": terminated, "done": done, "valid": valid})
    reward, value, next_value, log_rho, terminated, done = _masked(
        valid, reward, value, next_value, log_rho, terminated, done
    )
    next_value = next_value.masked_fill(terminated, 0)  # whatever stands behind the end of an MDP is not a value
    # beyond this the exponential overflows, and 0 * inf is NaN where leak is 1
    rho = log_rho.clamp(max=_LOG_MAX[value.dtype]).exp()

    def clipped(limit: float) -> Tensor:
        cut = rho.clamp(max=limit)
        return cut if leak == 1 else leak * cut + (1 - leak) * rho

    going = ~done
    going[-1] = False
    bootstrap = (~terminated).to(value.dtype) * gamma
    decay = going.to(value.dtype) * gamma
    delta = clipped(rho_clip) * (reward + bootstrap * next_value - value)
    if valid is not None:
        delta = delta.masked_fill(~valid, 0)
    correction = _recurrence(delta, decay * lmbda * clipped(c_clip))
    target = value + correction
    following = torch.where(going, next_value, 0)
    following[:-1] = torch.where(going[:-1], value[1:] + lmbda * correction[1:], next_value[:-1])
    following[-1] = next_value[-1]
    advantage = clipped(pg_rho_clip) * (reward + bootstrap * following - value)
    if valid is not None:
        advantage = advantage.masked_fill(~valid, 0)
    return VTraceOutput(target, advantage)


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
    """On-policy TD(lambda) targets ``[T, *B]``: V-trace with every ratio 1; arguments as there.

    ``lambda_return - value`` is the generalised advantage estimate (Schulman et al. 2016, arXiv 1506.02438).
    """
    out = vtrace(
        reward=reward,
        value=value,
        next_value=next_value,
        log_rho=torch.zeros_like(value),
        terminated=terminated,
        done=done,
        gamma=gamma,
        lmbda=lmbda,
        valid=valid,
    )
    return out.target


_LOG_MAX = {torch.float64: 700.0, torch.float32: 88.0, torch.bfloat16: 88.0, torch.float16: 11.0}


def _recurrence(b: Tensor, a: Tensor) -> Tensor:
    """y_t = b_t + a_t y_{t+1}, y_T = 0."""
    out = torch.empty_like(b)
    y = torch.zeros_like(b[0])
    for t in range(len(b) - 1, -1, -1):
        y = torch.addcmul(b[t], a[t], y)
        out[t] = y
    return out


def _masked(valid: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """0 where not valid, and an invalid step cuts the trace."""
    if valid is None:
        return list(tensors)
    *floats, terminated, done = tensors
    value = floats[1]
    cleared = [x.masked_fill(~valid, 0) for x in floats]
    cleared[1] = value
    return [*cleared, terminated, done | ~valid]


def _check(floats: dict[str, Tensor], masks: dict[str, Tensor | None]) -> None:
    value = floats["value"]
    if value.ndim < 1 or not len(value):
        raise ValueError(f"value must be [T, *B] with T at least 1, got {list(value.shape)}")
    for name, tensor in floats.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != value.dtype:
            raise TypeError(f"{name} must have the dtype of value, {value.dtype}, got {tensor.dtype}")
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
    for name, other in {**floats, **masks}.items():
        if other is None:
            continue
        if other.shape != value.shape:
            raise ValueError(f"{name} must have the shape of value, {list(value.shape)}, got {list(other.shape)}")
        if other.device != value.device:
            raise ValueError(f"{name} must be on the device of value, {value.device}, got {other.device}")
