"""The task, whatever kind it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offtrace.agents.config.base import Checks, ConfigError, Group
from offtrace.modules.envs.names import ATARI_FRAME_SKIP, atari_name, check_name, check_task_options, task_kind


@dataclass
class EnvConfig(Group):
    """The task."""

    task: str = "pong"
    """Atari game, Gymnasium id, domain-task of dm_control, or import path package.module:function of an own one."""
    num_envs: int = 16
    """Environments per actor."""
    protocol: Literal["classic", "sticky"] = "classic"
    """Atari only: classic (no-op starts, life loss ends an episode in training) or sticky (Machado et al. 2018)."""
    action_repeat: int = 1
    """dm_control only: steps of the task per action."""
    pixels: bool = False
    """dm_control only: observe images."""
    flatten: bool = True
    """Observations that are dictionaries become one vector; false: a network of your own reads them by name."""

    def options(self) -> dict[str, Any]:
        """What is not usual, as :func:`offtrace.modules.envs.make_env` takes it."""
        usual = EnvConfig()
        names = ("protocol", "action_repeat", "pixels", "flatten")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(usual, name)}

    @property
    def is_atari(self) -> bool:
        """Whether the task is an Atari game."""
        return atari_name(self.task) is not None

    @property
    def frame_skip(self) -> int:
        """Environment frames per agent step, as far as the name tells: an own task may have others."""
        return ATARI_FRAME_SKIP if self.is_atari else self.action_repeat

    @property
    def shows_images(self) -> bool | None:
        """Whether observations are images; None where the task has to be made to know."""
        kind = task_kind(self.task)
        return True if kind == "atari" else self.pixels if kind == "dm_control" else None

    def check(self, at: str) -> None:
        """As :meth:`Group.check`; the task is known, and has the options that are given."""
        Checks(self, at).at_least(1, "num_envs", "action_repeat")
        try:
            check_name(self.task)
        except ValueError as error:
            raise ConfigError(f"{at}.task: {error}") from error
        try:
            check_task_options(self.task, self.options())
        except ValueError as error:
            message = str(error).replace("True", "true").replace("False", "false")  # as flags are written
            raise ConfigError(f"{at}.{message}") from error
