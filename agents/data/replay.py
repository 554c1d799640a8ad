"""Samples of a replay that a collector fills, at a fixed ratio between the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase

from offtrace.agents.data.acting import Learner, check_sizes
from offtrace.agents.data.store import ReplayFactory, ReplayHook, StoringData
from offtrace.modules.keys import NEXT, POLICY_VERSION
from offtrace.modules.replay import Replay, SamplesPerInsert

if TYPE_CHECKING:
    from offtrace.modules.collectors import Collector

ENDLESS = 10**12
"""Length of a stream of which nobody knows the end."""


class ReplayData(StoringData):
    """Batches from a replay that a collector fills, several for the work of one ``training_step``.

    A rollout is taken and inserted whenever the learner has used up what the samples-per-insert ratio entitles it to;
    with actor processes the next ones are under way meanwhile, and wait when the learner is behind. The ratio therefore
    holds exactly in both modes. The first ``min_size`` steps only fill the replay: they are acted by the untrained
    policy, whose log-probabilities are exact, so that corrections hold for them too.

    Steps that an environment marks as not valid count as collected and are never sampled. Where the replay samples by
    priority, the loss's errors become the priorities, and the exponent of the importance weights grows to 1 over the
    training.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        replay_fn: gives the empty replay of a learner, and takes the folder for its files, or None where it may choose.
        total_frames: environment frames, over all ranks, after which the data ends.
        batch_size: steps learnt from in a batch of the replay, padding included: its samples times their length where
            all steps of a sequence are, otherwise (transitions, n-step windows) its samples.
        samples_per_insert: steps learnt from per collected step.
        min_size: steps per rank collected before the first batch.
        frame_skip: environment frames per agent step.
        updates_per_step: most batches for one ``training_step``.
        on_rollout: called with every rollout ``[N, T]`` before it is inserted.
        on_replayed: as of :class:`StoringData`.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        limiter: counts steps and samples of this rank.
        replay, frames, collector, episodes: as of :class:`StoringData`.
    """

    def __init__(
        self,
        collector_fn: Callable[[int, int], Collector],
        replay_fn: ReplayFactory,
        *,
        total_frames: int,
        batch_size: int,
        samples_per_insert: float,
        min_size: int,
        frame_skip: int = 1,
        updates_per_step: int = 8,
        on_rollout: Callable[[TensorDictBase], object] | None = None,
        on_replayed: ReplayHook | None = None,
    ) -> None:
        super().__init__(
            collector_fn, replay_fn, total_frames=total_frames, frame_skip=frame_skip, on_replayed=on_replayed
        )
        check_sizes(updates_per_step=updates_per_step, batch_size=batch_size)
        self.batch_size = batch_size
        self.updates_per_step = updates_per_step
        self.on_rollout = on_rollout
        self.limiter = SamplesPerInsert(samples_per_insert, min_size)

    @property
    def metrics(self) -> dict[str, float]:
        """As :attr:`StoringData.metrics`, and the steps learnt from per insert, since the replay was filled."""
        ratio = self.limiter.sampled / max(1, self.limiter.inserted - self.limiter.min_size)
        return {**super().metrics, "replay/samples_per_insert": ratio}

    @property
    def opening(self) -> str:
        """As :attr:`ActingData.opening`: the replay is filled."""
        missing = self.limiter.min_size - self.limiter.inserted
        return f"collecting {missing:,} steps before the first update" if missing > 0 else ""

    def updates(self, batch: Any) -> Iterable[TensorDictBase]:
        """Those of a :class:`Batches`."""
        batches: Batches = batch
        return batches

    def stream(self, collector: Collector, learner: Learner) -> ReplayStream:
        """As :meth:`ActingData.stream`; in a resumed run the replay is filled from disk.

        Raises:
            ValueError: when the ratio, the capacity and the batch do not fit each other.
            DamagedReplay: when the replay of a resumed run cannot be read.
        """
        replay = self.open_replay(learner)
        self.limiter.check(capacity=replay.capacity, batch=self.batch_size)
        self._check_batch(replay)
        self.fill_replay(learner.rank)
        return ReplayStream(self, collector, learner)

    def begin_empty(self) -> None:
        """As :meth:`StoringData.begin_empty`: the replay is filled before the next batch."""
        self.limiter.restart()

    def state_dict(self) -> dict[str, Any]:
        """As :class:`StoringData`, and the limiter's counters."""
        return {**super().state_dict(), "limiter": self.limiter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.limiter.load_state_dict(state_dict["limiter"])
        super().load_state_dict(state_dict)

    def _check_batch(self, replay: Replay) -> None:
        samples, steps = replay.batch_size, replay.batch_size * replay.length
        if self.batch_size not in (samples, steps):
            raise ValueError(
                f"batch_size is {self.batch_size}; the replay gives {samples} samples of {replay.length} steps, so it "
                f"must be {steps}, or {samples} where only the first step of each is learnt from"
            )


class Batches:
    """The batches of one ``training_step``, each sampled and counted when its turn comes.

    Where a run is broken off between two of them, the rest was neither.
    """

    def __init__(self, sample: Callable[[], TensorDictBase], number: int) -> None:
        self._sample = sample
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[TensorDictBase]:
        return (self._sample() for _ in range(self._number))


class ReplayStream:
    """The batches of one run, in order.

    It has a length, larger than what comes: Lightning fetches one list ahead from what has none.
    """

    def __init__(self, data: ReplayData, collector: Collector, learner: Learner) -> None:
        self._data = data
        self._collector = collector
        self._device = learner.device
        self._frames_per_rollout = collector.frames_per_batch * data.frame_skip * learner.ranks

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batches]:
        data = self._data
        while True:
            while data.limiter.may_sample(data.batch_size):
                count = math.floor(data.limiter.owed / data.batch_size)
                yield Batches(self._sample, min(data.updates_per_step, count))
            if data.frames >= data.total_frames:
                return
            self._collect()

    def _sample(self) -> TensorDictBase:
        data = self._data
        data.limiter.sample(data.batch_size)
        return data.replayed(self._device)

    def _collect(self) -> None:
        data = self._data
        packed = self._collector.take()
        data.episodes.note(packed)
        rollout = packed.unpack()
        data._versions = packed.get((NEXT, POLICY_VERSION))
        if data.on_rollout is not None:
            data.on_rollout(rollout)
        data.insert(rollout)
        data.limiter.insert(rollout.numel())
        data.frames += self._frames_per_rollout
