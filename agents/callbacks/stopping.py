"""How a run ends before its time."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from offtrace.agents.agent import Agent


class GracefulStop(pl.Callback):
    """Ends a run at the next update after Ctrl-C or SIGTERM; at once while it starts, and if the update does not come.

    A signal that comes when the last update is done waits for what is left to do: the last evaluation, the end of the
    actors. ``with stop:`` around ``trainer.fit`` and what has to follow it keeps the signals until the block ends;
    without, the callback holds them for as long as the fit takes.

    Args:
        held: until :meth:`setup` a signal is nothing: the process group does not stand yet, and the first learner waits
            for this one where it hears none. It then ends both.

    Attributes:
        signal: the signal's number, 0 while none came.
    """

    patience_s = 8.0

    def __init__(self, held: bool = False) -> None:
        self.signal = 0
        self._held = held
        self._training = self._finished = False
        self._kept = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        # before the fit: Lightning would make exit code 1 of a Ctrl-C that comes ahead of setup
        self._listen()
        self._kept = True
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def setup(self, trainer: pl.Trainer, agent: Agent, stage: str) -> None:
        """Takes the signals over before the actors start."""
        self._held = False
        self._listen()
        if self._before:
            # Lightning would put its own handler in front: it loses the exit code, and waits for the other ranks
            trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """From now on an update is worth waiting for."""
        self._training = True

    def on_train_epoch_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Updates are to come."""
        self._finished = False

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops the loop when a signal came, on all ranks or on none; then it came to all of them."""
        if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
            trainer.should_stop = True
            self._finish()
            came = trainer.strategy.all_gather(torch.tensor(self.signal, device=trainer.strategy.root_device))
            self.signal = self.signal or int(came.max())

    def on_train_epoch_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """No update is to come: what is left to do has the time that it takes."""
        self._finish()

    def on_exception(self, trainer: pl.Trainer, agent: Agent, exception: BaseException) -> None:
        """Gives the signals back."""
        if not self._kept:
            self._restore()

    def teardown(self, trainer: pl.Trainer, agent: Agent, stage: str) -> None:
        """Gives the signals back, after the data module has ended its actors."""
        if not self._kept:
            self._restore()

    def _finish(self) -> None:
        self._finished = True
        if self.signal:  # else the alarm is nobody's, or another's
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _listen(self) -> None:
        if not self._before and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            return
        again = bool(self.signal)
        self.signal = number
        if again or not self._training:
            raise KeyboardInterrupt
        if self._finished:
            return
        self._before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._expire))
        signal.setitimer(signal.ITIMER_REAL, self.patience_s)

    def _expire(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
