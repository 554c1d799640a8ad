"""What the tests of resumed runs share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from offtrace.agents.data import MixedData, ReplayData, RolloutData


class NewEnvironments(pl.Callback):
    """Puts fresh environments under a running stream at a number of frames, and touches nothing else.

    Where the stream has a replay, it waits until no update is owed.
    """

    def __init__(self, data: Any, frames: int) -> None:
        self.frames = frames
        self.streams: list[Any] = []
        make = data.train_dataloader
        data.train_dataloader = lambda: self.streams.append(make()) or self.streams[-1]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        data = trainer.datamodule
        owing = {
            ReplayData: lambda: data.limiter.may_sample(data.batch_size),
            MixedData: lambda: data.owed,
            RolloutData: lambda: False,
        }
        if data.frames == self.frames and not owing[type(data)]():
            state = torch.get_rng_state()
            version, old = data.collector.version, data.collector
            old.shutdown()
            data.collector = self.streams[-1]._collector = data.collector_fn(0, data.frames)
            data.collector.version = version
            torch.set_rng_state(state)
            self.frames = -1
