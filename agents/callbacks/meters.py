"""Meters: speed, returns, lag and the loss's diagnostics, on the screen and in the logs."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from offtrace.agents.agent import Agent
from offtrace.agents.callbacks.evaluation import Evaluation
from offtrace.agents.callbacks.weights import WeightSync


class _Mark(NamedTuple):
    """A moment, in seconds of training, and what was done up to it."""

    at: float
    frames: int
    updates: int


class Meters(pl.Callback):
    """Logs every so many seconds, and shows one line.

    It tells frames, frames/s, updates/s; ``return``, the mean of the last hundred episodes of training; ``score``, that
    of the last evaluation; ``lag``, the mean age in updates of the weights that acted in what is learnt from. On a
    terminal the line is a progress bar; elsewhere it is printed as it is logged. Only rank 0 shows and logs. Seconds of
    training (``train/seconds``, those of the parts before a resumed one included), and frames and updates per second,
    leave out the time spent in evaluations. Episodes that a failing simulator ended are counted in
    both (``train/dropped_episodes``), once there are any; so are actors that took the place of one that failed
    (``collector/restarts``).

    Args:
        total_frames: the end of the bar.
        every_s: seconds of training between two log entries.
        console: where the line goes; standard error by default.
    """

    def __init__(self, total_frames: int, every_s: float = 10.0, console: Console | None = None) -> None:
        self.total_frames = total_frames
        self.every_s = every_s
        self.console = console or Console(stderr=True, highlight=False)
        self.frames_per_second = 0.0
        self.updates_per_second = 0.0
        self.first_update_at = 0.0
        self._evaluation: Evaluation | None = None
        self._start: _Mark | None = None
        self._seconds_before = 0.0
        self._bar: Progress | None = None
        self._lag_max = 0
        self._lag_sum = 0.0
        self._lag_count = 0

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Starts the clock; says what the run does first."""
        self._evaluation = _find(trainer, Evaluation)
        self._sync = _find(trainer, WeightSync)
        self._start = self._last = self._mark(agent)
        if not trainer.is_global_zero:
            return
        opening = agent.data.opening
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(),
                console=self.console, refresh_per_second=1, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(opening or "starting", total=self.total_frames, completed=agent.frames)
            self._bar.start()
        elif opening:
            self.console.print(opening, soft_wrap=True)

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the lag; logs when it is time."""
        self.first_update_at = self.first_update_at or time.time()
        if self._sync is not None:
            self._lag_max = max(self._lag_max, self._sync.lag_max)
            self._lag_sum += self._sync.lag_mean
            self._lag_count += 1
        if self._clock() - self._last.at >= self.every_s:
            self._log(trainer, agent)

    def on_train_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Logs the rest; the speed becomes that of the whole run."""
        self._log(trainer, agent)
        assert self._start is not None
        self._measure_speed(self._start, agent)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, agent: Agent, exception: BaseException) -> None:
        """Leaves the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def seconds(self) -> float:
        """Of training so far, evaluations left out; those of the parts before a resumed one included."""
        return self._seconds_before + (0.0 if self._start is None else self._clock() - self._start.at)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the clock."""
        self._seconds_before = float(state_dict["seconds"])

    def _clock(self) -> float:
        """Seconds, in which evaluations do not count."""
        return time.perf_counter() - (0.0 if self._evaluation is None else self._evaluation.seconds)

    def _mark(self, agent: Agent) -> _Mark:
        return _Mark(self._clock(), agent.frames, agent.updates)

    def _measure_speed(self, since: _Mark, agent: Agent) -> _Mark:
        now = self._mark(agent)
        seconds = max(now.at - since.at, 1e-9)
        self.frames_per_second = (now.frames - since.frames) / seconds
        self.updates_per_second = (now.updates - since.updates) / seconds
        return now

    def _log(self, trainer: pl.Trainer, agent: Agent) -> None:
        metrics = {f"train/{name}": value for name, value in agent.pop_metrics().items()}
        if not metrics:
            return
        self._last = self._measure_speed(self._last, agent)
        if not trainer.is_global_zero:
            return
        episodes = agent.data.episodes
        metrics["train/frames_per_second"] = self.frames_per_second
        metrics["train/updates_per_second"] = self.updates_per_second
        metrics["train/seconds"] = self.seconds
        metrics["train/updates"] = float(agent.updates)
        metrics["train/learning_rate"] = float(agent.trainer.optimizers[0].param_groups[0]["lr"])
        if episodes.returns:
            metrics["train/return"] = sum(episodes.returns) / len(episodes.returns)
            metrics["train/episodes"] = float(episodes.count)
        if episodes.dropped:
            metrics["train/dropped_episodes"] = float(episodes.dropped)
        if agent.data.restarts:
            metrics["collector/restarts"] = float(agent.data.restarts)
        if agent.eager_updates:
            metrics["train/eager_updates"] = float(agent.eager_updates)
        metrics |= agent.data.metrics
        if self._lag_count:
            metrics["train/lag"] = self._lag_sum / self._lag_count
            metrics["train/lag_max"] = float(self._lag_max)
        self._lag_max, self._lag_sum, self._lag_count = 0, 0.0, 0
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=agent.frames)
        self._show(agent, metrics)

    def _show(self, agent: Agent, metrics: dict[str, float]) -> None:
        parts = [
            f"{agent.frames:,} of {self.total_frames:,} frames",
            f"{self.frames_per_second:,.0f}/s",
            f"{self.updates_per_second:,.0f} updates/s",
        ]
        if "train/return" in metrics:
            parts.append(f"return {metrics['train/return']:.1f}")
        if self._evaluation is not None and self._evaluation.scores:
            parts.append(f"score {self._evaluation.scores[-1][1]:.1f}")
        if "train/lag" in metrics:
            parts.append(f"lag {metrics['train/lag']:.1f}")
        if "train/dropped_episodes" in metrics:
            parts.append(f"{metrics['train/dropped_episodes']:.0f} episodes dropped")
        if agent.data.restarts:
            parts.append(f"restarts {agent.data.restarts}")
        line = " · ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=agent.frames, description=line)
        else:
            self.console.print(line, soft_wrap=True)


def _find(trainer: pl.Trainer, kind: type) -> Any:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
