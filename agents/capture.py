"""A whole update as one CUDA graph, which the host launches once, not kernel by kernel.

The rules are those of torch's notes on CUDA graphs: warm-up on a side stream; inputs at fixed addresses; gradients
freed before the backward pass, so that those of a graph lie in its own memory; no read by the host; step counts and
learning rate of the optimiser on the device. Autocast must not keep casts of weights for the next update, and
Lightning's does not.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Adam, Optimizer, RMSprop

from offtrace.agents.optim import RMSpropTF

WARM_UP = 3
"""Eager updates of a kind before it is captured. They count like all others."""

Outputs = tuple[TensorDictBase, Tensor]


class NotCapturableError(RuntimeError):
    """An update cannot be a CUDA graph, mostly because the host waits for the device in it."""


def make_capturable(optimizer: Optimizer) -> None:
    """Changes an optimiser, its state included, so that its step can be captured; Adam becomes the fused one.

    Raises:
        NotCapturableError: the optimiser is another than Adam, RMSprop and RMSpropTF.
    """
    kind = type(optimizer)
    if kind not in (Adam, RMSprop, RMSpropTF):
        raise NotCapturableError(f"{kind.__name__} has no form that can be captured: use Adam, RMSprop or RMSpropTF")
    for group in optimizer.param_groups:
        device = group["params"][0].device
        # a GPU's kernels take float32 alone; float64 keeps the numbers of a learning rate that is a Python float
        kept = torch.float32 if device.type == "cuda" else torch.float64
        group["lr"] = torch.tensor(float(group["lr"]), dtype=kept, device=device)
        if kind is not RMSpropTF:
            group["capturable"] = True
        if kind is Adam:
            group["fused"], group["foreach"] = True, None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(device, torch.float32)


class CapturedUpdate:
    """Runs updates on memory of its own: of each kind of batch the first few eagerly, the others as one CUDA graph.

    Args:
        update: all that the device does in an update; its outputs are detached.
        undo: takes back an eager update that was broken off.
        name: of the loss, for messages.
        eager_if_refused: an update that waits for the device runs eagerly from then on, with a warning.
        graphs: False captures nothing: all updates run eagerly, on any device, on the same memory.

    Raises:
        NotCapturableError: when called, where the update cannot be captured, or waits and must not run eagerly.

    Attributes:
        replays: updates that ran as a graph.
        refused: whether the update was found to wait for the device.
    """

    def __init__(
        self,
        update: Callable[[TensorDictBase], Outputs],
        undo: Callable[[], None],
        *,
        name: str,
        eager_if_refused: bool = False,
        graphs: bool = True,
    ) -> None:
        self._update, self._undo, self._name = update, undo, name
        self._eager_if_refused = eager_if_refused
        # one for all kinds: the nodes that add up gradients remember the stream on which they were made
        self._side = torch.cuda.Stream() if graphs else None
        self._recordings: dict[Hashable, _Recording] = {}
        self.replays = 0
        self.refused = False

    def __call__(self, batch: TensorDictBase, kind: Hashable) -> Outputs:
        """The update on ``batch``, which then has what the loss wrote into it.

        What it returns, and what the loss wrote, is overwritten by the next call.

        Args:
            batch: one with other keys, shapes or types has a graph of its own.
            kind: what else the host decides in an update; each has a graph of its own.
        """
        if self.refused:
            return self._update(batch)
        entries = dict(batch.items(True, True))
        key = (kind, *((name, entry.shape, entry.dtype) for name, entry in entries.items()))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = _Recording(batch, entries)
        recording.fill(entries)
        recording.calls += 1
        if self._side is not None and recording.calls > WARM_UP:
            outputs = self._replay(recording, self._side)
        else:
            try:
                outputs = self._eager(recording)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                self._refuse(error)
                return self._update(batch)
        recording.give_back(batch, entries)
        return outputs

    def _eager(self, recording: _Recording) -> Outputs:
        if self._side is None:
            return self._update(recording.batch)
        side, main = self._side, torch.cuda.current_stream()
        side.wait_stream(main)
        # the first of a kind may compile, and set up libraries
        strict = _waiting_refused() if recording.calls > 1 else contextlib.nullcontext()
        try:
            with torch.cuda.stream(side), strict:
                return self._update(recording.batch)
        finally:
            main.wait_stream(side)

    def _replay(self, recording: _Recording, side: torch.cuda.Stream) -> Outputs:
        if recording.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):
                    recording.outputs = self._update(recording.batch)
            except RuntimeError as error:  # nothing has run, so there is nothing to undo
                raise NotCapturableError(
                    f"the update of {self._name} cannot be captured ({str(error).splitlines()[0]}): train.capture must "
                    "be none"
                ) from error
            recording.graph = graph
        recording.graph.replay()
        self.replays += 1
        assert recording.outputs is not None
        return recording.outputs

    def _refuse(self, error: RuntimeError) -> None:
        self._undo()
        reason = f"because the host waits for the device at {_place(error)}"
        if not self._eager_if_refused:
            raise NotCapturableError(
                f"the update of {self._name} cannot be captured, {reason}: train.capture must be none, or try, which "
                "runs it eagerly"
            ) from error
        warnings.warn(f"the update of {self._name} runs eagerly, {reason}", RuntimeWarning, stacklevel=3)
        self.refused = True


class _Recording:
    """One kind of batch: the memory of its entries, and its graph."""

    def __init__(self, batch: TensorDictBase, entries: dict[Any, Tensor]) -> None:
        self.inputs = {key: torch.empty(x.shape, dtype=x.dtype, device=x.device) for key, x in entries.items()}
        self.batch = TensorDict(dict(self.inputs), batch.batch_size, device=batch.device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs | None = None

    def fill(self, entries: dict[Any, Tensor]) -> None:
        for key, entry in entries.items():
            self.inputs[key].copy_(entry, non_blocking=True)

    def give_back(self, batch: TensorDictBase, entries: dict[Any, Tensor]) -> None:
        """Gives ``batch`` what the loss added."""
        for key, entry in self.batch.items(True, True):
            if key not in entries:
                batch.set(key, entry)


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Whatever waits for the device raises a RuntimeError: "called a synchronizing CUDA operation"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _place(error: BaseException) -> str:
    """File and line of the innermost call outside of torch and tensordict."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(f"/{name}/" in frame.filename for name in ("torch", "tensordict"))]
    return f"{own[-1].filename}:{own[-1].lineno}"
