"""V-MPO, on-policy: python recipes/vmpo_control.py [--env.game CartPole-v1] [--help]"""

from __future__ import annotations

import sys

from offtrace.agents.mpo_config import VMPOConfig
from offtrace.recipes.cli import run_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return run_recipe(
        argv, presets={"default": VMPOConfig}, description="V-MPO. Without flags: CartPole, 300,000 steps."
    )


if __name__ == "__main__":
    sys.exit(main())
