"""What the configurations of algorithms on replayed data share, and their checks across groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offtrace.agents.config.base import Config, ConfigError, count
from offtrace.agents.config.estimator import Samples, samples_of
from offtrace.modules.replay.limiter import SamplesPerInsert

if TYPE_CHECKING:
    from offtrace.agents.config.mixed import MixedConfig
    from offtrace.agents.config.replay import ReplayConfig
    from offtrace.agents.config.train import ReplayTrainConfig

MOST_UPDATES = 100
"""For a collected step. What needs more would learn by heart what it has."""


@dataclass
class OffPolicyConfig(Config):
    """An algorithm that learns from a replay of all it has seen."""

    rescale_actions = True
    values = "action"

    if TYPE_CHECKING:

        @property
        def replay(self) -> ReplayConfig:
            """The replay."""

        @property
        def train(self) -> ReplayTrainConfig:
            """The run."""

    @property
    def devices_may_change(self) -> bool:
        """False: each learner has a replay of its own."""
        return False

    @property
    def samples(self) -> Samples:
        """What the loss's estimator is given."""
        return samples_of(self.loss.estimator, self.replay.length)

    @property
    def sequences_per_batch(self) -> int:
        """A sequence is learnt from at every step, an n-step window at its first."""
        return self.replay.batch_size // (self.samples.length if self.samples.every_step else 1)

    def validate(self) -> None:
        """As :meth:`Config.validate`; replay, collector and budget fit each other."""
        super().validate()
        _check_sequences(self)
        check_recurrent(self)
        check_sizes(self)
        _check_updates(self)
        check_budget(self, self.env.frame_skip)


def _check_sequences(config: OffPolicyConfig) -> None:
    replay, estimator, (length, every_step) = config.replay, config.loss.estimator, config.samples
    if length == samples_of(estimator, 2).length == 1:  # of transitions, by its nature
        return
    if length < 2:
        raise ConfigError(
            f"replay.length is {length}; loss.estimator {estimator} needs sequences of 2 steps or more, or must be "
            "one_step"
        )
    if every_step and replay.batch_size % length:
        raise ConfigError(
            f"replay.batch_size is {replay.batch_size}; loss.estimator {estimator} learns from sequences of "
            f"replay.length, {length}, steps: it must be a multiple of that"
        )


def check_recurrent(config: OffPolicyConfig | MixedConfig) -> None:
    """Refuse that a recurrent state is renewed where there is none, or in two ways.

    Raises:
        ConfigError: one sentence.
    """
    burn_in, whole_episodes = config.replay.burn_in, config.replay.whole_episodes
    if not burn_in and not whole_episodes:
        return
    if not config.network.recurrent:
        flag, value = ("whole_episodes", "true") if whole_episodes else ("burn_in", burn_in)
        raise ConfigError(
            f"replay.{flag} is {value}; it renews a recurrent state, and the network has none: it must be "
            f"{'false' if whole_episodes else 0}, or network.recurrent above 0"
        )
    if burn_in and whole_episodes:
        raise ConfigError(
            f"replay.burn_in is {burn_in}; with replay.whole_episodes the state comes from the episode's start: one of "
            "the two must be 0 or false"
        )


def check_sizes(config: OffPolicyConfig | MixedConfig) -> None:
    """Refuse a replay that holds less than a batch when it is first sampled, or less than the rollouts under way.

    Where a recurrent state is renewed, it must also hold the steps in front of a sequence.

    Raises:
        ConfigError: one sentence.
    """
    replay, unroll, length = config.replay, config.collector.unroll, config.samples.length
    rings = config.env.num_envs * max(1, config.collector.num_workers)
    number = config.sequences_per_batch
    if replay.overlap:  # the last steps of every environment begin no sequence yet
        least = number + rings * (length - 1)
    else:  # rollouts are as long, and each of their rows completes one at least: there, or where its episode ended
        least = number * length
    if replay.min_size < least:
        batch = f"{count(number, 'sequence')} of {length} steps" if length > 1 else str(number)
        raise ConfigError(
            f"replay.min_size is {replay.min_size}; for batches of {batch} from {count(rings, 'environment')} it must "
            f"be at least {least}"
        )
    # an ended episode takes one slot more than its steps, and every step of a rollout may end one
    least = rings * (2 * unroll + length)
    if replay.capacity < least:
        raise ConfigError(
            f"replay.capacity is {replay.capacity}; for {count(rings, 'environment')} and a collector.unroll of "
            f"{unroll} it must be at least {least}"
        )
    most = replay.capacity // rings - 2 * unroll - length
    if replay.whole_episodes and length > most:
        raise ConfigError(
            f"replay.capacity is {replay.capacity}; for {count(rings, 'environment')} and replay.whole_episodes, where "
            f"the {length} steps before a sequence are in front of it, it must be at least {least + rings * length}"
        )
    if replay.burn_in > most:
        raise ConfigError(
            f"replay.burn_in is {replay.burn_in}; a replay.capacity of {replay.capacity} for "
            f"{count(rings, 'environment')} leaves room for {most} steps in front of a sequence: it must be no more, "
            "or the capacity larger"
        )


def _check_updates(config: OffPolicyConfig) -> None:
    replay = config.replay
    try:
        limiter = SamplesPerInsert(replay.samples_per_insert, replay.min_size)
        limiter.check(capacity=replay.capacity, batch=replay.batch_size)
    except ValueError as error:
        raise ConfigError(f"replay.samples_per_insert: {error}") from error
    updates = float(limiter.ratio / replay.batch_size)
    if updates > MOST_UPDATES:
        raise ConfigError(
            f"replay.samples_per_insert is {replay.samples_per_insert:g}, {updates:,.0f} updates for each collected "
            f"step; with a replay.batch_size of {replay.batch_size} it must be at most "
            f"{MOST_UPDATES * replay.batch_size}"
        )


def check_budget(config: OffPolicyConfig, frame_skip: int) -> None:
    """Refuse a run that would end before its first update.

    Args:
        config: with a replay.
        frame_skip: environment frames per agent step.

    Raises:
        ConfigError: one sentence.
    """
    replay, unroll, frames = config.replay, config.collector.unroll, config.train.total_frames
    rollout = config.env.num_envs * unroll
    frames_per_rollout = rollout * frame_skip * config.train.learners
    if frames_per_rollout > frames:
        raise ConfigError(
            f"collector.unroll is {unroll}, and a rollout of all environments and learners {frames_per_rollout} "
            f"frames; it must not be more than train.total_frames, {frames}"
        )
    steps = rollout * math.ceil(frames / frames_per_rollout)
    limiter = SamplesPerInsert(replay.samples_per_insert, replay.min_size)
    needed = math.ceil(replay.min_size + replay.batch_size / limiter.ratio)
    if steps < needed:
        raise ConfigError(
            f"train.total_frames is {frames}, {steps} steps of each learner's actors; the first update comes after "
            f"{needed}, by replay.min_size, replay.batch_size and replay.samples_per_insert"
        )
