"""Soft actor-critic: python recipes/sac_control.py [--env.task walker-walk] [--loss.target retrace] [--help]"""

from __future__ import annotations

import sys

from offtrace.agents.sac_config import SACConfig, discrete_sac_config, pixel_sac_config, sac_v1_config
from offtrace.recipes.cli import run_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return run_recipe(
        argv,
        presets={
            "default": SACConfig,
            "discrete": discrete_sac_config,
            "pixels": pixel_sac_config,
            "v1": sac_v1_config,
        },
        description="Soft actor-critic. Without flags: cartpole-swingup of dm_control, half a million steps.",
    )


if __name__ == "__main__":
    sys.exit(main())
