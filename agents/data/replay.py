"""Where an off-policy learner's batches come from: a collector, a replay, and a ratio between the two."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.agents.acting import ActingData, place
from offtrace.modules.collectors import RolloutCollector
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.keys import NEXT, POLICY_VERSION, VALID
from offtrace.modules.replay import Replay, SamplesPerInsert
from offtrace.modules.replay_files import read_folder

__all__ = ["ReplayData"]

_ENDLESS = 10**12
_HOPELESS = 100
"""Steps, not one of them valid, after which a simulator will not come back."""


class ReplayData(ActingData):
    """Batches from a replay that a collector fills, several for the work of one ``training_step``.

    A rollout is taken and inserted whenever the learner has used up what the samples-per-insert ratio entitles it to;
    with actor processes the next ones are under way meanwhile, and wait when the learner is behind. The ratio therefore
    holds exactly in both modes. The first ``min_size`` steps only fill the replay: they are acted by the untrained
    policy, whose log-probabilities are exact, so that corrections hold for them too.

    Every rank owns a collector and a replay, and has the same number of batches. Steps that an environment marks as not
    valid count as collected and are never sampled.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        replay_fn: gives the empty replay of a rank, and takes the folder for its files, or None where it may choose.
        total_frames: environment frames, over all ranks, after which the data ends.
        batch_size: steps learnt from in a batch of the replay, padding included: its samples times their length where
            all steps of a sequence are, otherwise (transitions, n-step windows) its samples.
        samples_per_insert: steps learnt from per collected step.
        min_size: steps per rank collected before the first batch.
        frame_skip: environment frames per agent step.
        updates_per_step: most batches for one ``training_step``.
        on_rollout: called with every rollout ``[N, T]`` before it is inserted.

    Of a resumed run whose :attr:`folder` is not there any more the replay is filled again, which is said.

    Attributes:
        frames: environment frames collected so far, over all ranks.
        limiter: counts steps and samples of this rank.
        replay, collector: while training runs, else None.
        folder: where :meth:`save` writes, one folder a rank; None: the replay is not saved.
        saved: the name under which the replay lies there that a checkpoint may count on; None before the first.
        games: those that ended in this rank's rollouts, since training began.
    """

    def __init__(
        self,
        collector_fn: Callable[[int, int], RolloutCollector],
        replay_fn: Callable[[int, Path | None], Replay],
        *,
        total_frames: int,
        batch_size: int,
        samples_per_insert: float,
        min_size: int,
        frame_skip: int = 1,
        updates_per_step: int = 8,
        on_rollout: Callable[[TensorDictBase], None] | None = None,
    ) -> None:
        super().__init__(collector_fn)
        sizes = {"total_frames": total_frames, "frame_skip": frame_skip, "updates_per_step": updates_per_step}
        for name, value in {**sizes, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.replay_fn = replay_fn
        self.total_frames = total_frames
        self.batch_size = batch_size
        self.frame_skip = frame_skip
        self.updates_per_step = updates_per_step
        self.on_rollout = on_rollout
        self.limiter = SamplesPerInsert(samples_per_insert, min_size)
        self.replay: Replay | None = None
        self.folder: Path | None = None
        self.saved: str | None = None
        self._versions: Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """For the log: steps in the replay, and steps learnt from per insert, counted since the replay was filled."""
        steps = 0 if self.replay is None else len(self.replay)
        ratio = self.limiter.sampled / max(1, self.limiter.inserted - self.limiter.min_size)
        return {"replay/steps": float(steps), "replay/samples_per_insert": ratio}

    def behaviour_versions(self, batch: Any) -> Tensor:
        """Versions of the weights that acted in the newest rollout: how far the actors are behind, not the replay."""
        # a resumed run may owe updates before its first rollout
        return torch.tensor([self._version]) if self._versions is None else self._versions

    def train_dataloader(self) -> ReplayStream:
        """Start the collector, fill the replay from disk in a resumed run, and give the stream of batches.

        Raises:
            ValueError: when the ratio, the capacity and the batch do not fit each other.
            DamagedReplay: when the replay of a resumed run cannot be read.
        """
        self.shutdown()
        rank, world_size, device = place(self)
        self.collector = self.collector_fn(rank, self.frames)
        try:
            self.replay = self.replay_fn(rank, self._files(rank))
            self.limiter.check(capacity=self.replay.capacity, batch=self.batch_size)
            self._check_batch(self.replay)
            self._fill(self.replay, rank)
        except BaseException:
            self.shutdown()
            raise
        self.collector.version = self._version
        return ReplayStream(self, self.collector, self.replay, world_size=world_size, device=device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The stream moves batches itself."""
        return batch

    def save(self, rank: int) -> str | None:
        """Write the replay for the checkpoint that is about to be written; None where it has no place to lie.

        Returns:
            The name that :attr:`saved` becomes when every rank has written its own.

        Raises:
            OSError, DamagedReplay: it cannot be written. The checkpoint then names the one before, and is still worth
                having.
        """
        if self.folder is None or self.replay is None:
            return None
        name = f"{self.frames:012d}"
        self.replay.dump(self._place_of(rank, name))
        return name

    def prune(self, rank: int) -> None:
        """Delete what no checkpoint needs, once the one that names the newest replay is written.

        The one before stays: of several ranks one alone cannot know that the first has written the checkpoint.
        """
        if self.folder is None or self.saved is None:
            return
        for old in _dumps(self._place_of(rank, self.saved).parent)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`ActingData`, the limiter's counters, and the name of the saved replay."""
        return {**super().state_dict(), "limiter": self.limiter.state_dict(), "replay": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        super().load_state_dict(state_dict)
        self.saved = state_dict["replay"]
        self.limiter.load_state_dict(state_dict["limiter"])
        if self.collector is not None:
            assert self.replay is not None
            self._fill(self.replay, place(self)[0])

    def _check_batch(self, replay: Replay) -> None:
        samples, steps = replay.batch_size, replay.batch_size * replay.length
        if self.batch_size not in (samples, steps):
            raise ValueError(
                f"batch_size is {self.batch_size}; the replay gives {samples} samples of {replay.length} steps, so it "
                f"must be {steps}, or {samples} where only the first step of each is learnt from"
            )

    def _fill(self, replay: Replay, rank: int) -> None:
        """What the last run had, or else the counters of an empty replay."""
        if self.saved is not None and self.folder is not None and not self.folder.exists():
            warnings.warn(
                f"{self.folder} is gone: the run goes on with an empty replay, after {self.limiter.min_size} steps",
                RuntimeWarning,
                stacklevel=2,
            )
            self.limiter.restart()
        elif self.saved is not None and self.folder is not None:
            found = self._place_of(rank, self.saved)
            replay.load(found)
            for other in found.parent.iterdir():  # of writings that no checkpoint came to name
                if other.name not in (found.name, f"{found.name}.old"):
                    shutil.rmtree(other, ignore_errors=True)
        else:
            self.limiter.restart()

    def shutdown(self) -> None:
        """End the actors, and delete the files that the replay worked on."""
        super().shutdown()
        files = self._files(place(self)[0])
        if files is not None:
            shutil.rmtree(files, ignore_errors=True)

    def _files(self, rank: int) -> Path | None:
        """Where a replay in files works; what is saved lies elsewhere."""
        return None if self.folder is None else self.folder.with_name(f"{self.folder.name}.live{rank}")

    def _place_of(self, rank: int, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"rank{rank}" / name


def check_saved(checkpoint: dict[str, Any], folder: Path) -> None:
    """Reads the replays in ``folder`` that ``checkpoint`` names, and forgets them again.

    Raises:
        DamagedReplay: one of them cannot be read.
    """
    saved = checkpoint.get(ReplayData.__qualname__, {}).get("replay")
    if saved is not None and folder.exists():
        for rank in sorted(folder.iterdir()):
            read_folder(rank / saved)


def _dumps(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in folder.iterdir() if not path.suffix)


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

    def __init__(
        self, data: ReplayData, collector: RolloutCollector, replay: Replay, *, world_size: int, device: torch.device
    ) -> None:
        self._data = data
        self._collector = collector
        self._replay = replay
        self._device = device
        self._frames_per_rollout = collector.frames_per_batch * data.frame_skip * world_size
        self._taken = 0
        self._failed = 0

    def __len__(self) -> int:
        return _ENDLESS

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
        self._data.limiter.sample(self._data.batch_size)
        return self._replay.sample().to(self._device, non_blocking=True)

    def _collect(self) -> None:
        data = self._data
        rollout = next(self._collector)
        data._versions = rollout[NEXT, POLICY_VERSION]
        data.games.note(rollout)
        self._check(rollout)
        if data.on_rollout is not None:
            data.on_rollout(rollout)
        # the actors take turns
        self._replay.extend(rollout, worker=self._taken % max(1, self._collector.num_workers))
        self._taken += 1
        data.limiter.insert(rollout.numel())
        data.frames += self._frames_per_rollout

    def _check(self, rollout: TensorDictBase) -> None:
        valid = rollout.get(VALID, None)
        self._failed = 0 if valid is None or bool(valid.any()) else self._failed + rollout.numel()
        if self._failed >= _HOPELESS:
            raise EnvironmentFailure(
                f"the simulator failed in each of the last {self._failed} steps; there is nothing to learn from"
            )
