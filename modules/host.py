"""Which tensors the host may read without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether the host may read the values of ``tensor``: it lies on the CPU, and no compiler traces the call.

    A read of a device waits for all work that was queued there before, and cannot be part of a CUDA graph.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
