"""The throughput table of IMPALA's paper (Espeholt et al. 2018, table 1) with the shipped agents, as Markdown.

    python benchmarks/architectures.py                    ten minutes on two cores
    python benchmarks/architectures.py --quick --figure architectures.png

Five ways to act and to learn, on Pong with the shallow network: unrolls of 20, one update on each batch of all actors'
unrolls, the same numbers of actors and games. Where the actors wait for each other is what differs: in the batched A2C
nobody acts while the learner learns; in IMPALA an actor waits only once it is a rollout ahead of what was learnt from.
Two tasks: the emulator, whose steps take about the same time always; and the same with simulators that take 0 to 20 ms
for a step of an actor's games, drawn anew for each, and 200 ms more where a game ends, without using a core meanwhile.
Every figure comes from a process of its own; those of one round follow each other, so that all meet the same machine;
medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from offtrace.agents.config import available_cores
from offtrace.modules.envs import AtariEnv

if TYPE_CHECKING:
    from torch import Tensor

    from offtrace.agents.config import Config
    from offtrace.modules.envs.base import StepResult

UNROLL = 20
STEP, RESET = 0.02, 0.2  # seconds: most that a step of the slow simulators takes, and what a reset adds
GATE = "OFFTRACE_BENCHMARK_GATE"  # names the file that says how many rollouts each actor may have begun


class Architecture(NamedTuple):
    """A row of the table."""

    name: str
    waiting: str
    acting: Literal["copies", "server"]
    server_wait: float
    synchronous: bool


ARCHITECTURES = (
    Architecture("batched A2C, sync step", "after every step, for one batched forward pass", "server", 50.0, True),
    Architecture("batched A2C, sync trajectory", f"after every {UNROLL} steps", "copies", 0.0, True),
    Architecture("batched A2C, dynamic batching", f"after every {UNROLL} steps, forward passes batched as they come",
                 "server", 0.001, True),
    Architecture("IMPALA", "a rollout ahead", "copies", 0.0, False),
    Architecture("IMPALA, dynamic batching", "a rollout ahead, forward passes batched as they come",
                 "server", 0.001, False),
)  # fmt: skip
TASKS = ("steady", "varying")


class Pong(AtariEnv):
    """Pong that waits where it must: for the learner of a synchronous architecture, and for a slow simulator."""

    def __init__(self, num_envs: int, seed: int, *, slow: bool) -> None:
        super().__init__("pong", num_envs, seed=seed)
        self._slow, self._random = slow, random.Random(seed)
        self._made = 0
        self._gate = np.memmap(os.environ[GATE], np.int64, "r") if os.environ.get(GATE) else None

    def _advance(self, action: Tensor) -> StepResult:
        while self._gate is not None and self._gate[0] <= self._made // UNROLL:
            time.sleep(1e-4)
        self._made += 1
        if self._slow:
            time.sleep(self._random.uniform(0, STEP))
        result = super()._advance(action)
        if self._slow and bool(result.episode_end.any()):
            time.sleep(RESET)
        return result


def steady(num_envs: int, seed: int) -> Pong:
    """Steps of constant cost: ``--env.task architectures:steady``."""
    return Pong(num_envs, seed, slow=False)


def varying(num_envs: int, seed: int) -> Pong:
    """Steps whose time varies, and slow resets."""
    return Pong(num_envs, seed, slow=True)


def configuration(row: Architecture, task: str, actors: int, games: int, device: str) -> Config:
    """A2C or IMPALA, of which only the acting differs."""
    from offtrace.agents.a2c import A2CConfig
    from offtrace.agents.a2c import LossConfig as A2CLossConfig
    from offtrace.agents.config import CollectorConfig, EnvConfig, RolloutTrainConfig
    from offtrace.agents.impala import paper_config

    config: Any = paper_config()
    if row.synchronous:
        config = A2CConfig(loss=A2CLossConfig(reward_clip=1.0))
    config.env = EnvConfig(task=f"architectures:{task}", num_envs=games)
    config.collector = CollectorConfig(num_workers=actors, unroll=UNROLL, acting=row.acting)
    if row.acting == "server":
        config.collector.server_wait, config.collector.device = row.server_wait, device
    config.train = RolloutTrainConfig(total_frames=10**12, minibatches=1, epochs=1, unrolls=actors * games)
    config.validate()
    return config  # type: ignore[no-any-return]


def measure(row: Architecture, task: str, actors: int, games: int, seconds: float) -> float:
    """Agent steps a second, in this process."""
    import lightning.pytorch as pl
    import torch

    from offtrace.agents.callbacks import WeightSync
    from offtrace.agents.runs.training import learner_threads, make_trainer

    config = configuration(row, task, actors, games, "cuda" if torch.cuda.is_available() else "cpu")
    # where nobody acts meanwhile, the learner has all cores
    torch.set_num_threads(available_cores() if row.synchronous else learner_threads(config))

    class Watch(pl.Callback):
        """Lets the actors begin their next rollouts after an update, and takes the time."""

        def __init__(self, gate: np.memmap[Any, Any]) -> None:
            self.gate, self.speed = gate, 0.0
            self.begin: tuple[float, int] | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            self.gate[0] += 1
            now, frames = time.perf_counter(), trainer.datamodule.frames  # type: ignore[attr-defined]
            if self.gate[0] == 4:  # what is built at first calls is no part of the figures
                self.begin = now, frames
            elif self.begin is not None and now - self.begin[0] > seconds:
                self.speed = (frames - self.begin[1]) / 4 / (now - self.begin[0])
                trainer.should_stop = True

        def on_train_end(self, *_: Any) -> None:
            self.gate[0] = 10**12  # actors that wait can leave

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gate"
        np.ones(1, np.int64).tofile(path)
        if row.synchronous:
            os.environ[GATE] = str(path)
        agent, data = config.build()
        watch = Watch(np.memmap(path, np.int64, "r+"))
        make_trainer(config, Path(folder), [WeightSync(config.updates_per_push()), watch]).fit(agent, data)
        return watch.speed


def apart(place: int, task: str, args: argparse.Namespace) -> list[float]:
    """:func:`measure` in a process of its own; empty where it fails, and why goes to the errors."""
    command = [
        sys.executable, "-W", "ignore", __file__, "--inside", str(place), "--tasks", task, "--actors",
        str(args.actors), "--games", str(args.games), "--seconds", str(args.seconds),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"{ARCHITECTURES[place].name}, {task}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return []
    return [float(json.loads(done.stdout.strip().splitlines()[-1]))]


def line(place: int, tasks: list[str], speeds: dict[tuple[int, str], float]) -> str:
    """A row of the table, by its place."""
    figures = [f"{speeds[place, task]:,.0f}" if (place, task) in speeds else "failed" for task in tasks]
    return " | ".join(("| " + ARCHITECTURES[place].name, ARCHITECTURES[place].waiting, *figures)) + " |"


def ratios(speeds: dict[tuple[int, str], float]) -> str:
    """What it is worth not to wait, where steps vary."""
    impala = next(place for place, row in enumerate(ARCHITECTURES) if not row.synchronous)
    return "".join(
        f"\nWhere steps vary, IMPALA makes {speeds[impala, 'varying'] / speeds[place, 'varying']:.2f} times the steps "
        f"of {ARCHITECTURES[place].name}.\n"
        for place in range(impala)
        if {(impala, "varying"), (place, "varying")} <= speeds.keys()
    )


def draw(speeds: dict[tuple[int, str], float], path: str) -> None:
    """Bars, a group for each architecture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    places = sorted({place for place, _ in speeds})
    tasks = [task for task in TASKS if any(task == found for _, found in speeds)]
    for number, task in enumerate(tasks):
        heights = [speeds.get((place, task), 0.0) for place in places]
        axes.bar([x + 0.4 * number for x in range(len(places))], heights, 0.38, label=f"{task} steps")
    names = [ARCHITECTURES[place].name.replace(", ", "\n") for place in places]
    axes.set_xticks([x + 0.2 * (len(tasks) - 1) for x in range(len(places))], names, fontsize=8)
    axes.set_ylabel("agent steps per second")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table, and draws it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=max(2, available_cores() - 2), help="actor processes")
    parser.add_argument("--games", type=int, default=16, help="of each actor")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a figure, its start left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", choices=range(5), default=list(range(5)), help="of the table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--figure", help="file for the table as bars")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds, for a look")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        print(json.dumps(measure(ARCHITECTURES[args.inside], args.tasks[0], args.actors, args.games, args.seconds)))
        return
    if args.quick:
        args.seconds, args.rounds = 2.0, 1
    print(
        f"Agent steps/s, {args.actors} actors of {args.games} games, {available_cores()} cores, Python "
        f"{platform.python_version()}; {time.strftime('%Y-%m-%d')}\n"
    )
    print(" | ".join(("| architecture", "actors wait for each other", *args.tasks)) + " |")
    print("|---|---|" + "---|" * len(args.tasks), flush=True)
    found: dict[tuple[int, str], list[float]] = {}
    speeds: dict[tuple[int, str], float] = {}
    for number in range(args.rounds):
        for place in args.rows:
            for task in args.tasks:
                values = found.setdefault((place, task), [])
                values += apart(place, task, args)
                if values:
                    speeds[place, task] = statistics.median(values)
            if number == args.rounds - 1:
                print(line(place, args.tasks, speeds), flush=True)
    print(ratios(speeds), end="")
    if args.figure:
        draw(speeds, args.figure)


if __name__ == "__main__":
    main()
