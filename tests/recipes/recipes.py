"""The recipes that train, by name: what each begins with, and its whole command line at a tiny budget."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from offtrace.agents.config import Config
from offtrace.recipes import cli

TRAINING = (
    "impala_atari", "impala_control", "a2c", "ppo", "trpo", "q_actor_critic", "vmpo_control", "acer_atari",
    "acer_control", "dqn", "sac_control", "mpo_control", "reactor_atari", "reactor_control",
)  # fmt: skip
ON_ROLLOUTS = ("impala_atari", "impala_control", "a2c", "ppo", "q_actor_critic", "vmpo_control")
WHOLE = ("trpo",)
"""On rollouts that are not dealt."""
MIXING = ("acer_atari", "acer_control")


def main_of(name: str) -> Callable[[list[str]], int]:
    """The recipe's whole command line."""
    main: Callable[[list[str]], int] = import_module(f"offtrace.recipes.{name}").main
    return main


def presets_of(name: str) -> dict[str, Callable[[], Config]]:
    """What the recipe can begin with."""
    main: Any = main_of(name)
    found: dict[str, Callable[[], Config]] = main.keywords["presets"]
    return found


def parse(name: str, *argv: str) -> Config:
    """The configuration of a recipe's command line."""
    return cli.parse(list(argv), presets=presets_of(name), description="").config


EVERY_PRESET = [(name, preset) for name in TRAINING for preset in presets_of(name)]
