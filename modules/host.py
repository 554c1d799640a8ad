"""Which tensors the host may read without waiting for a device, and how it gets those that it may not."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether the host may read the values of ``tensor``: it lies on the CPU, and no compiler traces the call.

    A read of a device waits for all work that was queued there before, and cannot be part of a CUDA graph.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class Copies:
    """Copies of a device's tensors on their way to the host, with which nobody waits for them.

    Args:
        *tensors: may be overwritten as soon as they are given.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        self._copies = [
            torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
            for x in tensors
        ]
        if any(x.is_cuda for x in tensors):
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[Tensor]:
        """The copies; waits for what the device had to do before it made them, and for nothing later."""
        if self._there is not None:
            self._there.synchronize()
        return self._copies
