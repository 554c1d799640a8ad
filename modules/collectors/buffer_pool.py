"""Memory for large results that is used again once nobody holds the result any more."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes; below it the allocator keeps the pages itself


class BufferPool:
    """Gives uninitialised CPU tensors, from earlier ones that are out of use where it can.

    Fresh memory costs more than what is written to it: the system has to map and clear every page, 9 to 25 ms for the
    36 MB of an Atari rollout against 2 ms for the copy. A tensor counts as in use while anything refers to its
    storage: the tensor, a view, an array, a graph. Tensors of nearly the same number of bytes, up to an eighth more,
    use each other's memory.

    Args:
        keep: how many of one size to hold on to.
    """

    def __init__(self, keep: int = 6) -> None:
        self.keep = keep
        self._held: dict[int, list[Tensor]] = {}

    def empty_like(self, source: Tensor) -> Tensor:
        """Contiguous tensor of the shape and type of ``source``; its content is undefined."""
        return self.empty(source.shape, source.dtype)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Contiguous tensor; its content is undefined."""
        number = shape.numel() * dtype.itemsize
        if number < _LARGE:
            return torch.empty(shape, dtype=dtype)
        step = 1 << (number.bit_length() - 4)  # eight sizes to a power of two
        size = -(-number // step) * step
        held = self._held.setdefault(size, [])
        memory = next((tensor for tensor in held if _holders(tensor) == 1), None)
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8)
            if len(held) < self.keep:
                held.append(memory)
        return memory[:number].view(dtype).view(shape)  # a new holder of the same storage


def _holders(tensor: Tensor) -> int:
    """Tensors that refer to the storage. The handle this function makes to count them is not one of them."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:  # not public: without it nothing is ever taken to be free
        return 2
    return int(count(tensor.untyped_storage()._cdata)) - 1
