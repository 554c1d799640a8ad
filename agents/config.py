"""Configurations of the algorithms on rollouts: plain dataclasses whose fields are the recipes' flags.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from offtrace.agents.config_base import ActorConfig, Config, ConfigError, RunConfig

__all__ = [
    "ConfigError",
    "ImpalaConfig",
    "control_config",
    "default_config",
    "paper_config",
    "pendulum_config",
]


ENCODERS = ("shallow", "resnet", "mlp")


@dataclass
class EnvConfig:
    """The task."""

    game: str = "pong"
    """Atari game, Gymnasium id, or import path package.module:function of an own environment."""
    protocol: Literal["classic", "sticky"] = "classic"
    """Atari only: classic (no-op starts, life loss ends an episode in training) or sticky (Machado et al. 2018)."""
    num_envs: int = 16
    """Environments per actor process."""


@dataclass
class NetworkConfig:
    """The shared actor-critic."""

    encoder: str = "shallow"
    """shallow and resnet (the paper's two) read images, mlp reads vectors; or package.module:function of an own one."""
    hidden: list[int] = field(default_factory=lambda: [256])
    """Widths of the fully connected layers."""
    recurrent: int = 0
    """Width of an LSTM behind the encoder, which also reads the last action and reward; 0 for none."""
    channels_last: bool | None = None
    """Memory format of image encoders; null: channels last where the learner is on a GPU, where it is faster."""


@dataclass
class CollectorConfig(ActorConfig):
    """The actors."""

    sync_every: int = 0
    """Updates between two pushes of weights to the actors; 0: once per rollout."""
    lag: int = 0
    """Study tool: the actors get weights that are at least this many updates old."""


@dataclass
class LossConfig:
    """V-trace, or what stands in its place, and the loss."""

    estimator: Literal["vtrace", "retrace", "importance_sampling", "one_step", "none"] = "vtrace"
    """vtrace; retrace (the critic values actions); importance_sampling (no clips); one_step (policy only); none."""
    gamma: float = 0.99
    """Discount per agent step."""
    lmbda: float = 0.95
    """Trace decay."""
    rho_clip: float = 1.0
    """Of vtrace: clip of the ratio in the temporal difference; inf for none."""
    c_clip: float = 1.0
    """Of vtrace: clip of the ratio in the trace; inf for none."""
    pg_rho_clip: float = 1.0
    """Of vtrace, retrace and one_step: clip of the ratio in the policy gradient; inf for none."""
    leak: float = 1.0
    """Of vtrace: mixing of clipped (1) and plain (0) ratios."""
    value_coef: float = 0.5
    """Weight of half the squared value error."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over batch and time: sum as in the paper, or mean."""
    reward_clip: float | None = 1.0
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = True
    """Advantages of an update are shifted and scaled to mean 0 and deviation 1."""
    policy_clip: float | None = 0.1
    """Trust region: steps whose ratio has moved further than this get no policy gradient; null for none."""


@dataclass
class OptimConfig:
    """The optimiser."""

    name: Literal["adam", "rmsprop", "rmsprop_tf"] = "adam"
    """adam, torch's rmsprop, or the paper's rmsprop_tf."""
    lr: float = 4e-4
    """Step size at the start."""
    eps: float = 1e-5
    """Added to the root (inside it in rmsprop_tf)."""
    decay: float = 0.99
    """Of rmsprop's mean of squares."""
    schedule: Literal["linear", "constant"] = "linear"
    """linear falls to 0 at the last frame."""
    clip_grad_norm: float | None = 0.5
    """Maximum of the gradient's global norm; null for none."""


@dataclass
class TrainConfig(RunConfig):
    """The run."""

    minibatches: int = 4
    """Updates a rollout is dealt to."""
    epochs: int = 4
    """Passes over a rollout."""


class OnPolicyConfig(Config):
    """What the algorithms on rollouts share."""

    task_flag = "env.game"
    network: NetworkConfig
    loss: Any
    optim: OptimConfig

    def env_options(self) -> dict[str, Any]:
        """Protocol, and the last action and reward where the network is recurrent."""
        return {"protocol": self.env.protocol, "last_step": self.network.recurrent > 0}

    def updates_per_push(self) -> int:
        """``collector.sync_every``, or all updates on a rollout."""
        return int(self.collector.sync_every or self.train.minibatches * self.train.epochs)

    def forced_lag(self) -> int:
        """``collector.lag``."""
        return int(self.collector.lag)

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.at_least(1, "train.minibatches", "train.epochs")
        self.at_least(0, "collector.sync_every", "collector.lag", "network.recurrent")
        self.require("optim.decay", lambda value: 0 <= value < 1, "at least 0 and below 1")
        self.positive("optim.lr", "optim.eps")
        self.positive_or_null("optim.clip_grad_norm")
        self.sizes("network.hidden")
        self.require(
            "network.encoder",
            lambda value: value in ENCODERS or ":" in value,
            f"one of {', '.join(ENCODERS)}, or package.module:function",
        )
        if self.env.num_envs % self.train.minibatches:
            raise ConfigError(
                f"train.minibatches is {self.train.minibatches}; it must divide env.num_envs, {self.env.num_envs}"
            )


@dataclass
class ImpalaConfig(OnPolicyConfig):
    """IMPALA."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    family = "impala"

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.at_least(0, "loss.value_coef", "loss.entropy_coef")
        self.fraction("loss.gamma", "loss.lmbda", "loss.leak")
        for path in ("loss.rho_clip", "loss.c_clip", "loss.pg_rho_clip"):
            self.require(path, lambda value: value > 0, "above 0")
        self.positive_or_null("loss.reward_clip", "loss.policy_clip")
        if self.loss.c_clip > self.loss.rho_clip:
            raise ConfigError(
                f"loss.c_clip is {self.loss.c_clip:g}; it must not be above loss.rho_clip, {self.loss.rho_clip:g}"
            )


def default_config() -> ImpalaConfig:
    """Learns well from few frames on small machines."""
    return ImpalaConfig()


def paper_config() -> ImpalaConfig:
    """The published form: 32 unrolls of 20 per update, summed loss, TensorFlow's RMSProp, 200 million frames."""
    return ImpalaConfig(
        env=EnvConfig(num_envs=32),
        collector=CollectorConfig(unroll=20),
        loss=LossConfig(lmbda=1.0, reduction="sum", normalize_advantage=False, policy_clip=None),
        optim=OptimConfig(name="rmsprop_tf", lr=6e-4, eps=0.01, decay=0.99, clip_grad_norm=40.0),
        train=TrainConfig(total_frames=200_000_000, minibatches=1, epochs=1),
    )


def control_config() -> ImpalaConfig:
    """CartPole and Pendulum in minutes."""
    return ImpalaConfig(
        env=EnvConfig(game="CartPole-v1", num_envs=16),
        network=NetworkConfig(encoder="mlp", hidden=[64, 64]),
        collector=CollectorConfig(unroll=32),
        # returns of hundreds: the value error must not drown the policy's gradient in the shared layers
        loss=LossConfig(reward_clip=None, value_coef=0.01, policy_clip=0.2),
        optim=OptimConfig(lr=2.5e-3),
        train=TrainConfig(
            total_frames=150_000, minibatches=4, eval_every=50_000, checkpoint_every=50_000, precision="32-true"
        ),
    )


def pendulum_config() -> ImpalaConfig:
    """Pendulum: continuous actions."""
    config = control_config()
    config.env.game = "Pendulum-v1"
    config.loss.gamma = 0.9
    config.loss.entropy_coef = 0.0
    config.loss.value_coef = 0.05
    config.optim.lr = 1e-3
    config.train.total_frames = 400_000
    return config
