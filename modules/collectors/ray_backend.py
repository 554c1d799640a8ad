"""Actors on a Ray cluster: the learner asks each for its next rollout, takes them in turn, and replaces who fails.

Of this package this file and ray_cluster alone import Ray, and only when it is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from torch import Tensor

from offtrace.modules.collectors.actors import (
    ActorSpec,
    Failed,
    Leave,
    leave_signals_to_the_learner,
    let_signals_through,
    pickled,
    seed_everything,
    shut_down,
    told,
)
from offtrace.modules.collectors.frames import FRAMES, Packer
from offtrace.modules.collectors.memory import Key
from offtrace.modules.collectors.protocol import Copy
from offtrace.modules.collectors.ray_cluster import check_room, ray_connection
from offtrace.modules.collectors.restarts import Restarts
from offtrace.modules.collectors.seats import GOODBYE, Seat
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure

_POLL = 0.1  # seconds between two looks at the actors' health while a rollout is awaited
_BEAT = 0.5  # seconds between two requests for a sign of life
_HEAD_EVERY, _HEAD_TRIES = 2.0, 8  # seconds between two looks at the head, and how many in a row may fail
_LAST_WORDS = 2.0  # seconds for a finished rollout of an actor that has died
_SHUTDOWN_TIMEOUT = 4.0
_WATCH, _LIFE = "watch", "life"  # threads of an actor beside the one that acts


class RayOptions(NamedTuple):
    """Where Ray's actors run.

    Attributes:
        address: ``host:port`` of the head of a cluster that runs, or ``auto``: the one that this machine is a node of.
            Empty: a cluster of this machine alone, for this process, on 127.0.0.1.
        near: where there is room, on the learner's own node; else spread over the nodes.
        learners: ranks of ``torch.distributed`` whose actors share the cluster at ``address``. Each of them must make
            its collector, alike, at the same time: none takes CPUs before all have found room. Without an address each
            has a cluster of its own.
    """

    address: str = ""
    near: bool = False
    learners: int = 1


class Up(NamedTuple):
    """An actor is there: its environments, its process and its node."""

    num_envs: int
    pid: int
    node: str


class Sent(NamedTuple):
    """A rollout [N, T], packed, in the object store; its arrays cannot be written."""

    entries: dict[Key, np.ndarray[Any, Any]]
    shape: torch.Size


class RayActor:
    """An actor in a process of Ray's.

    ``begin``, ``rollout`` and ``close`` are called in one thread, which has the environments; ``beat`` and ``leave``
    are answered meanwhile; ``live`` is not answered, so what comes of it is that the actor is dead.
    """

    def __init__(self, worker: int, restart: int) -> None:
        leave_signals_to_the_learner()  # this is the main thread, and no other method is called in it
        self._worker, self._restart = worker, restart
        self._shared: SharedWeights | None = None

    def begin(self, data: bytes) -> Up | Failed:
        """Make environments and policy of the pickled :class:`ActorSpec`, in the thread that will step them."""
        import ray

        try:
            let_signals_through()
            spec: ActorSpec = cloudpickle.loads(data)
            torch.set_num_threads(spec.threads)
            seed_everything(spec.seed_of(self._worker, self._restart))
            shared = SharedWeights(spec.policy, self._worker + 1)  # the actor's own, with a place at its number
            self._collector = spec.make(shared, self._worker, self._restart)
            self._rollouts, self._packer = self._collector.iterator(), Packer(spec.frame_stack)
            self._frames: Tensor | None = None
            self._shared = shared
            return Up(shared.num_envs, os.getpid(), ray.util.get_node_ip_address())
        except BaseException as error:  # SystemExit too: an environment may want to end the process
            return told(error)

    def rollout(self, version: int, weights: np.ndarray[Any, Any]) -> Sent | Failed | None:
        """The next rollout, by these weights; None where none is wanted any more."""
        assert self._shared is not None
        try:
            if version != self._shared.version:
                self._shared.replace(_tensor(weights), version)
            rollout = next(self._rollouts)
            # memory that is written again: Ray has copied it out before the next call
            packed = self._packer.pack(rollout, self._frames)
            self._frames = packed.get(FRAMES)
            return Sent({key: tensor.numpy() for key, tensor in packed.items()}, rollout.shape)
        except Leave:
            return None
        except BaseException as error:
            return told(error)

    def beat(self) -> tuple[int, float]:
        """The number of the step, and when it began, by the actor's own clock."""
        if self._shared is None:
            return 0, 0.0
        return int(self._shared.steps[self._worker]), float(self._shared.beats[self._worker])

    def live(self) -> None:
        """As long as the actor does."""
        threading.Event().wait()

    def leave(self) -> None:
        """End the rollout that is being made at its next step."""
        if self._shared is not None:
            self._shared.stop()

    def close(self) -> None:
        """Close the environments, behind that rollout."""
        shut_down(self._collector)


