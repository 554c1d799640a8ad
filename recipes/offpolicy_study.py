"""What each correction is worth as the actors fall behind: python recipes/offpolicy_study.py [--quick] [--help]

In the spirit of table 2 of Espeholt et al. 2018, arXiv 1802.01561, on tasks of seconds: the actors' weights are a fixed
number of updates old, and a share of every batch comes from a replay of recent rollouts. Everything happens in order in
one process per training: a rollout, an update, a push of old weights. The first five arms differ in their estimator
alone, without trust region and normalised advantages, which would hide what a correction does. The next three are the
policy updates of ACER, LASER and Reactor, trust regions included, with what all arms share: a feed-forward network,
uniform replay, one update a rollout, the task's value_coef and entropy_coef. Not as published, besides: LASER's bound
is a guess, and its replay the share of the study; Reactor's critic has plain values, its policy no uniform share and no
detached encoder, and its target is copied after 10 updates in place of 1,000.

Written to the folder: study.csv (a finished training is kept and not run again), study.md, study.png.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offtrace.agents.config import ConfigError
from offtrace.modules.naming import nearest
from offtrace.recipes.flags import SentenceParser, check_flags
from offtrace.recipes.studies import append_row, read_rows, run_study, usable_folder
from offtrace.recipes.study_report import Cell, Result, draw, write_table

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from offtrace.modules.networks import Policy


class Arm(NamedTuple):
    """How a training learns: the loss by its name in ``offtrace.modules``, its estimator and options.

    ``critic`` is ``"v"`` or ``"q"``; ``target`` what follows the networks of the loss after every update, of itself or
    of ``every`` so many: ``tau`` is the part by which it moves.
    """

    loss: str
    estimator: str
    critic: str = "v"
    options: dict[str, Any] = {}  # noqa: RUF012  of a NamedTuple
    tau: float = 0.0
    every: int = 1


ARMS = {
    "vtrace": Arm("ImpalaLoss", "vtrace"),
    "retrace": Arm("QActorCriticLoss", "retrace", "q"),
    "importance_sampling": Arm("ImpalaLoss", "importance_sampling"),
    "one_step": Arm("ImpalaLoss", "one_step"),
    "none": Arm("ImpalaLoss", "gae"),
    "acer": Arm("ACERLoss", "retrace", "q", tau=0.01),
    "laser": Arm("ImpalaLoss", "vtrace", options={"max_kl": 0.2, "entropy_on_replay": False}),
    # the paper copies its target after 1,000 updates, three times as many as a training here has
    "reactor": Arm("ReactorLoss", "retrace", "q", tau=1.0, every=10),
    "acer_no_region": Arm("ACERLoss", "retrace", "q", options={"delta": None}),
    "reactor_clip_10": Arm("ReactorLoss", "retrace", "q", options={"clip": 10.0}, tau=1.0, every=10),
}
"""Names in table and figure."""
ABLATIONS = ("acer_no_region", "reactor_clip_10")
"""Arms that differ from another in one part; only ``--arms`` adds them."""
LAGS = (0, 1, 4, 16, 64)
MEMORY = 100
"""Rollouts that the replay holds."""
EPISODES = 32
"""Episodes of an evaluation."""


@dataclass(frozen=True)
class Task:
    """A task and what it is trained with; one update for every rollout."""

    lr: float
    value_coef: float
    entropy_coef: float
    num_envs: int = 32
    unroll: int = 20
    updates: int = 300
    gamma: float = 0.99
    lmbda: float = 1.0
    clip_grad_norm: float = 0.5
    hidden: int = 64

    def digest(self, arm: Arm) -> str:
        """A short name of all these numbers and of what ``arm`` is."""
        return hashlib.sha256(repr((self, arm)).encode()).hexdigest()[:8]

    def replayed(self, share: float) -> int:
        """Unrolls from the replay in a batch of which they are ``share``."""
        return round(self.num_envs * share / (1 - share))


TASKS = {
    "CartPole": Task(lr=2e-3, value_coef=0.01, entropy_coef=0.01),
    "Catch": Task(lr=2e-3, value_coef=0.5, entropy_coef=0.01),
}


Observer = Callable[[int, "TensorDictBase", "Policy"], None]


def train(cell: Cell, task: Task, observe: Observer | None = None) -> Result:
    """One training; deterministic but for ``seconds``.

    Args:
        cell: arm, lag, share of replay, seed.
        task: what everything else is.
        observe: called before each update with its number, the fresh rollout and the learner's policy.
    """
    import torch
    from torchrl.data import LazyTensorStorage, ReplayBuffer

    from offtrace import modules
    from offtrace.modules.keys import INDEX
    from offtrace.modules.losses import FastHardUpdate, FastSoftUpdate
    from offtrace.recipes import study_tasks

    start = time.perf_counter()
    torch.manual_seed(cell.seed)
    kind: type[study_tasks.ArrayTask] = getattr(study_tasks, cell.task)
    env, arm = kind(task.num_envs, cell.seed), ARMS[cell.arm]
    network: dict[str, Any] = {
        "network": "mlp", "observation_shape": [env.features], "num_actions": env.num_actions, "hidden": task.hidden,
        "critic": arm.critic,
    }  # fmt: skip
    learner, actor = modules.build_policy(**network), modules.build_policy(**network)
    loss = getattr(modules, arm.loss)(
        learner, estimator=f"{arm.estimator}(lmbda={task.lmbda})", gamma=task.gamma, value_coef=task.value_coef,
        entropy_coef=task.entropy_coef, reduction="mean", **arm.options,
    )  # fmt: skip
    policy = loss.policy
    follower: Any = None
    if arm.tau:
        follower = FastHardUpdate(loss) if arm.tau == 1 else FastSoftUpdate(loss, tau=arm.tau)
    optimizer = torch.optim.Adam(loss.parameters(), lr=task.lr, eps=1e-5)
    memory = ReplayBuffer(storage=LazyTensorStorage(MEMORY * task.num_envs))
    replayed = task.replayed(cell.replay)
    past = deque([_weights(policy)], maxlen=cell.lag + 1)
    diagnostics: dict[str, list[float]] = {"trace_length": [], "ess": [], "kl": []}
    scores: list[float] = []
    skipped = 0
    when = {math.ceil(cell.updates * part / 10) for part in (6, 8, 10)}
    for update in range(cell.updates):
        actor.load_state_dict(past[0])  # as they were ``lag`` updates ago, or at the start
        batch = study_tasks.rollout(env, actor, task.unroll)
        if observe is not None:
            observe(update, batch, policy)
        if replayed:
            batch[INDEX] = torch.zeros(batch.shape, dtype=torch.long)
            memory.extend(batch)
            batch = torch.cat([batch.set(INDEX, torch.full(batch.shape, -1)), memory.sample(replayed)])
        out = loss(batch)
        optimizer.zero_grad()
        (out["loss_policy"] + out["loss_value"] + out["loss_entropy"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), task.clip_grad_norm)
        if norm.isfinite():
            optimizer.step()
        else:  # plain importance sampling overflows
            skipped += 1
        if follower is not None and (update + 1) % arm.every == 0:
            follower.step()
        past.append(_weights(policy))
        for name, values in diagnostics.items():
            values.append(float(out[name]))
        if update + 1 in when:
            scores.append(study_tasks.play(kind, policy, EPISODES, 1_000_000 + cell.seed))
    means = {name: sum(values) / len(values) for name, values in diagnostics.items()}
    return Result(
        score=sum(scores) / len(scores), final=scores[-1], **means, skipped=skipped,
        frames=task.num_envs * task.unroll * cell.updates, seconds=round(time.perf_counter() - start, 1),
    )  # fmt: skip


def _weights(policy: Policy) -> dict[str, Any]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def run_cells(
    cells: Sequence[Cell], *, processes: int, done: Callable[[Cell, Result], None], tasks: dict[str, Task]
) -> None:
    """Trains every cell in processes of one thread each, and calls ``done`` with each as it finishes.

    Raises:
        RuntimeError: a training failed; its own message is in the text. The others are not begun.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(cells)), mp_context=context, initializer=_single_thread) as pool:
        try:  # an interrupt may come while the processes are started, too
            waiting = {pool.submit(train, cell, tasks[cell.task]): cell for cell in cells}
            for future in as_completed(waiting):
                done(waiting[future], future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=True)  # its semaphores are given back
            if isinstance(error, Exception):
                raise RuntimeError(f"a training failed: {type(error).__name__}: {error}") from error
            raise


