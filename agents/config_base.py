"""What every algorithm's configuration shares. Plain dataclasses; imports neither torch nor Lightning."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence."""


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def may_have_gpu() -> bool:
    """Whether a GPU driver that torch could use shows itself; only torch can tell how many GPUs there are."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, WSL
    return not sys.platform.startswith("linux") or any(os.path.exists(path) for path in drivers)


@dataclass
class RunConfig:
    """The run."""

    name: str | None = None
    """Folder under runs/; made from task, seed and time if not given."""
    total_frames: int = 15_000_000
    """Environment frames (four per Atari step, action repeats included), over all ranks."""
    seed: int = 0
    """Of network, environments and order of the data."""
    devices: int = 1
    """Learner processes."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the learners run."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Of the learner; auto: bf16 where the hardware computes it natively. Actors use float32."""
    eval_every: int = 1_000_000
    """Frames between two evaluations."""
    eval_episodes: int = 10
    """Whole games of an evaluation."""
    final_eval: bool = True
    """Evaluate at the end as well."""
    record: bool = True
    """Record a game of the best checkpoint at the end, as game.gif, where the task has pictures."""
    eval_mode: Literal["sample", "greedy"] = "sample"
    """Actions in evaluations: drawn from the policy, or its mode."""
    checkpoint_every: int = 1_000_000
    """Frames between two writings of last.ckpt."""
    log_every: float = 10.0
    """Seconds between two log lines."""


@dataclass
class ActorConfig:
    """The actors."""

    num_workers: int = 1
    """Actor processes; 0 collects in the learner's process, synchronously."""
    unroll: int = 64
    """Agent steps of an environment in one rollout."""
    threads: int = 1
    """Torch threads of an actor process."""
    device: str = "cpu"
    """Where the actors run their copy of the policy: cpu, cuda or cuda:<n>."""
    step_timeout: float = 60.0
    """Seconds after which a step that did not return counts as hung."""


@dataclass
class Config:
    """A configuration: groups of fields, checked by :meth:`validate`; subclasses are dataclasses.

    Besides the groups ``env``, ``collector`` and ``train`` that all of them have, a subclass says what its task is.
    """

    task_flag: ClassVar[str]
    """Flag that names the task."""
    family: ClassVar[str]
    """Name of the algorithm; the builder in :mod:`offtrace.agents.training`."""
    devices_may_change: ClassVar[bool] = True
    """Whether a resumed run may have another number of learners."""

    if TYPE_CHECKING:  # fields of every subclass, in its own order

        @property
        def env(self) -> Any:
            """The task."""

        @property
        def collector(self) -> Any:
            """The actors."""

        @property
        def train(self) -> Any:
            """The run."""

    @property
    def task(self) -> str:
        """Name of the environment, for :func:`offtrace.modules.envs.make_env`."""
        return str(self._get(self.task_flag))

    def env_options(self) -> dict[str, Any]:
        """What :func:`offtrace.modules.envs.make_env` gets besides name, number and seed."""
        return {}

    def description(self) -> dict[str, Any]:
        """What a checkpoint says of the task, so that its policy can be evaluated."""
        return {"env": {"name": self.task, "options": self.env_options()}, "eval_mode": self.train.eval_mode}

    def updates_per_push(self) -> int:
        """Learner updates between two pushes of weights to the actors."""
        return 1

    def forced_lag(self) -> int:
        """Least age, in updates, of the weights that the actors get."""
        return 0

    def validate(self) -> None:
        """Checks every value that can be checked without starting anything.

        Raises:
            ConfigError: one sentence that names the field, its value and what would be right.
        """
        self.at_least(
            1, "env.num_envs", "collector.unroll", "collector.threads", "train.total_frames", "train.devices",
            "train.eval_every", "train.eval_episodes", "train.checkpoint_every",
        )  # fmt: skip
        self.at_least(0, "collector.num_workers", "train.log_every")
        self.require("train.seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
        self.positive("collector.step_timeout")
        self.require(
            "collector.device", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value), "cpu, cuda or cuda:<number>"
        )

    def check_devices(self, gpus: int) -> None:
        """Checks that this machine, with ``gpus`` GPUs, has what the run asks for.

        Raises:
            ConfigError: one sentence.
        """
        wanted, accelerator = self.train.devices, self.train.accelerator
        cores = available_cores()
        if accelerator == "gpu" and not gpus:
            raise ConfigError("train.accelerator is gpu; this machine has none that torch can use")
        if accelerator != "cpu" and gpus:
            if wanted > gpus:
                raise ConfigError(f"train.devices is {wanted}; this machine has {gpus} GPUs")
        elif wanted > cores:
            raise ConfigError(f"train.devices is {wanted}; this machine has {cores} cores for learners on the CPU")
        kind, _, number = self.collector.device.partition(":")
        if kind == "cuda" and int(number or 0) >= gpus:
            raise ConfigError(f"collector.device is {self.collector.device}; this machine has {gpus} GPUs")

    def at_least(self, least: float, *paths: str) -> None:
        """Every number at ``paths`` must be finite and at least ``least``."""
        for path in paths:
            finite = math.isfinite(self._get(path))
            right = f"at least {least:g}" if finite else f"finite, and at least {least:g}"
            self.require(path, lambda value: value >= least and math.isfinite(value), right)

    def positive(self, *paths: str) -> None:
        """Every number at ``paths`` must be finite and above 0."""
        for path in paths:
            self.require(path, lambda value: value > 0 and math.isfinite(value), "above 0 and finite")

    def positive_or_null(self, *paths: str) -> None:
        """Every number at ``paths`` must be above 0, or null."""
        for path in paths:
            self.require(path, lambda value: value is None or value > 0, "above 0, or null")

    def fraction(self, *paths: str) -> None:
        """Every number at ``paths`` must be in [0, 1]."""
        for path in paths:
            self.require(path, lambda value: 0 <= value <= 1, "between 0 and 1")

    def sizes(self, *paths: str) -> None:
        """Every list at ``paths`` must hold sizes."""
        for path in paths:
            self.require(path, lambda value: value and min(value) >= 1, "a list of sizes of at least 1")

    def require(self, path: str, holds: Callable[[Any], Any], right: str) -> None:
        """``holds`` must be true of the value at ``path``; ``right`` says what would be."""
        value = self._get(path)
        if not holds(value):
            raise ConfigError(f"{path} is {value}; it must be {right}")

    def _get(self, path: str) -> Any:
        group, name = path.split(".")
        return getattr(getattr(self, group), name)
