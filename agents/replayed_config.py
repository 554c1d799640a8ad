"""Configuration that the algorithms on replayed data share. Imports neither torch nor Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from offtrace.agents.config_base import ActorConfig, Config, ConfigError, RunConfig
from offtrace.modules.envs.suite import control_name
from offtrace.modules.replay.limiter import SamplesPerInsert

MOST_UPDATES = 100
"""For a collected step. What needs more would learn by heart what it has."""

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
    """Steps learnt from in one update: transitions, n-step windows, or batch_size / length sequences for a trace
    (padding behind the end of an episode included)."""
    length: int = 8
    """Steps of a sequence for targets with a trace. n-step targets take sequences of loss.n_step."""
    samples_per_insert: float = 256.0
    """Steps learnt from per collected step: divided by batch_size, the updates per step."""
    min_size: int = 1_000
    """Steps collected before the first update. (SAC's authors take 1,000 to 10,000, with random actions.)"""
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

    @property
    def samples(self) -> int:
        """Samples of a batch: a sequence is learnt from at every step, an n-step window at its first."""
        return self.replay.batch_size // (1 if self.loss.target == "n_step" else self.sample_length)

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
        if self.loss.target == "tree_backup" and control_name(self.task) is not None:
            self.refuse_tree_backup()
        for flag, usual in (("env.action_repeat", 1), ("env.pixels", False)):
            value = self._get(flag)
            if value != usual and control_name(self.task) is None:
                raise ConfigError(
                    f"{flag} is {str(value).lower()}, which only tasks of dm_control have; for {self.task} it must be "
                    f"{str(usual).lower()}"
                )

    def refuse_tree_backup(self) -> NoReturn:
        """Of a task with continuous actions.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"loss.target is tree_backup, which needs discrete actions; those of {self.task} are continuous: it must "
            "be another, such as retrace"
        )

    def _check_replay(self) -> None:
        replay, unroll = self.replay, self.collector.unroll
        if replay.capacity < max(replay.batch_size, replay.min_size):
            raise ConfigError(
                f"replay.capacity is {replay.capacity}; it must hold replay.batch_size, {replay.batch_size}, and "
                f"replay.min_size, {replay.min_size}"
            )
        if self.loss.target == "n_step" and self.loss.n_step < 2:
            raise ConfigError(
                f"loss.n_step is {self.loss.n_step}; with loss.target n_step it must be at least 2, or the target "
                "one_step"
            )
        if self.loss.target not in ("one_step", "n_step"):
            if replay.length < 2:
                raise ConfigError(
                    f"replay.length is {replay.length}; loss.target {self.loss.target} needs sequences of 2 steps or "
                    "more"
                )
            if replay.batch_size % replay.length:
                raise ConfigError(
                    f"replay.batch_size is {replay.batch_size}; loss.target {self.loss.target} learns from sequences "
                    f"of replay.length, {replay.length}, steps: it must be a multiple of that"
                )
        rings = self.env.num_envs * max(1, self.collector.num_workers)
        # the last steps of every environment begin no sequence yet
        least = self.samples + rings * (self.sample_length - 1)
        if replay.min_size < least:
            sequences = f" sequences of {self.sample_length} steps" if self.sample_length > 1 else ""
            raise ConfigError(
                f"replay.min_size is {replay.min_size}; for batches of {self.samples}{sequences} from {rings} "
                f"environments it must be at least {least}"
            )
        # an ended episode takes one slot more than its steps, and every step of a rollout may end one
        least = rings * (2 * unroll + self.sample_length)
        if replay.capacity < least:
            raise ConfigError(
                f"replay.capacity is {replay.capacity}; for {rings} environments and a collector.unroll of {unroll} it "
                f"must be at least {least}"
            )
        try:
            limiter = SamplesPerInsert(replay.samples_per_insert, replay.min_size)
            limiter.check(capacity=replay.capacity, batch=replay.batch_size)
        except ValueError as error:
            raise ConfigError(f"replay.samples_per_insert: {error}") from error
        rollout = self.env.num_envs * unroll
        updates = float(limiter.ratio / replay.batch_size)
        if updates > MOST_UPDATES:
            raise ConfigError(
                f"replay.samples_per_insert is {replay.samples_per_insert:g}, {updates:,.0f} updates for each "
                f"collected step; with a replay.batch_size of {replay.batch_size} it must be at most "
                f"{MOST_UPDATES * replay.batch_size}"
            )
        frames_per_rollout = rollout * self.env.action_repeat * self.train.devices
        if frames_per_rollout > self.train.total_frames:
            raise ConfigError(
                f"collector.unroll is {unroll}, and a rollout of all environments and learners {frames_per_rollout} "
                f"frames; it must not be more than train.total_frames, {self.train.total_frames}"
            )
        steps = rollout * math.ceil(self.train.total_frames / frames_per_rollout)
        needed = math.ceil(replay.min_size + replay.batch_size / limiter.ratio)
        if steps < needed:
            raise ConfigError(
                f"train.total_frames is {self.train.total_frames}, {steps} steps of each learner's actors; the first "
                f"update comes after {needed}, by replay.min_size, replay.batch_size and replay.samples_per_insert"
            )