class RaySeat(Seat):
    """A place for one Ray actor after another.

    Args:
        worker: its number.
        shared: the learner's weights, whose books note the signs of life.

    Attributes:
        pid: of the last that came up.
        rollout: what was delivered, and is there whatever becomes of the actor; None where there is none.
    """

    def __init__(self, worker: int, shared: SharedWeights) -> None:
        super().__init__(f"Ray actor {worker}", shared, worker)
        self.pid = 0
        self.rollout: Sent | None = None
        self._node = ""
        self._weights: Callable[[], tuple[int, Any]] | None = None  # to make it with
        self._actor: Any = None
        self._answer: Any = None
        self._life: Any = None
        self._beating: Any = None
        self._ask_at = 0.0

    def start(self, actor_class: Any, spec: Any) -> None:
        """Make an actor of the class; a new one makes the rollout that the last one owed."""
        self._actor, self._node = actor_class.remote(self._place, self.occupy()), ""
        self._life, self._beating = self._ask("live", _LIFE), None
        self._expect(self._actor.begin.remote(spec))

    def go_on(self, weights: Callable[[], tuple[int, Any]]) -> None:
        """Let it make its next rollout, with the version and the weights that there are when it begins."""
        self.rollout, self.owes, self._weights, self.idle = None, True, weights, 0.0
        if self.running and self.up:
            self._expect(self._actor.rollout.remote(*weights()))

    @property
    def awaited(self) -> list[Any]:
        """Futures of its answer, if it owes one, which Ray fetches onto this machine meanwhile, and of its death."""
        return [x for x in (self._answer, self._life) if x is not None] if self.running else []

    def read(self) -> None:
        """Take in an answer, or its death.

        Raises:
            EnvironmentFailure: it failed, or is dead.
        """
        # what it had finished may be on its way still
        if self._answer is None or not concurrent.futures.wait([self._answer], _LAST_WORDS).done:
            self._result(self._life)
        answer = self._result(self._answer)
        self._answer = None
        if isinstance(answer, Failed):
            with contextlib.suppress(Exception):  # whatever becomes of it, it is ended
                self.leave().result(timeout=GOODBYE)
            raise EnvironmentFailure(
                f"{self._named} failed at step {self._last_step()}: {answer.reason}\n\n"
                f"In its process:\n{answer.traceback}"
            )
        if isinstance(answer, Up):
            self.came_up()
            self.pid, self._node = answer.pid, answer.node
            self._shared.num_envs = answer.num_envs
            if self.owes and self._weights is not None:
                self.go_on(self._weights)
        else:
            self.rollout, self.owes = answer, False

    def check(self, seconds: float, limit: float) -> None:
        """Called after each ``seconds`` of waiting for it: ask for a sign of life, and look when the last one came.

        Raises:
            EnvironmentFailure: it is dead, or hangs.
        """
        if self._beating is not None and self._beating.done():
            self._note(self._result(self._beating))
            self._beating = None
        if self._beating is None and time.monotonic() >= self._ask_at:
            self._beating, self._ask_at = self._ask("beat"), time.monotonic() + min(_BEAT, limit / 4)
        self.check_moving(seconds, limit)

    def leave(self) -> Any:
        """Ask it to close its environments; a future of when it has."""
        self._ask("leave")
        return self._actor.close.remote().future()

    def end(self, *, kill: bool) -> None:
        """Let go of it, and end it without asking, unless it has gone with the connection."""
        if not self.running:
            return
        import ray

        self.running = False
        if kill:
            with contextlib.suppress(Exception):  # it may be gone, and Ray with it
                ray.kill(self._actor, no_restart=True)
        self._actor = self._answer = self._reference = self._life = self._beating = None

    @property
    def _named(self) -> str:
        return f"{self.what} on {self._node}" if self._node else self.what

    def _expect(self, reference: Any) -> None:
        # the reference keeps what it is of from being forgotten
        self._reference, self._answer = reference, reference.future()

    def _ask(self, method: str, thread: str = _WATCH) -> Any:
        return getattr(self._actor, method).options(concurrency_group=thread).remote().future()

    def _note(self, beat: tuple[int, float]) -> None:
        self._shared.steps[self._place], self._shared.beats[self._place] = beat

    def _last_step(self) -> int:
        """Its own count of now."""
        with contextlib.suppress(Exception):
            self._note(self._ask("beat").result(_SHUTDOWN_TIMEOUT))
        return self.step

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise EnvironmentFailure(
                f"{self._named} ended by itself ({type(error).__name__})\n\nRay says:\n{error}"
            ) from None


