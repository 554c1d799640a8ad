"""What every configuration is made of. Plain dataclasses; imports neither torch nor Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from offtrace.modules.envs.names import known_actions
from offtrace.modules.machine import available_cores

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.config.collector import CollectorConfig
    from offtrace.agents.config.env import EnvConfig
    from offtrace.agents.config.network import FeedForwardConfig
    from offtrace.agents.config.train import TrainConfig
    from offtrace.agents.data import ActingData
    from offtrace.modules.envs import EnvInfo


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence."""


def count(number: int, noun: str) -> str:
    """``1 episode``, ``2 episodes``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


NORMAL_SCALES = math.exp(-5), math.exp(2)
"""Limits of the standard deviation of :class:`offtrace.modules.networks.NormalHead`, which needs torch."""


class Checks:
    """Checks of one group's values; a failure is a :class:`ConfigError` that names flag, value and what would be right.

    Args:
        group: the values.
        at: name of the group, what stands before the dot in a flag.
    """

    def __init__(self, group: Any, at: str) -> None:
        self._group, self._at = group, at

    def at_least(self, least: float, *names: str) -> None:
        """Every number must be finite and at least ``least``."""
        for name in names:
            finite = math.isfinite(getattr(self._group, name))
            right = f"at least {least:g}" if finite else f"finite, and at least {least:g}"
            self.require(name, lambda value: value >= least and math.isfinite(value), right)

    def positive(self, *names: str) -> None:
        """Every number must be finite and above 0."""
        for name in names:
            self.require(name, lambda value: value > 0 and math.isfinite(value), "above 0 and finite")

    def positive_or_null(self, *names: str) -> None:
        """Every number must be above 0, or null."""
        for name in names:
            self.require(name, lambda value: value is None or value > 0, "above 0, or null")

    def finite_or_null(self, *names: str) -> None:
        """Every number must be above 0 and finite, or null."""
        for name in names:
            self.require(name, lambda value: value is None or 0 < value < math.inf, "above 0 and finite, or null")

    def normal_scale(self, *names: str) -> None:
        """Every number must be a standard deviation that the head of a normal policy does not clip, or null."""
        low, high = NORMAL_SCALES
        right = f"from {low:.4g} to {high:.4g}, where the policy keeps it, or null"
        for name in names:
            self.require(name, lambda value: value is None or low <= value <= high, right)

    def fraction(self, *names: str) -> None:
        """Every number must be in [0, 1]."""
        for name in names:
            self.require(name, lambda value: 0 <= value <= 1, "between 0 and 1")

    def sizes(self, *names: str) -> None:
        """Every list must hold sizes."""
        for name in names:
            self.require(name, lambda value: value and min(value) >= 1, "a list of sizes of at least 1")

    def categorical(self) -> None:
        """``atoms`` must be that of a categorical critic, or 0, and ``v_max`` positive."""
        self.positive("v_max")
        self.require("atoms", lambda value: value == 0 or value >= 2, "0, or at least 2")

    def require(self, name: str, holds: Callable[[Any], Any], right: str) -> None:
        """``holds`` must be true of the value; ``right`` says what would be."""
        value = getattr(self._group, name)
        if not holds(value):
            raise ConfigError(f"{self._at}.{name} is {value}; it must be {right}")


class Group:
    """Fields of one topic. A subclass is a dataclass; its fields are flags, and it checks itself."""

    def check(self, at: str) -> None:
        """Refuse values that cannot be, whatever the other groups say.

        Args:
            at: name of the group in the configuration.

        Raises:
            ConfigError: one sentence that names the flag, its value and what would be right.
        """


@dataclass
class Config:
    """A configuration: groups of fields that check themselves, and checks across them. Subclasses are dataclasses.

    An algorithm's configuration says which network acts (:meth:`policy_spec`) and builds agent and data
    (:meth:`build`); all else that a run needs is here.
    """

    algorithm: ClassVar[str]
    """Name of the algorithm."""
    actions: ClassVar[Literal["any", "discrete", "continuous"]] = "any"
    """What the algorithm acts with."""
    continuous_only: ClassVar[tuple[str, ...]] = ()
    """Settings, as ``group.name``, that are not read where actions are discrete, and refused there."""
    values: ClassVar[Literal["state", "action"]] = "state"
    """What the loss's estimator is of."""
    rescale_actions: ClassVar[bool] = False
    """Whether the policy's continuous actions are in [-1, 1], to be mapped to a Gymnasium task's bounds."""

    if TYPE_CHECKING:  # fields of every subclass, in its own order

        @property
        def env(self) -> EnvConfig:
            """The task."""

        @property
        def network(self) -> FeedForwardConfig:
            """The networks."""

        @property
        def collector(self) -> CollectorConfig:
            """The actors."""

        @property
        def loss(self) -> Any:
            """The loss; its fields are the loss's arguments."""

        @property
        def train(self) -> TrainConfig:
            """The run."""

    @property
    def devices_may_change(self) -> bool:
        """Whether a resumed run may have another number of learners."""
        return True

    @property
    def actors_fit_machine(self) -> bool:
        """Whether a recipe may take more actors where there are cores for them: what is learnt must not suffer."""
        return False

    @property
    def rollouts_per_batch(self) -> int:
        """Rollouts of different actors that are taken together."""
        return 1

    @property
    def task(self) -> str:
        """Name of the environment, for :func:`offtrace.modules.envs.make_env`."""
        return self.env.task

    def build(self) -> tuple[Agent, ActingData]:
        """Agent and data module; nothing is started yet. Networks draw from torch's generator: seed it first.

        Raises:
            ValueError: when the task is unknown, or the agent cannot act in it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build")

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """Plain values from which a checkpoint's policy is built again: ``builder`` and its ``arguments``."""
        raise NotImplementedError(f"{type(self).__name__} must define policy_spec")

    def floats_per_step(self, info: EnvInfo) -> int:
        """Numbers of four bytes that the policy writes at a step, beside the action's log-probability; for a replay."""
        action = 2 if info.num_actions is not None else info.action_dim or 0  # an index has 8 bytes
        parameters = info.num_actions if info.num_actions is not None else 2 * (info.action_dim or 0)
        recurrent = self.network.recurrent
        memory = 2 * recurrent + action + 1 if recurrent else 0  # the state, and the last action and reward
        return action + parameters + memory

    def env_options(self) -> dict[str, Any]:
        """What :func:`offtrace.modules.envs.make_env` gets besides name, number and seed."""
        options = self.env.options()
        if self.rescale_actions:
            options["rescale_actions"] = True
        if self.network.recurrent:
            options["last_step"] = True
        return options

    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint says of the task, so that its policy can be evaluated."""
        return {"env": {"name": self.task, "options": self.env_options()}, "eval_mode": self.train.eval_mode}

    def updates_per_push(self) -> int:
        """Learner updates between two pushes of weights to the actors."""
        return self.collector.sync_every or 1

    def forced_lag(self) -> int:
        """Least age, in updates, of the weights that the actors get."""
        return self.collector.lag

    def validate(self) -> None:
        """Check every value that can be checked without starting anything; subclasses add checks across groups.

        Raises:
            ConfigError: one sentence that names the flag, its value and what would be right.
        """
        for field in fields(self):
            check_group(getattr(self, field.name), field.name)
        if self.env.shows_images is not None:
            self.network.check_reads(self.task, self.env.shows_images)
        threads = self.collector.emulator_threads
        if threads > 1 and not self.env.is_atari:
            raise ConfigError(
                f"collector.emulator_threads is {threads}, which only Atari games have; {self.task} is none: it must "
                "be 1"
            )
        self.check_actions()

    def check_actions(self, actions: Literal["discrete", "continuous"] | None = None) -> None:
        """Check that the task's actions are such as the algorithm can choose, and its estimator correct.

        Args:
            actions: of the task; None: what is known of them without running the user's code.

        Raises:
            ConfigError: one sentence.
        """
        from offtrace.agents.config.estimator import check_actions  # imports this module

        found = actions or known_actions(self.task)
        if self.actions != "any" and found not in (None, self.actions):
            raise ConfigError(
                f"env.task is {self.task}, whose actions are {found}; {self.algorithm} needs {self.actions} ones"
            )
        if self.values == "action":
            check_actions("loss", self.loss.estimator, self.task, found)
        if found == "discrete":
            for path in self.continuous_only:
                group, name = path.split(".")
                value, default = (getattr(x, name) for x in (getattr(self, group), type(getattr(self, group))()))
                if value != default:
                    raise ConfigError(
                        f"{path} is {value}; the actions of {self.task} are discrete, for which it is not read: it "
                        f"must be {default}"
                    )
        if found is not None:
            self.check_kind(found)

    def check_kind(self, kind: Literal["discrete", "continuous"]) -> None:
        """Check what depends on the kind of the task's actions, which is known.

        Raises:
            ConfigError: one sentence.
        """

    def check_devices(self, gpus: int) -> None:
        """Check that this machine, with ``gpus`` GPUs, has what the run asks for.

        Raises:
            ConfigError: one sentence.
        """
        wanted, accelerator = self.train.devices, self.train.accelerator
        cores = available_cores()
        if accelerator == "gpu" and not gpus:
            raise ConfigError("train.accelerator is gpu; this machine has none that torch can use")
        if accelerator != "cpu" and gpus:
            if wanted > gpus:
                raise ConfigError(f"train.devices is {wanted}; this machine has {count(gpus, 'GPU')}")
        elif wanted > cores:
            raise ConfigError(
                f"train.devices is {wanted}; this machine has {count(cores, 'core')} for learners on the CPU"
            )
        kind, _, number = self.collector.device.partition(":")
        if kind == "cuda" and int(number or 0) >= gpus:
            raise ConfigError(f"collector.device is {self.collector.device}; this machine has {count(gpus, 'GPU')}")


def check_group(group: Group, at: str) -> None:
    """As :meth:`Group.check`, and no field may be null that takes none: a file may hold it anywhere."""
    for field in fields(group):  # type: ignore[arg-type]  # subclasses are dataclasses
        takes_null = any(word in str(field.type) for word in ("None", "Optional", "Any"))
        if getattr(group, field.name) is None and not takes_null:
            usual = getattr(type(group)(), field.name)
            raise ConfigError(f"{at}.{field.name} is null; it must have a value, such as {usual}")
    group.check(at)