def _single_thread() -> None:
    import torch
    import torchrl  # noqa: F401  its import sets the level of its log

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every storage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the others
    torch.set_num_threads(1)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked.

    Raises:
        ConfigError: one sentence.
    """
    arms = [name for name in ARMS if name not in ABLATIONS]
    parser = SentenceParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three lags, no replay: a minute or two")
    parser.add_argument("--folder", type=Path, default=Path("runs/offpolicy_study"), help="for csv, table and figure")
    parser.add_argument("--tasks", nargs="+", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--arms", nargs="+", help=f"default: {' '.join(arms)}; besides: {' '.join(ABLATIONS)}")
    parser.add_argument("--lags", nargs="+", type=int, help=f"in updates; default: {' '.join(map(str, LAGS))}")
    parser.add_argument("--replay", nargs="+", type=float, help="shares of a batch; default: 0 0.5")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2 3 4")
    parser.add_argument("--updates", type=int, help="of one training; default: that of the task")
    parser.add_argument("--lr", type=float, help="Adam's step size; default: that of the task")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default 2)")
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    quick: dict[str, Any] = {"lags": [0, 4, 64], "replay": [0.0], "seeds": [0]}
    full: dict[str, Any] = {
        "tasks": list(TASKS), "arms": arms, "lags": list(LAGS), "replay": [0.0, 0.5],
        "seeds": [0, 1, 2, 3, 4],
    }  # fmt: skip
    for name, value in (full | quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in full:
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for name, known in (("tasks", tuple(TASKS)), ("arms", tuple(ARMS))):
        for word in getattr(args, name):
            if word not in known:
                raise ConfigError(f"--{name} has {word}; they must be of {', '.join(known)}{nearest(word, known)}")
    for name, least in (("lags", 0), ("seeds", 0), ("updates", 10), ("processes", 1)):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < least:
                raise ConfigError(f"--{name} has {number}; it must be at least {least}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ConfigError(f"--lr is {args.lr}; it must be positive")
    for share in args.replay:
        if not 0 <= share < 1:
            raise ConfigError(f"--replay has {share}; it must be at least 0 and below 1")
        for name in args.tasks:
            rows, fresh = TASKS[name].replayed(share), TASKS[name].num_envs
            if abs(rows / (fresh + rows) - share) > 0.005:
                below = math.floor(fresh * share / (1 - share))
                near = " or ".join(f"{rows / (fresh + rows):.3f}" for rows in (below, below + 1))
                raise ConfigError(f"--replay has {share}; beside {fresh} fresh unrolls whole ones give {near}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs what is not in the folder yet, then writes table and figure; returns what :func:`run_study` does."""
    return run_study(argv, parse, study)


