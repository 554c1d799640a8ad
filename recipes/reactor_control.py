"""Reactor on vectors: python recipes/reactor_control.py [--preset memory] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.reactor import control_config, memory_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "memory": memory_config},
    description="Reactor. Without flags: CartPole; --preset memory for CartPole without velocities.",
)

if __name__ == "__main__":
    sys.exit(main())
