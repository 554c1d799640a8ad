"""V-trace and the action-value operator on a GPU: one kernel launch, every input read once.

A program owns a few columns and walks over tiles of rows, the last tile first. Inside a tile the recurrence is an
associative scan, which keeps enough loads in flight to fill the memory bus where a walk row by row would wait for each.
Written in Triton, which comes with the GPU builds of torch; without it, and for what the kernels do not know (a
discount that is a tensor), the plain path is used.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from offtrace.modules.returns.checks import LOG_MAX, computing_dtype, narrowed

kernels: Any
try:
    from offtrace.modules.returns import triton_kernels as kernels
except ImportError:
    kernels = None

ROWS, COLUMNS = 32, 32
"""Of a tile."""


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: on a GPU that Triton knows, in eager mode.

    ``TRITON_INTERPRET=1`` runs them on the CPU, slowly, for tests.
    """
    if kernels is None or torch.compiler.is_compiling():
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all((x.is_cuda or interpreted) and not wrapped(x) and x.numel() > 0 for x in tensors if x is not None)


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    log_rho: Tensor,
    terminated: Tensor,
    done: Tensor,
    valid: Tensor | None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Target and advantage of :func:`offtrace.modules.returns.vtrace`, whose numbers ``options`` are."""
    inputs = [x.contiguous() for x in (value, reward, next_value, log_rho)]
    target, advantage = (torch.empty_like(inputs[0], dtype=computing_dtype(value)) for _ in range(2))
    flags = [terminated.contiguous(), done.contiguous(), done if valid is None else valid.contiguous()]
    bounded = options["leak"] == 1 and options["c_clip"] * options["lmbda"] <= 1 and options["rho_clip"] < math.inf
    _launch(
        kernels.vtrace_kernel, (*inputs, *flags, target, advantage), value, HAS_VALID=valid is not None,
        BOUNDED=bounded, SATURATE=not bounded or options["pg_rho_clip"] == math.inf,
        LOG_MAX=LOG_MAX[computing_dtype(value)], **{name.upper(): number for name, number in options.items()},
    )  # fmt: skip
    return narrowed(target, value.dtype), narrowed(advantage, value.dtype)


def q_return(
    reward: Tensor,
    q_value: Tensor,
    next_state_value: Tensor,
    trace: Tensor | float,
    terminated: Tensor,
    done: Tensor,
    valid: Tensor | None,
    gamma: float,
) -> Tensor:
    """G of :func:`offtrace.modules.returns.q_return`, float32 for half precision."""
    inputs = [x.contiguous() for x in (q_value, reward, next_state_value)]
    traces = trace.contiguous() if isinstance(trace, Tensor) else inputs[0]
    number = None if isinstance(trace, Tensor) else trace
    target = torch.empty_like(inputs[0], dtype=computing_dtype(q_value))
    flags = [terminated.contiguous(), done.contiguous(), done if valid is None else valid.contiguous()]
    _launch(
        kernels.q_kernel, (*inputs, traces, *flags, target), q_value, HAS_VALID=valid is not None, GAMMA=gamma,
        TRACE=number, BOUNDED=number is not None and abs(number) <= 1,
    )  # fmt: skip
    return target


def _launch(kernel: Any, tensors: tuple[Tensor, ...], like: Tensor, **constants: Any) -> None:
    length = like.shape[0]
    width = like.numel() // length
    limit = torch.finfo(computing_dtype(like)).max
    with torch.cuda.device_of(like):  # Triton launches on the current device
        kernel[(math.ceil(width / COLUMNS),)](
            *tensors, length, width, LIMIT=limit, DOUBLE=like.dtype is torch.float64, R=ROWS, C=COLUMNS, **constants
        )
