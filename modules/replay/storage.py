"""The memory of a replay: for each entry of a step one tensor over all slots."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules.replay.entries import Key, entries_of, nested
from offtrace.modules.replay.files import reserve

Layout = Mapping[Key, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of one slot of each entry."""


class Storage:
    """Tensors ``[slots, ...]``, in memory or in files, allocated when it is known what a step holds.

    Args:
        slots: how many.
        kind: ``"tensor"`` or ``"memmap"``.
        path: folder of the files; a temporary one if not given.
        device: of the tensors.

    Raises:
        ValueError: these do not go together.

    Attributes:
        leaves: the tensors; empty at first.
        state: which of them are states, so that a step has one and its successor another.
        has_init: whether what was inserted says where episodes start.
    """

    def __init__(
        self, slots: int, kind: Literal["tensor", "memmap"], path: str | Path | None, device: torch.device
    ) -> None:
        if kind not in ("tensor", "memmap"):
            raise ValueError(f"storage is {kind!r}; it must be 'tensor' or 'memmap'")
        if kind == "memmap" and device.type != "cpu":
            raise ValueError(f"a 'memmap' storage lies on the CPU, got device {str(device)!r}")
        self.slots, self.kind, self.path, self.device = slots, kind, path, device
        self.leaves: dict[Key, Tensor] = {}
        self.state: list[Key] = []
        self.has_init = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one slot; 0 before the allocation."""
        return sum(leaf[0].numel() * leaf.element_size() for leaf in self.leaves.values())

    def allocate(self, layout: Layout) -> None:
        """Takes memory for ``layout``, uninitialised; what is there already stays where it is of the same layout."""
        if {key: (tuple(leaf.shape[1:]), leaf.dtype) for key, leaf in self.leaves.items()} == dict(layout):
            return
        if self.kind == "tensor":
            self.leaves = {
                key: torch.empty(self.slots, *shape, dtype=dtype, device=self.device)
                for key, (shape, dtype) in layout.items()
            }
            return
        row = nested({key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in layout.items()})
        if self.path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="offtrace-replay-")
            self.path = self._temporary.name
        mapped = TensorDict(row, []).expand(self.slots).memmap_like(prefix=str(self.path), existsok=True)
        reserve(Path(self.path))
        # Plain views of the memory: a lookup through the subclass of memory-mapped tensors costs twice as much.
        found = entries_of(mapped)
        self.leaves = {key: found[key].as_subclass(Tensor) for key in layout}

    def tensor(self, array: np.ndarray) -> Tensor:
        """``array`` on the device of the storage."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":  # where a copy that does nothing costs, too
            return tensor
        return tensor.to(self.device, non_blocking=True)

    def by_ring(self, rings: int) -> dict[Key, Tensor]:
        """The tensors as ``[rings, slots / rings, ...]``."""
        return {key: leaf.view(rings, self.slots // rings, *leaf.shape[1:]) for key, leaf in self.leaves.items()}
