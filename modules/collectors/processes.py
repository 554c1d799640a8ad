"""Actors in processes of their own: the learner takes their rollouts in turn, watches over them, and ends them."""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import MultiAsyncCollector

from offtrace.modules.collectors.actors import ActorCollector, initialise_process
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure

_POLL = 0.1  # seconds between two looks at the workers' health while a rollout is awaited
_START_ALLOWANCE = 120.0  # seconds for importing the libraries, on top of the time one step may take
_SHUTDOWN_TIMEOUT = 4.0
_KILL_TIMEOUT = 10.0  # a killed process is gone at once, unless the machine is loaded or hangs


class RoundRobinCollector(MultiAsyncCollector):
    """TorchRL's asynchronous collector with a place in the queue for every worker, emptied in turn.

    TorchRL's queue holds one rollout; a worker that cannot put its own within a second collects again over it. A
    worker has at most one rollout waiting, so with one place for each no put ever waits and none is lost: a worker
    stands still until its rollout was copied out, which is the backpressure.
    """

    def __init__(self, *args: Any, shared: SharedWeights, step_timeout: float, **kwargs: Any) -> None:
        self._shared = shared
        self._step_timeout = step_timeout
        self.copy_out: Callable[[TensorDictBase], TensorDictBase] = TensorDictBase.clone
        self.turn = 0  # the worker that made the rollout given last
        super().__init__(*args, **kwargs)

    @property
    def _queue_len(self) -> int:
        return int(self.num_workers)

    def _run_processes(self) -> None:
        # Workers must see neither Ctrl-C nor a SIGTERM to the whole process group, which the learner handles: a blocked
        # signal stays blocked in the child. The tracker is started first because its start unblocks them.
        multiprocessing.resource_tracker.ensure_running()
        allowance = _START_ALLOWANCE + self._step_timeout
        watchdog = threading.Timer(allowance, self.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            with _signals_blocked():
                super()._run_processes()
        except BaseException:  # a signal arrives when it is let through again
            self.kill()
            self.release()
            raise
        finally:
            watchdog.cancel()

    def kill(self) -> None:
        """End the workers without asking, and wait for their ends, or zombies would stay."""
        processes = getattr(self, "procs", ())
        for process in processes:
            with contextlib.suppress(Exception):
                process.kill()
        for process in processes:
            with contextlib.suppress(Exception):
                process.join(_KILL_TIMEOUT)

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """As TorchRL's, with a shorter time by default."""
        super().shutdown(_SHUTDOWN_TIMEOUT if timeout is None else timeout, close_env, raise_on_error)
        self.kill()  # TorchRL waits no longer for those it had to kill than its time lasts

    def release(self) -> None:
        """After shutdown: let go of semaphores and shared memory, which last as long as somebody holds them."""
        for name in ("queue_out", "_traj_pool", "collector_class", "copy_out"):
            self.__dict__.pop(name, None)

    def iterator(self) -> Iterator[TensorDictBase]:
        """Rollouts [N, T] of worker 0, 1, ..., 0, 1, ... without end, each a copy."""
        resumed = [0.0] * self.num_workers
        for worker in range(self.num_workers):
            resumed[worker] = self._resume(worker)
        self.running = True
        arrived: set[int] = set()
        turn = 0
        while True:
            while turn not in arrived:
                arrived |= self._arrivals()
                if turn not in arrived:
                    self._check(turn, resumed[turn])
            arrived.remove(turn)
            rollout = self.copy_out(self.out_tensordicts[turn])
            resumed[turn] = self._resume(turn)
            self.turn = turn
            yield rollout
            turn = (turn + 1) % self.num_workers

    def _resume(self, worker: int) -> float:
        self.pipes[worker].send((None, "continue"))
        return time.monotonic()

    def _arrivals(self) -> set[int]:
        try:
            data, count = self.queue_out.get(timeout=_POLL)
        except queue.Empty:
            return set()
        if count:
            return {data}
        rollout, worker = data  # the first message carries the shared memory
        self.out_tensordicts[worker] = rollout
        return {worker}

    def _check(self, awaited: int, resumed: float) -> None:
        try:
            self._raise_if_unwell(awaited, resumed)
        except EnvironmentFailure:
            self.kill()  # a worker that hangs would use up all the time it is given to leave
            raise

    def _raise_if_unwell(self, awaited: int, resumed: float) -> None:
        for worker, process in enumerate(self.procs):
            message = self._shared.errors_of(worker)
            if message is not None or not process.is_alive():
                process.join(0.2)
                message = message or self._shared.errors_of(worker)
                raise EnvironmentFailure(describe(self._shared, worker, message, process.exitcode))
        idle = time.monotonic() - max(resumed, float(self._shared.beats[awaited]))
        if idle > self._step_timeout:
            step = int(self._shared.steps[awaited])
            raise EnvironmentFailure(
                f"actor process {awaited} has made no step for {idle:.1f} s (step {step} hangs; the limit step_timeout "
                f"is {self._step_timeout:g} s)"
            )


class ProcessBackend:
    """Meets :class:`~offtrace.modules.collectors.protocol.Backend`: actors are one rollout ahead of the learner.

    Args:
        env_fns: gives the environment of each actor.
        shared: the weights.
        options: of :class:`ActorCollector`.
        step_timeout: seconds that one step, a reset included, may take.
        threads: torch threads of each actor.

    Raises:
        EnvironmentFailure: an actor did not come up; its own message is in the text.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[..., Any]],
        shared: SharedWeights,
        options: dict[str, Any],
        *,
        step_timeout: float,
        threads: int,
    ) -> None:
        self._shared = shared
        self._iterator: Iterator[TensorDictBase] | None = None
        special = {name: options.pop(name) for name in ("policy_bytes", "seeds", "device")}
        try:
            self._collector = RoundRobinCollector(
                env_fns,
                collector_class=partial(ActorCollector, shared=shared, **special),
                init_fn=partial(initialise_process, shared.parent),
                num_threads=torch.get_num_threads(),
                num_sub_threads=threads,
                shared=shared,
                step_timeout=step_timeout,
                **options,
            )
        except Exception as error:
            messages = [shared.errors_of(worker) for worker in range(len(env_fns))]
            shared.release()
            worker, message = next(((w, m) for w, m in enumerate(messages) if m), (0, None))
            if message is None:
                raise EnvironmentFailure(f"an actor process did not come up: {error}") from error
            raise EnvironmentFailure(describe(shared, worker, message, None)) from None

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
        return [process.pid for process in self._collector.procs]

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """As of the protocol."""
        return self._shared.publish(tensors)

    def take(self, copied: Callable[[TensorDictBase], TensorDictBase]) -> tuple[TensorDictBase, int]:
        """As of the protocol.

        Raises:
            EnvironmentFailure: an actor raised, died or hung. All are ended then.
        """
        self._collector.copy_out = copied
        try:
            if self._iterator is None:
                self._iterator = iter(self._collector)
            return next(self._iterator), self._collector.turn
        except EnvironmentFailure:
            raise
        except Exception as error:
            raise self._shared.failure(error) from error
        finally:
            self._collector.copy_out = TensorDictBase.clone  # keeps nothing alive that belongs to the caller

    def shutdown(self) -> None:
        """Ask, then terminate, then kill, within about 5 seconds."""
        self._shared.stop()
        self._collector.shutdown(raise_on_error=False)
        self._collector.release()
        self._shared.release()
        self._iterator = None


def describe(shared: SharedWeights, worker: int, message: str | None, exitcode: int | None) -> str:
    """One sentence, then the worker's own traceback."""
    step = int(shared.steps[worker])
    if message is None:
        cause = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
        return f"actor process {worker} ended by itself at step {step} ({cause})."
    reason = message.strip().splitlines()[-1]
    return f"actor process {worker} failed at step {step}: {reason}\n\nIn the actor process:\n{message}"


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
