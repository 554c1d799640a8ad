"""Configurations: plain dataclasses whose fields are the recipes' flags. Imports neither torch nor Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence."""


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

    encoder: Literal["shallow", "resnet", "mlp"] = "shallow"
    """shallow and resnet (the paper's two) read images; mlp reads vectors."""
    hidden: list[int] = field(default_factory=lambda: [256])
    """Widths of the fully connected layers."""
    recurrent: int = 0
    """Width of an LSTM behind the encoder, which also reads the last action and reward; 0 for none."""


@dataclass
class CollectorConfig:
    """The actors."""

    num_workers: int = 1
    """Actor processes; 0 collects in the learner's process, synchronously."""
    unroll: int = 64
    """Agent steps of an environment in one rollout."""
    threads: int = 1
    """Torch threads of an actor process."""
    step_timeout: float = 60.0
    """Seconds after which a step that did not return counts as hung."""
    sync_every: int = 0
    """Updates between two pushes of weights to the actors; 0: once per rollout."""
    lag: int = 0
    """Study tool: the actors get weights that are at least this many updates old."""


@dataclass
class LossConfig:
    """V-trace and the loss."""

    gamma: float = 0.99
    """Discount per agent step."""
    lmbda: float = 0.95
    """Trace decay."""
    rho_clip: float = 1.0
    """Clip of the ratio in the temporal difference; inf for none."""
    c_clip: float = 1.0
    """Clip of the ratio in the trace; inf for none."""
    pg_rho_clip: float = 1.0
    """Clip of the ratio in the policy gradient; inf for none."""
    leak: float = 1.0
    """Mixing of clipped (1) and plain (0) ratios."""
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
    correction: bool = True
    """False takes every ratio as 1: no off-policy correction, for studies."""


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
class TrainConfig:
    """The run."""

    name: str | None = None
    """Folder under runs/; made from game, seed and time if not given."""
    total_frames: int = 15_000_000
    """Environment frames (four per Atari step), over all ranks."""
    minibatches: int = 4
    """Updates a rollout is dealt to."""
    epochs: int = 4
    """Passes over a rollout."""
    seed: int = 0
    """Of network, environments and order of minibatches."""
    devices: int = 1
    """Learner processes."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the learners run."""
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    """Of the learner; actors use float32."""
    eval_every: int = 1_000_000
    """Frames between two evaluations."""
    eval_episodes: int = 10
    """Whole games of an evaluation."""
    final_eval: bool = True
    """Evaluate at the end as well."""
    eval_mode: Literal["sample", "greedy"] = "sample"
    """Actions in evaluations: drawn from the policy, or its mode."""
    checkpoint_every: int = 1_000_000
    """Frames between two writings of last.ckpt."""
    log_every: float = 10.0
    """Seconds between two log lines."""


@dataclass
class ImpalaConfig:
    """IMPALA."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Checks every value that can be checked without starting anything.

        Raises:
            ConfigError: one sentence that names the field, its value and what would be right.
        """
        for path in (
            "env.num_envs", "collector.unroll", "collector.threads", "train.total_frames", "train.minibatches",
            "train.epochs", "train.devices", "train.eval_every", "train.eval_episodes", "train.checkpoint_every",
        ):  # fmt: skip
            self._require(path, lambda value: value >= 1, "at least 1")
        for path in ("collector.num_workers", "collector.sync_every", "collector.lag", "network.recurrent"):
            self._require(path, lambda value: value >= 0, "at least 0")
        for path in ("train.seed", "loss.value_coef", "loss.entropy_coef", "train.log_every"):
            self._require(path, lambda value: value >= 0 and math.isfinite(value), "at least 0")
        for path in ("loss.gamma", "loss.lmbda", "loss.leak"):
            self._require(path, lambda value: 0 <= value <= 1, "between 0 and 1")
        self._require("optim.decay", lambda value: 0 <= value < 1, "at least 0 and below 1")
        for path in ("loss.rho_clip", "loss.c_clip", "loss.pg_rho_clip"):
            self._require(path, lambda value: value > 0, "above 0")
        for path in ("optim.lr", "optim.eps", "collector.step_timeout"):
            self._require(path, lambda value: value > 0 and math.isfinite(value), "above 0")
        for path in ("loss.reward_clip", "loss.policy_clip", "optim.clip_grad_norm"):
            self._require(path, lambda value: value is None or value > 0, "above 0, or null")
        self._require("network.hidden", lambda value: value and min(value) >= 1, "a list of sizes of at least 1")
        if self.loss.c_clip > self.loss.rho_clip:
            raise ConfigError(
                f"loss.c_clip is {self.loss.c_clip:g}; it must not be above loss.rho_clip, {self.loss.rho_clip:g}"
            )
        if self.env.num_envs % self.train.minibatches:
            raise ConfigError(
                f"train.minibatches is {self.train.minibatches}; it must divide env.num_envs, {self.env.num_envs}"
            )

    def _require(self, path: str, holds: Any, right: str) -> None:
        group, name = path.split(".")
        value = getattr(getattr(self, group), name)
        if not holds(value):
            raise ConfigError(f"{path} is {value}; it must be {right}")


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
