"""Updates that are taken back on the device, where their gradient was not finite, without the host's looking."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Guard:
    """Keeps weights, buffers (target networks are such) and the optimiser's state from a gradient that is not finite.

    From the first such gradient on, every update is taken back, until the host looks at :attr:`norm`. What is kept are
    the same bits as without the guard.

    Args:
        loss: whose parameters and buffers are kept.
        optimizer: whose state is there already.

    Attributes:
        norm: of the last gradient, or of the first that was not finite; a scalar of the device.
    """

    def __init__(self, loss: nn.Module, optimizer: Optimizer) -> None:
        device = next(loss.parameters()).device
        states = list(optimizer.state.values())
        found = [*loss.parameters(), *loss.buffers(), *(x for state in states for x in state.values())]
        self._kept: dict[torch.dtype, list[Tensor]] = {}
        for tensor in {id(x): x.detach() for x in found if isinstance(x, Tensor) and x.device == device}.values():
            self._kept.setdefault(tensor.dtype, []).append(tensor)
        # of an Adam on a GPU the host counts the steps
        steps = [state["step"] for state in states if "step" in state]
        self._host_steps = [step for step in steps if step.device != device]
        self._before: list[Tensor] = []
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)

    def remember(self) -> None:
        """Called before an update."""
        self._before = [_flat(tensors) for tensors in self._kept.values()]

    def note(self, norm: Tensor) -> None:
        """Takes the norm of the update's gradient."""
        self.norm.copy_(torch.where(self.norm.isfinite(), norm.detach(), self.norm))

    def restore(self) -> None:
        """Called behind an update: takes it back, or leaves it, by :attr:`norm`."""
        good = self.norm.isfinite()
        self._skipped += ~good
        for tensors, before in zip(self._kept.values(), self._before, strict=True):
            _write(tensors, torch.where(good, _flat(tensors), before))

    def undo(self) -> None:
        """Takes an update back that was broken off."""
        for tensors, before in zip(self._kept.values(), self._before, strict=True):
            _write(tensors, before)

    def forget_skipped(self) -> int:
        """How many updates were taken back; they are no longer counted as steps of the optimiser."""
        skipped = int(self._skipped)
        self._skipped.zero_()
        for step in self._host_steps:
            step -= skipped
        return skipped


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _write(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [x.view(y.shape) for x, y in zip(parts, tensors, strict=True)])
