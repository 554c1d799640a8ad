"""Samples of a replay put together: what lies in slots, as a TensorDict of steps and their successors."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules.keys import DONE, FINALS, IS_INIT, NEXT, TERMINATED, TRUNCATED, VALID
from offtrace.modules.replay.entries import Key, nested
from offtrace.modules.replay.frames import STACK
from offtrace.modules.replay.rings import Rings
from offtrace.modules.replay.storage import Storage


class Batches:
    """Reads a storage by slots.

    Args:
        storage: the data.
        rings: which slots follow each other, and where episodes end.
        frame_stack: frames of an observation, of which a slot holds the newest.
    """

    def __init__(self, storage: Storage, rings: Rings, frame_stack: int) -> None:
        self._storage, self._rings, self._frame_stack = storage, rings, frame_stack

    def take(self, key: Key, slots: Tensor) -> Tensor:
        """What was inserted as ``key`` into ``slots`` ``[B]``, ``[B, ...]``; stacks of frames are whole again."""
        leaf = self._storage.leaves[key]
        if self._frame_stack == 1 or key != STACK:
            return leaf.index_select(0, slots)
        frames = leaf.index_select(0, self._rings.stacks(slots).flatten())
        return frames.view(len(slots), self._frame_stack * leaf.shape[1], *leaf.shape[2:])

    def transitions(self, slots: np.ndarray, named: dict[str, Tensor]) -> TensorDict:
        """The steps in ``slots``, ``[B]``, and their successors; ``named`` are entries ``[B]`` that come with them."""
        index, next_index = self._storage.tensor(slots), self._storage.tensor(self._rings.successors(slots))
        found = {key: self.take(key, index) for key in self._storage.leaves}
        successors = {key: self.take(key, next_index) for key in self._storage.state}
        return self._assemble(found, successors, named, self._rings.ends(slots))

    def sequences(self, slots: np.ndarray, named: dict[str, Tensor]) -> TensorDict:
        """The sequences that begin in ``slots``, ``[B, length]``, the steps before them in front; ``named`` ``[B]``."""
        states, steps, valid = self._rings.windows(slots)
        index, both = self._storage.tensor(steps.ravel()), self._storage.tensor(states.ravel())
        shape = steps.shape
        found, successors = {}, {}
        for key, leaf in self._storage.leaves.items():
            if key not in self._storage.state:
                found[key] = leaf.index_select(0, index).view(*shape, *leaf.shape[1:])
        for key in self._storage.state:
            window = self.take(key, both)
            window = window.view(shape[0], shape[1] + 1, *window.shape[1:])
            found[key], successors[key] = window[:, :-1], window[:, 1:]
        named = {name: value.unsqueeze(1).expand(shape) for name, value in named.items()}
        ends = self._rings.ends(steps)
        room = 0
        if valid is not None:
            named[VALID] = self._storage.tensor(valid).unsqueeze(-1)
            terminated, truncated = ends[:2]
            # a sequence never crosses episodes, so that an end within it has padding behind
            room = int((truncated & ~terminated & valid)[:, :-1].any())
        named[FINALS] = torch.empty(*shape, room, 0, device=self._storage.device)
        return self._assemble(found, successors, named, ends)

    def _assemble(
        self, found: dict[Key, Tensor], successors: dict[Key, Tensor], named: dict[str, Tensor], ends: np.ndarray
    ) -> TensorDict:
        shape = ends.shape[1:]
        root = nested({key: value for key, value in found.items() if key[0] != NEXT})
        successors.update({key[1:]: value for key, value in found.items() if key[0] == NEXT})  # rewards and the like
        next_entries = nested(successors)
        flags = self._storage.tensor(ends).unsqueeze(-1)
        next_entries[TERMINATED], next_entries[TRUNCATED], next_entries[DONE], init = flags.unbind()
        if self._storage.has_init:
            # padding repeats a step, which may be an episode's first; a state that is reset there would be lost
            root[IS_INIT] = init & named[VALID] if VALID in named else init
        # as a dict it would be gone through twice
        root[NEXT] = TensorDict(next_entries, shape, device=self._storage.device)
        return TensorDict({**root, **named}, shape, device=self._storage.device)
