"""The memory that the learner shares with its actors.

The weights travel through one block guarded by a lock. The learner copies its parameters in and raises the version.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offtrace.modules.collectors.memory import Key, SharedBlock, lay_out
from offtrace.modules.envs import EnvironmentFailure

_LOCK_TIMEOUT = 30.0
_LOCK_POLL = 2e-4


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by dotted name, detached, sharing memory with the module.

    The other buffers are none of the weights: a ``state_dict`` has not got them either.
    """
    found = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    others = constants(module)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name not in others:
            found[name] = buffer.detach()
    return found


def constants(module: nn.Module) -> frozenset[str]:
    """Dotted names of the buffers that are not persistent."""
    return frozenset(
        f"{place}.{name}" if place else name
        for place, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    )


class SharedWeights:
    """The newest weights and their version, and with them heartbeats and the stop flag.

    Args:
        policy: gives names, shapes and first values of the weights.
        workers: number of actors.
    """

    def __init__(self, policy: nn.Module, workers: int) -> None:
        weights = {_key(name): tensor for name, tensor in named_tensors(policy).items()}
        # version, stop, environments of one actor; steps of each; time.monotonic() of the last one, seconds
        books: dict[Key, Tensor] = {
            "state": torch.zeros(3, dtype=torch.int64),
            "steps": torch.zeros(workers, dtype=torch.int64),
            "beats": torch.zeros(workers, dtype=torch.float64),
        }
        self._constants = constants(policy)
        self._layout, size = lay_out({**weights, **books})
        self._open(SharedBlock(size))
        for key, tensor in weights.items():
            self.weights[key[1]].copy_(tensor)

    def _open(self, block: SharedBlock) -> None:
        self._block = block
        views = block.views(self._layout)
        self.state, self.steps, self.beats = (views.pop(name) for name in ("state", "steps", "beats"))
        self.weights = {key[1]: tensor for key, tensor in views.items()}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For an actor process: the block itself, not what is in it."""
        return {"layout": self._layout, "block": self._block, "constants": self._constants}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layout, self._constants = state["layout"], state["constants"]
        self._open(state["block"])

    @property
    def version(self) -> int:
        """Number of weight updates published so far."""
        return int(self.state[0])

    @version.setter
    def version(self, value: int) -> None:
        self.state[0] = value

    @property
    def packed(self) -> Tensor:
        """All weights where they lie, uint8 ``[bytes]``."""
        return self._block.whole[: self._layout["state"].offset]

    def replace(self, packed: Tensor, version: int) -> None:
        """Copy in what is :attr:`packed` elsewhere, of the same policy, and its version."""
        with self._locked():
            self.packed.copy_(packed)
            self.state[0] = version

    @property
    def num_envs(self) -> int:
        """Environments of one actor, known once it is up."""
        return int(self.state[2])

    @num_envs.setter
    def num_envs(self, value: int) -> None:
        self.state[2] = value

    def stop(self) -> None:
        """Ask the actors to leave at their next step."""
        self.state[1] = 1

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy new weights in and return the new version. Every policy call that begins afterwards uses them.

        Raises:
            KeyError: when a weight is missing or unknown.
            ValueError: when one has another shape.
            RuntimeError: when an actor holds the lock and does not go on.
        """
        odd = sorted((tensors.keys() - self._constants) ^ self.weights.keys())
        if odd:
            raise KeyError(f"the weights do not fit the policy of the actors: {odd[:5]} are on one side only")
        for name, buffer in self.weights.items():
            if tensors[name].shape != buffer.shape:
                raise ValueError(
                    f"the weight {name!r} has shape {list(tensors[name].shape)}; that of the actors has "
                    f"{list(buffer.shape)}"
                )
        with self._locked():
            for name, buffer in self.weights.items():
                buffer.copy_(tensors[name])
            self.state[0] += 1
            return int(self.state[0])

    def load_into(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy the newest weights into ``tensors`` and return their version."""
        with self._locked():
            for name, buffer in self.weights.items():
                tensors[name].copy_(buffer)
            return int(self.state[0])

    def release(self) -> None:
        """Let go of the memory that was shared; the books stay as they are."""
        self.state, self.steps, self.beats = (x.clone() for x in (self.state, self.steps, self.beats))
        self.weights = {}
        self._block.close()
        del self._block

    def failure(self, error: Exception) -> EnvironmentFailure:
        """What the learner raises for an error in its own process."""
        told = str(error) if isinstance(error, EnvironmentFailure) else f"{type(error).__name__}: {error}"
        return EnvironmentFailure(
            "collection in the learner's process, where nothing can be replaced, failed at step "
            f"{int(self.steps[0])}: {told}"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process, and one thread of it, at a time; who dies lets go."""
        with self._lock:
            limit = time.monotonic() + _LOCK_TIMEOUT
            while not self._block.lock():
                if time.monotonic() > limit:
                    raise RuntimeError(f"the lock on the actors' weights was not free within {_LOCK_TIMEOUT:.0f} s")
                time.sleep(_LOCK_POLL)
            try:
                yield
            finally:
                self._block.unlock()


def _key(name: str) -> Key:
    return ("weights", name)
