"""Reactor on Atari: python recipes/reactor_atari.py [--env.task breakout] [--preset paper] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.reactor import atari_config, paper_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": atari_config, "paper": paper_config},
    description="Reactor on Atari. Without flags: Pong, forty million frames.",
)

if __name__ == "__main__":
    sys.exit(main())
