"""IMPALA on Atari: python recipes/impala_atari.py [--env.game breakout] [--preset paper] [--help]"""

from __future__ import annotations

import sys

from offtrace.agents.config import default_config, paper_config
from offtrace.recipes.cli import run_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return run_recipe(
        argv,
        presets={"default": default_config, "paper": paper_config},
        description="IMPALA on Atari. Without flags: Pong, fifteen million frames, this machine's devices.",
    )


if __name__ == "__main__":
    sys.exit(main())
