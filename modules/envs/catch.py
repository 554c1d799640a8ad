"""Catch as a game of images: learnt in minutes where an Atari game takes hours."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

ROWS, COLUMNS = 10, 7
_HEIGHT, _WIDTH = 8, 12  # pixels of a cell: the board fills 80 x 84 of the image


class Catch(gymnasium.Env[Any, Any]):
    """A ball falls from a random column, a row a step; the paddle in the last row moves left, stays or moves right.

    Nine steps and one reward, at the end: 1 if the paddle meets the ball, else -1. A random policy has about -0.7. As
    images for the Atari networks, uint8 ``[1, 84, 84]``. The task is bsuite's (Osband et al. 2020), on ten rows of
    seven columns.

    By name: ``--env.task offtrace.modules.envs.catch:Catch``.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self) -> None:
        self._row = self._ball = self._paddle = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """A new ball."""
        super().reset(seed=seed)
        self._row, self._ball, self._paddle = 0, int(self.np_random.integers(COLUMNS)), COLUMNS // 2
        return self._image(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """``action`` 0, 1 or 2: left, stay, right."""
        self._row += 1
        self._paddle = min(max(self._paddle + int(action) - 1, 0), COLUMNS - 1)
        over = self._row == ROWS - 1
        reward = (1.0 if self._ball == self._paddle else -1.0) if over else 0.0
        return self._image(), reward, over, False, {}

    def _image(self) -> Any:
        image = np.zeros((1, 84, 84), np.uint8)
        for row, column in ((self._row, self._ball), (ROWS - 1, self._paddle)):
            image[0, row * _HEIGHT : (row + 1) * _HEIGHT, column * _WIDTH : (column + 1) * _WIDTH] = 255
        return image
