"""Checkpoints: whole files or none, of finite weights, and beside them what the data module has to save."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from offtrace.agents.agent import Agent, TrainingDivergedError
from offtrace.agents.data.acting import ActingData, PlainData
from offtrace.agents.runs.checkpoint import CheckpointError, read_checkpoint
from offtrace.modules.replay import DamagedReplay


class Checkpoints(pl.Callback):
    """``last.ckpt`` every so many frames, at the end and when anything stops the run; ``best.ckpt`` after a best score.

    The ``last.ckpt`` before it, of fewer frames, is kept as ``previous.ckpt``, and so is the replay that belongs to it.
    Files appear whole or not at all, and never hold weights that are not finite. Rank 0 writes. Where each rank has a
    replay to save they agree on whether all could; else nobody waits for anybody, so that a failure on one rank cannot
    hang the others.

    Args:
        folder: where the files go.
        every: environment frames between two writings of ``last.ckpt``.
        resumed: the checkpoint from which the run goes on. A ``last.ckpt`` that lies there and is another one is
            damaged, and not kept.
    """

    def __init__(self, folder: Path, every: int, resumed: Path | None = None) -> None:
        self.folder = folder
        self.every = every
        self.resumed = resumed
        self._kept: int | None = None  # frames of the last.ckpt that lies there
        self._next = every
        self._began = self._final = False
        self._best_before = float("-inf")

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Sets the next checkpoint behind the frames already trained."""
        self._began = True
        self._kept = agent.frames if self.resumed == self.folder / "last.ckpt" else None
        self._next = (agent.frames // self.every + 1) * self.every
        if self.resumed is not None:  # the run may have found better weights than it has gone on from
            self._best_before = _score_of(self.folder / "best.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes ``last.ckpt`` when it is time."""
        if agent.frames >= self._next:
            self._next = (agent.frames // self.every + 1) * self.every
            self.save(trainer, agent, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Writes the final ``last.ckpt``, ahead of a last evaluation, which may take long."""
        self._final = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if self._final:
            self.save(trainer, agent, "last.ckpt")

    def on_train_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Writes it again, with that evaluation's score; and the data where it was not known to be the last epoch."""
        self.save(trainer, agent, "last.ckpt", data=not self._final)

    def on_exception(self, trainer: pl.Trainer, agent: Agent, exception: BaseException) -> None:
        """Keeps what was learned, whatever ended the run.

        One of several ranks alone cannot save their replays: the checkpoint names those that all of them wrote last.
        """
        if agent.updates and self._began:  # before that, what was read is not all in place
            with contextlib.suppress(TrainingDivergedError):  # nothing may keep the checkpoint from being written
                agent.check_guard()
            alone, saved = trainer.world_size == 1, agent.data.saved
            if agent.data.saves and not alone:
                warnings.warn(
                    f"last.ckpt names the replays that all learners wrote last, {saved or 'none'}: one of them alone "
                    "cannot save the others'",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.save(trainer, agent, "last.ckpt", data=alone)

    def on_score(self, trainer: pl.Trainer, agent: Agent, score: float, *, best: float) -> None:
        """Writes ``best.ckpt`` when ``score`` is the best, that of a ``best.ckpt`` before a resume included."""
        if score >= max(best, self._best_before):
            self.save(trainer, agent, "best.ckpt")

    def save(self, trainer: pl.Trainer, agent: Agent, name: str, *, data: bool = True) -> None:
        """Writes one file, through a temporary one beside it; with ``last.ckpt`` the ``data``, such as a replay."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in agent.parameters()):
            return
        try:
            agent.settle()
        except (DamagedReplay, ValueError) as error:  # the replay is not saved then, but what was learnt is
            warnings.warn(f"the last priorities did not get into the replay: {error}", RuntimeWarning, stacklevel=2)
        saved = data and name == "last.ckpt" and agent.data.saves and self._save_data(trainer, agent.data)
        if trainer.is_global_zero:
            # without a replay of its own it is no other than the one that is there, whose replay it names
            self._write(trainer, name, agent.frames, rotate=saved or not agent.data.saves)
        if saved:
            agent.data.prune(trainer.global_rank)

    def _save_data(self, trainer: pl.Trainer, data: ActingData | PlainData) -> bool:
        """Whether it was written; of several ranks, by all of them."""
        name = None
        try:
            name = data.save(trainer.global_rank)
        except (OSError, DamagedReplay) as error:
            warnings.warn(f"the replay was not saved: {error}", RuntimeWarning, stacklevel=2)
        if not trainer.strategy.reduce_boolean_decision(name is not None, all=True):
            return False
        data.saved = name
        return True

    def _write(self, trainer: pl.Trainer, name: str, frames: int, *, rotate: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        # Trainer.save_checkpoint would wait for all ranks, which a failing rank never reaches.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            torch.save(checkpoint, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if name == "last.ckpt":
            if rotate and self._kept not in (None, frames):
                (self.folder / name).replace(self.folder / "previous.ckpt")
            self._kept = frames
        temporary.replace(self.folder / name)


def _score_of(best: Path) -> float:
    """The score of the weights in ``best.ckpt``; minus infinity where there is none that can be read."""
    try:
        scores = read_checkpoint(best)["callbacks"]["Evaluation"]["scores"]
    except (CheckpointError, KeyError):
        return float("-inf")
    return float(scores[-1][1]) if scores else float("-inf")
