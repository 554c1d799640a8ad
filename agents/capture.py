"""A whole update as one CUDA graph, which the host asks for once, not kernel by kernel.

The rules are those of torch's notes on CUDA graphs: warm-up on a side stream, inputs and gradients that stay where they
are, no read by the host, an optimiser whose step counts and learning rate lie on the device.
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
"""Updates of a kind that run one by one before it is captured; they are updates like the others."""

Outputs = tuple[TensorDictBase, Tensor]


class NotCapturableError(RuntimeError):
    """An update waits for the device, and so is no CUDA graph."""


def make_capturable(optimizer: Optimizer) -> None:
    """Gives an optimiser the form that can be captured, its state included: Adam's is the fused one.

    Raises:
        NotCapturableError: it has none.
    """
    kind = type(optimizer)
    if kind not in (Adam, RMSprop, RMSpropTF):
        raise NotCapturableError(f"{kind.__name__} has no form that can be captured: use Adam, RMSprop or RMSpropTF")
    for group in optimizer.param_groups:
        device = group["params"][0].device
        # the kernel of a GPU takes no other; on the CPU it is the number that the host would give
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
    """Runs updates from memory that stays where it is: a few one by one, then as a graph, one for each kind of batch.

    Args:
        update: all that the device does in an update.
        undo: takes the last one back, wherever it was broken off.
        name: of the loss, for messages.
        eager_if_refused: whether an update that cannot be captured runs one by one, with a warning.
        graphs: False captures nothing: the same function on the same memory, on any device.

    Raises:
        NotCapturableError: when called, where the update waits for the device, and it was not asked for otherwise.

    Attributes:
        replays: updates that were a graph.
        refused: whether the update cannot be captured.
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
        self._eager_if_refused, self._graphs = eager_if_refused, graphs
        self._recordings: dict[Hashable, _Recording] = {}
        self.replays = 0
        self.refused = False

    def __call__(self, batch: TensorDictBase, kind: Hashable) -> Outputs:
        """The update on ``batch``; what the loss writes into it is there afterwards.

        Args:
            batch: of any shape; with others of its entries, shapes and types it shares a graph.
            kind: what else the host decides in an update.
        """
        if self.refused:
            return self._update(batch)
        entries = dict(batch.items(True, True))
        key = (kind, *((name, entry.shape, entry.dtype) for name, entry in entries.items()))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = _Recording(batch, entries)
        recording.fill(entries)
        try:
            outputs = self._run(recording)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            self._undo()
            place = _place(error)
            if not self._eager_if_refused:
                raise NotCapturableError(
                    f"the update of {self._name} cannot be captured, because the host waits for the device at {place}: "
                    "train.capture must be none, or try, which runs it eagerly"
                ) from error
            warnings.warn(
                f"the update of {self._name} runs eagerly, because the host waits for the device at {place}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.refused = True
            return self._update(batch)
        recording.give_back(batch, entries)
        return outputs

    def _run(self, recording: _Recording) -> Outputs:
        recording.calls += 1
        if not self._graphs:
            return self._update(recording.batch)
        if recording.calls <= WARM_UP:
            side, main = recording.stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side), _waiting_refused():
                outputs = self._update(recording.batch)
            main.wait_stream(side)
            return outputs
        if recording.graph is None:
            recording.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording.graph, stream=recording.stream()):
                recording.outputs = self._update(recording.batch)
        self.replays += 1
        recording.graph.replay()
        assert recording.outputs is not None
        return recording.outputs


class _Recording:
    """The memory of one kind of batches, and their graph."""

    def __init__(self, batch: TensorDictBase, entries: dict[Any, Tensor]) -> None:
        self.inputs = {key: torch.empty(x.shape, dtype=x.dtype, device=x.device) for key, x in entries.items()}
        self.batch = TensorDict(dict(self.inputs), batch.batch_size, device=batch.device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs | None = None
        self._stream: torch.cuda.Stream | None = None

    def stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream

    def fill(self, entries: dict[Any, Tensor]) -> None:
        for key, entry in entries.items():
            self.inputs[key].copy_(entry, non_blocking=True)

    def give_back(self, batch: TensorDictBase, entries: dict[Any, Tensor]) -> None:
        for key, entry in self.batch.items(True, True):
            if key not in entries:
                batch.set(key, entry)


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Whatever waits for the device raises "called a synchronizing CUDA operation"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _place(error: BaseException) -> str:
    """File and line, outside of torch, where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(f"/{name}/" in frame.filename for name in ("torch", "tensordict"))]
    return f"{own[-1].filename}:{own[-1].lineno}"
