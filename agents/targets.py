"""How target networks follow: called with the number of updates, after each."""

from __future__ import annotations

from collections.abc import Callable

from torchrl.objectives.common import LossModule

from offtrace.modules.losses.updates import FastHardUpdate, FastSoftUpdate


def soft_update(loss: LossModule, tau: float) -> Callable[[int], None] | None:
    """target <- (1 - tau) target + tau source, after every update; None where ``loss`` has no target networks."""
    if not any(name.startswith("target_") for name in loss._modules):
        return None
    updater = FastSoftUpdate(loss, tau=tau)
    return lambda updates: updater.step()


class HardUpdates:
    """target <- source after every ``every``-th update since the very beginning, resumed or not."""

    def __init__(self, loss: LossModule, every: int) -> None:
        self._updater, self._every = FastHardUpdate(loss), every

    def due(self, updates: int) -> bool:
        """Whether the call after so many updates copies; a captured update must know."""
        return updates % self._every == 0

    def __call__(self, updates: int) -> None:
        """Copies if it is due."""
        if self.due(updates):
            self._updater.step()


def hard_update(loss: LossModule, every: int) -> HardUpdates:
    """The :class:`HardUpdates` of the target networks of ``loss``."""
    return HardUpdates(loss, every)
