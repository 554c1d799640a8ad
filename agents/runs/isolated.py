"""Checks in processes of their own: one that raises, hangs or crashes is one line, and the others go on."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

_LONGEST = 300  # characters of what an error says
_PATIENCE = 6.0  # seconds in which a process that is interrupted ends by itself


class Missing(Exception):
    """What is looked for is not there; the message is one sentence that says what to do."""


class Check(NamedTuple):
    """Something to be looked at.

    Attributes:
        name: of the line.
        call: says in a few words what it found, or raises: :class:`Missing`, or any error. Pickles by name.
        needed: whether offtrace does without it.
        limit: seconds, of which the first check of a process waits for its imports too.
    """

    name: str
    call: Callable[[], str]
    needed: bool = True
    limit: float = 30.0


class Line(NamedTuple):
    """What a check found: ``state`` is ``ok``, ``missing`` (what is not needed) or ``failed``."""

    name: str
    state: str
    text: str
    needed: bool


def run_isolated(groups: Sequence[Sequence[Check]]) -> Iterator[Line]:
    """The lines of all checks as they come: groups at the same time, the checks of each in turn, in one process.

    Where a check does not end in time, or takes its process with it, the rest of the group goes on in another one. All
    processes have ended when the iterator has.
    """
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(group) for group in groups if group)
        while busy := [worker for worker in workers if worker.left]:
            soonest = min(worker.deadline for worker in busy)
            ready = wait([worker.pipe for worker in busy], max(0.0, soonest - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready or worker.deadline <= time.monotonic():
                    yield worker.line()
    finally:
        limit = time.monotonic() + _PATIENCE
        for worker in workers:
            if worker.left:
                worker.interrupt()
        for worker in workers:
            worker.end(limit)


class _Worker:
    """The process of a group, and the checks that are left."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self.left = list(checks)
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = Pipe()
        fd = theirs.fileno()
        # what this process can import; a session of its own, so that all of its processes can be ended together
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from offtrace.agents.runs.isolated import work; work({fd})"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[fd], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.pipe.send(self.left)
        self.deadline = time.monotonic() + self.left[0].limit

    def line(self) -> Line:
        """That of the next check, which has ended or must end now."""
        check = self.left.pop(0)
        late = not self.pipe.poll()
        if not late:
            with contextlib.suppress(EOFError, OSError):
                found: Line = self.pipe.recv()
                self.deadline = time.monotonic() + (self.left[0].limit if self.left else 0.0)
                return found
        if late:
            self.interrupt()
        code = self.end(time.monotonic() + _PATIENCE)
        if self.left:
            self._start()
        how = f"it did not end within {check.limit:g} s" if late else f"its process ended {_cause(code)}"
        return Line(check.name, "failed", how, check.needed)

    def interrupt(self) -> None:
        """Lets the process end before its checks have, without leaving temporary files, if it can."""
        self._process.send_signal(signal.SIGINT)

    def end(self, limit: float) -> int:
        """Ends all processes of the group, once the first has ended or at the time ``limit``; its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, limit - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.pipe.close()
        return self._process.wait()


def _cause(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def work(fd: int) -> None:
    """What a group's process does: receives checks through the pipe ``fd``, and sends the line of each."""
    os.set_inheritable(fd, False)
    pipe = Connection(fd)
    checks: list[Check] = pipe.recv()
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    for check in checks:
        pipe.send(line_of(check))
    gc.freeze()  # the last collection would go through all objects of the libraries


def line_of(check: Check) -> Line:
    """Makes the check, in this process."""
    try:
        return Line(check.name, "ok", check.call(), check.needed)
    except Missing as error:
        return Line(check.name, "failed" if check.needed else "missing", _sentence(error), check.needed)
    except (Exception, SystemExit) as error:
        return Line(check.name, "failed", _sentence(error), check.needed)


def _sentence(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")[:_LONGEST]
    own = isinstance(error, (Missing, ValueError, RuntimeError)) and first
    return first if own else f"{type(error).__name__}: {first}".removesuffix(": ")


def _end_with(pipe: Connection) -> None:
    """Ends all processes of the group when the one that asks has ended, however it did."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.killpg(0, signal.SIGKILL)
