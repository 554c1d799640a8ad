"""IMPALA on control tasks: python recipes/impala_control.py [--preset pendulum] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.impala import control_config, laser_control_config, pendulum_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "pendulum": pendulum_config, "laser": laser_control_config},
    description="IMPALA on control tasks. Without flags: CartPole; --preset pendulum for continuous actions.",
)

if __name__ == "__main__":
    sys.exit(main())
