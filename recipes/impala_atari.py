"""IMPALA on Atari: python recipes/impala_atari.py [--env.task breakout] [--preset replay] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.impala import atari_config, laser_config, paper_config, replay_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": atari_config, "paper": paper_config, "replay": replay_config, "laser": laser_config},
    description="IMPALA on Atari. Without flags: Pong, fifteen million frames, the actors that fit this machine.",
)

if __name__ == "__main__":
    sys.exit(main())
