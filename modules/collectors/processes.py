"""Actors in processes of their own: the learner takes their rollouts in turn, watches over them, and ends them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from offtrace.modules.collectors.actors import ActorSpec, Failed, Rollout, Up, run_actor, run_server
from offtrace.modules.collectors.memory import Key, SharedBlock
from offtrace.modules.collectors.protocol import Copy
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.fork_server import ForkedProcess, start_fork_server

_POLL = 0.1  # seconds between two looks at the actors' health while a rollout is awaited
_START_ALLOWANCE = 120.0  # seconds for importing the libraries, on top of the time one step may take
_SHUTDOWN_TIMEOUT = 4.0
_UNKNOWN = 255  # the exit code of a process whose fork server is gone
_KILL_TIMEOUT = 10.0  # a killed process is gone at once, unless the machine is loaded or hangs


class ChildProcess:
    """A process that the learner has started, and what it says.

    Args:
        target: what runs in it, called with its end of a pipe and ``arguments``.
        what: its name in messages.
        shared: the weights, with the signs of life.
        place: its place in those.
        arguments: further ones.

    Attributes:
        process, pipe, what: as they are.
        up: whether it has told that it is there.
        idle: seconds for which it has been waited for since its last sign of life.
    """

    def __init__(
        self, target: Callable[..., None], what: str, shared: SharedWeights, place: int, *arguments: Any
    ) -> None:
        self.what, self.up = what, False
        self.idle, self._beat = 0.0, 0.0
        self._shared, self._place = shared, place
        self.pipe, theirs = Pipe()
        self.process = ForkedProcess(target, what, (theirs, shared, *arguments))
        try:
            self.process.start()
        except OSError as error:
            self.pipe.close()
            raise EnvironmentFailure(f"{what} was not started: {error}") from error
        finally:
            theirs.close()  # so that the pipe ends when the process does

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
            raise EnvironmentFailure(
                f"{self.what} failed at step {self.step}: {message.reason}\n\nIn its process:\n{message.traceback}"
            )
        self.up = self.up or isinstance(message, Up)

    def note(self, message: Any) -> None:
        """What a subclass keeps of a message."""

    def check_alive(self) -> None:
        """Look whether the process is there, or what it said last.

        Raises:
            EnvironmentFailure: it is dead.
        """
        if not self.process.is_alive() and not self.pipe.poll():
            raise self._dead()

    def wait_for_beat(self, seconds: float) -> float:
        """Called after each ``seconds`` of waiting for it: how long it has been waited for since its last sign of life.

        A time in which this process itself stood still, suspended with the others, does not count.
        """
        beat = float(self._shared.beats[self._place])
        self.idle = seconds + (self.idle if beat == self._beat else 0.0)
        self._beat = beat
        return self.idle

    @property
    def step(self) -> int:
        """The number of its last step."""
        return int(self._shared.steps[self._place])

    def release(self) -> None:
        """Let go of what it holds."""
        self.pipe.close()

    def _dead(self) -> EnvironmentFailure:
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if code == _UNKNOWN:
            cause = "how is not known: the fork server, its parent, is gone"
        return EnvironmentFailure(f"{self.what} ended by itself at step {self.step} ({cause})")

    def kill(self) -> None:
        """End it without asking; whether or not its parent is there to tell of it."""
        with contextlib.suppress(OSError):
            if self.process.pid is not None and self.process.exitcode in (None, _UNKNOWN):
                os.kill(self.process.pid, signal.SIGKILL)


class ActorProcess(ChildProcess):
    """One actor.

    Args:
        worker: its number.
        shared: the weights.
        spec: the pickled :class:`ActorSpec`.
        server: its pipe to the server, where there is one.

    Attributes:
        has_rollout: whether a rollout waits in its memory.
    """

    def __init__(self, worker: int, shared: SharedWeights, spec: SharedBlock, server: Connection | None) -> None:
        self.has_rollout = False
        self._entries: dict[Key, Tensor] = {}
        self._shape = torch.Size()
        super().__init__(partial(run_actor, worker), f"actor process {worker}", shared, worker, spec, server)

    def go_on(self) -> None:
        """Let it make its next rollout, over the last one."""
        self.has_rollout = False
        with contextlib.suppress(OSError):  # it has died, which is found when its rollout is awaited
            self.pipe.send(None)
        self.idle = 0.0

    def rollout(self) -> tuple[Mapping[Key, Tensor], torch.Size]:
        """Entries and shape of what waits, in the memory that the actor writes the next one to."""
        return self._entries, self._shape

    def note(self, message: Any) -> None:
        """Whether there is a rollout, and where."""
        self.has_rollout = isinstance(message, Rollout)
        if isinstance(message, Rollout) and message.layout is not None:
            self._entries = SharedBlock.receive(self.pipe).views(message.layout)
            self._shape = message.shape

    def release(self) -> None:
        """Let go of pipe and memory."""
        super().release()
        self._entries = {}


class ProcessBackend:
    """Meets :class:`~offtrace.modules.collectors.protocol.Backend`: actors are one rollout ahead of the learner.

    An actor makes a rollout when it is told to, into memory that the learner sees, and stands still until that was
    copied out: which is the backpressure, and why no rollout is lost. All of them start at the same time.

    Args:
        spec: of the actors, one for each of its seeds.
        shared: the weights.
        step_timeout: seconds that one step, a reset included, may take.

    Raises:
        ValueError: the environment's maker or the policy does not pickle.
        EnvironmentFailure: an actor did not come up; its own message is in the text.
    """

    def __init__(self, spec: ActorSpec, shared: SharedWeights, *, step_timeout: float) -> None:
        self._shared = shared
        self._step_timeout = step_timeout
        self._turn = 0
        self._acting = False
        self._actors: list[ActorProcess] = []
        self._server: ChildProcess | None = None
        pickled = _pickled(spec)
        start_fork_server()
        try:
            self._start(spec, pickled)
            self._wait_until(lambda: all(actor.up for actor in self._actors), _START_ALLOWANCE + step_timeout)
        except BaseException:
            self._kill()
            raise
        finally:
            pickled.close()

    def _start(self, spec: ActorSpec, pickled: SharedBlock) -> None:
        number = len(spec.seeds)
        # each actor's pipe to the server: its own end, and the server's
        pipes = [Pipe() if spec.server is not None else (None, None) for _ in range(number)]
        try:
            if spec.server is not None:
                ends = [end for _, end in pipes]
                self._server = ChildProcess(run_server, "the inference server", self._shared, number, pickled, ends)
            for worker, (end, _) in enumerate(pipes):
                self._actors.append(ActorProcess(worker, self._shared, pickled, end))
        finally:  # so that a pipe ends when one of its two processes does
            for end in itertools.chain(*pipes):
                if end is not None:
                    end.close()

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
    def pids(self) -> list[int]:
        """Of the actor processes."""
        return [int(actor.process.pid or 0) for actor in self._actors]

    @property
    def _processes(self) -> list[ChildProcess]:
        # the server first: actors end when it does, and it is the cause then
        return [*([] if self._server is None else [self._server]), *self._actors]

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """As of the protocol."""
        return self._shared.publish(tensors)

    def take(self, copied: Copy) -> tuple[dict[Key, Tensor], torch.Size, int]:
        """As of the protocol.

        Raises:
            EnvironmentFailure: an actor raised, died or hung. All are ended then.
        """
        if not self._acting:
            self._acting = True
            for actor in self._actors:
                actor.go_on()
        actor = self._actors[self._turn]
        try:
            self._wait_until(lambda: actor.has_rollout, None)
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
        for child in self._processes:
            child.pipe.close()
        limit = time.monotonic() + _SHUTDOWN_TIMEOUT
        try:
            for child in self._processes:
                child.process.join(max(0.0, limit - time.monotonic()))
        finally:  # a second Ctrl-C too must leave nobody
            self._kill()
            self._shared.release()

    def _wait_until(self, condition: Callable[[], bool], seconds: float | None) -> None:
        """Take in what the processes say until ``condition`` holds; ``seconds`` are the most that all of it may take.

        Raises:
            EnvironmentFailure: one failed, died or hangs, or the time is over.
        """
        pipes = {child.pipe: child for child in self._processes}
        limit = None if seconds is None else time.monotonic() + seconds
        while not condition():
            before = time.monotonic()
            ready: list[Any] = wait(list(pipes), _POLL)
            for pipe in ready:
                self._read(pipes[pipe])
            if ready:
                continue
            for child in self._processes:
                child.check_alive()
            if limit is None:
                self._check_moving(self._actors[self._turn], min(time.monotonic() - before, 2 * _POLL))
            elif time.monotonic() > limit:
                late = next(child for child in self._processes if not child.up)
                raise EnvironmentFailure(f"{late.what} did not come up within {seconds:.0f} s")

    def _read(self, child: ChildProcess) -> None:
        try:
            child.read()
        except EnvironmentFailure:
            if self._server is not None and child is not self._server:
                self._server.process.join(_POLL)
                while self._server.pipe.poll():  # its word, or its end
                    self._server.read()
            raise

    def _check_moving(self, actor: ActorProcess, seconds: float) -> None:
        """Look whether the actor, or the server that it may wait for, has shown a sign of life in time.

        ``seconds``: since the last look.

        Raises:
            EnvironmentFailure: one hangs.
        """
        limit = self._step_timeout
        if self._server is not None and (idle := self._server.wait_for_beat(seconds)) > limit:
            raise EnvironmentFailure(
                f"the inference server has answered nothing for {idle:.1f} s (batch {self._server.step} hangs; the "
                f"limit step_timeout is {limit:g} s)"
            )
        if (idle := actor.wait_for_beat(seconds)) > limit:
            raise EnvironmentFailure(
                f"{actor.what} has made no step for {idle:.1f} s (step {actor.step} hangs; the limit step_timeout "
                f"is {limit:g} s)"
            )

    def _kill(self) -> None:
        """End the processes without asking, and wait for their ends, or zombies would stay."""
        for child in self._processes:
            child.kill()
        for child in self._processes:
            with contextlib.suppress(Exception):
                child.process.join(_KILL_TIMEOUT)
            child.release()


def _pickled(spec: ActorSpec) -> SharedBlock:
    """In shared memory, because what is larger than a pipe would keep the start of a process waiting for its imports.

    Raises:
        ValueError: it does not pickle.
    """
    try:
        data = cloudpickle.dumps(spec)
    except Exception as error:
        raise ValueError(
            f"the environment's maker or the policy does not pickle, which actor processes need: {error}; leave out "
            "what cannot be copied (open files, locks, windows), or collect in this process with num_workers=0"
        ) from error
    block = SharedBlock(len(data))
    block.whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return block
