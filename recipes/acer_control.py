"""ACER on vectors: python recipes/acer_control.py [--env.task Acrobot-v1] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.acer import control_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config},
    description="ACER. Without flags: CartPole, 500,000 steps.",
)

if __name__ == "__main__":
    sys.exit(main())
