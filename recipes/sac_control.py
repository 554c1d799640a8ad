"""Soft actor-critic: python recipes/sac_control.py [--env.task walker-walk] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.sac import control_config, discrete_config, pixel_config, v1_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "discrete": discrete_config, "pixels": pixel_config, "v1": v1_config},
    description="Soft actor-critic. Without flags: cartpole-swingup of dm_control, half a million steps.",
)

if __name__ == "__main__":
    sys.exit(main())
