"""TRPO: python recipes/trpo.py [--preset pendulum] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.trpo import atari_config, control_config, pendulum_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "atari": atari_config, "pendulum": pendulum_config},
    description="TRPO. Without flags: CartPole, 100,000 steps; --preset pendulum for continuous actions.",
)

if __name__ == "__main__":
    sys.exit(main())
