"""What the configurations of algorithms on rollouts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offtrace.agents.config.base import Config, ConfigError, count

if TYPE_CHECKING:
    from offtrace.agents.config.optim import AdamConfig
    from offtrace.agents.config.train import WholeRolloutTrainConfig


@dataclass
class RolloutConfig(Config):
    """An algorithm that learns from the rollouts of its own recent policies, and lets them go."""

    if TYPE_CHECKING:

        @property
        def optim(self) -> AdamConfig:
            """The optimiser."""

        @property
        def train(self) -> WholeRolloutTrainConfig:
            """The run."""

    def updates_per_push(self) -> int:
        """``collector.sync_every``, or all updates on a rollout."""
        return self.collector.sync_every or self.train.minibatches * self.train.epochs

    @property
    def rollouts_per_batch(self) -> int:
        """As :attr:`Config.rollouts_per_batch`, by ``train.unrolls``."""
        return max(1, self.train.unrolls // self.env.num_envs)

    def validate(self) -> None:
        """As :meth:`Config.validate`; the actors give what is dealt, and the minibatches divide it."""
        super().validate()
        unrolls, envs, actors = self.train.unrolls, self.env.num_envs, max(1, self.collector.num_workers)
        if unrolls % envs:
            raise ConfigError(
                f"train.unrolls is {unrolls}; an actor gives one of each of its environments: it must be a multiple "
                f"of env.num_envs, {envs}"
            )
        if unrolls > envs * actors:
            raise ConfigError(
                f"train.unrolls is {unrolls}; {count(actors, 'actor')} (collector.num_workers) of "
                f"{count(envs, 'environment')} (env.num_envs) can give {envs * actors}: it must be at most that"
            )
        dealt, what = envs * self.rollouts_per_batch, f"env.num_envs, {envs}"
        if unrolls:
            what = f"train.unrolls, {unrolls}"
        if self.deals_steps:
            dealt *= self.collector.unroll
            what = f"the {dealt} steps of a rollout (env.num_envs times collector.unroll)"
            if self.network.recurrent:
                raise ConfigError(
                    f"network.recurrent is {self.network.recurrent}; train.deal is steps, which would tear sequences "
                    "apart: it must be environments"
                )
        if dealt % self.train.minibatches:
            raise ConfigError(f"train.minibatches is {self.train.minibatches}; it must divide {what}")

    @property
    def deals_steps(self) -> bool:
        """Whether single steps are dealt to the minibatches, not whole environments."""
        return False
