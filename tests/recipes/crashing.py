"""A task that takes its process with it; it imports little, because every actor does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from gymnasium.envs.classic_control import PendulumEnv


class Crashing(PendulumEnv):
    """Episodes of three steps; ends its process at step 12, the first time that one comes there."""

    steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 12:
            with contextlib.suppress(FileExistsError):
                Path("again").touch(exist_ok=False)
                os._exit(1)
        observation, reward, _, _, info = super().step(action)
        return observation, float(reward), False, self.steps % 3 == 0, info
