"""MPO: python recipes/mpo_control.py [--env.task walker-walk] [--preset dmpo] [--help]"""

from __future__ import annotations

import sys
from functools import partial

from offtrace.agents.mpo import control_config, discrete_config, dmpo_config, full_covariance_config
from offtrace.recipes.cli import run_recipe

main = partial(
    run_recipe,
    presets={
        "default": control_config,
        "discrete": discrete_config,
        "dmpo": dmpo_config,
        "full": full_covariance_config,
    },
    description="MPO. Without flags: cartpole-swingup of dm_control, half a million steps.",
)

if __name__ == "__main__":
    sys.exit(main())
