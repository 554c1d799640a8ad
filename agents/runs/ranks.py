"""Which of several learners this process is, and what they tell each other before training.

Lightning starts those of one machine itself, one after the other. On several nodes torchrun starts all of them at once;
they meet in its store, so that what one refuses ends all in a sentence, where they would wait for it for half an hour.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from offtrace.agents.config import ConfigError
from offtrace.agents.config.train import TrainConfig
from offtrace.agents.runs.folders import RunError

_PATIENCE = 600.0  # seconds for which the learners wait for each other, which import torch on machines under load
_POLL = 0.1
_REFUSED = "refused"


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Of this process among all learners; 0 also where it is the only one, or the others are not started yet."""
    return int(os.environ.get("RANK" if by_torchrun() else "LOCAL_RANK", 0))


def by_lightning() -> bool:
    """Whether Lightning in the first learner started this process, which is another one."""
    return rank() > 0 and not by_torchrun()


def check_launch(train: TrainConfig) -> None:
    """Look whether the learners that are wanted were started.

    Raises:
        ConfigError: one sentence, with the command that does it.
    """
    devices, nodes = train.devices, train.num_nodes
    if not by_torchrun():
        if nodes > 1:
            raise ConfigError(
                f"train.num_nodes is {nodes}, and this learner would wait for those of the other nodes for ever: start "
                f"it by torchrun --nnodes {nodes} --node_rank N --nproc_per_node {devices} --master_addr HOST "
                f"--master_port 29500 RECIPE FLAGS on each node, N from 0 to {nodes - 1}, HOST that of node 0"
            )
        if train.learners > 1 and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "LOCAL_RANK" not in os.environ:
            # Lightning would take each task for a learner, each of which would begin a run of its own
            raise ConfigError(
                f"train.devices is {devices}, and Slurm started {os.environ['SLURM_NTASKS']} tasks; start one task a "
                f"node, and in it the learners by torchrun: srun --ntasks-per-node 1 torchrun --nproc_per_node "
                f"{devices} RECIPE FLAGS"
            )
        return
    started, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (started, here) != (train.learners, devices):
        raise ConfigError(
            f"train.devices is {devices} and train.num_nodes {nodes}, and torchrun started {started} learners, {here} "
            f"on this node: it must be --train.devices {here} --train.num_nodes {started // here}, or torchrun "
            f"--nnodes {nodes} --nproc_per_node {devices}"
        )


def from_first(make: Callable[[], str]) -> str:
    """What ``make`` gives on the first learner, which alone calls it. Of those that torchrun starts all must call this.

    Raises:
        RunError: another learner refused, or is not there.
    """
    if not by_torchrun():
        return make()
    if not rank():
        _set("first", make())
    return _await("first")


def meet(about: str) -> None:
    """Wait until all learners that torchrun started have come here, each with the same ``about``, lines of text.

    Raises:
        RunError: another learner refused, is not there, or is about something else.
    """
    if not by_torchrun():
        return
    _set(f"here{rank()}", about)
    for other in range(int(os.environ["WORLD_SIZE"])):
        theirs = _await(f"here{other}")
        if theirs != about:
            pairs = zip(theirs.splitlines(), about.splitlines(), strict=False)
            difference = next((f"{x.strip()!r} where this one has {y.strip()!r}" for x, y in pairs if x != y), "more")
            raise RunError(f"learner {other} has {difference}: give all learners the same command line")


def tell_refusal(sentence: str) -> None:
    """Lets those who wait for this learner know why it does not come."""
    if by_torchrun():
        with contextlib.suppress(RunError):  # they may be gone
            _set(_REFUSED, f"learner {rank()} on {socket.gethostname()} says: {sentence}")


def _set(key: str, value: str) -> None:
    with _told():
        _store().set(f"offtrace/{key}", value)


def _await(key: str) -> str:
    limit = time.monotonic() + _PATIENCE
    with _told():
        while not _store().check([f"offtrace/{key}"]):
            if _store().check([f"offtrace/{_REFUSED}"]):
                raise RunError(_store().get(f"offtrace/{_REFUSED}").decode())
            if time.monotonic() > limit:
                raise RunError(f"another learner has not come within {_PATIENCE:.0f} s; its own output says why")
            time.sleep(_POLL)
        return str(_store().get(f"offtrace/{key}").decode())


@contextlib.contextmanager
def _told() -> Any:
    try:
        yield
    except RuntimeError as error:  # the store ends with torchrun on the first node
        raise RunError(
            f"the learners on the first node have ended, or cannot be reached from {socket.gethostname()}; their own "
            "output says why"
        ) from error


@functools.cache
def _store() -> Any:
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://", timeout=timedelta(seconds=_PATIENCE))))[0]
