"""Actors in processes of their own: the learner takes their rollouts in turn, watches over them, and replaces them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import torch
from torch import Tensor

from offtrace.modules.collectors.actors import ActorSpec, Failed, Rollout, Up, pickled, run_actor, run_server
from offtrace.modules.collectors.memory import Key, SharedBlock
from offtrace.modules.collectors.protocol import Copy
from offtrace.modules.collectors.restarts import Restarts
from offtrace.modules.collectors.seats import GOODBYE, Seat
from offtrace.modules.collectors.server import adopt
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.fork_server import ForkedProcess, start_fork_server

_POLL = 0.1  # seconds between two looks at the actors' health while a rollout is awaited
_LAST_WORDS = 0.5  # seconds for what a server says when its actors have left
_SHUTDOWN_TIMEOUT = 4.0
_UNKNOWN = 255  # the exit code of a process whose fork server is gone
_KILL_TIMEOUT = 10.0  # a killed process is gone at once, unless the machine is loaded or hangs


class Child(Seat):
    """A place for one process after another, each in place of the last, and what they say.

    Args:
        what, shared, place: as of :class:`~offtrace.modules.collectors.seats.Seat`.

    Attributes:
        process, pipe: of the process that is there, if any.
        has_rollout: whether one waits in its memory.
    """

    has_rollout = False
    process: ForkedProcess
    pipe: Connection

    def begin(self, target: Callable[..., None], *arguments: Any) -> None:
        """Start a process: ``target`` with how many were there before, its end of a pipe, and ``arguments``.

        Raises:
            EnvironmentFailure: it was not started.
        """
        self.pipe, theirs = Pipe()
        number = self.occupy()
        self.process = ForkedProcess(partial(target, number), self.what, (theirs, self._shared, *arguments))
        try:
            self.process.start()
        except OSError as error:
            raise EnvironmentFailure(f"{self.what} was not started: {error}") from error
        finally:
            theirs.close()  # so that the pipe ends when the process does

    def start(self, spec: SharedBlock, server: Child | None) -> None:
        """Start the process for the pickled :class:`ActorSpec`, and the server that acts for it.

        Raises:
            EnvironmentFailure: it was not started.
        """
        raise NotImplementedError

    def read(self) -> None:
        """Take in what it says.

        Raises:
            EnvironmentFailure: it failed, or is dead.
        """
        try:
            message = self.pipe.recv()
            self.note(message)
        except (EOFError, OSError):
            self.process.join(_KILL_TIMEOUT)
            raise self._dead() from None
        if isinstance(message, Failed):
            self.process.join(GOODBYE)  # in which it closes its environments
            raise EnvironmentFailure(
                f"{self.what} failed at step {self.step}: {message.reason}\n\nIn its process:\n{message.traceback}"
            )
        if isinstance(message, Up):
            self.came_up()

    def note(self, message: Any) -> None:
        """What a subclass keeps of a message."""

    def check_alive(self) -> None:
        """Look whether the process is there, or what it said last.

        Raises:
            EnvironmentFailure: it is dead.
        """
        # without the fork server nobody knows; the process may be well, and its pipe ends when it does
        if self.process.exitcode not in (None, _UNKNOWN) and not self.pipe.poll():
            raise self._dead()

    def kill(self) -> None:
        """End it without asking; whether or not its parent is there to tell of it."""
        if not self.running:
            return
        with contextlib.suppress(OSError):
            if self.process.pid is not None and self.process.exitcode in (None, _UNKNOWN):
                os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for the end of what was killed, or a zombie would stay, and let go of it."""
        if not self.running:
            return
        with contextlib.suppress(Exception):  # it may never have been started
            self.process.join(_KILL_TIMEOUT)
        self.pipe.close()
        self.running = False

    def _dead(self) -> EnvironmentFailure:
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if code == _UNKNOWN:
            cause = "how is not known: the fork server, its parent, is gone"
        return EnvironmentFailure(f"{self.what} ended by itself at step {self.step} ({cause})")


class ServerProcess(Child):
    """The one that acts for all actors."""

    def __init__(self, what: str, shared: SharedWeights, place: int) -> None:
        super().__init__(what, shared, place)
        self.owes = True  # answers, always

    def start(self, spec: SharedBlock, server: Child | None) -> None:
        """As :meth:`Child.start`; it is the server."""
        self.begin(run_server, spec)

    def hanging(self, limit: float) -> str:
        """As :meth:`Child.hanging`."""
        return (
            f"{self.what} has answered nothing for {self.idle:.1f} s (batch {self.step} hangs; the limit step_timeout "
            f"is {limit:g} s)"
        )


