"""Actors in processes of their own: the learner takes their rollouts in turn, watches over them, and ends them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from offtrace.modules.collectors.actors import ActorSpec, Failed, Rollout, Up, run_actor
from offtrace.modules.collectors.memory import Key, SharedBlock
from offtrace.modules.collectors.protocol import Copy
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.fork_server import context, signals_blocked, start_fork_server

_POLL = 0.1  # seconds between two looks at the actors' health while a rollout is awaited
_START_ALLOWANCE = 120.0  # seconds for importing the libraries, on top of the time one step may take
_SHUTDOWN_TIMEOUT = 4.0
_KILL_TIMEOUT = 10.0  # a killed process is gone at once, unless the machine is loaded or hangs


class ActorProcess:
    """One actor process, as the learner sees it.

    Args:
        worker: its number.
        shared: the weights.
        spec: the pickled :class:`ActorSpec`.

    Attributes:
        process, worker: as they are.
        up: whether it has told that it is there.
        has_rollout: whether a rollout waits in its memory.
        since: when it was last told to go on, ``time.monotonic()``.
    """

    def __init__(self, worker: int, shared: SharedWeights, spec: SharedBlock) -> None:
        self.worker = worker
        self._shared = shared
        self._entries: dict[Key, Tensor] = {}
        self._shape = torch.Size()
        self.pipe, theirs = context().Pipe()
        self.process = context().Process(
            target=run_actor, args=(worker, theirs, shared, spec), name=f"actor {worker}", daemon=False
        )
        self.up = self.has_rollout = False
        self.since = time.monotonic()
        self.process.start()
        theirs.close()  # so that the pipe ends when the actor does

    def go_on(self) -> None:
        """Let it make its next rollout, over the last one."""
        self.has_rollout = False
        with contextlib.suppress(OSError):  # it has died, which is found when its rollout is awaited
            self.pipe.send(None)
        self.since = time.monotonic()

    def rollout(self) -> tuple[Mapping[Key, Tensor], torch.Size]:
        """Entries and shape of what waits, in the memory that the actor writes the next one to."""
        return self._entries, self._shape

    def read(self) -> None:
        """Take in what it says.

        Raises:
            EnvironmentFailure: it failed, or is dead.
        """
        try:
            message = self.pipe.recv()
            if isinstance(message, Rollout) and message.layout is not None:
                self._entries = SharedBlock.receive(self.pipe).views(message.layout)
                self._shape = message.shape
        except (EOFError, OSError):
            self.process.join(_KILL_TIMEOUT)
            raise self._dead() from None
        if isinstance(message, Failed):
            reason = message.traceback.strip().splitlines()[-1]
            raise EnvironmentFailure(
                f"actor process {self.worker} failed at step {self.step}: {reason}\n\nIn the actor process:\n"
                f"{message.traceback}"
            )
        self.up = self.up or isinstance(message, Up)
        self.has_rollout = isinstance(message, Rollout)

    def check_alive(self) -> None:
        """Look whether the process is there, or what it said last.

        Raises:
            EnvironmentFailure: it is dead.
        """
        if not self.process.is_alive() and not self.pipe.poll():
            raise self._dead()

    def _dead(self) -> EnvironmentFailure:
        code = self.process.exitcode
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return EnvironmentFailure(f"actor process {self.worker} ended by itself at step {self.step} ({cause}).")

    def check_moving(self, limit: float) -> None:
        """Look whether it has made a step within ``limit`` seconds.

        Raises:
            EnvironmentFailure: it hangs.
        """
        idle = time.monotonic() - max(self.since, float(self._shared.beats[self.worker]))
        if idle > limit:
            raise EnvironmentFailure(
                f"actor process {self.worker} has made no step for {idle:.1f} s (step {self.step} hangs; the limit "
                f"step_timeout is {limit:g} s)"
            )

    def release(self) -> None:
        """Let go of pipe and memory."""
        self.pipe.close()
        self._entries = {}

    @property
    def step(self) -> int:
        """The number of its last step."""
        return int(self._shared.steps[self.worker])


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
        pickled = _pickled(spec)
        start_fork_server()
        try:
            with signals_blocked():
                for worker in range(len(spec.seeds)):
                    self._actors.append(ActorProcess(worker, shared, pickled))
            self._wait_until(lambda: all(actor.up for actor in self._actors), _START_ALLOWANCE + step_timeout)
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
    def pids(self) -> list[int]:
        """Of the actor processes."""
        return [int(actor.process.pid or 0) for actor in self._actors]

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
        for actor in self._actors:
            actor.pipe.close()
        limit = time.monotonic() + _SHUTDOWN_TIMEOUT
        for actor in self._actors:
            actor.process.join(max(0.0, limit - time.monotonic()))
        self._kill()
        self._shared.release()

    def _wait_until(self, condition: Callable[[], bool], seconds: float | None) -> None:
        """Take in what the actors say until ``condition`` holds; ``seconds`` are the most that all of it may take.

        Raises:
            EnvironmentFailure: an actor failed, died or hangs, or the time is over.
        """
        pipes = {actor.pipe: actor for actor in self._actors}
        limit = None if seconds is None else time.monotonic() + seconds
        while not condition():
            ready: list[Any] = wait(list(pipes), _POLL)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                pipes[pipe].read()
            if ready:
                continue
            for actor in self._actors:
                actor.check_alive()
            if limit is None:
                self._actors[self._turn].check_moving(self._step_timeout)
            elif time.monotonic() > limit:
                late = [actor.worker for actor in self._actors if not actor.up]
                raise EnvironmentFailure(f"actor process {late[0]} did not come up within {seconds:.0f} s")

    def _kill(self) -> None:
        """End the actors without asking, and wait for their ends, or zombies would stay."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                actor.process.kill()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                actor.process.join(_KILL_TIMEOUT)
            actor.release()


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
