"""What a comparison writes: statistics of few seeds, a table and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtrace.agents.config import count
from offtrace.agents.runs.atari_scores import RANDOM_HUMAN
from offtrace.modules.envs.names import atari_name, task_kind
from offtrace.recipes.compare_run import RANDOM
from offtrace.recipes.studies import line, number

RESAMPLES = 10_000

BEST = {
    "CartPole-v1": 500.0,  # the most that there is
    "Acrobot-v1": -69.1,  # RL Baselines3 Zoo's benchmark, QR-DQN
    "Pendulum-v1": -150.0,  # the same, TQC
    "Taxi-v4": 7.93,  # the most that there is: value iteration, mean over its starts
    "offtrace.modules.envs.catch:Catch": 1.0,  # the most that there is
    "offtrace.modules.envs.memory:cartpole_positions": 500.0,  # the most that there is
}
"""Best known scores, where a user gives no other."""


def best_known(task: str) -> float | None:
    """The best known score of a task: of Atari games that of a human tester, of dm_control the most that there is."""
    if task in BEST:
        return BEST[task]
    kind = task_kind(task)
    if kind == "atari":
        return RANDOM_HUMAN.get(atari_name(task) or "", (0.0, None))[1]
    return 1000.0 if kind == "dm_control" else None


def interquartile_mean(values: Any, axis: int | None = None) -> Any:
    """Mean of the middle half: a quarter of the values, rounded down, is left out at each end."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def stratified_interval(strata: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the interquartile mean of all values, by the percentile bootstrap.

    The values of each stratum, which are the seeds of one task, are drawn anew among themselves (Agarwal et al. 2021,
    arXiv 2108.13264, whose library rliable does the same and needs seven packages that are not here).
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(np.asarray(values, float), (RESAMPLES, len(values))) for values in strata]
    means = interquartile_mean(np.concatenate(drawn, axis=1), axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Scores:
    """The scores of one task.

    Attributes:
        task: its name.
        best: the best known score.
        by_agent: the score of every seed, by agent.
        speed: mean steps/s of every agent.
        failed: how many trainings of an agent have no score.
    """

    task: str
    best: float | None
    by_agent: dict[str, list[float]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def random(self) -> float | None:
        """Mean score of random actions; None where they have none."""
        found = self.by_agent.get(RANDOM)
        return float(np.mean(found)) if found else None

    def normalised(self, agent: str) -> NDArray[np.float64] | None:
        """Scores of an agent, 0 for random actions and 1 for the best known; None without these, or the best below."""
        if self.best is None or self.random is None or self.best <= self.random or not self.by_agent.get(agent):
            return None
        return (np.asarray(self.by_agent[agent]) - self.random) / (self.best - self.random)


def overall(tasks: Sequence[Scores], agents: Sequence[str]) -> dict[str, tuple[list[list[float]], float]]:
    """Normalised scores of every agent, a list for each task that it has some in, and their interquartile mean."""
    found = {}
    for agent in agents:
        strata = [x.tolist() for x in (task.normalised(agent) for task in tasks) if x is not None]
        if strata:
            found[agent] = strata, float(interquartile_mean(np.concatenate(strata)))
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def table(tasks: Sequence[Scores], agents: Sequence[str]) -> str:
    """Markdown: a table for each task, the best first, and one over the tasks."""
    lines = [text for task in tasks for text in _of_task(task)]
    found = overall(tasks, agents)
    if not found:
        return "\n".join(lines)
    lines += ["**Over the tasks**: interquartile mean of the normalised scores (0 random, 1 best known), and its 95 %"]
    lines += ["interval, by a bootstrap stratified by task", ""]
    lines += [line(["agent", "interquartile mean", "95 % interval", "tasks"]), line(["---"] * 4)]
    for agent, (strata, mean) in found.items():
        spread = "one seed, which proves nothing"
        if max(map(len, strata)) > 1:
            spread = ", ".join(map(number, stratified_interval(strata)))
        lost = sum(task.failed.get(agent, 0) for task in tasks)
        told = f"{len(strata)} of {len(tasks)}" + (f"; without {count(lost, 'failed training')}" if lost else "")
        lines.append(line([agent, number(mean), spread, told]))
    return "\n".join([*lines, ""])


def _of_task(scores: Scores) -> Iterator[str]:
    told = "no best known score" if scores.best is None else f"best known {number(scores.best)}"
    if scores.best is not None and scores.random is not None and scores.best <= scores.random:
        told += f", which is not above random actions, {number(scores.random)}: not normalised; --best gives another"
    yield f"**{scores.task}**, {told}"
    yield ""
    yield line(["agent", "mean", "interquartile range", "normalised mean", "seeds", "steps/s"])
    yield line(["---"] * 6)
    for agent, values in sorted(scores.by_agent.items(), key=lambda item: -np.mean(item[1])):
        normalised = scores.normalised(agent)
        low, high = np.percentile(values, [25, 75])
        yield line(
            [
                agent,
                number(float(np.mean(values))),
                f"{number(low)} to {number(high)}" if len(values) > 1 else "",
                "" if normalised is None else number(float(normalised.mean())),
                str(len(values))
                if not (lost := scores.failed.get(agent))
                else f"{len(values)} of {len(values) + lost}",
                f"{scores.speed[agent]:,.0f}" if agent != RANDOM else "",
            ]
        )
    yield ""


def draw(path: Path, tasks: Sequence[Scores], agents: Sequence[str]) -> None:
    """A PNG: of every task each seed, their mean and interquartile range; and the interquartile mean, its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    short = [task.task.rpartition(":")[2] for task in tasks]
    titles = {task.task: name if short.count(name) == 1 else task.task for task, name in zip(tasks, short, strict=True)}
    shown = [name for name in agents if any(task.by_agent.get(name) for task in tasks)]
    found = overall(tasks, agents)
    figure = Figure(figsize=(3.2 * (len(tasks) + bool(found)) + 1, 0.32 * len(shown) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks) + bool(found), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, tasks, strict=False):
        for place, name in enumerate(shown):
            values = task.by_agent.get(name)
            if values:
                axis.hlines(place, *np.percentile(values, [25, 75]), color=f"C{place}", linewidth=6, alpha=0.35)
                axis.plot(values, [place] * len(values), ".", color=f"C{place}")
                axis.plot(np.mean(values), place, "|", color=f"C{place}", markersize=12, markeredgewidth=2)
        for value in (task.random, task.best):
            if value is not None:
                axis.axvline(value, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(titles[task.task], parse_math=False)
        axis.set_xlabel("score of each seed, |: their mean\ndotted: random, best known")
    if found:
        for name, (strata, mean) in found.items():
            place = shown.index(name)
            axes[-1].hlines(place, *stratified_interval(strata), color=f"C{place}", linewidth=6, alpha=0.35)
            axes[-1].plot(mean, place, "o", color=f"C{place}")
        axes[-1].set_title("over the tasks")
        axes[-1].set_xlabel("interquartile mean, normalised")
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
