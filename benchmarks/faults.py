"""What runs survive, counted: killed, raising, hanging actors, numbers that are not finite, signals, a killed learner.

    python benchmarks/faults.py [--quick] [--only kills conservation rates dead term driver starts]

Every row is a run of its own in a process group of its own. ``--quick`` takes fewer kills, frames and starts.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil

RATE = 1e-4
_ENVS, _STEPS = 4, 16


class Numbered(gymnasium.Env[Any, Any]):
    """Endless; the observation is a number for every start of it, and the number of the step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self._number, self._steps = random.getrandbits(48), 0

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self._seen(), 1.0, False, False, {}

    def _seen(self) -> Any:
        return np.array([self._number, self._steps], np.float64)


class Faulty(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole; one step in ten thousand fails, in actor processes alone."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self._acts, self._chance = multiprocessing.parent_process() is not None, random.Random()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        found = super().step(action)
        return self.fail(found) if self._acts and self._chance.random() < RATE else found

    def fail(self, found: Any) -> Any:
        raise NotImplementedError


class Raising(Faulty):
    def fail(self, found: Any) -> Any:
        raise ValueError("the pole is bent")


class Hanging(Faulty):
    def fail(self, found: Any) -> Any:
        time.sleep(10_000)


class NotANumber(Faulty):
    def fail(self, found: Any) -> Any:
        return (np.full(4, math.nan, np.float32), *found[1:])


class Breakable(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole; it cannot be made once there is a file ``broken``."""

    def __init__(self) -> None:
        if Path("broken").exists() and multiprocessing.parent_process() is not None:
            raise ValueError("there is no licence")
        super().__init__(gymnasium.make("CartPole-v1"))


@contextmanager
def recipe(*argv: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of IMPALA with two actor processes in a folder of its own, where its output goes into ``log``."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    path = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, sys.path)])
    command = [
        sys.executable, "-m", "offtrace.recipes.impala_control", "--train.name=a", "--collector.num_workers=2",
        "--train.record=false", "--train.log_every=1", *argv,
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        run = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield run, folder
    finally:
        run.kill()
        run.wait()
        shutil.rmtree(folder, ignore_errors=True)


def actors(run: int) -> list[psutil.Process]:
    """The processes forked for a run: children of its fork server."""
    found = []
    for process in psutil.Process(run).children(recursive=True):
        try:
            parent = process.parent()
            if parent is not None and all("forkserver" in " ".join(x.cmdline()) for x in (process, parent)):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def learns(run: subprocess.Popen[str], folder: Path, lines: int = 2) -> None:
    """Waits until a run has logged."""
    file = folder / "runs/a/metrics.csv"
    wait(lambda: run.poll() is not None or (file.exists() and file.read_text().count("\n") > lines), 120)
    assert run.poll() is None, (folder / "log").read_text()


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it holds; infinity if it does not in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            return math.inf
        time.sleep(0.02)
    return time.monotonic() - start


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    """Whether they have ended."""
    return lambda: not any(x.is_running() and x.status() != psutil.STATUS_ZOMBIE for x in processes)


def told(folder: Path) -> str:
    """What a run ended with, in a few words."""
    summary = json.loads((folder / "runs/a/summary.json").read_text())
    score = summary["scores"][-1][1] if summary["scores"] else math.nan
    dropped = f", {summary['dropped_episodes']} episodes dropped" if summary["dropped_episodes"] else ""
    return f"{summary['frames']:,} frames, restarts {summary['restarts']}{dropped}, score {score:.1f}"


def last_line(folder: Path, word: str) -> str:
    """The last line of a run's output that has ``word``."""
    found = [line for line in (folder / "log").read_text().splitlines() if word in line]
    return found[-1] if found else "nothing"


def kills(quick: bool) -> Iterator[tuple[str, str]]:
    """kill -9 of random actors of a run that learns CartPole."""
    number, chance = (4 if quick else 20), random.Random(0)
    with recipe(f"--train.total_frames={150_000 if quick else 500_000}") as (run, folder):
        learns(run, folder)
        whole, killed = [], 0
        while killed < number and run.poll() is None:
            there = actors(run.pid)
            if len(there) == 2:
                victim = chance.choice(there)
                victim.kill()
                killed += 1
                whole.append(wait(lambda v=victim: v not in (x := actors(run.pid)) and len(x) == 2, 30))  # type: ignore[misc]
            time.sleep(chance.random())
        code = run.wait(600)
        yield (
            f"`kill -9` of a random actor, {killed} times in a run of CartPole",
            f"exit {code}; {told(folder)}; a new process after {sum(whole) / len(whole):.2f} s, at most "
            f"{max(whole):.2f} s",
        )


def conservation(quick: bool) -> Iterator[tuple[str, str]]:
    """The same to a collector whose observations are numbered."""
    from offtrace.modules.collectors import ServerOptions, make_collector
    from offtrace.modules.envs import make_env
    from offtrace.modules.networks import build_policy

    warnings.simplefilter("ignore")
    policy = build_policy(observation_shape=[2], num_actions=2, network="mlp", normalize=None)
    ways: dict[str, dict[str, Any]] = {"copies of the policy": {}, "an inference server": {"server": ServerOptions()}}
    for way, options in ways.items():
        chance, number = random.Random(1), (4 if quick else 20)
        env_fn = partial(make_env, "faults:Numbered", _ENVS)
        whole: list[float] = []
        with make_collector(env_fn, policy, frames_per_batch=_ENVS * _STEPS, num_workers=3, **options) as collector:
            backend: Any = collector.backend  # type: ignore[attr-defined]
            learner = _Learner(collector)
            learner.learn(6)
            while collector.restarts < number:
                before = collector.restarts
                os.kill(chance.choice(backend.pids), signal.SIGKILL)
                start = time.monotonic()
                while collector.restarts == before or not all(x.up for x in backend._actors):
                    learner.learn(1)
                whole.append(time.monotonic() - start)
                learner.learn(chance.randrange(6))
            restarts = collector.restarts
        yield (
            f"the same to three actors with {way}, steps numbered",
            f"{restarts} restarts; {learner.found()}; all up after {sum(whole) / len(whole):.2f} s, at most "
            f"{max(whole):.2f} s",
        )


class _Learner:
    """Notes every step it is given, by the environment's start and its row."""

    def __init__(self, collector: Any) -> None:
        self._collector = collector
        self._seen: dict[tuple[float, int], list[int]] = {}
        self._turns: list[int] = []

    def learn(self, rollouts: int) -> None:
        for _ in range(rollouts):
            rollout = next(self._collector)
            self._turns.append(int(rollout["worker"][0, 0]))
            for row, steps in enumerate(rollout["observation"].tolist()):
                for start, step in steps:
                    self._seen.setdefault((start, row), []).append(int(step))

    def found(self) -> str:
        seen = self._seen.values()
        twice = sum(len(x) - len(set(x)) for x in seen)
        missing = sum(max(x) + 1 - len(set(x)) for x in seen)
        turns = self._turns == [place % 3 for place in range(len(self._turns))]
        steps = sum(map(len, seen))
        return f"of {steps:,} steps {twice} twice, {missing} missing, rollouts {'' if turns else 'not '}in turn"


def rates(quick: bool) -> Iterator[tuple[str, str]]:
    """Environments of which a step in ten thousand fails."""
    frames = 60_000 if quick else 300_000
    for name in ("Raising", "Hanging", "NotANumber"):
        with recipe(f"--env.task=faults:{name}", f"--train.total_frames={frames}", "--collector.step_timeout=3") as (
            run,
            folder,
        ):
            code = run.wait(1800)
            yield (
                f"`{name}`: a step in 10,000 of CartPole",
                f"exit {code}; " + (last_line(folder, "training stopped") if code else told(folder)),
            )


def dead(quick: bool) -> Iterator[tuple[str, str]]:
    """All actors killed, and an environment that cannot be made any more."""
    with recipe("--env.task=faults:Breakable", "--train.total_frames=100_000_000") as (run, folder):
        learns(run, folder)
        (folder / "broken").touch()
        for actor in actors(run.pid):
            actor.kill()
        seconds = wait(lambda: run.poll() is not None, 120)
        yield (
            "all actors dead for good",
            f"exit {run.returncode} after {seconds:.1f} s: {last_line(folder, 'training stopped')}",
        )


def term(quick: bool) -> Iterator[tuple[str, str]]:
    """SIGTERM to the process group, while an actor is being replaced."""
    with recipe("--train.total_frames=100_000_000") as (run, folder):
        learns(run, folder)
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        actors(run.pid)[0].kill()
        os.killpg(run.pid, signal.SIGTERM)
        seconds = wait(lambda: run.poll() is not None, 60)
        left = wait(gone(processes), 30)
        last = (folder / "runs/a/checkpoints/last.ckpt").exists()
        yield (
            "SIGTERM to the group, an actor just killed",
            f"exit {run.returncode} after {seconds:.1f} s, checkpoint {'written' if last else 'missing'}, all "
            f"processes gone {left:.1f} s later",
        )


def driver(quick: bool) -> Iterator[tuple[str, str]]:
    """kill -9 of the learner, of the fork server, and of both."""
    with recipe("--train.total_frames=100_000_000") as (run, folder):
        learns(run, folder)
        there = actors(run.pid)
        run.kill()
        run.wait()
        yield "`kill -9` of the learner", f"its {len(there)} actors are gone after {wait(gone(there), 60):.1f} s"
    with recipe(f"--train.total_frames={100_000 if quick else 300_000}") as (run, folder):
        learns(run, folder)
        there = actors(run.pid)
        parent = there[0].parent()
        assert parent is not None
        parent.kill()
        time.sleep(1)
        there[0].kill()
        code = run.wait(600)
        yield "`kill -9` of the fork server, then of an actor", f"exit {code}; {told(folder)}"
    with recipe(f"--train.total_frames={100_000 if quick else 300_000}", "--collector.acting=server") as (run, folder):
        learns(run, folder)
        actors(run.pid)[0].kill()  # the first that is started
        code = run.wait(600)
        line = last_line(folder, "a new one takes its place")
        yield "`kill -9` of the inference server", f"exit {code}; {told(folder)}; {line}"


def starts(quick: bool) -> Iterator[tuple[str, str]]:
    """Ctrl-C at any moment of a start."""
    number, chance = (5 if quick else 100), random.Random(2)
    left, codes, slowest = 0, collections.Counter[int](), 0.0
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for _ in range(number):
        with recipe("--train.total_frames=100_000_000") as (run, _):
            time.sleep(chance.uniform(0.5, 12.0))
            processes = psutil.Process(run.pid).children(recursive=True)
            os.killpg(run.pid, signal.SIGINT)
            wait(lambda r=run: r.poll() is not None, 60)  # type: ignore[misc]
            codes[int(run.returncode)] += 1
            slowest = max(slowest, wait(gone(processes), 60))  # a fork server ends when it has imported
            left += sum(not gone([x])() for x in processes)
    names = set(os.listdir("/dev/shm")) - shared if shared else set()
    ended = ", ".join(f"{code} {times} times" for code, times in codes.items())
    yield (
        f"{number} starts and Ctrl-Cs, 0.5 to 12 s later",
        f"exit {ended}; {left} processes and {len(names)} names in /dev/shm left, the last process gone "
        f"{slowest:.1f} s after the learner at most",
    )


def main() -> None:
    """Prints a table."""
    checks = {x.__name__: x for x in (kills, conservation, rates, dead, term, driver, starts)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=checks, default=list(checks))
    args = parser.parse_args()
    print("| what happens | what came of it |\n|---|---|", flush=True)
    for name in args.only:
        for what, result in checks[name](args.quick):
            print(f"| {what} | {result} |", flush=True)


if __name__ == "__main__":
    main()