class ActorProcess(Child):
    """One actor. A rollout that it has delivered is there to be taken whatever becomes of its process.

    Args:
        worker: its number.
        shared: the weights.
    """

    def __init__(self, worker: int, shared: SharedWeights) -> None:
        super().__init__(f"actor process {worker}", shared, worker)
        self._entries: Mapping[Key, Tensor] = {}
        self._shape = torch.Size()

    def start(self, spec: SharedBlock, server: Child | None) -> None:
        """As :meth:`Child.start`; a new actor makes the rollout that the last one owed."""
        ours, theirs = (None, None) if server is None else Pipe()
        try:
            if server is not None and theirs is not None:
                with contextlib.suppress(OSError):  # it has died, which is found when it is read
                    adopt(server.pipe, theirs)
            self.begin(partial(run_actor, self._place), spec, ours)
        finally:  # so that the pipe ends when one of its two processes does
            for end in (ours, theirs):
                if end is not None:
                    end.close()
        if self.owes:
            self.go_on()

    def go_on(self) -> None:
        """Let it make its next rollout, over the last one."""
        self.has_rollout, self.owes = False, True
        if self.running:
            with contextlib.suppress(OSError):  # it has died, which is found when it is read
                self.pipe.send(None)
        self.idle = 0.0

    def rollout(self) -> tuple[Mapping[Key, Tensor], torch.Size]:
        """Entries and shape of what waits, in the memory that the actor writes the next one to."""
        return self._entries, self._shape

    def note(self, message: Any) -> None:
        """Whether there is a rollout, and where."""
        if not isinstance(message, Rollout):
            return
        if message.layout is not None:
            self._entries = SharedBlock.receive(self.pipe).views(message.layout)
            self._shape = message.shape
        self.has_rollout, self.owes = True, False  # last: what an actor died in sending is not there

    def forget(self) -> None:
        """Let go of the memory."""
        self._entries = {}


