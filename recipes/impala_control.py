"""IMPALA on control tasks of Gymnasium: python recipes/impala_control.py [--preset pendulum] [--help]"""

from __future__ import annotations

import sys

from offtrace.agents.config import control_config, pendulum_config
from offtrace.recipes.cli import run_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return run_recipe(
        argv,
        presets={"default": control_config, "pendulum": pendulum_config},
        description="IMPALA on control tasks. Without flags: CartPole; --preset pendulum for continuous actions.",
    )


if __name__ == "__main__":
    sys.exit(main())
