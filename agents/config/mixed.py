"""What the configurations of algorithms on fresh rollouts and replayed ones share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config.base import Checks, ConfigError, Group
from offtrace.agents.config.estimator import Samples
from offtrace.agents.config.off_policy import check_recurrent, check_sizes
from offtrace.agents.config.replay import check_place
from offtrace.agents.config.rollouts import RolloutConfig
from offtrace.modules.replay.limiter import rows_of_share


@dataclass
class MixedReplayConfig(Group):
    """The replay of older rollouts, what both of its forms have."""

    capacity: int = 800_000
    """Steps it holds."""
    min_size: int = 10_000
    """Steps collected before the first replayed row."""
    storage: Literal["tensor", "memmap"] = "tensor"
    """In memory, or in files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """In whose memory: the machine's, or that of the learner's GPU."""

    # sequences are learnt from at every step, and as the fresh rollouts they weight all steps of an episode alike
    overlap = False

    # a group of an algorithm that has recurrent networks makes fields of them
    burn_in = 0
    whole_episodes = False

    @property
    def form(self) -> dict[str, float]:
        """How much is replayed, as an argument of :class:`offtrace.agents.data.MixedData`; empty for nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define form")

    @property
    def prioritized(self) -> bool:
        """False: every sequence is sampled alike."""
        return False

    def rows(self, fresh: int) -> int:
        """Sequences sampled at a time, where a fresh batch has so many rows."""
        return fresh

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(0, "min_size")
        checks.at_least(1, "capacity")
        if self.capacity < self.min_size:
            raise ConfigError(f"{at}.capacity is {self.capacity}; it must hold {at}.min_size, {self.min_size}")
        check_place(at, self.storage, self.device)


@dataclass
class RatioReplayConfig(MixedReplayConfig):
    """The replay of older rollouts."""

    ratio: float = 4.0
    """Replayed batches behind each fresh one, on average (Poisson); 0: none are stored."""
    sequences: int | None = None
    """In a replayed batch; null: as many as a fresh one has."""

    @property
    def form(self) -> dict[str, float]:
        """As :attr:`MixedReplayConfig.form`."""
        return {"ratio": self.ratio} if self.ratio else {}

    def rows(self, fresh: int) -> int:
        """As :meth:`MixedReplayConfig.rows`."""
        return self.sequences or fresh

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(0, "ratio")
        checks.require("sequences", lambda value: value is None or value >= 1, "at least 1, or null")
        super().check(at)


@dataclass
class ShareReplayConfig(MixedReplayConfig):
    """The replay of older rollouts."""

    share: float = 0.0
    """Replayed part of every batch, behind its fresh rows; 0: none are stored."""
    burn_in: int = 0
    """Recurrent networks only: steps in front of a replayed sequence that the network is run over, from the stored
    state, to renew the state (R2D2); 0: the stored state."""
    whole_episodes: bool = False
    """Recurrent networks only: replayed rows go through whole episodes from their start, a sequence in each batch, and
    the state is computed anew (LASER)."""

    @property
    def form(self) -> dict[str, float]:
        """As :attr:`MixedReplayConfig.form`."""
        return {"share": self.share} if self.share else {}

    def rows(self, fresh: int) -> int:
        """As :meth:`MixedReplayConfig.rows`.

        Raises:
            ConfigError: ``share`` is no whole number of rows.
        """
        try:
            return rows_of_share(fresh, self.share)
        except ValueError as error:
            raise ConfigError(f"replay.{error}") from error

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.require("share", lambda value: 0 <= value < 1, "at least 0 and below 1")
        checks.at_least(0, "burn_in")
        super().check(at)


@dataclass
class MixedConfig(RolloutConfig):
    """An algorithm that learns from every rollout when it is fresh, and again from a replay."""

    if TYPE_CHECKING:

        @property
        def replay(self) -> Any:
            """The replay: one of the two forms of :class:`MixedReplayConfig`."""

    @property
    def devices_may_change(self) -> bool:
        """As :attr:`Config.devices_may_change`: each learner has a replay of its own, where there is one."""
        return not self.replay.form

    @property
    def samples(self) -> Samples:
        """A replayed sequence is as long as a rollout."""
        return Samples(self.collector.unroll, True)

    @property
    def sequences_per_batch(self) -> int:
        """Those sampled at a time: as many as a fresh batch has environments, or the share of its batch."""
        found: int = self.replay.rows(self.env.num_envs * self.rollouts_per_batch // self.train.minibatches)
        return found

    def validate(self) -> None:
        """As :meth:`Config.validate`; replay and budget fit the rollouts."""
        super().validate()
        check_recurrent(self)  # with nothing to replay too
        if not self.replay.form:
            return
        unroll = self.collector.unroll
        if unroll < 2:
            raise ConfigError(f"collector.unroll is {unroll}; a replay holds sequences as long: it must be at least 2")
        check_sizes(self)
        steps = self.train.total_frames // (self.env.frame_skip * self.train.learners)
        if steps <= self.replay.min_size:
            raise ConfigError(
                f"replay.min_size is {self.replay.min_size}; train.total_frames, {self.train.total_frames}, are "
                f"{steps} steps of each learner's actors, and nothing would be replayed: it must be below that"
            )
