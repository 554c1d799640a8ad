"""The memory that the learner shares with its actors.

The weights travel through one buffer guarded by a lock. The learner copies its parameters in and raises the version.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offtrace.modules.envs import EnvironmentFailure

_LOCK_TIMEOUT = 30.0
_MESSAGE_LIMIT = 16_000  # characters; a pipe takes 64 KiB without a reader


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, detached, sharing memory with the module."""
    found = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    found.update({name: b.detach() for name, b in module.named_buffers(remove_duplicate=False)})
    return found


class SharedWeights:
    """The newest weights and their version, and with them heartbeats, error messages and the stop flag.

    Args:
        policy: gives names, shapes and first values of the weights.
        workers: number of actor processes; 0 for one actor in the learner's own process.
        context: the multiprocessing context the processes are started with.
    """

    def __init__(self, policy: nn.Module, workers: int, context: Any) -> None:
        self.weights = {name: t.to("cpu", copy=True) for name, t in named_tensors(policy).items()}
        self.state = torch.zeros(3, dtype=torch.int64)  # version, stop, environments of one actor
        self.steps = torch.zeros(max(workers, 1), dtype=torch.int64)
        self.beats = torch.zeros(max(workers, 1), dtype=torch.float64)  # time.monotonic() of the last step, seconds
        self.lock: Any = threading.Lock()
        self.errors: list[Any] = []
        if workers:
            for tensor in (*self.weights.values(), self.state, self.steps, self.beats):
                tensor.share_memory_()
            self.lock = context.Lock()
            self.errors = [context.SimpleQueue() for _ in range(workers)]
        self.parent = os.getpid()

    @property
    def version(self) -> int:
        """Number of weight updates published so far."""
        return int(self.state[0])

    @version.setter
    def version(self, value: int) -> None:
        self.state[0] = value

    @property
    def num_envs(self) -> int:
        """Environments of one actor, known once it is up."""
        return int(self.state[2])

    @num_envs.setter
    def num_envs(self, value: int) -> None:
        self.state[2] = value

    def stop(self) -> None:
        """Ask the actors to leave at their next step."""
        self.state[1] = 1

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy new weights in and return the new version. Every policy call that begins afterwards uses them.

        Raises:
            KeyError: when a weight is missing or unknown.
            RuntimeError: when an actor died while it held the lock.
        """
        if tensors.keys() != self.weights.keys():
            odd = sorted(tensors.keys() ^ self.weights.keys())
            raise KeyError(f"the weights do not fit the policy of the actors: {odd[:5]} are on one side only")
        self._acquire()
        try:
            for name, buffer in self.weights.items():
                buffer.copy_(tensors[name])
            self.state[0] += 1
            return int(self.state[0])
        finally:
            self.lock.release()

    def load_into(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy the newest weights into ``tensors`` and return their version."""
        self._acquire()
        try:
            for name, buffer in self.weights.items():
                tensors[name].copy_(buffer)
            return int(self.state[0])
        finally:
            self.lock.release()

    def release(self) -> None:
        """Let go of lock and queues, whose names stay in the file system as long as somebody holds them."""
        self.lock, self.errors = threading.Lock(), []

    def report(self, worker: int, message: str) -> None:
        """Leave an error message for the learner."""
        if self.errors:
            self.errors[worker].put(message[-_MESSAGE_LIMIT:])

    def errors_of(self, worker: int) -> str | None:
        """First message that the actor left, or None."""
        if self.errors and not self.errors[worker].empty():
            return str(self.errors[worker].get())
        return None

    def failure(self, error: Exception) -> EnvironmentFailure:
        """What the learner raises for an error that no actor process has reported."""
        return EnvironmentFailure(f"collection failed at step {int(self.steps[0])}: {type(error).__name__}: {error}")

    def _acquire(self) -> None:
        if not self.lock.acquire(timeout=_LOCK_TIMEOUT):
            raise RuntimeError(f"the lock on the actors' weights was not free within {_LOCK_TIMEOUT:.0f} s")
