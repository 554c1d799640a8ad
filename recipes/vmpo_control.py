"""V-MPO, on-policy: python recipes/vmpo_control.py [--env.task CartPole-v1] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.vmpo import control_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={"default": control_config},
    description="V-MPO. Without flags: CartPole, 300,000 steps.",
)

if __name__ == "__main__":
    sys.exit(main())
