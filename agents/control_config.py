"""Configurations of the algorithms on replayed data, SAC and MPO, and of V-MPO. Imports neither torch nor Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from offtrace.agents.config import CollectorConfig, EnvConfig, NetworkConfig, OnPolicyConfig, OptimConfig, TrainConfig
from offtrace.agents.config_base import ActorConfig, Config, ConfigError, RunConfig
from offtrace.modules.envs.suite import control_name
from offtrace.modules.limiter import SamplesPerInsert

Target = Literal["one_step", "n_step", "retrace", "importance_sampling", "q_lambda", "tree_backup"]


@dataclass
class ControlEnvConfig:
    """The task."""

    task: str = "cartpole-swingup"
    """Task of dm_control (domain-task), Gymnasium id, or import path package.module:function of an own environment."""
    num_envs: int = 1
    """Environments per actor."""
    action_repeat: int = 1
    """Steps of a dm_control task per action."""
    pixels: bool = False
    """dm_control: observe images."""


@dataclass
class ControlNetworkConfig:
    """Policy and critics."""

    encoder: Literal["mlp", "layernorm_mlp", "shallow"] = "mlp"
    """mlp (ReLU) and layernorm_mlp (Acme) read vectors, shallow reads images."""
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of the policy's layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of a critic's layers."""
    critics: int = 2
    """Critics, of which the smallest value counts."""
    normalize: bool = False
    """Running normalisation of observations, saved with the policy."""
    smoothing: float = 0.0
    """Low pass over executed actions, 0 for none: a = smoothing * last action + (1 - smoothing) * sample."""


@dataclass
class ReplayCollectorConfig(ActorConfig):
    """The actors."""

    num_workers: int = 0
    """Actor processes, which act while the learner learns; 0 collects in the learner's process, in turn with it."""
    unroll: int = 8
    """Agent steps of an environment between two insertions, and so between two pushes of weights."""


@dataclass
class ReplayConfig:
    """The replay."""

    capacity: int = 1_000_000
    """Steps it holds."""
    batch_size: int = 256
    """Transitions, or sequences, of one update."""
    length: int = 8
    """Steps of a sequence for targets with a trace. n-step targets take sequences of loss.n_step."""
    samples_per_insert: float = 256.0
    """Transitions or sequences sampled per collected step: with batch_size, the updates per step."""
    min_size: int = 1_000
    """Steps collected before the first update."""
    storage: Literal["tensor", "memmap"] = "tensor"
    """In memory, or in files."""


@dataclass
class ReplayTrainConfig(RunConfig):
    """The run."""

    total_frames: int = 500_000
    """Environment steps, action repeats included, over all ranks."""
    precision: Literal["32-true"] = "32-true"
    """Of the learner: the values of sampled actions differ by less than a step of bf16."""
    eval_every: int = 10_000
    """Frames between two evaluations."""
    eval_mode: Literal["sample", "greedy"] = "greedy"
    """Actions in evaluations: drawn from the policy, or its mode."""
    checkpoint_every: int = 50_000
    """Frames between two writings of last.ckpt and the replay."""
    compile: bool = False
    """torch.compile the loss; the first update then takes a minute, and a C++ compiler is needed."""
    updates_per_step: int = 8
    """Most updates in one step of Lightning's loop, which costs about half a millisecond each."""


