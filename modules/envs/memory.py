"""Tasks that only an agent with a memory solves, by import path."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

_POSITIONS = [0, 2]
"""Of the cart and of the pole's angle; the velocities stand behind each."""


def cartpole_positions() -> gymnasium.Env[Any, Any]:
    """CartPole-v1 without its two velocities, which have to be inferred from the positions seen so far."""
    env = gymnasium.make("CartPole-v1")
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    seen = gymnasium.spaces.Box(space.low[_POSITIONS], space.high[_POSITIONS], dtype=np.float32)
    return gymnasium.wrappers.TransformObservation(env, lambda observation: observation[_POSITIONS], seen)
