"""Configuration of SAC. Imports neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from offtrace.agents.config_base import ConfigError
from offtrace.agents.replayed_config import (
    ControlEnvConfig,
    ControlNetworkConfig,
    ReplayCollectorConfig,
    ReplayConfig,
    ReplayedConfig,
    ReplayTrainConfig,
    Target,
)


@dataclass
class SACLossConfig:
    """Soft actor-critic; the paper's values where nothing else is said."""

    version: Literal[2, 1] = 2
    """2: temperature learnt (Haarnoja et al. 2018b); 1: value network and reward scale (2018a)."""
    gamma: float = 0.99
    """Discount per agent step."""
    target: Target = "one_step"
    """What the critics learn: one_step, n_step (uncorrected), or a trace; tree_backup for discrete actions only."""
    n_step: int = 5
    """Of n_step."""
    lmbda: float = 0.95
    """Decay of the trace."""
    alpha_init: float = 0.1
    """Temperature at the start: pytorch_sac's for dm_control; the paper's code has 1."""
    fixed_alpha: float | None = None
    """A temperature that does not learn; null learns it."""
    target_entropy: float | Literal["auto"] = "auto"
    """In nats; auto: minus the dimensions of an action, or 0.98 log |A| where they are discrete."""
    alpha_loss: Literal["alpha", "log_alpha"] = "alpha"
    """What the temperature's loss multiplies."""
    reward_scale: float = 1.0
    """Factor of the reward; version 1 needs one: see its preset."""


@dataclass
class SACOptimConfig:
    """Adam, and the target networks."""

    lr_actor: float = 3e-4
    """Step size of the policy."""
    lr_critic: float = 1e-3
    """Step size of the critics; with the policy's, one of two cartpole-swingup runs stayed at 650."""
    lr_alpha: float = 3e-4
    """Step size of the temperature's logarithm."""
    tau: float = 0.005
    """Share of the new weights in the target critics after every update."""
    clip_grad_norm: float | None = None
    """Maximum of the gradient's norm in each of the networks; null for none."""


@dataclass
class SACConfig(ReplayedConfig):
    """Soft actor-critic."""

    env: ControlEnvConfig = field(default_factory=ControlEnvConfig)
    network: ControlNetworkConfig = field(default_factory=ControlNetworkConfig)
    collector: ReplayCollectorConfig = field(default_factory=ReplayCollectorConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    loss: SACLossConfig = field(default_factory=SACLossConfig)
    optim: SACOptimConfig = field(default_factory=SACOptimConfig)
    train: ReplayTrainConfig = field(default_factory=ReplayTrainConfig)

    family = "sac"

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.positive("optim.lr_alpha", "loss.alpha_init", "loss.reward_scale")
        self.require("loss.fixed_alpha", lambda value: value is None or value >= 0, "at least 0, or null")
        self.require("optim.tau", lambda value: 0 < value <= 1, "above 0 and at most 1")
        usual = SACLossConfig()
        if self.loss.version == 1:
            for name in ("alpha_init", "fixed_alpha", "target_entropy", "alpha_loss"):
                value = getattr(self.loss, name)
                if value != getattr(usual, name):
                    raise ConfigError(f"loss.{name} is {value}; version 1 has no temperature, only loss.reward_scale")
        if self.loss.version == 1 and self.loss.target not in ("one_step", "n_step"):
            raise ConfigError(
                f"loss.target is {self.loss.target}; version 1 has no target critics: it must be one_step or n_step"
            )


def discrete_sac_config() -> SACConfig:
    """CartPole with discrete actions."""
    config = SACConfig()
    config.env.task = "CartPole-v1"
    config.env.num_envs = 4
    config.replay.samples_per_insert = 128.0
    config.optim.lr_actor = config.optim.lr_critic = 1e-3
    config.optim.tau = 0.02
    config.loss.target_entropy = 0.2  # 0.98 log 2, the usual, is next to a coin
    config.train.total_frames = 30_000
    config.train.eval_every = 5_000
    return config


def pixel_sac_config() -> SACConfig:
    """dm_control from images."""
    config = SACConfig()
    config.env.pixels, config.env.action_repeat = True, 4
    config.network.encoder = "shallow"
    config.replay.capacity = 300_000  # 6.4 GB: of the three stacked frames each is stored once
    return config


def sac_v1_config() -> SACConfig:
    """The first version: value network, fixed temperature, reward scale."""
    config = SACConfig()
    config.loss.version = 1
    # a temperature of 0.05; the paper's 5 to 20 are for Gym, where a step is worth several times as much as here
    config.loss.reward_scale = 20.0
    return config
