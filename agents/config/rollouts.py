"""What the configurations of algorithms on rollouts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offtrace.agents.config.base import Config, ConfigError

if TYPE_CHECKING:
    from offtrace.agents.config.optim import AdamConfig
    from offtrace.agents.config.train import RolloutTrainConfig


@dataclass
class RolloutConfig(Config):
    """An algorithm that learns from the rollouts of its own recent policies, and lets them go."""

    if TYPE_CHECKING:

        @property
        def optim(self) -> AdamConfig:
            """The optimiser."""

        @property
        def train(self) -> RolloutTrainConfig:
            """The run."""

    def updates_per_push(self) -> int:
        """``collector.sync_every``, or all updates on a rollout."""
        return self.collector.sync_every or self.train.minibatches * self.train.epochs

    def validate(self) -> None:
        """As :meth:`Config.validate`; the minibatches divide what is dealt to them."""
        super().validate()
        dealt, what = self.env.num_envs, f"env.num_envs, {self.env.num_envs}"
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
