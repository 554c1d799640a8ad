"""Memory for large results that is used again once nobody holds the result any more."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes; below it the allocator keeps the pages itself


class BufferPool:
    """Gives uninitialised CPU tensors, from earlier ones that are out of use where it can.

    Fresh memory costs more than what is written to it: the system has to map and clear every page, 9 to 25 ms for the
    36 MB of an Atari rollout against 2 ms for the copy. A tensor counts as in use while anything refers to its
    storage: the tensor, a view, an array, a graph.

    Args:
        keep: how many tensors of one shape and type to hold on to.
    """

    def __init__(self, keep: int = 6) -> None:
        self.keep = keep
        self._held: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def empty_like(self, source: Tensor) -> Tensor:
        """Contiguous tensor of the shape and type of ``source``; its content is undefined."""
        return self.empty(source.shape, source.dtype)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Contiguous tensor; its content is undefined."""
        if shape.numel() * dtype.itemsize < _LARGE:
            return torch.empty(shape, dtype=dtype)
        held = self._held.setdefault((shape, dtype), [])
        for tensor in held:
            if _holders(tensor) == 1:
                return tensor.detach()  # a new holder of the same storage
        tensor = torch.empty(shape, dtype=dtype)
        if len(held) < self.keep:
            held.append(tensor)
        return tensor.detach()


def _holders(tensor: Tensor) -> int:
    """Tensors that refer to the storage. The handle this function makes to count them is not one of them."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:  # not public: without it nothing is ever taken to be free
        return 2
    return int(count(tensor.untyped_storage()._cdata)) - 1