class ProcessBackend:
    """Meets :class:`~offtrace.modules.collectors.protocol.Backend`: actors are one rollout ahead of the learner.

    An actor makes a rollout when it is told to, into memory that the learner sees, and stands still until that was
    copied out: which is the backpressure, and why no rollout is lost. All of them start at the same time.

    One that raises, dies or hangs is replaced by a new process, with a new seed, memory and pipe of its own. It begins
    its rollout later than the one in its place would have, so with weights no older. Where the server fails, all start
    anew: an actor cannot go on in the middle of a step.

    Args:
        spec: of the actors.
        shared: the weights.
        num_workers: number of actors.
        step_timeout: seconds that one step, a reset included, may take.
        restarts: decides on faults.

    Raises:
        ValueError: the environment's maker or the policy does not pickle.
        EnvironmentFailure: an actor did not come up; its own message is in the text.
    """

    def __init__(
        self, spec: ActorSpec, shared: SharedWeights, *, num_workers: int, step_timeout: float, restarts: Restarts
    ) -> None:
        self._shared = shared
        self._step_timeout = step_timeout
        self._restarts = restarts
        self._turn = 0
        self._acting = False
        self._actors = [ActorProcess(worker, shared) for worker in range(num_workers)]
        self._server = None if spec.server is None else ServerProcess("the inference server", shared, num_workers)
        # the server first: actors end when it does, and it is the cause then
        self._children: list[Child] = [*([] if self._server is None else [self._server]), *self._actors]
        self._spec: SharedBlock | None = _in_shared_memory(pickled(spec))
        try:
            start_fork_server()
            self._wait_until(lambda: all(actor.up for actor in self._actors))
        except BaseException:
            self._kill()
            raise

    @property
    def version(self) -> int:
        """As of the protocol."""
        return self._shared.version

    @version.setter
    def version(self, value: int) -> None:
        self._shared.version = value

    @property
    def num_envs(self) -> int:
        """As of the protocol."""
        return self._shared.num_envs

    @property
    def restarts(self) -> int:
        """As of the protocol."""
        return self._restarts.count

    @property
    def pids(self) -> list[int]:
        """Of the actor processes that are there."""
        return [int(actor.process.pid or 0) for actor in self._actors if actor.running]

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """As of the protocol."""
        return self._shared.publish(tensors)

    def take(self, copied: Copy) -> tuple[dict[Key, Tensor], torch.Size, int]:
        """As of the protocol.

        Raises:
            EnvironmentFailure: an actor raised, died or hung, and is not replaced. All are ended then.
        """
        if not self._acting:
            self._acting = True
            for actor in self._actors:
                actor.go_on()
        actor = self._actors[self._turn]
        try:
            self._wait_until(lambda: actor.has_rollout)
        except EnvironmentFailure:
            self._kill()  # one that hangs would use up all the time it is given to leave
            raise
        entries, shape = actor.rollout()
        entries = copied(entries)
        actor.go_on()
        worker, self._turn = self._turn, (self._turn + 1) % len(self._actors)
        return entries, shape, worker

    def shutdown(self) -> None:
        """Ask, then kill, within about 5 seconds."""
        self._shared.stop()
        running = [child for child in self._children if child.running]
        for child in running:
            child.pipe.close()
        limit = time.monotonic() + _SHUTDOWN_TIMEOUT
        try:
            for child in running:
                with contextlib.suppress(AssertionError):  # it was not started
                    child.process.join(max(0.0, limit - time.monotonic()))
        finally:  # a second Ctrl-C too must leave nobody
            self._kill()
            self._shared.release()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Start what is due and take in what the processes say, until ``condition`` holds.

        Raises:
            EnvironmentFailure: one failed, died or hangs, and is not replaced.
        """
        while not condition():
            self._start_due()
            before = time.monotonic()
            pipes = {child.pipe: child for child in self._children if child.running}
            ready: list[Any] = wait(list(pipes), _POLL)
            for pipe in ready:
                self._watched(pipes[pipe], pipes[pipe].read)
            if ready:
                continue
            # more than it asked for is time in which this process stood still
            seconds = min(time.monotonic() - before, 2 * _POLL)
            for child in self._children:
                self._watched(child, partial(self._check, child, seconds))
        self._start_due()  # what was found on the way comes up while the learner learns

    def _start_due(self) -> None:
        now = time.monotonic()  # one for all, so that no actor comes before its server
        for child in self._children:
            if child.due <= now:
                assert self._spec is not None
                self._watched(child, partial(child.start, self._spec, self._server), starts=True)

    def _check(self, child: Child, seconds: float) -> None:
        """Look whether a child is well."""
        child.check_alive()
        # the server that an actor may wait for is to be found first
        served = self._server is not None and child is not self._server
        child.check_moving(seconds, self._step_timeout + (2 * _POLL if served else 0.0))

    def _watched(self, child: Child, action: Callable[[], None], *, starts: bool = False) -> None:
        """``action`` on what is there of ``child``, which is replaced where that tells of a fault.

        Raises:
            EnvironmentFailure: it is not.
        """
        if not (child.running or starts):  # it was ended with another
            return
        had = child.has_rollout
        try:
            action()
        except EnvironmentFailure as error:
            child, fault = self._cause(child, error)
            delay = self._restarts.after(child.what, fault)
            together = self._children if child is self._server else [child]
            for one in together:
                one.kill()
            for one in together:
                one.end()
                one.due = time.monotonic() + delay
        else:
            if child.has_rollout and not had:
                self._restarts.delivered(*(one.what for one in (child, self._server) if one is not None))

    def _cause(self, child: Child, fault: EnvironmentFailure) -> tuple[Child, EnvironmentFailure]:
        """The server and its fault, where a child's is that the server has gone."""
        server = self._server
        if server is None or child is server or not server.running:
            return child, fault
        try:
            while server.pipe.poll(_LAST_WORDS):  # its word, or its end
                server.read()
        except EnvironmentFailure as cause:
            return server, cause
        return child, fault

    def _kill(self) -> None:
        """End the processes without asking, and let go of everything."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.end()
        for actor in self._actors:
            actor.forget()
        if self._spec is not None:
            self._spec.close()
        self._spec = None


def _in_shared_memory(data: bytes) -> SharedBlock:
    """Where what is larger than a pipe does not keep the start of a process waiting for its imports."""
    block = SharedBlock(len(data))
    block.whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return block