class ReplayedConfig(Config):
    """What the algorithms on replayed data share."""

    task_flag = "env.task"
    devices_may_change = False  # each has a replay of its own
    network: ControlNetworkConfig
    replay: ReplayConfig
    loss: Any

    @property
    def sample_length(self) -> int:
        """Steps of a sample: 1 for transitions."""
        return int({"one_step": 1, "n_step": self.loss.n_step}.get(self.loss.target, self.replay.length))

    def env_options(self) -> dict[str, Any]:
        """What the task's family understands."""
        options: dict[str, Any] = {"rescale_actions": True}
        if self.env.action_repeat > 1:
            options["action_repeat"] = self.env.action_repeat
        if self.env.pixels:
            options["pixels"] = True
        return options

    def validate(self) -> None:
        """As :meth:`Config.validate`."""
        super().validate()
        self.at_least(
            1, "env.action_repeat", "network.critics", "replay.capacity", "replay.batch_size", "replay.length",
            "loss.n_step", "train.updates_per_step",
        )  # fmt: skip
        self.at_least(0, "replay.min_size")
        self.positive("replay.samples_per_insert", "optim.lr_actor", "optim.lr_critic")
        self.positive_or_null("optim.clip_grad_norm")
        self.fraction("loss.gamma", "loss.lmbda")
        self.sizes("network.hidden", "network.critic_hidden")
        self.require("network.smoothing", lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._check_task_options()
        self._check_replay()
        images = self.env.pixels
        if images != (self.network.encoder == "shallow"):
            right = "shallow" if images else "mlp or layernorm_mlp"
            raise ConfigError(
                f"network.encoder is {self.network.encoder}; with env.pixels {str(images).lower()} it must be {right}"
            )

    def _check_task_options(self) -> None:
        for flag, usual in (("env.action_repeat", 1), ("env.pixels", False)):
            value = self._get(flag)
            if value != usual and control_name(self.task) is None:
                raise ConfigError(
                    f"{flag} is {str(value).lower()}, which only tasks of dm_control have; for {self.task} it must be "
                    f"{str(usual).lower()}"
                )

    def _check_replay(self) -> None:
        replay, unroll = self.replay, self.collector.unroll
        if replay.capacity < max(replay.batch_size, replay.min_size):
            raise ConfigError(
                f"replay.capacity is {replay.capacity}; it must hold replay.batch_size, {replay.batch_size}, and "
                f"replay.min_size, {replay.min_size}"
            )
        if self.loss.target not in ("one_step", "n_step") and replay.length < 2:
            raise ConfigError(
                f"replay.length is {replay.length}; loss.target {self.loss.target} needs sequences of 2 steps or more"
            )
        lanes = self.env.num_envs * max(1, self.collector.num_workers)
        # the last steps of every environment begin no sequence yet
        least = replay.batch_size + lanes * (self.sample_length - 1)
        if replay.min_size < least:
            sequences = f" sequences of {self.sample_length} steps" if self.sample_length > 1 else ""
            raise ConfigError(
                f"replay.min_size is {replay.min_size}; for batches of {replay.batch_size}{sequences} from {lanes} "
                f"environments it must be at least {least}"
            )
        # an ended episode takes one slot more than its steps, and every step of a rollout may end one
        least = lanes * (2 * unroll + self.sample_length)
        if replay.capacity < least:
            raise ConfigError(
                f"replay.capacity is {replay.capacity}; for {lanes} environments and a collector.unroll of {unroll} it "
                f"must be at least {least}"
            )
        try:
            limiter = SamplesPerInsert(replay.samples_per_insert, replay.min_size)
            limiter.check(capacity=replay.capacity, batch=replay.batch_size)
        except ValueError as error:
            raise ConfigError(f"replay.samples_per_insert: {error}") from error
        rollout = self.env.num_envs * unroll
        frames_per_rollout = rollout * self.env.action_repeat * self.train.devices
        steps = rollout * math.ceil(self.train.total_frames / frames_per_rollout)
        needed = math.ceil(replay.min_size + replay.batch_size / limiter.ratio)
        if steps < needed:
            raise ConfigError(
                f"train.total_frames is {self.train.total_frames}, {steps} steps of each learner's actors; the first "
                f"update comes after {needed}, by replay.min_size, replay.batch_size and replay.samples_per_insert"
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
    """Factor of the reward; version 1 needs one of about 5."""


@dataclass
class SACOptimConfig:
    """Adam, and the target networks."""

    lr_actor: float = 3e-4
    """Step size of the policy."""
    lr_critic: float = 3e-4
    """Step size of the critics."""
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


@dataclass
class MPOLossConfig:
    """Maximum a posteriori policy optimisation; Acme's defaults."""

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
    n_step: int = 5
    """Of n_step."""
    lmbda: float = 0.95
    """Decay of the trace."""
    num_samples: int = 20
    """Actions per state in the E-step."""
    epsilon: float = 0.1
    """Bound of the E-step in nats."""
    epsilon_mean: float | None = None
    """Bound of the mean's movement; null: 0.0025 per dimension, or 0.1 jointly."""
    epsilon_cov: float | None = None
    """Bound of the covariance's movement; null: 1e-6 per dimension, or 1e-4 jointly."""
    epsilon_policy: float = 2.5e-3
    """Bound of the policy's movement, for discrete actions."""
    action_penalty: bool = True
    """Penalise samples outside the bounds."""


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
    network: ControlNetworkConfig = field(
        default_factory=lambda: ControlNetworkConfig(
            encoder="layernorm_mlp", hidden=[256, 256, 256], critic_hidden=[256, 256, 256], critics=1
        )
    )
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
        self.positive("optim.lr_dual", "loss.epsilon", "loss.epsilon_policy", "loss.v_max")
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
class VMPOConfig(OnPolicyConfig):
    """V-MPO, on rollouts."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(game="CartPole-v1"))
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(encoder="mlp", hidden=[64, 64]))
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


def discrete_sac_config() -> SACConfig:
    """CartPole with discrete actions."""
    config = SACConfig()
    config.env.task = "CartPole-v1"
    config.env.num_envs = 4
    config.replay.samples_per_insert = 128.0
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
    config.loss.reward_scale = 5.0
    return config


def discrete_mpo_config() -> MPOConfig:
    """CartPole with discrete actions."""
    config = MPOConfig()
    config.env.task = "CartPole-v1"
    config.env.num_envs = 4
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
