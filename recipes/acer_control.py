"""ACER on vectors: python recipes/acer_control.py [--preset continuous] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.acer import continuous_config, control_config, pendulum_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "continuous": continuous_config, "pendulum": pendulum_config},
    description="ACER. Without flags: CartPole, 150,000 steps; for continuous actions begin with --preset continuous, "
    "cartpole-swingup of dm_control, or pendulum.",
)

if __name__ == "__main__":
    sys.exit(main())
