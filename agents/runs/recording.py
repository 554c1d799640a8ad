"""The recorded episode of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchrl.envs import EnvBase

from offtrace.modules.keys import EPISODE_END, NEXT, OBSERVATION, VALID


class Recorder:
    """Keeps the first episode of the first environment, as an observer of :func:`offtrace.agents.evaluate`.

    Its pictures are what the environment renders, every fourth one, because rendering costs more than a step; or where
    it does not render, every observation: its newest image, or the colours where it has three channels and is no stack.

    Args:
        env: batched ``[N]``.

    Raises:
        ValueError: if ``env`` neither renders nor has observations that are images.

    Attributes:
        frames: uint8 ``[H, W, 3]``, or ``[H, W]`` without colours.
    """

    every = 4

    def __init__(self, env: EnvBase) -> None:
        self.frames: list[np.ndarray] = []
        self._render: Callable[[], np.ndarray] | None = env.render if getattr(env, "renders", False) else None
        shape = env.observation_spec[OBSERVATION].shape
        if self._render is None and len(shape) != 4:
            raise ValueError(
                f"{getattr(env, 'name', 'the task')} has no pictures: it does not render, and its observations are no "
                "images"
            )
        self._colours = len(shape) == 4 and shape[1] == 3 and getattr(env, "frame_stack", 1) == 1
        self._steps = 0
        self._over = False

    def __call__(self, step: Any) -> None:
        """Notes a step's TensorDict ``[N]``.

        Raises:
            EnvironmentFailure: this machine cannot render.
        """
        if self._over:
            return
        valid = step.get((NEXT, VALID), None)  # False: the simulator failed, and the episode has no end
        self._over = bool(step[NEXT, EPISODE_END][0].any()) or (valid is not None and not bool(valid[0].all()))
        if self._render is None:
            image = step[OBSERVATION][0].cpu()
            self.frames.append((image.permute(1, 2, 0) if self._colours else image[-1]).numpy().copy())
        elif self._over or self._steps % self.every == 0:
            self.frames.append(self._render())
        self._steps += 1

    def save(self, out: Path) -> None:
        """Writes the episode as a GIF; raises as :func:`save_gif`."""
        if self._render is None:
            save_gif(self.frames, out)
        else:
            save_gif(self.frames, out, fps=25, scale=1)


def save_gif(frames: Sequence[np.ndarray], out: Path, *, fps: int = 15, scale: int = 2, limit: int = 1200) -> None:
    """Writes grey ``[H, W]`` or colour ``[H, W, 3]`` uint8 frames as an animated GIF, without ffmpeg.

    Args:
        frames: at least one.
        out: the GIF.
        fps: of the playback.
        scale: each pixel becomes a square of this side.
        limit: of more frames than this, evenly spread ones are kept.

    Raises:
        ValueError: if there are no frames.
        OSError: if the file cannot be written.
    """
    if not frames:
        raise ValueError("a GIF needs at least one frame, got none")
    stride = -(-len(frames) // limit)
    images = []
    for frame in frames[::stride]:
        image = Image.fromarray(frame)
        images.append(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST))
    images[0].save(out, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, optimize=False)
