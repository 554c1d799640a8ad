"""Rollouts as learners get them: in memory of their own, with the version of the weights and the actor in each step."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from offtrace.modules.collectors.buffer_pool import BufferPool
from offtrace.modules.collectors.frames import FIRST, FRAMES, PackedRollout
from offtrace.modules.collectors.memory import Key
from offtrace.modules.collectors.protocol import Backend
from offtrace.modules.collectors.weights import named_tensors
from offtrace.modules.keys import NEXT, POLICY_VERSION, VALID, WORKER

# Never True at the root of a rollout, or a copy of what ("next", key) holds.
_EXCLUDED = ("done", "terminated", "truncated", "episode_reward", "episode_length", "episode_end", "collector")


class _Half:
    """A batch of several rollouts, of which some are taken."""

    def __init__(self, places: Tensor) -> None:
        self.places = places  # of the rows, in the order in which they are taken
        self.taken = 0
        self.joined: dict[Key, Tensor] = {}
        self.frames: list[Tensor] = []
        self.shape = torch.Size()


class RolloutCollector:
    """An endless iterator of rollouts that owns its actors, whatever runs them. Made by :func:`make_collector`.

    Each rollout is a TensorDict ``[N, T]`` (N environments of one actor, time last) that shares memory with nobody. It
    holds what environment and policy wrote, ``"policy_version"`` and ``("next", "policy_version")``: int64 ``[N, T]``,
    the number of pushes whose weights chose the action of the step; and ``"worker"``, int64 ``[N, T]``: the number of
    the actor, in the memory of one number. Environments whose simulator may fail give ``"valid"``, bool ``[N, T, 1]``:
    False where it failed in the step.

    Args:
        backend: runs the actors.
        frames_per_batch: N T, the size of an actor's rollout.
        frame_stack: frames in an observation, of which each comes from the backend once; 1: observations come whole.
        rollouts_per_batch: R, rollouts of different actors that come as one ``[R N, T]``.

    Attributes:
        backend, frame_stack, rollouts_per_batch: as given.
        frames_per_batch: R N T.
        order: maps N to a permutation of the environments in which to copy the next rollout out, or None. The copy is
            made anyway, so shuffling here is free.
        pin_memory: copy into page-locked memory, from which a transfer to a GPU need not wait.
    """

    def __init__(
        self, backend: Backend, *, frames_per_batch: int, frame_stack: int = 1, rollouts_per_batch: int = 1
    ) -> None:
        self.backend = backend
        self.frame_stack, self.rollouts_per_batch = frame_stack, rollouts_per_batch
        self.frames_per_batch = frames_per_batch * rollouts_per_batch
        self.order: Callable[[int], Tensor] | None = None
        self.pin_memory = False
        self._memory = BufferPool()
        self._half: _Half | None = None
        self._closed = False
        self._owner = os.getpid()
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
        """R N, the environments of a rollout."""
        return self.backend.num_envs * self.rollouts_per_batch

    @property
    def restarts(self) -> int:
        """Actors and inference servers that took the place of one that failed, so far."""
        return self.backend.restarts

    def __iter__(self) -> RolloutCollector:
        return self

    def __next__(self) -> TensorDictBase:
        """Next rollout ``[N, T]``; errors as of :meth:`take`."""
        return self.take().unpack()

    def take(self) -> PackedRollout:
        """Next rollout ``[N, T]``, as it travels: each frame in it once.

        Raises:
            EnvironmentFailure: an actor raised, died or hung, and is not replaced; its own message is in the text. All
                actors are ended.
            RuntimeError: after ``shutdown``.
        """
        if self._closed:
            raise RuntimeError("the collector was shut down; make a new one")
        try:
            entries, shape = self._take()
        except Exception:
            self.shutdown()
            raise
        entries[NEXT, POLICY_VERSION] = entries[POLICY_VERSION]
        if (NEXT, VALID) in entries:  # a simulator's word on the step; at the root it was on the one before
            entries[VALID] = entries.pop((NEXT, VALID))
        return PackedRollout(entries, shape, self.frame_stack, self._memory)

    def update_policy(self, policy_or_weights: nn.Module | TensorDictBase | Mapping[str, Tensor]) -> int:
        """Give the actors new weights and return the new version.

        Takes a module of the same structure, ``TensorDict.from_module(module).data`` or a ``state_dict``, on any
        device. The weights are copied; every step that begins after the call uses them.

        Raises:
            KeyError: a weight is missing or unknown.
            ValueError: one has another shape.
            RuntimeError: after ``shutdown``.
        """
        if self._closed:
            raise RuntimeError("the collector was shut down; make a new one")
        if isinstance(policy_or_weights, nn.Module):
            return self.backend.publish(named_tensors(policy_or_weights))
        if isinstance(policy_or_weights, TensorDictBase):
            policy_or_weights = policy_or_weights.data.flatten_keys(".").to_dict()
        return self.backend.publish(policy_or_weights)

    def shutdown(self) -> None:
        """End all actors: ask, then kill, within about 5 seconds. Further calls do nothing.

        In process there is nobody to kill: environments that take long to close are waited for.
        """
        if self._closed or os.getpid() != self._owner:  # a fork of the learner has no say
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

    def _take(self) -> tuple[dict[Key, Tensor], torch.Size]:
        """Entries and shape of the next batch; the copy out of the actors' memory joins and orders the rows."""
        order = None if self.order is None else self.order(self.num_envs)
        if self.rollouts_per_batch == 1:
            entries, shape, worker = self.backend.take(partial(self._copied, order=order))
            entries[WORKER] = self._stamp(worker, shape)
            return entries, shape
        # kept until it is whole: a Ctrl-C between two takings must lose nothing
        half = self._half = self._half or _Half(torch.arange(self.num_envs) if order is None else order.argsort())
        joined, frames = half.joined, half.frames
        for part in half.places.split(self.backend.num_envs)[half.taken :]:
            _, half.shape, worker = self.backend.take(partial(self._join, joined, frames, part))
            half.taken += 1
            if WORKER not in joined:
                joined[WORKER] = self._empty(torch.Size([self.num_envs, *half.shape[1:]]), torch.int64)
            joined[WORKER][part] = worker
        self._half = None
        if frames:
            number = sum(map(len, frames))
            joined[FRAMES] = torch.cat(
                frames, out=self._empty(torch.Size([number, *frames[0].shape[1:]]), frames[0].dtype)
            )
        return joined, torch.Size([self.num_envs, *half.shape[1:]])

    def _copied(self, entries: Mapping[Key, Tensor], order: Tensor | None = None) -> dict[Key, Tensor]:
        """One actor's entries, in memory of their own."""

        def copied(key: Key, source: Tensor) -> Tensor:
            out = self._empty(source.shape, source.dtype)
            if order is None or key == FRAMES:  # the order of frames is that of the places where stacks begin
                return out.copy_(source)
            return torch.index_select(source, 0, order, out=out)

        return {key: copied(key, source) for key, source in _wanted(entries)}

    def _join(
        self, joined: dict[Key, Tensor], frames: list[Tensor], rows: Tensor, entries: Mapping[Key, Tensor]
    ) -> dict[Key, Tensor]:
        """Writes one of several actors' entries into ``rows`` of ``joined``, and adds its frames to the list."""
        before = sum(map(len, frames))
        for key, source in _wanted(entries):
            if key == FRAMES:
                frames.append(self._memory.empty_like(source).copy_(source))
                continue
            if key not in joined:
                joined[key] = self._empty(torch.Size([self.num_envs, *source.shape[1:]]), source.dtype)
            part = source + before if key == FIRST else source
            if part.dtype == torch.uint8:  # numpy writes whole rows, torch their elements one by one
                joined[key].numpy()[rows.numpy()] = part.numpy()
            else:
                joined[key][rows] = part
        return joined

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self.pin_memory:  # its allocator recycles by itself, and knows which transfers are under way
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return self._memory.empty(shape, dtype)

    def _stamp(self, worker: int, shape: torch.Size) -> Tensor:
        if self.pin_memory:
            return torch.full(shape, worker, pin_memory=True)
        return torch.tensor(worker).expand(shape)  # one number for all steps


def _wanted(entries: Mapping[Key, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    for key, source in entries.items():
        if (key if isinstance(key, str) else key[0]) not in _EXCLUDED:
            yield key, source


def _shutdown_if_alive(reference: weakref.ref[RolloutCollector]) -> None:
    collector = reference()
    if collector is not None:
        collector.shutdown()
