"""What runs survive, counted: killed, raising, hanging actors, numbers that are not finite, signals, a killed learner.

    python benchmarks/faults.py [--quick] [--backend ray] \\
        [--only kills conservation rates dead stop driver starts nodes]

Every row is a run of its own in a process group of its own, with a temporary folder of its own. ``--quick`` takes fewer
kills, frames and starts. ``--backend ray`` runs the actors on Ray; ``nodes`` is of Ray alone: runs that join a cluster
of several nodes, all on this machine.
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
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil

RATE = 1e-4
PATHS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, sys.path)])}
ENDLESS = "--train.total_frames=100_000_000"
Rows = Iterator[tuple[str, str]]


class Numbered(gymnasium.Env[Any, Any]):
    """Endless; the observation is a number for every start of it, and the number of the step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self._seen = np.array([random.getrandbits(48), 0], np.float64)
        return self._seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._seen = self._seen + np.array([0.0, 1.0])
        return self._seen, 1.0, False, False, {}


def in_actor() -> bool:
    """Whether this is an actor's process, of either backend, and not the learner's."""
    return multiprocessing.parent_process() is not None or Path(sys.argv[0]).name == "default_worker.py"


class Raising(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole; one step in ten thousand fails, in actors alone, and not in the first rollout, where it ends a run."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self._rate = RATE if in_actor() else 0.0
        self._chance, self._steps = random.Random(), 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        found, self._steps = super().step(action), self._steps + 1
        return found if self._steps < 100 else self.fail(found) if self._chance.random() < self._rate else found

    def fail(self, found: Any) -> Any:
        raise ValueError("the pole is bent")


class Hanging(Raising):
    def fail(self, found: Any) -> Any:
        time.sleep(10_000)


class NotANumber(Raising):
    def fail(self, found: Any) -> Any:
        return (np.full(4, math.nan, np.float32), *found[1:])


class Breakable(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole; it cannot be made once there is a file ``broken``."""

    def __init__(self) -> None:
        if Path(os.environ["TMPDIR"], "broken").exists() and in_actor():
            raise ValueError("there is no licence")
        super().__init__(gymnasium.make("CartPole-v1"))


class Run:
    """A run of IMPALA with two actors, in a folder of its own; ``with`` waits until it has learnt a little."""

    backend = "processes"

    def __init__(self, *argv: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="f-"))
        self.temporary = self.folder / "t"  # the sockets in it have long names
        self.temporary.mkdir()
        command = [sys.executable, "-m", "offtrace.recipes.impala_control", "--train.name=a", "--train.log_every=1"]
        command += ["--collector.num_workers=2", "--train.record=false", f"--collector.backend={self.backend}", *argv]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **PATHS, "TMPDIR": str(self.temporary)}, stdout=log,
                stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Run:
        file = self.folder / "runs/a/metrics.csv"
        seconds = wait(lambda: self.over() or (file.exists() and file.read_text().count("\n") > 2), 600)
        assert seconds < math.inf, self.log()
        assert not self.over(), self.log()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def over(self) -> bool:
        return self.process.poll() is not None

    def end(self, seconds: float) -> str:
        """Waits for the end; exit code, as a shell tells it, and what came of the run."""
        code = self.process.wait(seconds)
        file = self.folder / "runs/a/summary.json"
        if code or not file.exists():
            return f"exit {128 - code if code < 0 else code}; {self.line('training stopped')}"
        summary = json.loads(file.read_text())
        dropped = f", {summary['dropped_episodes']} episodes dropped" if summary["dropped_episodes"] else ""
        scores = ", ".join(f"{score:.1f}" for _, score in summary["scores"][-3:])
        return f"exit 0; {summary['frames']:,} frames, restarts {summary['restarts']}{dropped}, last scores {scores}"

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def line(self, word: str) -> str:
        """The last line of the output that has ``word``."""
        return next((line for line in reversed(self.log().splitlines()) if word in line), "nothing")

    def signal(self, number: int) -> None:
        """To the group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def actors(self) -> list[psutil.Process]:
        """Processes forked for the run, children of its fork server; or those of Ray, on any node here."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                parent = process.parent()
                names = [" ".join(x.cmdline()) for x in (process, parent) if x is not None]
                if names[0].startswith("ray::RayActor") or (len(names) == 2 and all("forkserver" in x for x in names)):
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return found

    def left(self) -> list[str]:
        """What it left in its temporary folder."""
        return [x.name for x in self.temporary.iterdir() if not x.name.startswith("torchinductor")]


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it holds; infinity if it does not in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            return math.inf
        time.sleep(0.02)
    return time.monotonic() - start


def alive(processes: list[psutil.Process]) -> int:
    def lives(process: psutil.Process) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return sum(map(lives, processes))


def spread(seconds: list[float]) -> str:
    return f"after {sum(seconds) / len(seconds):.2f} s, at most {max(seconds):.2f} s"


def kills(quick: bool) -> Rows:
    number, chance, whole = (4 if quick else 20), random.Random(0), list[float]()
    with Run(f"--train.total_frames={150_000 if quick else 500_000}") as run:
        while len(whole) < number and not run.over():
            there = run.actors()
            if len(there) == 2:
                victim = chance.choice(there)
                victim.kill()
                whole.append(wait(lambda v=victim: v not in (x := run.actors()) and len(x) == 2, 30))  # type: ignore[misc]
            time.sleep(chance.random())
        ended = run.end(600)
        yield f"`kill -9` of a random actor, {len(whole)} times in a run", f"{ended}; a new process {spread(whole)}"


def conservation(quick: bool) -> Rows:
    from offtrace.modules.collectors import ServerOptions

    ways: dict[str, dict[str, Any]] = {
        "with copies of the policy": {}, "with an inference server": {"server": ServerOptions()},
    }  # fmt: skip
    for way, arguments in {"on Ray": {"backend": "ray"}}.items() if Run.backend == "ray" else ways.items():
        yield f"the same to three actors {way}, steps numbered", conserved(arguments, 4 if quick else 20)


def conserved(arguments: dict[str, Any], number: int) -> str:
    """Kills beside a learner that notes every step it is given, by the environment's start."""
    from offtrace.modules.collectors import make_collector
    from offtrace.modules.envs import make_env
    from offtrace.modules.networks import build_policy

    warnings.simplefilter("ignore")
    policy = build_policy(observation_shape=[2], num_actions=2, network="mlp", normalize=None)
    env_fn, chance = partial(make_env, "faults:Numbered", 4), random.Random(1)
    os.environ.update(PATHS)  # Ray's processes import the environment
    seen, turns, whole = collections.defaultdict[float, list[int]](list), list[int](), list[float]()
    with make_collector(env_fn, policy, frames_per_batch=64, num_workers=3, **arguments) as collector:
        backend: Any = collector.backend  # type: ignore[attr-defined]
        seats = backend._seats if Run.backend == "ray" else backend._actors

        def learn(rollouts: int) -> None:
            for _ in range(rollouts):
                rollout = next(collector)
                turns.append(int(rollout["worker"][0, 0]))
                for start, step in rollout["observation"].flatten(0, 1).tolist():
                    seen[start].append(int(step))

        learn(6)
        while collector.restarts < number:
            before, start = collector.restarts, time.monotonic()
            os.kill(chance.choice(backend.pids), signal.SIGKILL)
            while collector.restarts == before or not all(x.up for x in seats):
                learn(1)
            whole.append(time.monotonic() - start)
            learn(chance.randrange(6))
        restarts = collector.restarts
    twice = sum(len(x) - len(set(x)) for x in seen.values())
    missing = sum(max(x) + 1 - len(set(x)) for x in seen.values())
    order = "" if turns == [place % 3 for place in range(len(turns))] else "not "
    return (
        f"{restarts} restarts; of {sum(map(len, seen.values())):,} steps {twice} twice, {missing} missing, "
        f"rollouts {order}in turn; all up {spread(whole)}"
    )


def rates(quick: bool) -> Rows:
    for name in ("Raising", "Hanging", "NotANumber"):
        frames = 60_000 if quick else 300_000
        with Run(f"--env.task=faults:{name}", f"--train.total_frames={frames}", "--collector.step_timeout=3") as run:
            yield f"`{name}`: a step in 10,000 of CartPole", run.end(1800)


def dead(quick: bool) -> Rows:
    with Run("--env.task=faults:Breakable", ENDLESS) as run:
        (run.temporary / "broken").touch()
        for actor in run.actors():
            actor.kill()
        told = wait(lambda: "training stopped" in run.log(), 120)
        exited = told + wait(run.over, 120)
        yield "all actors dead for good", f"told after {told:.1f} s, gone after {exited:.1f} s: {run.end(1)}"


def stop(quick: bool) -> Rows:
    """SIGTERM and Ctrl-C."""
    for number, what in ((signal.SIGTERM, "SIGTERM to the group"), (signal.SIGINT, "Ctrl-C")):
        with Run(ENDLESS) as run:
            processes = run.children()
            run.actors()[0].kill()
            run.signal(number)
            seconds, left = wait(run.over, 60), wait(lambda p=processes: not alive(p), 30)  # type: ignore[misc]
            last = "written" if (run.folder / "runs/a/checkpoints/last.ckpt").exists() else "missing"
            yield (
                f"{what}, an actor just killed",
                f"exit {run.process.returncode} after {seconds:.1f} s, checkpoint {last}, "
                f"all processes gone {left:.1f} s later, {len(run.left())} names in its temporary folder",
            )


def driver(quick: bool) -> Rows:
    """kill -9 of the learner, of the fork server, and of the inference server; or of what Ray's cluster depends on."""
    with Run(ENDLESS) as run:
        there, others = run.actors(), run.children()
        run.process.kill()
        run.process.wait()
        seconds = wait(lambda: not alive(there), 60)
        last = seconds + wait(lambda: not alive(others), 90)
        yield (
            "`kill -9` of the learner",
            f"its {len(there)} actors are gone after {seconds:.1f} s, all its processes after {last:.1f} s; "
            f"{len(run.left())} names in its temporary folder",
        )
    if Run.backend == "ray":
        for name in ("raylet", "gcs_server"):
            with Run(ENDLESS) as run:
                processes = run.children()
                next(x for x in processes if x.name() == name).kill()
                seconds, left = wait(run.over, 120), wait(lambda p=processes: not alive(p), 90)  # type: ignore[misc]
                yield (
                    f"`kill -9` of Ray's `{name}` on the learner's node",
                    f"exit {run.process.poll()} after {seconds:.1f} s, all processes gone {left:.1f} s later",
                )
        return
    frames = f"--train.total_frames={100_000 if quick else 300_000}"
    with Run(frames) as run:
        there = run.actors()
        there[0].parent().kill()  # type: ignore[union-attr]
        time.sleep(1)
        there[0].kill()
        yield "`kill -9` of the fork server, then of an actor", run.end(600)
    with Run(frames, "--collector.acting=server") as run:
        run.actors()[0].kill()  # the first that is started
        yield "`kill -9` of the inference server", f"{run.end(600)}; {run.line('a new one takes its place')}"


def starts(quick: bool) -> Rows:
    """Ctrl-C at any moment of a start."""
    number, chance = (5 if quick else 20 if Run.backend == "ray" else 100), random.Random(2)
    left, folders, codes, slowest, shared = 0, 0, collections.Counter[str](), 0.0, names()
    for _ in range(number):
        run = Run(ENDLESS)
        time.sleep(chance.uniform(0.5, 12.0))
        processes = run.children()
        run.signal(signal.SIGINT)
        code = run.end(1).partition(";")[0] if wait(run.over, 60) < math.inf else "no end in 60 s"
        codes[code] += 1
        if code != "exit 130":
            print(run.log(), file=sys.stderr, flush=True)
        slowest = max(slowest, wait(lambda p=processes: not alive(p), 60))  # type: ignore[misc]
        left += alive(processes)
        folders += len(run.left())
        run.__exit__()
    ended = ", ".join(f"{code} {times} times" for code, times in codes.items())
    yield (
        f"{number} starts and Ctrl-Cs, 0.5 to 12 s later",
        f"{ended}; {left} processes, {folders} names in temporary folders and {len(names() - shared)} in /dev/shm "
        f"left, the last process gone {slowest:.1f} s after the learner at most",
    )


def names() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def nodes(quick: bool) -> Rows:
    """Runs that join a cluster: a node of it is killed and one added, and it is left as it was."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(PATHS)
    soon = {f"health_check_{name}": 500 for name in ("initial_delay_ms", "period_ms", "timeout_ms")}
    arguments = {"num_cpus": 1, "_system_config": {**soon, "health_check_failure_threshold": 5}}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    ray.init(cluster.address, log_to_driver=False, configure_logging=False)
    first = cluster.add_node(num_cpus=2)
    other = ray.remote(num_cpus=1)(collections.Counter).remote()  # another job, on the head's one CPU
    join = ["--collector.backend=ray", f"--collector.address={cluster.address}"]
    try:
        cluster.wait_for_nodes()

        def free() -> bool:
            return bool(ray.available_resources().get("CPU", 0.0) == 2.0)

        wait(lambda: ray.available_resources().get("CPU") == 2.0, 30)
        with Run(f"--train.total_frames={150_000 if quick else 500_000}", *join) as run:
            ray.get(other.update.remote(["before"]))
            start = time.monotonic()
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(num_cpus=2)
            wait(lambda: "restart 2 of" in run.log(), 60)
            seconds = time.monotonic() - start + wait(lambda: len(run.actors()) == 2, 60)
            yield (
                "a node with both actors killed, another one added",
                f"{run.end(1200)}; two new actors after {seconds:.1f} s",
            )
        for what, end in (("its end", None), ("Ctrl-C", signal.SIGINT), ("`kill -9`", signal.SIGKILL)):
            with Run(ENDLESS if end else "--train.total_frames=100_000", *join) as run:
                if end:
                    run.signal(end)
                ended = run.end(600).partition(";")[0]
                seconds = wait(free, 60)
                ray.get(other.update.remote([what]))
                yield (
                    f"{what} of a run that joined a cluster",
                    f"{ended}; its CPUs free after {seconds:.1f} s, {len(run.left())} names in its temporary folder; "
                    f"{sum(x['Alive'] for x in ray.nodes())} of 2 nodes are there",
                )
        calls = ray.get(other.copy.remote())
        yield "the other job of that cluster", f"has its state: {len(calls)} of 4 calls counted"
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Prints a table."""
    checks = {x.__name__: x for x in (kills, conservation, rates, dead, stop, driver, starts, nodes)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=checks, help="default: all")
    parser.add_argument("--backend", choices=["processes", "ray"], default=Run.backend)
    args = parser.parse_args()
    Run.backend = args.backend
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray listens on 127.0.0.1 alone, if this comes before it
    # what a script starts in the background ignores Ctrl-C, and so would the runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("| what happens | what came of it |\n|---|---|", flush=True)
    for name in args.only or [x for x in checks if x != "nodes" or args.backend == "ray"]:
        for what, result in checks[name](args.quick):
            print(f"| {what} | {result} |", flush=True)


if __name__ == "__main__":
    main()
