"""Pictures of a run: the learning curve and a recorded episode."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchrl.envs import EnvBase

from offtrace.agents.runs.folders import metric_parts
from offtrace.modules.keys import EPISODE_END, NEXT, OBSERVATION

Curve = list[tuple[int, float]]


def read_curves(metrics: Path) -> tuple[Curve, Curve]:
    """Training returns and evaluation scores, ``(frames, value)``, from a run's ``metrics.csv`` and its earlier parts.

    A run that was stopped and resumed trained the frames behind its last checkpoint twice; the later time counts.

    Raises:
        OSError: if there is neither such a file nor a part of one.
    """
    parts = metric_parts(metrics)
    if metrics.exists() or not parts:
        parts.append(metrics)
    rows: list[dict[str, str]] = []
    for part in parts:
        with open(part, newline="") as file:
            later = [row for row in csv.DictReader(file) if row.get("step")]
        if later:
            # the first row of a part stands at the frames of its checkpoint, where the part before may end with a score
            rows = [row for row in rows if int(row["step"]) <= int(later[0]["step"])] + later
    training = [(int(row["step"]), float(row["train/return"])) for row in rows if row.get("train/return")]
    scores = [(int(row["step"]), float(row["eval/return"])) for row in rows if row.get("eval/return")]
    return training, scores


def plot_curve(runs: dict[str, Path], out: Path, *, title: str = "", goal: float | None = None) -> None:
    """Draws return against environment frames for one or several runs into a PNG.

    Args:
        runs: label to ``metrics.csv``; training returns are thin lines, evaluation scores lines with dots.
        out: the PNG.
        title: above it.
        goal: a dashed line.

    Raises:
        OSError: if a file cannot be read or written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {label: read_curves(path) for label, path in runs.items()}
    for index, (label, (training, scores)) in enumerate(curves.items()):
        color = f"C{index}"
        if training:
            x, y = zip(*training, strict=True)
            thin = None if scores else label
            axes.plot([frames / 1e6 for frames in x], y, color=color, alpha=0.35, linewidth=1, label=thin)
        if scores:
            x, y = zip(*scores, strict=True)
            axes.plot([frames / 1e6 for frames in x], y, color=color, marker="o", markersize=3, label=label)
    if goal is not None:
        axes.axhline(goal, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("environment frames (millions)")
    axes.set_ylabel("return of a whole episode")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if any(map(any, curves.values())):
        # below the axes: several curves leave no corner free
        figure.legend(title="evaluation (dots), training (thin)", loc="outside lower center", ncols=3)
    figure.savefig(out, dpi=130)


class Recorder:
    """Keeps the first episode of the first environment, as an observer of :func:`offtrace.agents.evaluate`.

    Its pictures are what the environment renders, every fourth one, because rendering costs more than a step; or where
    it does not render, the newest image of every observation.

    Args:
        env: batched ``[N]``.

    Raises:
        ValueError: if ``env`` neither renders nor has observations that are images.

    Attributes:
        frames: uint8 ``[H, W, 3]``, or ``[H, W]`` from observations.
    """

    every = 4

    def __init__(self, env: EnvBase) -> None:
        self.frames: list[np.ndarray] = []
        self._render: Callable[[], np.ndarray] | None = env.render if getattr(env, "renders", False) else None
        if self._render is None and len(env.observation_spec[OBSERVATION].shape) != 4:
            raise ValueError(
                f"{getattr(env, 'name', 'the task')} has no pictures: it does not render, and its observations are no "
                "images"
            )
        self._steps = 0
        self._over = False

    def __call__(self, step: Any) -> None:
        """Notes a step's TensorDict ``[N]``.

        Raises:
            EnvironmentFailure: this machine cannot render.
        """
        if self._over:
            return
        self._over = bool(step[NEXT, EPISODE_END][0].any())
        if self._render is None:
            self.frames.append(step[OBSERVATION][0, -1].cpu().numpy().copy())
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
