"""Memory that several processes see, without a name that could be left behind."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64
_MEMORY = Path("/dev/shm")  # where there is none, a temporary file is mapped, and written back at the system's leisure

Key = str | tuple[str, ...]


class Place(NamedTuple):
    """Where one tensor lies in a block."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


Layout = dict[Key, Place]


class SharedBlock:
    """A number of bytes, zero at first, that go when the last process that maps them ends, however it ends.

    It travels in the arguments of a process that is started, or by :meth:`send` to one that runs.

    Args:
        size: bytes, at least 1.
        fd: of a block that another process made; None makes one.

    Attributes:
        size: as given.
        whole: all bytes, uint8 ``[size]``.

    Raises:
        OSError: there is not so much memory.
    """

    _fd = -1

    def __init__(self, size: int, fd: int | None = None) -> None:
        self.size = size
        self._fd = _anonymous_file(size) if fd is None else fd
        self.whole = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)

    def view(self, place: Place) -> Tensor:
        """The tensor at ``place``, in the block's own memory."""
        size = place.shape.numel() * place.dtype.itemsize
        return self.whole[place.offset : place.offset + size].view(place.dtype).view(place.shape)

    def views(self, layout: Layout) -> dict[Key, Tensor]:
        """The tensors of a whole layout."""
        return {key: self.view(place) for key, place in layout.items()}

    def send(self, pipe: Any) -> None:
        """Gives it to the process at the other end of ``pipe``, which calls :meth:`receive`."""
        pipe.send(self.size)
        reduction.send_handle(pipe, self._fd, None)

    @classmethod
    def receive(cls, pipe: Any) -> SharedBlock:
        """What the other end of ``pipe`` sends."""
        size = pipe.recv()
        return cls(size, reduction.recv_handle(pipe))

    def lock(self) -> bool:
        """Take the block's lock, which no two processes hold at once; False where another has it.

        It goes with the process that holds it. Threads of one process must keep each other out themselves.
        """
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; what is mapped stays until nobody holds a view of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return _attached, (self.size, reduction.DupFd(self._fd))


class Mailbox:
    """Tensors that go through a block of this process's own to another one, which reads them where they lie."""

    def __init__(self) -> None:
        self.layout: Layout = {}
        self.views: dict[Key, Tensor] = {}

    def put(self, tensors: Mapping[Key, Tensor]) -> SharedBlock | None:
        """Copies them in, over the last ones; a new block where they do not fit, which must be sent."""
        layout, size = lay_out(tensors)
        block = None
        if layout != self.layout:
            block = SharedBlock(size)
            self.layout, self.views = layout, block.views(layout)
        for key, tensor in tensors.items():
            if tensor is not self.views[key]:
                self.views[key].copy_(tensor)
        return block


def lay_out(tensors: Mapping[Key, Tensor]) -> tuple[Layout, int]:
    """Places for copies of ``tensors`` in a block, and the size of it."""
    layout, size = Layout(), 0
    for key, tensor in tensors.items():
        layout[key] = Place(size, tensor.shape, tensor.dtype)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return layout, max(size, 1)


def _attached(size: int, handle: Any) -> SharedBlock:
    return SharedBlock(size, handle.detach())


def _anonymous_file(size: int) -> int:
    folder = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # pages that are promised here cannot fail when they are written, which would be the end of the process
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # macOS
            os.truncate(file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder or tempfile.gettempdir()} has no room for {size:,} bytes, which actors share with the "
                "learner: give it more (docker: --shm-size), or make rollouts smaller",
            ) from error
        return os.dup(file.fileno())
