"""DQN: python recipes/dqn.py [--preset atari] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.dqn import atari_config, control_config, rainbow_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "atari": atari_config, "rainbow": rainbow_config},
    description="DQN. Without flags: CartPole, 50,000 steps; --preset atari for Pong.",
)

if __name__ == "__main__":
    sys.exit(main())
