"""What the data modules share: the actors they own, and the games these play."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDictBase
from torch import nn

from offtrace.agents.config_base import Config
from offtrace.modules.collectors import RolloutCollector, make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.keys import EPISODE_END, EPISODE_REWARD, NEXT, VALID


class GameMeter:
    """Whole games that ended in the rollouts.

    Attributes:
        episodes: how many.
        returns: raw returns of the last 100.
        dropped: episodes that a failing simulator ended; they are not among the others.
    """

    def __init__(self) -> None:
        self.episodes = 0
        self.returns: deque[float] = deque(maxlen=100)
        self.dropped = 0

    def note(self, rollout: TensorDictBase) -> None:
        """Adds the games that ended in a rollout, where the environment tells of games."""
        valid = rollout.get(VALID, None)
        if valid is not None:  # each step that is no data ends an episode
            self.dropped += int((~valid).sum())
        ends = rollout.get((NEXT, EPISODE_END), None)
        if ends is None:
            return
        returns = rollout[NEXT, EPISODE_REWARD][ends].tolist()
        self.episodes += len(returns)
        self.returns.extend(returns)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"episodes": self.episodes, "returns": list(self.returns), "dropped": self.dropped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.episodes, self.dropped = int(state_dict["episodes"]), int(state_dict["dropped"])
        self.returns.extend(state_dict["returns"])


def place(data: LightningDataModule) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device of the learner that ``data`` belongs to."""
    if data.trainer is None:
        return 0, 1, torch.device("cpu")
    return data.trainer.global_rank, data.trainer.world_size, data.trainer.strategy.root_device


class ActingData(LightningDataModule):
    """A data module that owns a collector while training runs.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.

    Attributes:
        frames: environment frames taken so far, over all ranks.
        collector: the collector while training runs, else None.
        games: those that ended in this rank's rollouts, since training began.
    """

    def __init__(self, collector_fn: Callable[[int, int], RolloutCollector]) -> None:
        super().__init__()
        self.collector_fn = collector_fn
        self.collector: RolloutCollector | None = None
        self.frames = 0
        self.games = GameMeter()
        self._version = 0

    def state_dict(self) -> dict[str, Any]:
        """Counters, equal on all ranks, and the games of the rank that writes."""
        version = self._version if self.collector is None else self.collector.version
        return {"frames": self.frames, "version": version, "games": self.games.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.frames, self._version = int(state_dict["frames"]), int(state_dict["version"])
        self.games.load_state_dict(state_dict["games"])
        if self.collector is not None:
            self.collector.version = self._version

    def teardown(self, stage: str) -> None:
        """End the actors."""
        self.shutdown()

    def on_exception(self, exception: BaseException) -> None:
        """End the actors; else the interpreter would wait for them at its exit."""
        self.shutdown()

    def shutdown(self) -> None:
        """End the actors, if any run."""
        if self.collector is not None:
            collector, self.collector = self.collector, None
            self._version = collector.version
            collector.shutdown()


def rollout_collector(config: Config, policy: nn.Module, rank: int, frames: int) -> RolloutCollector:
    """The collector of ``rank`` for a run of ``config`` that begins or goes on at ``frames``."""
    env_fn = partial(make_env, config.task, config.env.num_envs, **config.env_options())
    return make_collector(
        env_fn,
        policy,
        frames_per_batch=config.env.num_envs * config.collector.unroll,
        num_workers=config.collector.num_workers,
        seed=config.train.seed,
        start=frames,
        rank=rank,
        step_timeout=config.collector.step_timeout,
        threads_per_worker=config.collector.threads,
        device=config.collector.device,
    )
