"""What the configurations of algorithms on fresh rollouts and replayed ones share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from offtrace.agents.config.base import Checks, ConfigError, Group
from offtrace.agents.config.estimator import Samples
from offtrace.agents.config.off_policy import check_sizes
from offtrace.agents.config.rollouts import RolloutConfig


@dataclass
class MixedReplayConfig(Group):
    """The replay of older rollouts."""

    ratio: float = 4.0
    """Replayed batches behind each fresh one, on average (Poisson); 0: none are stored."""
    sequences: int | None = None
    """In a replayed batch; null: as many as a fresh one has."""
    capacity: int = 800_000
    """Steps it holds."""
    min_size: int = 10_000
    """Steps collected before the first replayed batch."""
    storage: Literal["tensor", "memmap"] = "tensor"
    """In memory, or in files."""

    @property
    def prioritized(self) -> bool:
        """False: every sequence is sampled alike."""
        return False

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(0, "ratio", "min_size")
        checks.at_least(1, "capacity")
        checks.require("sequences", lambda value: value is None or value >= 1, "at least 1, or null")
        if self.capacity < self.min_size:
            raise ConfigError(f"{at}.capacity is {self.capacity}; it must hold {at}.min_size, {self.min_size}")


@dataclass
class MixedConfig(RolloutConfig):
    """An algorithm that learns from every rollout when it is fresh, and again from a replay."""

    devices_may_change = False  # each has a replay of its own

    if TYPE_CHECKING:

        @property
        def replay(self) -> MixedReplayConfig:
            """The replay."""

    @property
    def samples(self) -> Samples:
        """A replayed sequence is as long as a rollout."""
        return Samples(self.collector.unroll, True)

    @property
    def sequences_per_batch(self) -> int:
        """By ``replay.sequences``, or as many as a fresh batch has environments."""
        return self.replay.sequences or self.env.num_envs // self.train.minibatches

    def validate(self) -> None:
        """As :meth:`Config.validate`; replay and budget fit the rollouts."""
        super().validate()
        if not self.replay.ratio:
            return
        unroll = self.collector.unroll
        if unroll < 2:
            raise ConfigError(f"collector.unroll is {unroll}; a replay holds sequences as long: it must be at least 2")
        check_sizes(self)
        steps = self.train.total_frames // (self.env.frame_skip * self.train.devices)
        if steps <= self.replay.min_size:
            raise ConfigError(
                f"replay.min_size is {self.replay.min_size}; train.total_frames, {self.train.total_frames}, are "
                f"{steps} steps of each learner's actors, and nothing would be replayed: it must be below that"
            )
