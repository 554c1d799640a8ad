"""A mode in which the host must not read a device: on a GPU every read waits for all that was asked for before."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount",
    "repeat_interleave", "_unique2", "unique_dim", "unique_consecutive",
    "lift_fresh",  # no read, but a number that the host must send
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"tolist", "numpy", "cpu", "__array__"}


class HostRead(AssertionError):
    """The host read a tensor."""


class _Copies(TorchFunctionMode):
    """Methods that no dispatcher sees on the CPU."""

    def __init__(self, mode: NoReads) -> None:
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPIES:
            self._mode.note(func.__name__)
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host must wait for.

    Args:
        on_host: tensors that lie on the host whatever the device, such as the step counts of Adam.
        found: reads are noted here, as (operation, file), in place of being refused.
    """

    def __init__(self, *on_host: Tensor, found: set[tuple[str, str]] | None = None) -> None:
        super().__init__()
        self._on_host = {tensor.data_ptr() for tensor in on_host}
        self._found = found
        self._copies = _Copies(self)

    def __enter__(self) -> Any:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._copies.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in INDEXING else ()
        if any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.note(f"{name} by a mask")
        elif name in READS and not (isinstance(args[0], Tensor) and args[0].data_ptr() in self._on_host):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, operation: str) -> None:
        """Refuses the operation, or notes it."""
        frames = [frame for frame in traceback.extract_stack() if "/offtrace/" in frame.filename]
        place = frames[-1] if frames else None
        if self._found is not None:
            self._found.add((operation, place.filename.split("/offtrace/")[-1] if place else "?"))
            return
        where = f"{place.filename}:{place.lineno}: {place.line}" if place else "outside the package"
        raise HostRead(f"{operation}: {where}")
