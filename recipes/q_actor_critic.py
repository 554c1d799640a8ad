"""Actor-critic with action values: python recipes/q_actor_critic.py [--preset atari] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.q_actor_critic import atari_config, control_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config, "atari": atari_config},
    description="An actor-critic with Retrace. Without flags: CartPole; --preset atari for Pong.",
)

if __name__ == "__main__":
    sys.exit(main())
