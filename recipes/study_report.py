"""What the study of stale actors writes: a table with intervals, a figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offtrace.recipes.studies import line, number


@dataclass(frozen=True, order=True)
class Cell:
    """One training of the study."""

    task: str
    replay: float
    """Share of a batch's unrolls that comes from the replay."""
    arm: str
    lag: int
    """Age in updates of the weights that act."""
    seed: int
    updates: int
    settings: str
    """What else the training depends on, see :meth:`Task.digest`; other settings make another training."""


@dataclass(frozen=True)
class Result:
    """What came of it. Means over the updates, except the returns."""

    score: float
    """Mean return of the learner's policy over the evaluations of the last half."""
    final: float
    """Mean return of the last evaluation."""
    trace_length: float
    ess: float
    kl: float
    """Of the acting to the learner's policy, nats."""
    skipped: int
    """Updates left out because their gradient was not finite."""
    frames: int
    seconds: float


Rows = dict[Cell, Result]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by the percentile bootstrap; of one value, that value."""
    from scipy.stats import bootstrap

    if len(set(values)) < 2:
        return values[0], values[0]
    found = bootstrap((np.asarray(values),), np.mean, method="percentile", n_resamples=4000, rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def grouped(rows: Rows, value: str) -> dict[tuple[str, float], dict[str, dict[int, list[float]]]]:
    """Values of the seeds by (task, replay), arm and lag."""
    out: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for cell, result in sorted(rows.items(), key=lambda item: item[0]):
        out[cell.task, cell.replay][cell.arm][cell.lag].append(getattr(result, value))
    return out


def write_table(path: Path, rows: Rows, *, arms: Iterable[str]) -> None:
    """Markdown, for each task and share of replay: arm by lag, mean return [95 % interval], and trace lengths."""
    lines = []
    traces = grouped(rows, "trace_length")
    for (task, replay), table in grouped(rows, "score").items():
        lags = sorted({lag for by_lag in table.values() for lag in by_lag})
        title = f"**{task}, {replay:.0%} replay**"
        single = all(len(values) == 1 for by_lag in table.values() for values in by_lag.values())
        kind = "one seed, which proves nothing" if single else "mean [95 % interval]"
        for heading, source, show in (
            (f"{title}: return by lag, {kind}", table, _with_interval),
            (f"{title}: steps a trace carries, by lag", traces[task, replay], _mean),
        ):
            lines += [heading, "", line(["arm", *map(str, lags)]), line(["---"] * (len(lags) + 1))]
            shown = [name for name in arms if name in source]
            lines += [line([name, *(show(source[name].get(lag, [])) for lag in lags)]) for name in shown]
            lines.append("")
    path.write_text("\n".join(lines))


def _mean(values: list[float]) -> str:
    return number(float(np.mean(values))) if values else ""


def _with_interval(values: list[float]) -> str:
    if not values:
        return ""
    low, high = interval(values)
    return f"{_mean(values)} [{number(low)}, {number(high)}]" if len(values) > 1 else _mean(values)


def draw(path: Path, rows: Rows, *, arms: Sequence[str]) -> None:
    """A PNG: return and trace length against lag, one line with its interval per arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = list(grouped(rows, "score"))
    figure = Figure(figsize=(3.6 * len(columns) + 1, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True)
    labels: dict[str, Any] = {}
    for level, (value, name) in enumerate((("score", "return"), ("trace_length", "steps a trace carries"))):
        for axis, key in zip(axes[level], columns, strict=True):
            for index, arm in enumerate(arms):
                by_lag = grouped(rows, value)[key].get(arm, {})
                if not by_lag:
                    continue
                lags = sorted(by_lag)
                low, high = zip(*(interval(by_lag[lag]) for lag in lags), strict=True)
                means = [np.mean(by_lag[lag]) for lag in lags]
                (drawn,) = axis.plot(lags, means, color=f"C{index}", marker="o", markersize=3, label=arm)
                axis.fill_between(lags, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
                labels[arm] = drawn
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks(sorted({cell.lag for cell in rows}), [str(x) for x in sorted({c.lag for c in rows})])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if level == 0:
                axis.set_title(f"{key[0]}, {key[1]:.0%} replay")
            else:
                axis.set_xlabel("lag of the actors (updates)")
        axes[level][0].set_ylabel(name)
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=110)
