"""New weights for the actors, and how old their data is."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from tensordict import TensorDict

from offtrace.agents.agent import Agent
from offtrace.agents.data.acting import ActingData


class WeightSync(pl.Callback):
    """Gives the actors the learner's weights, and measures how old the data is.

    Args:
        every: updates between two pushes.
        lag: forced age in updates: what is pushed are the weights of at least ``lag`` updates ago. 0 pushes the newest.
            A study tool: with 0 the lag is what the pipeline makes it.

    Attributes:
        lag_mean, lag_max: age in updates of the behaviour weights of what is newest in the last batch, counted from the
            update the weights were copied at to the update that trains on them.
    """

    def __init__(self, every: int = 1, lag: int = 0) -> None:
        if every < 1 or lag < 0:
            raise ValueError(f"every must be at least 1 and lag at least 0, got {every} and {lag}")
        self.every = every
        self.lag = lag
        self.lag_mean = 0.0
        self.lag_max = 0
        self._old: deque[tuple[int, TensorDict]] = deque()
        self._copied_at: list[int] = []
        self._pushes = 0
        self._start = 0
        self._first_version = 0

    def setup(self, trainer: pl.Trainer, agent: Agent, stage: str) -> None:
        """Takes the trainer's data module.

        Raises:
            ValueError: it is none that owns actors.
        """
        data = trainer.datamodule
        if not isinstance(data, ActingData):
            raise ValueError(
                f"WeightSync gives weights to actors, and the trainer's data, {type(data).__name__}, has none; leave "
                "WeightSync out of the callbacks"
            )
        self._data = data

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Notes that the collector starts with the learner's present weights."""
        self._copied_at = [agent.updates]
        self._start = agent.updates  # a resumed run begins a rollout, wherever in one it was stopped
        self._pushes = 0
        assert self._data.collector is not None
        self._first_version = self._data.collector.version
        self._old.clear()
        self._remember(agent)

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Agent, batch: Any, batch_idx: int) -> None:
        """Takes the versions of the batch, which the host has: on a device they would be waited for."""
        versions, steps = self._data.behaviour_versions.long().unique(return_counts=True)
        copied = torch.tensor([self._copied_at[version - self._first_version] for version in versions.tolist()])
        self.lag_mean = agent.updates - float((copied * steps).sum() / steps.sum())
        self.lag_max = agent.updates - int(copied.min())

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pushes, every ``every`` updates."""
        self._remember(agent)
        pushes = (agent.updates - self._start) // self.every
        if pushes == self._pushes:
            return
        self._pushes = pushes
        updates, weights = (agent.updates, agent.policy_weights()) if not self.lag else self._old[0]
        self._copied_at.append(updates)
        assert self._data.collector is not None
        self._data.collector.update_policy(weights)

    def _remember(self, agent: Agent) -> None:
        if not self.lag:
            return
        self._old.append((agent.updates, agent.policy_weights().clone()))
        while len(self._old) > 1 and self._old[1][0] <= agent.updates - self.lag:
            self._old.popleft()
