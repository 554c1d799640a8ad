"""Takes updates back on the device after a gradient that was not finite, so that the host need not look."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Guard:
    """Undoes every update from the first gradient that is not finite until :meth:`forget`.

    It copies all that an update changes, before each: weights, buffers (target networks and running statistics are
    such) and the optimiser's state. To mask the step alone would save the copy, but needs a kernel for each optimiser
    and leaves targets and statistics moving. A few large kernels copy all tensors of a dtype at once. Updates with
    finite gradients have the same bits as without the guard.

    Args:
        loss: holds the weights and buffers.
        optimizer: after its first step, so that all of its state is there.

    Attributes:
        norm: of the last gradient, or of the first that was not finite; a scalar of the device.
    """

    def __init__(self, loss: nn.Module, optimizer: Optimizer) -> None:
        device = next(loss.parameters()).device
        state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        # tied weights are there twice
        found = {id(x): x.detach() for x in (*loss.parameters(), *loss.buffers(), *state)}
        self._kept: dict[torch.dtype, list[Tensor]] = {}
        for tensor in found.values():
            if tensor.device == device:
                self._kept.setdefault(tensor.dtype, []).append(tensor)
        # where Adam is neither fused nor captured its step counts lie on the host
        self._host_steps = [x for x in state if x.device != device and not x.ndim]
        self._before: list[Tensor] = []
        self._undone = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)

    def remember(self) -> None:
        """Copies everything, before an update."""
        self._before = [_flat(tensors) for tensors in self._kept.values()]

    def note(self, norm: Tensor) -> None:
        """Takes the norm of the update's gradient."""
        self.norm.copy_(torch.where(self.norm.isfinite(), norm.detach(), self.norm))

    def restore(self) -> None:
        """Undoes the update if :attr:`norm` is not finite; called after it."""
        good = self.norm.isfinite()
        self._undone += ~good
        for tensors, before in zip(self._kept.values(), self._before, strict=True):
            _write(tensors, torch.where(good, _flat(tensors), before))

    def undo(self) -> None:
        """Undoes an update that was broken off before :meth:`restore`."""
        for tensors, before in zip(self._kept.values(), self._before, strict=True):
            _write(tensors, before)

    def forget(self) -> int:
        """How many updates were undone; from now on updates move the weights again. Waits for the device."""
        undone = int(self._undone)
        self._undone.zero_()
        self.norm.zero_()
        for step in self._host_steps:
            step -= undone
        return undone


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _write(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [x.view(y.shape) for x, y in zip(parts, tensors, strict=True)])
