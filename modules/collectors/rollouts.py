"""Rollouts as learners get them: in memory of their own, with the version of the weights and the actor in each step."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from offtrace.modules.collectors.buffer_pool import BufferPool
from offtrace.modules.collectors.frames import FRAMES, PackedRollout
from offtrace.modules.collectors.memory import Key
from offtrace.modules.collectors.protocol import Backend
from offtrace.modules.collectors.weights import named_tensors
from offtrace.modules.keys import NEXT, POLICY_VERSION, VALID, WORKER

# Never True at the root of a rollout, or a copy of what ("next", key) holds.
_EXCLUDED = ("done", "terminated", "truncated", "episode_reward", "episode_length", "episode_end", "collector")


class RolloutCollector:
    """An endless iterator of rollouts that owns its actors, whatever runs them. Made by :func:`make_collector`.

    Each rollout is a TensorDict ``[N, T]`` (N environments of one actor, time last) that shares memory with nobody. It
    holds what environment and policy wrote, ``"policy_version"`` and ``("next", "policy_version")``: int64 ``[N, T]``,
    the number of pushes whose weights chose the action of the step; and ``"worker"``, int64 ``[N, T]``: the number of
    the actor, in the memory of one number. Environments whose simulator may fail give ``"valid"``, bool ``[N, T, 1]``:
    False where it failed in the step.

    Args:
        backend: runs the actors.
        frames_per_batch: N T, the size of a rollout.
        frame_stack: frames in an observation, of which each comes from the backend once; 1: observations come whole.

    Attributes:
        backend, frames_per_batch, frame_stack: as given.
        order: maps N to a permutation of the environments in which to copy the next rollout out, or None. The copy is
            made anyway, so shuffling here is free.
        pin_memory: copy into page-locked memory, from which a transfer to a GPU need not wait.
    """

    def __init__(self, backend: Backend, *, frames_per_batch: int, frame_stack: int = 1) -> None:
        self.backend = backend
        self.frame_stack = frame_stack
        self.frames_per_batch = frames_per_batch
        self.order: Callable[[int], Tensor] | None = None
        self.pin_memory = False
        self._memory = BufferPool()
        self._closed = False
        self._at_exit = partial(_shutdown_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)  # before multiprocessing's own hook, which would wait for the workers

    @property
    def version(self) -> int:
        """Number of weight pushes so far."""
        return self.backend.version

    @version.setter
    def version(self, value: int) -> None:
        self.backend.version = value

    @property
    def num_envs(self) -> int:
        """N, the environments of one actor."""
        return self.backend.num_envs

    def __iter__(self) -> RolloutCollector:
        return self

    def __next__(self) -> TensorDictBase:
        """Next rollout ``[N, T]``; errors as of :meth:`take`."""
        return self.take().unpack()

    def take(self) -> PackedRollout:
        """Next rollout ``[N, T]``, as it travels: each frame in it once.

        Raises:
            EnvironmentFailure: an actor raised, died or hung; its own message is in the text. All actors are ended.
            RuntimeError: after ``shutdown``.
        """
        if self._closed:
            raise RuntimeError("the collector was shut down; make a new one")
        try:
            entries, shape, worker = self.backend.take(self._copy_out)
        except Exception:
            self.shutdown()
            raise
        entries[WORKER] = self._stamp(worker, shape)
        entries[NEXT, POLICY_VERSION] = entries[POLICY_VERSION]
        if (NEXT, VALID) in entries:  # a simulator's word on the step; at the root it was on the one before
            entries[VALID] = entries.pop((NEXT, VALID))
        return PackedRollout(entries, shape, self.frame_stack, self._memory)

    def update_policy(self, policy_or_weights: nn.Module | TensorDictBase | Mapping[str, Tensor]) -> int:
        """Give the actors new weights and return the new version.

        Takes a module of the same structure, ``TensorDict.from_module(module).data`` or a ``state_dict``, on any
        device. The weights are copied; every step that begins after the call uses them.
        """
        if isinstance(policy_or_weights, nn.Module):
            return self.backend.publish(named_tensors(policy_or_weights))
        if isinstance(policy_or_weights, TensorDictBase):
            policy_or_weights = policy_or_weights.data.flatten_keys(".").to_dict()
        return self.backend.publish(policy_or_weights)

    def shutdown(self) -> None:
        """End all actors: ask, then terminate, then kill, within about 5 seconds. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        threads = torch.get_num_threads()
        self.backend.shutdown()
        torch.set_num_threads(threads)  # TorchRL raises it when it shuts down

    def __enter__(self) -> RolloutCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.shutdown()

    def _copy_out(self, entries: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        order = None if self.order is None else self.order(self.num_envs)

        def copied(key: Key, source: Tensor) -> Tensor:
            if self.pin_memory:  # its allocator recycles by itself, and knows which transfers are under way
                out = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            else:
                out = self._memory.empty_like(source)
            if order is None or key == FRAMES:  # the order of frames is that of the places where stacks begin
                return out.copy_(source)
            return torch.index_select(source, 0, order, out=out)

        return {key: copied(key, source) for key, source in entries.items() if _root(key) not in _EXCLUDED}

    def _stamp(self, worker: int, shape: torch.Size) -> Tensor:
        if self.pin_memory:
            return torch.full(shape, worker, pin_memory=True)
        return torch.tensor(worker).expand(shape)  # one number for all steps


def _root(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _shutdown_if_alive(reference: weakref.ref[RolloutCollector]) -> None:
    collector = reference()
    if collector is not None:
        collector.shutdown()