def study(args: argparse.Namespace, tasks: dict[str, Task] | None = None) -> int:
    """The study of checked arguments; ``tasks`` other than the recipe's are for tests.

    Raises:
        ConfigError: if the folder cannot be used.
        RuntimeError: if a training failed.
    """
    tasks = TASKS if tasks is None else tasks
    if args.lr is not None:
        tasks = {name: replace(task, lr=args.lr) for name, task in tasks.items()}
    path = args.folder / "study.csv"
    usable_folder(args.folder)
    rows = read_rows(path, Cell, Result)
    # seeds first, so that a study that is stopped has whole seeds
    wanted = dict.fromkeys(
        Cell(task, replay, arm, lag, seed, args.updates or tasks[task].updates, tasks[task].digest(ARMS[arm]))
        for seed, task, replay, lag, arm in itertools.product(args.seeds, args.tasks, args.replay, args.lags, args.arms)
    )
    missing = [cell for cell in wanted if cell not in rows]
    soon = "; the first takes about half a minute" if missing else ""
    print(f"{len(wanted)} trainings, {len(wanted) - len(missing)} of them finished before{soon}", flush=True)
    start = time.perf_counter()

    def done(cell: Cell, result: Result) -> None:
        append_row(path, cell, result)
        rows[cell] = result
        count = sum(cell in rows for cell in missing)
        left = (time.perf_counter() - start) / count * (len(missing) - count)
        print(
            f"{count}/{len(missing)} {cell.task} seed {cell.seed}, {cell.replay:.0%} replay, lag {cell.lag}, "
            f"{cell.arm}: return {result.score:.3g}, trace {result.trace_length:.2g}, about {left / 60:.0f} min "
            "left",
            flush=True,
        )

    if missing:
        run_cells(missing, processes=args.processes, done=done, tasks=tasks)
    chosen = {cell: rows[cell] for cell in wanted}
    write_table(args.folder / "study.md", chosen, arms=args.arms)
    draw(args.folder / "study.png", chosen, arms=args.arms)
    print(f"written: {', '.join(str(args.folder / name) for name in ('study.csv', 'study.md', 'study.png'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
