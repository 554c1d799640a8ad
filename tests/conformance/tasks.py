"""One small task of every kind that agents act in, by import path."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor, nn

LENGTH = 6


class Task(gymnasium.Env[Any, Any]):
    """Episodes of six steps, the third of them sometimes a termination; the reward depends on the action."""

    observation_space: spaces.Space[Any] = spaces.Box(-1, 1, (3,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), self.info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.check(action)
        terminated = self.steps == 3 and bool(self.np_random.random() < 0.3)
        reward = float(np.mean(action)) * 0.1
        return self.observation_space.sample(), reward, terminated, self.steps == LENGTH, self.info()

    def info(self) -> dict[str, Any]:
        return {}

    def check(self, action: Any) -> None:
        assert self.action_space.contains(action), action


class Vector(Task):
    """Vectors, discrete actions."""


class Continuous(Task):
    """Vectors, continuous actions."""

    action_space = spaces.Box(-2, 2, (2,), np.float32)


class Images(Task):
    """Images, discrete actions."""

    observation_space = spaces.Box(0, 255, (3, 24, 24), np.uint8)


class ContinuousImages(Images):
    """Images, continuous actions."""

    action_space = spaces.Box(-2, 2, (2,), np.float32)


class Masked(Task):
    """Illegal actions, others in every step; an illegal one is an error."""

    def info(self) -> dict[str, Any]:
        self.mask = np.ones(3, np.int8)
        self.mask[self.np_random.integers(3)] = 0
        return {"action_mask": self.mask}

    def check(self, action: Any) -> None:
        assert self.legal[action] == 1, f"action {action} is illegal: {self.legal}"

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.legal = self.mask
        return super().step(action)


class MultiDiscrete(Task):
    """Two discrete actions at once."""

    action_space = spaces.MultiDiscrete([2, 3])


class Dictionary(Task):
    """Observations that are dictionaries."""

    observation_space = spaces.Dict(
        {"position": spaces.Box(-1, 1, (2,), np.float32), "gear": spaces.Discrete(3), "speed": spaces.Box(-1, 1, (1,))}
    )


class OwnEncoder(nn.Module):
    """A network of the user's that reads the dictionary by name."""

    def __init__(self, shapes: dict[str, Any], hidden: Any) -> None:
        super().__init__()
        self.position = nn.Linear(shapes["position"][0], 8)
        self.speed = nn.Linear(shapes["speed"][0], 8)
        self.out_features = 8

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return (self.position(x["position"]) + self.speed(x["speed"])).tanh()


def own_encoder(shapes: Any, hidden: Any) -> OwnEncoder:
    """As ``network.encoder``."""
    return OwnEncoder(shapes, hidden)
