"""The process from which actor processes are forked: it has imported the libraries once, for all of them.

A process started afresh spends seconds of a core on imports. A fork of this server is there in a hundredth of a second,
and takes nothing from the learner: no thread, no lock, no GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

_ALWAYS = ("offtrace.modules.collectors.actors", "offtrace.modules.networks.policy")
_IF_USED = tuple(f"offtrace.modules.envs.{name}" for name in ("atari", "control", "gym"))


def start_fork_server(*modules: str) -> None:
    """Start it, if it does not run yet, and come back at once: it imports while the caller goes on.

    Args:
        modules: further ones that it imports. One that is not there is passed over. Those of environments that this
            process has imported, it imports too.
    """
    if not _has_fork_server():
        return
    used = [name for name in _IF_USED if name in sys.modules]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_ALWAYS, *used, *modules])
    # its start lets through the signals that are blocked below
    resource_tracker.ensure_running()
    with signals_blocked():
        forkserver.ensure_running()


def context() -> Any:
    """How actor processes are started: from the server, or afresh on a system that cannot fork."""
    return multiprocessing.get_context("forkserver" if _has_fork_server() else "spawn")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started in it has SIGINT and SIGTERM blocked: the learner alone handles those."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_fork_server() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
