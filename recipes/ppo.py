"""PPO: python recipes/ppo.py [--preset atari] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.ppo import atari_config, control_config, mujoco_config, paper_config, pendulum_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={
        "default": control_config, "atari": atari_config, "paper": paper_config, "pendulum": pendulum_config,
        "mujoco": mujoco_config,
    },
    description="PPO. Without flags: CartPole, 100,000 steps; --preset atari for Pong, paper for Pong at the published "
    "settings, mujoco for HalfCheetah.",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
