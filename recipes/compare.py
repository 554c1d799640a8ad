"""Which agent learns a task best: python recipes/compare.py --tasks CartPole-v1 mytask:make [--seeds 5] [--help]

Every agent that can act in a task trains in it, each seed as a run of its own, for the same number of frames. Its last
policy is then scored over whole episodes, in one evaluation for all. Actions drawn at random are scored likewise.
Stopped by Ctrl-C, the same command goes on where it was; a training that has finished is not run again, one that failed
is. With other settings it is another training: a preset's, --frames and --episodes are all of them.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from offtrace.agents.config import ConfigError, available_cores, count
from offtrace.agents.registry import config_class
from offtrace.agents.runs.folders import commit_of
from offtrace.modules.envs.names import check_name
from offtrace.modules.naming import nearest
from offtrace.recipes.compare_report import BEST, Scores, best_known, draw, table
from offtrace.recipes.compare_run import (
    PRESETS,
    RANDOM,
    Cell,
    configuration,
    finished,
    make_cell,
    seconds_before,
)
from offtrace.recipes.flags import SentenceParser, check_flags, import_from_here, whole_number
from offtrace.recipes.studies import append_row, read_rows, run_study, usable_folder

TASKS = ("CartPole-v1", "Acrobot-v1", "Taxi-v4", "offtrace.modules.envs.catch:Catch")
"""Vectors, vectors without a reward near the start, a table with illegal actions, and images."""


@dataclass(frozen=True)
class Result:
    """What came of a training."""

    score: float
    """Mean return of the last policy's episodes; NaN where the training failed."""
    trained: int
    """Environment frames that it had, which whole rollouts may make a few more than asked for."""
    steps_per_second: float
    """Environment frames, in the last part of the run."""
    seconds: float
    """Wall time."""
    version: str
    """Commit of the package, ``+`` behind it where files differ; or its version."""
    failed: str
    """Why there is no score; empty where there is."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as they can be without making a task; ``best`` is by task.

    Raises:
        ConfigError: one sentence.
    """
    parser = SentenceParser(
        description=__doc__, epilog=_epilog(), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"as of --env.task; default: {' '.join(TASKS)}")
    parser.add_argument("--agents", nargs="+", default=list(PRESETS), help="default: all of the table below")
    parser.add_argument("--seeds", type=whole_number, default=5, help="trainings of an agent in a task (default 5)")
    parser.add_argument("--frames", type=whole_number, default=100_000, help="of a training (default 1e5)")
    parser.add_argument("--episodes", type=whole_number, default=20, help="of the evaluation at its end (default 20)")
    parser.add_argument(
        "--recurrent", type=whole_number, default=0, help="width of an LSTM in every network (default 0)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="for all that is written")
    parser.add_argument("--jobs", type=whole_number, default=1, help="trainings at a time (default 1)")
    parser.add_argument(
        "--best", nargs="+", default=[], metavar="TASK=SCORE", help="the best known score, which is 1 when normalised"
    )
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    args.tasks, args.agents = (list(dict.fromkeys(words)) for words in (args.tasks, args.agents))
    for name in args.agents:
        if name not in PRESETS:
            raise ConfigError(f"--agents has {name}; they must be of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    for name in ("seeds", "frames", "episodes", "jobs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.recurrent < 0:
        raise ConfigError(f"--recurrent is {args.recurrent}; it must be at least 0")
    import_from_here()
    for task in args.tasks:
        try:
            check_name(task)
        except ValueError as error:
            raise ConfigError(f"--tasks: {error}") from error
    args.best = {task: best_known(task) for task in args.tasks} | dict(_best(word, args.tasks) for word in args.best)
    return args


def _best(word: str, tasks: Sequence[str]) -> tuple[str, float]:
    task, _, text = word.rpartition("=")
    if task not in tasks:
        raise ConfigError(
            f"--best has {word}; it must be TASK=SCORE, of a task among {', '.join(tasks)}{nearest(task, tasks)}"
        )
    with suppress(ValueError):
        if math.isfinite(float(text)):
            return task, float(text)
    raise ConfigError(f"--best has {word}; the score must be a number")


def _epilog() -> str:
    rows = [("agent", "discrete actions", "continuous actions", "images, discrete actions")]
    for name, presets in PRESETS.items():
        continuous = "cannot act" if config_class(name).actions == "discrete" else presets.continuous
        rows.append((name, presets.discrete, continuous, presets.images))
    lines = ["  ".join(f"{word:<23}" for word in row).rstrip() for row in rows]
    known = ", ".join(f"{task} {score:g}" for task, score in BEST.items())
    return _EPILOG.format(presets="\n".join(lines), known=known)


_EPILOG = """\
An agent has the preset of its recipe, as RECIPE/PRESET; a task has its usual options, and nothing is fitted to the
machine. An agent that cannot act in a task, or has too few frames to begin to learn, is left out, which is told.
With --recurrent so is one that can have no LSTM: for tasks that only a memory solves.

{presets}

Best known scores: {known};
of Atari games a human tester's, of dm_control 1000. Another task needs --best to count in what is over the tasks.

Written to the folder: compare.csv, a row for each training; compare.md and compare.png; logs/, and in runs/ what a
recipe leaves of each training, without its replay.

How long it takes: 100,000 frames of CartPole, on two cores that others used as well, are one to three minutes for
agents on rollouts and ACER, ten for DQN and Reactor, twenty to thirty for SAC and MPO: about an hour and a half for all
agents and a seed. Of images it is many times as much: choose by --agents. What is left is printed with every score.
"""


def choose(args: argparse.Namespace) -> Iterator[Cell]:
    """The trainings, seed by seed; tells of every agent that a task is left out for.

    Raises:
        ConfigError: if a task cannot be made, or no agent can act in any.
    """
    chosen: list[tuple[str, str, str]] = []
    for task in args.tasks:
        chosen.append((task, RANDOM, ""))
        chosen += [(task, *found) for found in _agents(task, args)]
    if not any(preset for _, _, preset in chosen):
        raise ConfigError(
            f"none of {', '.join(args.agents)} can act in {', '.join(args.tasks)}: there is nothing to do"
        )
    for seed in range(args.seeds):
        for task, agent, preset in chosen:
            yield make_cell(agent, preset, task, args.frames, args.episodes, seed, args.recurrent)


def _agents(task: str, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    from offtrace.modules.envs import env_info

    try:
        info = env_info(task)
    except Exception as error:  # the user's own code may raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"--tasks has {task}, which cannot be made: {told}") from error
    shape = info.observation_shape
    images = not hasattr(shape, "items") and len(shape) == 3
    for agent in args.agents:
        presets = PRESETS[agent]
        preset = presets.continuous if info.kind == "continuous" else presets.images if images else presets.discrete
        try:
            config = configuration(preset, task, args.frames, args.episodes, seed=0, recurrent=args.recurrent)
            config.validate()
            config.check_actions(info.kind)
        except ConfigError as error:
            print(f"{agent} is left out of {task}: {error}", flush=True)
        else:
            yield agent, preset


def study(args: argparse.Namespace) -> int:
    """Trains what is missing, then prints and draws.

    Raises:
        ConfigError: if the folder or a task cannot be used.
    """
    usable_folder(args.folder)
    path = args.folder / "compare.csv"
    with _alone(args.folder) as lock:
        rows = read_rows(path, Cell, Result)
        wanted = list(choose(args))
        missing = [cell for cell in wanted if cell not in rows or rows[cell].failed]
        print(f"{count(len(wanted), 'training')}, {len(wanted) - len(missing)} of them finished before", flush=True)
        for task in args.tasks:
            if args.best[task] is None:
                print(f"{task} has no best known score; --best {task}=SCORE normalises its scores", flush=True)
        start = time.perf_counter()
        version = commit_of(Path(__file__).resolve().parent) or importlib.metadata.version("offtrace")
        with closing(_run(missing, args, version, lock)) as ended:
            for number, (cell, result) in enumerate(ended, 1):
                append_row(path, cell, result)
                rows[cell] = result
                left = (time.perf_counter() - start) / number * (len(missing) - number)
                print(f"{number}/{len(missing)} {_line(cell, result)}, about {left / 60:.0f} min left", flush=True)
    report(args, {cell: rows[cell] for cell in wanted})
    failed = [cell for cell in wanted if rows[cell].failed]
    for cell in failed:
        print(f"error: {_line(cell, rows[cell])}; the whole output: {_log(args.folder, cell)}", file=sys.stderr)
    return 1 if failed else 0


def _line(cell: Cell, result: Result) -> str:
    what = f"{cell.task} {cell.agent} seed {cell.seed}"
    if result.failed:
        return f"{what} failed: {result.failed}"
    speed = f"{result.steps_per_second:,.0f} steps/s, " if result.trained else ""
    return f"{what}: score {result.score:.4g}, {speed}{result.seconds:.0f} s"


def _log(folder: Path, cell: Cell) -> Path:
    return folder / "logs" / f"{cell.name}.txt"


@contextmanager
def _alone(folder: Path) -> Iterator[IO[str]]:
    """Keeps a second comparison out of the folder: this one removes runs that were broken off. Its trainings hold the
    file too, so that one which outlives a killed comparison keeps the next one out.
    """
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--folder is {folder}, in which a comparison, or a training that one has left behind, is running; it "
                "must be another, or wait"
            ) from error
        yield lock


def command(cell: Cell, folder: Path) -> list[str]:
    """What runs a cell in a folder."""
    # -P: of the folder that one is in nothing stands before Python's own modules, such as a statistics.py
    return [sys.executable, "-P", "-m", "offtrace.recipes.compare_run", json.dumps(asdict(cell)), str(folder)]


def _run(
    cells: Sequence[Cell], args: argparse.Namespace, version: str, lock: IO[str]
) -> Generator[tuple[Cell, Result]]:
    """Runs the cells, so many at a time, and gives each as it ends; when left early, stops what is running."""
    environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // args.jobs)), **os.environ}
    waiting = list(reversed(cells))
    running: dict[subprocess.Popen[bytes], tuple[Cell, Path, Path, int]] = {}
    (args.folder / "logs").mkdir(exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                cell = waiting.pop()
                folder, log = args.folder / "runs" / cell.name, _log(args.folder, cell)
                if finished(folder, cell.frames) is not None:  # the comparison was killed between its end and its row
                    yield cell, _result(cell, folder, version, 0, "")
                    continue
                print(f"{cell.task} {cell.agent} seed {cell.seed} begins: {log}", flush=True)
                with open(log, "ab") as out:
                    begun = out.tell()
                    # a session of its own: of Ctrl-C each training hears once, from here
                    process = subprocess.Popen(
                        command(cell, folder), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
                        start_new_session=True, pass_fds=[lock.fileno()],
                    )  # fmt: skip
                running[process] = cell, folder, log, begun
            for process in [process for process in running if process.poll() is not None]:
                cell, folder, log, begun = running.pop(process)
                said = log.read_bytes()[begun:].decode(errors="replace")
                yield cell, _result(cell, folder, version, process.returncode, said)
            time.sleep(0.05)
    finally:
        _stop(list(running))


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Lets every training save; a second Ctrl-C ends them as they are."""
    if not running:
        return
    print("stopping, and saving what is running; Ctrl-C again ends it at once", file=sys.stderr)
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the actors too
            process.wait()
        raise


def _result(cell: Cell, folder: Path, version: str, code: int, output: str) -> Result:
    """What a process that ended with ``code`` has left in ``folder``, and said."""
    summary: dict[str, Any] | None = None if code else finished(folder, cell.frames)
    if summary is None:
        told = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
        names = {number.value: number.name for number in signal.Signals}
        if -code in names:
            told.append(f"its process was ended by {names[-code]}")
        elif code - 128 in names:
            told.append(f"it was stopped by {names[code - 128]}")
        elif not code:
            told.append("it has no score: the simulator failed in every episode")
        failed = told[-1] if told else f"its process ended with code {code}"
        if code == 2 and (folder / "checkpoints").exists():  # what it has learnt is not for a program to remove
            failed += f"; to begin it again, remove {folder}"
        return Result(math.nan, 0, 0.0, 0.0, version, failed)
    shutil.rmtree(folder / "replay", ignore_errors=True)  # gigabytes, for a run that does not go on
    return Result(
        score=summary["scores"][-1][1], trained=summary["frames"], steps_per_second=summary["frames_per_second"],
        seconds=round(seconds_before(folder) + summary["seconds"], 1), version=version, failed="",
    )  # fmt: skip


def report(args: argparse.Namespace, rows: dict[Cell, Result]) -> None:
    """Prints the table and writes it and the figure."""
    tasks = {task: Scores(task, args.best[task]) for task in args.tasks}
    speeds: dict[tuple[str, str], list[float]] = {}
    for cell, result in rows.items():
        if result.failed:
            tasks[cell.task].failed[cell.agent] = tasks[cell.task].failed.get(cell.agent, 0) + 1
        else:
            tasks[cell.task].by_agent.setdefault(cell.agent, []).append(result.score)
            speeds.setdefault((cell.task, cell.agent), []).append(result.steps_per_second)
    for (task, agent), values in speeds.items():
        tasks[task].speed[agent] = sum(values) / len(values)
    shown, agents = [task for task in tasks.values() if task.by_agent], [*args.agents, RANDOM]
    if not shown:
        return
    text = table(shown, agents)
    versions = {result.version for result in rows.values() if not result.failed}
    if len(versions) > 1:
        text += f"\nThe scores are of {count(len(versions), 'version')} of the package: {', '.join(sorted(versions))}\n"
    (args.folder / "compare.md").write_text(text)
    draw(args.folder / "compare.png", shown, agents)
    print(f"\n{text}")
    print(f"written: {', '.join(str(args.folder / f'compare.{end}') for end in ('csv', 'md', 'png'))}")


def main(argv: list[str] | None = None) -> int:
    """Runs what is not in the folder yet, then writes table and figure.

    Returns:
        the exit code of :func:`run_study`; 1 where a training failed, when all have run.
    """
    return run_study(argv, parse, study)


if __name__ == "__main__":
    sys.exit(main())
