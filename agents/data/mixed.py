"""Fresh rollouts and replayed ones in one stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase

from offtrace.agents.data.acting import Learner, books_of
from offtrace.agents.data.replay import ENDLESS
from offtrace.agents.data.rollouts import Dealer
from offtrace.agents.data.store import ReplayFactory, ReplayHook, StoringData
from offtrace.modules.keys import FINALS, INDEX, POLICY_VERSION, VALID, WEIGHT
from offtrace.modules.replay import Replay
from offtrace.modules.replay.limiter import rows_of_share

if TYPE_CHECKING:
    from offtrace.modules.collectors import Collector


class MixedData(StoringData):
    """Batches ``[B, T]`` from fresh rollouts and from a replay of the older ones.

    Fresh rollouts ``[N, T]`` are dealt as :class:`offtrace.agents.data.RolloutData` deals environments, N / minibatches
    rows to a batch. What the replay adds is one of two forms:

    - ``share``: every batch has replayed rows behind its fresh ones, and they are this share of it (Espeholt et al.
      2018, arXiv 1802.01561, section 5.2.2: one half). ``valid`` tells padding from steps; ``index`` is -1 and
      ``weight`` 1 in fresh rows. Of the other entries a batch has those that both halves have.
    - ``ratio``: behind every fresh batch come n whole batches of replayed rows, n from a Poisson distribution with this
      mean (ACER, Wang et al. 2017, arXiv 1611.01224). It is a function of seed, rollout and batch: every rank has the
      same number, and so has a resumed run.

    A replayed row is a sequence of T steps inside an episode. The sequences tile the episode from its first step on,
    the last one padded, so that each of its steps is replayed equally often. A rollout is inserted once, behind its
    own last use: no step that is fresh in a batch is also replayed in it. Before the replay holds ``min_size`` steps,
    batches are fresh alone.

    ``frames`` are those of fresh rollouts. What is replayed is counted apart.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        replay_fn: gives the empty replay of a learner, of padded sequences of T steps without overlap, and takes the
            folder for its files, or None where it may choose.
        total_frames: environment frames, over all ranks, after which the data ends. The last rollout is whole.
        min_size: steps per rank that the replay holds before the first replayed row.
        share: replayed part of a batch, above 0 and below 1.
        ratio: mean number of replayed batches behind a fresh one, above 0. One of the two is given.
        frame_skip: environment frames per agent step.
        minibatches: fresh batches of a rollout in one pass; must divide the environments of a collector.
        epochs: passes over a rollout.
        seed: of the order, and of the number of replayed batches.
        on_rollout: called once with every fresh rollout ``[N, T]`` on the learner's device, before it is dealt. The
            entries that it sets are dealt and stored.
        on_replayed: as of :class:`StoringData`.

    Raises:
        ValueError: a number is out of range, or not exactly one of ``share`` and ``ratio`` is given.

    Attributes:
        rollouts: fresh rollouts taken so far on this rank.
        inserted: steps inserted into this replay, those that are not valid included: the same number on every rank.
        replayed_frames: environment frames in replayed rows so far, padding included, over all ranks.
        owed: replayed batches that come before the next fresh one.
        replay, frames, collector, episodes: as of :class:`StoringData`.
    """

    def __init__(
        self,
        collector_fn: Callable[[int, int], Collector],
        replay_fn: ReplayFactory,
        *,
        total_frames: int,
        min_size: int,
        share: float | None = None,
        ratio: float | None = None,
        frame_skip: int = 1,
        minibatches: int = 1,
        epochs: int = 1,
        seed: int = 0,
        on_rollout: Callable[[TensorDictBase], object] | None = None,
        on_replayed: ReplayHook | None = None,
    ) -> None:
        super().__init__(
            collector_fn, replay_fn, total_frames=total_frames, frame_skip=frame_skip, on_replayed=on_replayed
        )
        if (share is None) == (ratio is None):
            raise ValueError(f"share is {share} and ratio is {ratio}; exactly one of them must be given")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share is {share}; it must be above 0 and below 1")
        if ratio is not None and not 0 < ratio < math.inf:
            raise ValueError(f"ratio is {ratio}; it must be above 0 and finite")
        if min_size < 0:
            raise ValueError(f"min_size is {min_size}; it must be at least 0")
        self.dealer = Dealer(minibatches, epochs, seed)
        self.min_size, self.share, self.ratio = min_size, share, ratio
        self.on_rollout = on_rollout
        self.rollouts = self.inserted = self.replayed_frames = self.owed = 0

    @property
    def metrics(self) -> dict[str, float]:
        """As :attr:`StoringData.metrics`, and the frames replayed."""
        return {**super().metrics, "replay/replayed_frames": float(self.replayed_frames)}

    @property
    def opening(self) -> str:
        """As :attr:`ActingData.opening`: nothing is replayed yet, and frames come faster than later."""
        missing = max(1, self.min_size) - self.inserted
        if missing <= 1:
            return ""
        if self.share is None:
            later = f"{self.ratio:g} batches for each fresh one are"
        else:
            later = f"{self.share:.0%} of a batch is"
        return f"learning from {missing:,} fresh steps alone; then {later} replayed, and frames come more slowly"

    @property
    def replays(self) -> bool:
        """Whether the replay holds enough to be sampled."""
        return self.inserted >= max(1, self.min_size)

    def stream(self, collector: Collector, learner: Learner) -> MixedStream:
        """As :meth:`ActingData.stream`; in a resumed run the replay is filled from disk.

        Raises:
            ValueError: when minibatches, share or replay do not fit the rollouts.
            DamagedReplay: when the replay of a resumed run cannot be read.
        """
        self.dealer.check(collector.num_envs, "environments")
        self._check_replay(self.open_replay(learner), collector.frames_per_batch // collector.num_envs)
        stream = MixedStream(self, collector, learner)
        self.fill_replay(learner.rank)
        collector.pin_memory = learner.device.type == "cuda"
        return stream

    def begin_empty(self) -> None:
        """As :meth:`StoringData.begin_empty`: nothing is replayed before the replay is filled."""
        self.inserted = self.owed = 0

    def replayed_rows(self, fresh: int) -> int:
        """Replayed rows of a batch that has so many fresh ones; under ``ratio``, of a batch of its own.

        Raises:
            ValueError: ``share`` of the batch is no whole number of rows.
        """
        if self.share is None:
            return self._open.batch_size
        return rows_of_share(fresh, self.share)

    def replayed_batches(self, batch: int) -> int:
        """Replayed batches behind fresh batch number ``batch`` of the rollout; 0 under ``share``."""
        if self.ratio is None:
            return 0
        numbers = np.random.SeedSequence([self.dealer.seed, self.rollouts, batch], spawn_key=(1,))
        return int(np.random.default_rng(numbers).poisson(self.ratio))

    def state_dict(self) -> dict[str, Any]:
        """As :class:`StoringData`, and the counters."""
        names = ("rollouts", "inserted", "replayed_frames", "owed")
        return {**super().state_dict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        for name in ("rollouts", "inserted", "replayed_frames", "owed"):
            setattr(self, name, int(state_dict[name]))
        super().load_state_dict(state_dict)

    def _check_replay(self, replay: Replay, steps: int) -> None:
        if steps < 2:
            raise ValueError("a rollout has 1 step; sequences to replay must have 2 or more")
        if replay.length != steps or not replay.pad or replay.overlap:
            raise ValueError(
                f"the replay gives sequences of {replay.length} steps, {'' if replay.pad else 'not '}padded, "
                f"{'with' if replay.overlap else 'without'} overlap; of rollouts of {steps} steps it must give padded "
                f"ones of {steps} without"
            )
        if self.min_size > replay.capacity:
            raise ValueError(
                f"min_size is {self.min_size}, but the replay holds {replay.capacity} steps; it must be "
                f"{replay.capacity} or less"
            )


class MixedStream:
    """The batches of one run, in order, with a length because Lightning fetches ahead from what has none."""

    def __init__(self, data: MixedData, collector: Collector, learner: Learner) -> None:
        self._data = data
        self._collector = collector
        self._rank = learner.rank
        self._device = learner.device
        self._rows = data.replayed_rows(collector.num_envs // data.dealer.minibatches)
        steps = collector.frames_per_batch
        self._frames_per_rollout = steps * data.frame_skip * learner.ranks
        self._frames_replayed = self._rows * (steps // collector.num_envs) * data.frame_skip * learner.ranks

    def __len__(self) -> int:
        if self._data.ratio is not None:
            return ENDLESS
        return math.ceil(self._data.total_frames / self._frames_per_rollout) * len(self._data.dealer)

    def __iter__(self) -> Iterator[TensorDictBase]:
        data = self._data
        yield from self._replayed()  # what a stopped run owed
        while data.frames < data.total_frames:
            packed = self._collector.take()
            data.episodes.note(packed)
            fresh = packed.unpack(self._device)
            rollout = fresh.clone(False) if self._device.type == "cpu" else packed.unpack()
            if data.on_rollout is not None:
                before = dict(fresh.items(True, True))
                data.on_rollout(fresh)
                for key, entry in fresh.items(True, True):
                    if before.get(key) is not entry:
                        rollout.set(key, entry.to("cpu"))
            parts = data.dealer.deal(fresh, books_of(packed), self._rank, data.rollouts, dealt=False)
            for number, (part, books, last) in enumerate(parts):
                batch = self._joined(part) if data.share is not None and data.replays else part
                owed = data.replayed_batches(number)
                if last:
                    # All of it is done when the last batch is handed out: a checkpoint written after that update holds
                    # the rollout in its replay, and one in the middle of a rollout does not claim any of it.
                    data.insert(rollout)
                    data.inserted += rollout.numel()
                    data.frames += self._frames_per_rollout
                    data.rollouts += 1
                data.owed = owed if data.replays else 0
                data._versions = books[POLICY_VERSION]
                yield batch
                yield from self._replayed()

    def _replayed(self) -> Iterator[TensorDictBase]:
        """The batches that are owed, each sampled and counted when its turn comes."""
        while self._data.owed:
            self._data.owed -= 1
            yield self._sample()

    def _sample(self) -> TensorDictBase:
        data = self._data
        data.replayed_frames += self._frames_replayed
        return data.replayed(self._device, self._rows)

    def _joined(self, fresh: TensorDictBase) -> TensorDictBase:
        """Replayed rows behind fresh ones, with the entries that both have."""
        replayed = self._sample()
        there = set(replayed.keys(True, True))
        both = [key for key in fresh.keys(True, True) if key in there and key not in (VALID, FINALS)]
        shape = fresh.batch_size
        marks = {VALID: torch.ones(*shape, 1, dtype=torch.bool, device=self._device)}
        marks[INDEX] = torch.full(shape, -1, device=self._device)
        if WEIGHT in there:
            marks[WEIGHT] = torch.ones(shape, device=self._device)
        own = fresh.get(VALID, None)
        if own is not None:
            marks[VALID] = own
        joined: TensorDictBase = torch.cat([fresh.select(*both).update(marks), replayed.select(*both, *marks)])
        room = max(part[FINALS].shape[2] for part in (fresh, replayed))
        joined[FINALS] = torch.empty(*joined.shape, room, 0, device=self._device)
        return joined