class Connection:
    """That of this process to its Ray cluster.

    Ray makes a new one by itself, with settings of its own, where it is asked for anything without one; and a minute
    after the head has gone it ends the process, so that nothing could be saved.
    """

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._head = ray.get_runtime_context().gcs_address
        self._due = 0.0
        self._failed = 0

    @property
    def there(self) -> bool:
        """Whether Ray may be asked for anything."""
        return bool(self._ray.is_initialized())

    def check(self) -> None:
        """Called often: look whether it is there, and now and then whether the cluster's head is.

        Raises:
            EnvironmentFailure: it has gone.
        """
        if not self.there:
            raise EnvironmentFailure("the connection to the Ray cluster was ended, and the collector was not before it")
        if time.monotonic() < self._due:
            return
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _HEAD_EVERY / 2).close()
            self._failed = 0
        except OSError as error:
            self._failed += 1
            if self._failed == _HEAD_TRIES:
                raise EnvironmentFailure(
                    f"the head of the Ray cluster, {self._head}, has gone ({error}); start the cluster again, and go "
                    "on from the checkpoint"
                ) from error
        self._due = time.monotonic() + _HEAD_EVERY


class RayBackend:
    """Meets :class:`~offtrace.modules.collectors.protocol.Backend`: Ray actors, one rollout ahead of the learner.

    An actor makes a rollout when it is asked to, with the newest weights, which go along, and then stands still until
    that was taken: a rollout has one version. It travels in Ray's object store as numpy arrays, is fetched while the
    learner learns, and copied once, into the learner's memory. Weights are put into the store once a version.

    One that raises, dies, hangs, or whose node goes, is replaced by a new one with a new seed; its rollout begins
    later, so with weights no older.

    Args:
        spec: of the actors.
        shared: the weights.
        num_workers: number of actors.
        step_timeout: seconds that one step, a reset included, may take.
        restarts: decides on faults.
        options: where they run.

    Raises:
        ValueError: the environment's maker or the policy does not pickle, Ray is not installed, the cluster cannot be
            reached, or has too few CPUs.
        EnvironmentFailure: an actor did not come up; its own message is in the text.
    """

    def __init__(
        self,
        spec: ActorSpec,
        shared: SharedWeights,
        *,
        num_workers: int,
        step_timeout: float,
        restarts: Restarts,
        options: RayOptions,
    ) -> None:
        data = pickled(spec._replace(environ={}))  # the cluster may be shared with others
        self._shared = shared
        self._step_timeout = step_timeout
        self._restarts = restarts
        self._turn = 0
        self._acting = False
        self._taken: Sent | None = None  # a rollout that is not copied yet
        self._put: tuple[int, Any] = (-1, None)  # the weights in the store, and their version
        self._seats = [RaySeat(worker, shared) for worker in range(num_workers)]
        self._cluster = contextlib.ExitStack()
        self._cluster.enter_context(ray_connection(options.address, num_workers * spec.threads))
        try:
            self._connection = Connection()
            check_room(num_workers, spec.threads, options.learners if options.address else 1)
            self._class = _actor_class(spec.threads, options)
            self._spec = _put(data)
            _quiet_about_read_only()
            self._wait_until(lambda: all(seat.up for seat in self._seats))
        except BaseException:
            self._end()
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
        """Of the actors that are there, on their nodes."""
        return [seat.pid for seat in self._seats if seat.running and seat.up]

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """As of the protocol; every rollout that begins afterwards uses them."""
        return self._shared.publish(tensors)

    def take(self, copied: Copy) -> tuple[dict[Key, Tensor], torch.Size, int]:
        """As of the protocol.

        Raises:
            EnvironmentFailure: an actor raised, died or hung, and is not replaced. All are ended then.
        """
        if self._taken is None:
            try:
                self._taken = self._next()
            except EnvironmentFailure:
                self._end()  # one that hangs would use up all the time it is given to leave
                raise
        entries = copied({key: _tensor(array) for key, array in self._taken.entries.items()})
        shape, worker, self._taken = self._taken.shape, self._turn, None
        self._turn = (self._turn + 1) % len(self._seats)
        return entries, shape, worker

    def _next(self) -> Sent:
        """The rollout of the actor whose turn it is, which makes its next one meanwhile."""
        self._connection.check()
        if not self._acting:
            self._acting = True
            for seat in self._seats:
                seat.go_on(self._weights)
        seat = self._seats[self._turn]
        self._weights()  # into the store before the actor waits for them
        self._wait_until(lambda: seat.rollout is not None)
        assert seat.rollout is not None
        rollout = seat.rollout
        seat.go_on(self._weights)  # what lies in the store is not written again: the actor need not wait for the copy
        return rollout

    def shutdown(self) -> None:
        """Ask, then kill, within about 5 seconds."""
        try:
            asked = self._seats if self._connection.there else []
            leaving = [seat.leave() for seat in asked if seat.running and seat.up]
            concurrent.futures.wait(leaving, _SHUTDOWN_TIMEOUT)
        finally:  # a second Ctrl-C too must leave nobody
            self._end()
            self._shared.release()

    def _weights(self) -> tuple[int, Any]:
        """The newest version, and where it lies in the store."""
        if self._put[0] != self._shared.version:
            self._put = (self._shared.version, _put(self._shared.packed.numpy()))
        return self._put

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Start what is due and take in what the actors deliver, until ``condition`` holds.

        Raises:
            EnvironmentFailure: one failed, died or hangs, and is not replaced; or the cluster has gone.
        """
        while not condition():
            self._connection.check()
            before = time.monotonic()
            self._start_due()
            awaited = [future for seat in self._seats for future in seat.awaited]
            if awaited:
                concurrent.futures.wait(awaited, _POLL, concurrent.futures.FIRST_COMPLETED)
            else:  # all have failed
                time.sleep(_POLL)
            ready = [seat for seat in self._seats if any(future.done() for future in seat.awaited)]
            for seat in ready:
                self._watched(seat, seat.read)
            if ready:
                continue
            # more than it asked for is time in which this process stood still
            seconds = min(time.monotonic() - before, 2 * _POLL)
            for seat in self._seats:
                if seat.running and (seat.owes or not seat.up):
                    self._watched(seat, partial(seat.check, seconds, self._step_timeout))
        self._start_due()  # what was found on the way comes up while the learner learns

    def _start_due(self) -> None:
        for seat in self._seats:
            if seat.due <= time.monotonic():
                seat.start(self._class, self._spec)

    def _watched(self, seat: RaySeat, action: Callable[[], None]) -> None:
        """``action`` on what is there of ``seat``, which is replaced where that tells of a fault.

        Raises:
            EnvironmentFailure: it is not.
        """
        had = seat.rollout is not None
        try:
            action()
        except EnvironmentFailure as error:
            delay = self._restarts.after(seat.what, error)
            seat.end(kill=True)
            seat.due = time.monotonic() + delay
        else:
            if seat.rollout is not None and not had:
                self._restarts.delivered(seat.what)

    def _end(self) -> None:
        """End the actors without asking, and let go of everything."""
        for seat in self._seats:
            seat.end(kill=self._connection.there)
            seat.rollout = None
        self._class = self._spec = self._taken = None
        self._put = (-1, None)
        self._cluster.close()


def _actor_class(threads: int, options: RayOptions) -> Any:
    """What makes actors, where they are to run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where: Any = "SPREAD"
    if options.near:
        where = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True
        )
    # Ray's own restarts would repeat the seed
    actor = ray.remote(concurrency_groups={_WATCH: 1, _LIFE: 1}, max_restarts=0, max_task_retries=0)(RayActor)
    return actor.options(num_cpus=threads, scheduling_strategy=where)


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """On the memory of the object store, which is only read."""
    return torch.from_numpy(array)


def _quiet_about_read_only() -> None:
    """Have torch's warning of memory that cannot be written, which comes once, now and unseen."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)
