"""Where the learner's batches come from: a Lightning data module that owns a collector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.agents.acting import ActingData, place
from offtrace.modules.collectors import RolloutCollector
from offtrace.modules.keys import NEXT, POLICY_VERSION

__all__ = ["OnPolicyData"]


class OnPolicyData(ActingData):
    """Batches ``[B / minibatches, T]`` from rollouts ``[B, T]``, each rollout used ``epochs`` times and then let go.

    Every rank owns a collector, built by ``collector_fn(rank, frames)`` when training begins, so that it starts from
    the weights a checkpoint brought back. The environments of a rollout are dealt to the minibatches anew in every
    epoch. That order is a function of (seed, rank, rollout, epoch) alone: a resumed run deals as the uninterrupted one
    would, and no rank has state of its own to save.

    On a GPU a rollout is copied once, into pinned memory, and crosses once, without waiting.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        total_frames: environment frames, over all ranks, after which the data ends. The last rollout is whole.
        frame_skip: environment frames per agent step.
        minibatches: parts of a rollout; must divide the number of environments of a collector.
        epochs: passes over a rollout.
        seed: of the order.

    Attributes:
        frames, collector, games: as of :class:`ActingData`.
        rollouts: rollouts taken so far on this rank.
    """

    def __init__(
        self,
        collector_fn: Callable[[int, int], RolloutCollector],
        *,
        total_frames: int,
        frame_skip: int = 1,
        minibatches: int = 1,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(collector_fn)
        sizes = {"total_frames": total_frames, "frame_skip": frame_skip, "minibatches": minibatches, "epochs": epochs}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.total_frames = total_frames
        self.frame_skip = frame_skip
        self.minibatches = minibatches
        self.epochs = epochs
        self.seed = seed
        self.rollouts = 0

    def behaviour_versions(self, batch: TensorDictBase) -> Tensor:
        """Versions of the weights that acted in ``batch``, int64."""
        return batch[NEXT, POLICY_VERSION]

    def train_dataloader(self) -> RolloutStream:
        """Start the collector and give the stream of batches."""
        self.shutdown()
        rank, world_size, device = place(self)
        collector = self.collector_fn(rank, self.frames)
        self.collector = collector
        if collector.num_envs % self.minibatches:
            self.shutdown()
            raise ValueError(
                f"minibatches is {self.minibatches}; it must divide the {collector.num_envs} environments of a rollout."
            )
        collector.version = self._version
        collector.pin_memory = device.type == "cuda"
        return RolloutStream(self, collector, rank=rank, world_size=world_size, device=device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are on the device already; anything else is moved as Lightning would."""
        if isinstance(batch, TensorDictBase):
            return batch if batch.device == device else batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`ActingData`, and the rollouts taken."""
        return {**super().state_dict(), "rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        super().load_state_dict(state_dict)
        self.rollouts = int(state_dict["rollouts"])


class RolloutStream:
    """The batches of one run, in order. Its length is the number of batches of the whole run, resumed or not.

    The length matters: Lightning fetches one batch ahead, one more batch of policy lag, from what has none.
    """

    def __init__(
        self,
        data: OnPolicyData,
        collector: RolloutCollector,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._data = data
        self._collector = collector
        self._rank = rank
        self._device = device
        self._frames_per_rollout = collector.frames_per_batch * data.frame_skip * world_size

    def __len__(self) -> int:
        rollouts = math.ceil(self._data.total_frames / self._frames_per_rollout)
        return rollouts * self._data.epochs * self._data.minibatches

    def __iter__(self) -> Iterator[TensorDictBase]:
        data = self._data
        while data.frames < data.total_frames:
            # The first order is applied by the copy that takes the rollout out of the actors' memory.
            self._collector.order = lambda size: self._order(size, epoch=0)
            rollout = next(self._collector).to(self._device, non_blocking=True)
            data.games.note(rollout)
            for epoch in range(data.epochs):
                if epoch:
                    rollout = _take(rollout, self._order(rollout.shape[0], epoch=epoch).to(self._device))
                *parts, last = rollout.split(rollout.shape[0] // data.minibatches)
                yield from parts
                if epoch == data.epochs - 1:
                    # Counted when its last part is handed out: after that update a checkpoint holds whole rollouts,
                    # and in the middle of one it does not claim what was not learned yet.
                    data.frames += self._frames_per_rollout
                    data.rollouts += 1
                yield last

    def _order(self, size: int, *, epoch: int) -> Tensor:
        word = np.random.SeedSequence([self._data.seed, self._rank, self._data.rollouts, epoch]).generate_state(1)[0]
        return torch.randperm(size, generator=torch.Generator().manual_seed(int(word)))


def _take(rollout: TensorDictBase, order: Tensor) -> TensorDictBase:
    # index_select moves whole rows; indexing a TensorDict moves elements, four times slower for images
    return rollout.apply(lambda tensor: tensor.index_select(0, order))
