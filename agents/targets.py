"""How target networks follow: called with the number of updates, after each."""

from __future__ import annotations

from collections.abc import Callable

from torchrl.objectives.common import LossModule

from offtrace.modules.losses.updates import FastHardUpdate, FastSoftUpdate


def soft_update(loss: LossModule, tau: float) -> Callable[[int], None]:
    """target <- (1 - tau) target + tau source, after every update."""
    updater = FastSoftUpdate(loss, tau=tau)
    return lambda updates: updater.step()


def hard_update(loss: LossModule, every: int) -> Callable[[int], None]:
    """Copies whole, after every ``every``-th update since the very beginning, resumed or not."""
    updater = FastHardUpdate(loss)

    def update(updates: int) -> None:
        if updates % every == 0:
            updater.step()

    return update
