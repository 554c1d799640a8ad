"""The learning curves of runs, read from their metrics, and their figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offtrace.agents.runs.folders import metric_parts

Curve = list[tuple[int, float]]
"""Environment frames and a value, in ascending order."""


_TRAINING, _SCORE, _SECONDS = _COLUMNS = ("train/return", "eval/return", "train/seconds")
"""Where ``metrics.csv`` has what :class:`Curves` names, in its order."""
_KEPT = 200
"""Points of a written curve of training or time."""
_THIN: dict[str, Any] = {"alpha": 0.35, "linewidth": 1}
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3}


class Curves(NamedTuple):
    """What a run has logged.

    Attributes:
        training: mean return of the last hundred training episodes.
        scores: of the evaluations.
        seconds: that training had taken, evaluations left out; empty where a part of the run did not log them.
    """

    training: Curve
    scores: Curve
    seconds: Curve

    def seconds_at(self, frames: Sequence[float]) -> NDArray[np.float64]:
        """Seconds of training until each of ``frames``, in a straight line between what was logged."""
        return np.interp(frames, *np.array([(0, 0.0), *self.seconds]).T)


def read_curves(metrics: Path) -> Curves:
    """The curves of a run's ``metrics.csv`` and its earlier parts.

    A run that was stopped and resumed trained the frames behind its last checkpoint twice; the later time counts.

    Raises:
        OSError: if there is neither such a file nor a part of one.
    """
    parts = metric_parts(metrics)
    if metrics.exists() or not parts:
        parts.append(metrics)
    rows: list[dict[str, str]] = []
    timed = True  # whether every part tells its seconds
    for part in parts:
        with open(part, newline="") as file:
            later = [row for row in csv.DictReader(file) if row.get("step")]
        if later:
            timed = (timed or not rows) and any(row.get(_SECONDS) for row in later)
            rows = [row for row in rows if int(row["step"]) <= int(later[0]["step"])] + later

    def column(name: str) -> Curve:
        return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]

    training, scores, seconds = map(column, _COLUMNS)
    return Curves(training, scores, seconds if timed else [])


def write_curves(curves: Curves, metrics: Path) -> None:
    """Writes what :func:`read_curves` reads: every score, and of longer curves 200 points, evenly, with both ends.

    Args:
        curves: of a run.
        metrics: the file, in a folder that may not exist yet.

    Raises:
        OSError: if the file cannot be written.
    """
    rows: dict[int, dict[str, float]] = {}
    for name, curve in zip(_COLUMNS, curves, strict=True):
        kept = len(curve) if name == _SCORE else min(_KEPT, len(curve))
        for place in np.linspace(0, len(curve) - 1, kept).round().astype(int):
            frames, value = curve[place]
            rows.setdefault(frames, {})[name] = value
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with open(metrics, "w", newline="") as file:
        writer = csv.DictWriter(file, ("step", *_COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": frames, **rows[frames]} for frames in sorted(rows))


def time_unit(seconds: float) -> tuple[str, float]:
    """What to tell so many seconds in: a name, and its seconds."""
    return ("hours", 3600.0) if seconds >= 600 else ("minutes", 60.0)


def plot_curves(
    runs: Mapping[str, Sequence[Curves]],
    out: Path,
    *,
    title: str = "",
    goal: float | None = None,
    against_time: bool = False,
) -> None:
    """Draws return against environment frames for one or several runs into a PNG.

    Args:
        runs: label to the curves of its runs, which have one colour; training returns are thin lines, evaluation
            scores lines with dots.
        out: the PNG.
        title: above it.
        goal: a dashed line.
        against_time: a second panel, against hours or minutes of training, of the runs that know them.

    Raises:
        OSError: if the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours: list[Any] = [f"C{index}" for index in range(len(runs))]
    if len(runs) > 10:  # of which there are no more
        colours = list(colormaps["turbo"](np.linspace(0, 1, len(runs))))
    figure = Figure(figsize=(10 if against_time else 7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ends = [one.seconds[-1][1] for several in runs.values() for one in several if one.seconds]
    unit, length = time_unit(max(ends, default=0.0))
    drawn = [curve for several in runs.values() for one in several for curve in (one.training, one.scores) if curve]
    scale, divisor = ("millions", 1e6) if any(curve[-1][0] >= 1e6 for curve in drawn) else ("thousands", 1e3)
    panels = figure.subplots(1, 1 + against_time, squeeze=False, sharey=True)[0]
    for colour, several in zip(colours, runs.values(), strict=True):
        for curves in several:
            for curve, look in ((curves.training, _THIN), (curves.scores, _DOTS)):
                frames, values = [x for x, _ in curve], [y for _, y in curve]
                panels[0].plot(np.divide(frames, divisor), values, color=colour, **look)
                if against_time and curves.seconds:
                    panels[1].plot(curves.seconds_at(frames) / length, values, color=colour, **look)
    for panel, name in zip(panels, (f"environment frames ({scale})", f"{unit} of training"), strict=False):
        if goal is not None:
            panel.axhline(goal, color="0.5", linestyle="--", linewidth=1)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("return of a whole episode")
    figure.suptitle(title, parse_math=False)
    handles = [Line2D([], [], color=colour, label=label, **_DOTS) for colour, label in zip(colours, runs, strict=True)]
    columns = max(1, int(10 * figure.get_figwidth()) // (max(map(len, runs)) + 6))  # letters that a line holds
    # below the axes: several curves leave no corner free
    legend = figure.legend(
        handles=handles, title="evaluation (dots), training (thin)", loc="outside lower center", ncols=min(6, columns)
    )
    for label in legend.get_texts():
        label.set_parse_math(False)  # a label may hold any letter
    figure.savefig(out, dpi=130)
