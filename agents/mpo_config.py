"""Configuration of MPO and V-MPO. Imports neither torch nor Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from offtrace.agents.config import CollectorConfig, EnvConfig, NetworkConfig, OnPolicyConfig, OptimConfig, TrainConfig
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
from offtrace.modules.envs.suite import control_name


@dataclass
class MPOLossConfig:
    """Maximum a posteriori policy optimisation; the values of Acme's control scripts where nothing else is said."""

    critic: Literal["scalar", "categorical"] = "scalar"
    """categorical is DMPO, with 51 atoms."""
    v_max: float = 150.0
    """The categorical critic's support reaches from minus this to this."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of the policy; diagonal bounds each dimension by itself."""
    gamma: float = 0.99
    """Discount per agent step."""
    target: Target = "n_step"
    """What the critic learns: one_step, n_step (uncorrected), or a trace; tree_backup for discrete actions only."""
    n_step: int = 4
    """Of n_step."""
    lmbda: float = 0.95
    """Decay of the trace."""
    num_samples: int = 20
    """Actions per state in the E-step."""
    epsilon: float = 0.1
    """Bound of the E-step in nats."""
    epsilon_mean: float | None = None
    """Bound of the mean's movement; null: 0.01 per dimension, or 0.1 jointly."""
    epsilon_cov: float | None = None
    """Bound of the covariance's movement; null: 1e-6 per dimension, or 1e-4 jointly."""
    epsilon_policy: float = 2.5e-3
    """Bound of the policy's movement, for discrete actions."""
    action_penalty: bool = True
    """Penalise samples outside the bounds."""


@dataclass
class MPONetworkConfig(ControlNetworkConfig):
    """Policy and critic; Acme's."""

    encoder: Literal["mlp", "layernorm_mlp", "shallow"] = "layernorm_mlp"
    """mlp (ReLU) and layernorm_mlp (Acme) read vectors, shallow reads images."""
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Widths of the policy's layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Widths of a critic's layers."""
    critics: int = 1
    """Critics, of which the smallest value counts."""
    init_scale: float = 0.5
    """Standard deviation of a continuous action at the start. It shrinks slowly: this is the exploration."""


@dataclass
class MPOOptimConfig:
    """Adam, and the target networks."""

    lr_actor: float = 3e-4
    """Step size of the policy: that of Acme's control scripts; its default is 1e-4."""
    lr_critic: float = 3e-4
    """Step size of the critic, likewise."""
    lr_dual: float = 1e-2
    """Step size of the multipliers."""
    target_every: int = 100
    """Updates between two copies into the target networks."""
    clip_grad_norm: float | None = 40.0
    """Maximum of the gradient's norm in each of the networks; null for none."""


@dataclass
class MPOConfig(ReplayedConfig):
    """MPO, DMPO and their form for discrete actions."""

    env: ControlEnvConfig = field(default_factory=ControlEnvConfig)
    network: MPONetworkConfig = field(default_factory=MPONetworkConfig)
    collector: ReplayCollectorConfig = field(default_factory=ReplayCollectorConfig)
    replay: ReplayConfig = field(default_factory=lambda: ReplayConfig(samples_per_insert=64.0))
    loss: MPOLossConfig = field(default_factory=MPOLossConfig)
    optim: MPOOptimConfig = field(default_factory=MPOOptimConfig)
    train: ReplayTrainConfig = field(default_factory=ReplayTrainConfig)

    family = "mpo"

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.at_least(1, "loss.num_samples", "optim.target_every")
        self.positive("optim.lr_dual", "loss.epsilon", "loss.epsilon_policy", "loss.v_max", "network.init_scale")
        self.positive_or_null("loss.epsilon_mean", "loss.epsilon_cov")
        largest = self.env.action_repeat / (1 - self.loss.gamma) if self.loss.gamma < 1 else math.inf
        if self.loss.critic == "categorical" and control_name(self.task) is not None and self.loss.v_max < largest:
            raise ConfigError(
                f"loss.v_max is {self.loss.v_max:g}; with loss.gamma {self.loss.gamma:g} and env.action_repeat "
                f"{self.env.action_repeat} the returns of dm_control reach {largest:g}: it must be that or more"
            )


@dataclass
class VMPOLossConfig:
    """V-MPO for small control tasks; the loss's own defaults are those of the paper's Atari runs."""

    gamma: float = 0.99
    """Discount per agent step."""
    target: Literal["lambda", "n_step", "vtrace"] = "lambda"
    """What the value learns, and advantages are measured from."""
    lmbda: float = 0.95
    """Trace decay of lambda and vtrace."""
    n_step: int = 5
    """Of n_step."""
    epsilon: float = 0.1
    """Bound of the E-step in nats."""
    epsilon_kl: float = 0.01
    """Bound of the policy's movement, for discrete actions."""
    epsilon_mean: float = 0.01
    """Bound of the mean's movement, for continuous actions."""
    epsilon_cov: float = 1e-5
    """Bound of the covariance's movement, for continuous actions."""
    top_fraction: float = 0.5
    """Advantages that are learnt from."""
    value_coef: float = 0.01
    """Weight of half the squared value error: returns of hundreds must not drown the policy in the shared layers."""


@dataclass
class VMPONetworkConfig(NetworkConfig):
    """The shared actor-critic."""

    encoder: str = "mlp"
    """shallow and resnet (IMPALA's two) read images, mlp reads vectors; or package.module:function of an own one."""
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the fully connected layers."""
    popart: bool = False
    """Normalise values by the returns' mean and deviation (PopArt); loss.value_coef is then in their units."""


@dataclass
class VMPOConfig(OnPolicyConfig):
    """V-MPO, on rollouts."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(game="CartPole-v1"))
    network: VMPONetworkConfig = field(default_factory=VMPONetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(unroll=32))
    loss: VMPOLossConfig = field(default_factory=VMPOLossConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2.5e-3))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            total_frames=300_000, eval_every=50_000, checkpoint_every=50_000, precision="32-true"
        )
    )

    family = "vmpo"

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.at_least(1, "loss.n_step")
        self.at_least(0, "loss.value_coef")
        self.fraction("loss.gamma", "loss.lmbda")
        self.positive("loss.epsilon", "loss.epsilon_kl", "loss.epsilon_mean", "loss.epsilon_cov")
        self.require("loss.top_fraction", lambda value: 0 < value <= 1, "above 0 and at most 1")


def discrete_mpo_config() -> MPOConfig:
    """CartPole with discrete actions."""
    config = MPOConfig()
    config.env.task = "CartPole-v1"
    config.env.num_envs = 4
    config.loss.target = "retrace"  # with uncorrected n steps the score wanders between 280 and 450
    config.train.total_frames = 50_000
    config.train.eval_every = 5_000
    return config


def dmpo_config() -> MPOConfig:
    """A categorical critic."""
    config = MPOConfig()
    config.loss.critic = "categorical"
    return config


def full_covariance_config() -> MPOConfig:
    """A policy with full covariance, bounded jointly."""
    config = MPOConfig()
    config.loss.covariance = "full"
    return config
