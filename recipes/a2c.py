"""A2C: python recipes/a2c.py [--preset atari] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.a2c import atari_config, control_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "atari": atari_config},
    description="A2C. Without flags: CartPole, 500,000 steps; --preset atari for Pong.",
)

if __name__ == "__main__":
    sys.exit(main())
