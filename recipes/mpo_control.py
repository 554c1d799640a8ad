"""MPO: python recipes/mpo_control.py [--env.task walker-walk] [--preset dmpo] [--help]"""

from __future__ import annotations

import sys

from offtrace.agents.mpo_config import MPOConfig, discrete_mpo_config, dmpo_config, full_covariance_config
from offtrace.recipes.cli import run_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    return run_recipe(
        argv,
        presets={
            "default": MPOConfig,
            "discrete": discrete_mpo_config,
            "dmpo": dmpo_config,
            "full": full_covariance_config,
        },
        description="MPO. Without flags: cartpole-swingup of dm_control, half a million steps.",
    )


if __name__ == "__main__":
    sys.exit(main())
