"""The replay of one rank: made, filled, sampled, saved and found again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.agents.data.acting import ActingData, Learner
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.keys import INDEX, POLICY_VERSION, PRIORITY, VALID, WEIGHT
from offtrace.modules.replay import Replay
from offtrace.modules.returns import effective_sample_size

if TYPE_CHECKING:
    from offtrace.modules.collectors import Collector

ReplayFactory = Callable[[Learner, Path | None], Replay]
"""Gives the empty replay of a learner, and takes the folder for its files, or None where it may choose."""

ReplayHook = Callable[[TensorDictBase], TensorDictBase]
"""Takes a replayed batch ``[B, burn_in + T]`` and returns the one ``[B, T]`` to learn from."""

_HOPELESS = 100
"""Steps, not one of them valid, after which a simulator will not come back."""


class _Sampled(NamedTuple):
    """Of a replayed batch what the log tells of, and the newest version of the weights when it was sampled."""

    version: Tensor | None
    valid: Tensor | None
    weight: Tensor | None
    newest: int


class StoringData(ActingData):
    """A data module with a replay, which it saves beside the checkpoints, one folder a rank.

    Every rank owns a collector and a replay, and has the same number of batches. Of a resumed run whose ``folder`` is
    not there any more the replay is filled again, which is said.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        replay_fn: gives the empty replay of a learner, and takes the folder for its files, or None where it may choose.
        total_frames: environment frames, over all ranks, after which the data ends.
        frame_skip: environment frames per agent step.
        on_replayed: called with every replayed batch on the learner's device, before it is joined with fresh rows or
            learnt from, for what has to be computed anew, such as a recurrent state
            (:func:`offtrace.modules.losses.burn_in`). Needed where the replay gives steps in front of its sequences.
            Where it goes through whole episodes, it keeps the state that comes back.

    Attributes:
        replay: that of this rank, once training begins; None before.
        folder, saved, frames, collector, episodes: as of :class:`ActingData`.
    """

    saves: ClassVar[bool] = True

    def __init__(
        self,
        collector_fn: Callable[[int, int], Collector],
        replay_fn: ReplayFactory,
        *,
        total_frames: int,
        frame_skip: int,
        on_replayed: ReplayHook | None = None,
    ) -> None:
        super().__init__(collector_fn, total_frames=total_frames, frame_skip=frame_skip)
        self.on_replayed = on_replayed
        self.replay: Replay | None = None
        self._replay_fn = replay_fn
        self._failed = 0
        self._sampled: _Sampled | None = None
        self._named: list[str] = []  # the last two that checkpoints were given

    @property
    def metrics(self) -> dict[str, float]:
        """For the log: steps in the replay, and of the newest replayed batch what is known of it.

        ``replay/age`` and ``replay/age_max``, over its valid steps: the newest version of the weights minus the one
        that acted. A version is a push to the actors. ``replay/priority_ess``, where sampling is by priority: the
        effective sample size of its importance weights, as a fraction.
        """
        found = {"replay/steps": float(self.steps_stored)}
        if self._sampled is None:
            return found
        version, valid, weight, newest = self._sampled
        if version is not None:
            age = (newest - (version if valid is None else version[valid.view(version.shape)])).double()
            found |= {"replay/age": float(age.mean()), "replay/age_max": float(age.max())}
        if weight is not None:
            found["replay/priority_ess"] = float(effective_sample_size(weight.view(len(weight), -1)[:, 0].log()))
        return found

    @property
    def steps_stored(self) -> int:
        """Steps in the replay."""
        return 0 if self.replay is None else len(self.replay)

    @property
    def progress(self) -> float:
        """Part of the frames that are done, in [0, 1]."""
        return min(1.0, self.frames / self.total_frames)

    def open_replay(self, learner: Learner) -> Replay:
        """Makes the empty replay of ``learner``.

        Raises:
            ValueError: it gives steps in front of its sequences, and there is no ``on_replayed`` to take them away.
        """
        self.replay = replay = self._replay_fn(learner, self._files(learner.rank))
        if replay.burn_in and self.on_replayed is None:
            raise ValueError(
                f"the replay gives {replay.burn_in} steps in front of each sequence, and there is no on_replayed that "
                "takes them away: give one, such as losses.burn_in with the policy"
            )
        return replay

    def fill_replay(self, rank: int) -> None:
        """Fills the replay with what the last run had; it stays empty where there is nothing, or not any more.

        Raises:
            DamagedReplay: it cannot be read.
        """
        if self.saved is None or self.folder is None:
            return self.begin_empty()
        if not self.folder.exists():
            warnings.warn(
                f"{self.folder} is gone: the run goes on with an empty replay, which is filled first",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.begin_empty()
        found = self._place_of(rank, self.saved)
        self._open.load(found)
        for other in found.parent.iterdir():
            earlier = other.name < found.name and not other.suffix  # the checkpoint before may name it
            if not earlier and other.name not in (found.name, f"{found.name}.old"):  # no checkpoint came to name it
                shutil.rmtree(other, ignore_errors=True)

    def begin_empty(self) -> None:
        """Make the counters fit a replay that begins empty."""
        raise NotImplementedError(f"{type(self).__name__} must define begin_empty")

    def insert(self, rollout: TensorDictBase) -> None:
        """Inserts a rollout ``[N, T]`` of one actor or several, their environments in their own order.

        Raises:
            EnvironmentFailure: the simulator has failed in every step for long.
        """
        valid = rollout.get(VALID, None)
        self._failed = 0 if valid is None or bool(valid.any()) else self._failed + rollout.numel()
        if self._failed >= _HOPELESS:
            raise EnvironmentFailure(
                f"the simulator failed in each of the last {self._failed} steps; there is nothing to learn from"
            )
        for part in rollout.split(self._open.num_envs):  # of one actor each
            self._open.extend(part)

    def sample(self, number: int | None = None) -> TensorDictBase:
        """A batch of so many samples, by default the replay's own; the sampler anneals with the training."""
        self._open.sampler.anneal(self.progress)
        batch = self._open.sample(number)
        newest = self._version if self.collector is None else self.collector.version
        version, valid, weight = (batch.get(key, None) for key in (POLICY_VERSION, VALID, WEIGHT))
        self._sampled = _Sampled(version, valid, weight, newest)
        return batch

    def replayed(self, device: torch.device, number: int | None = None) -> TensorDictBase:
        """As :meth:`sample`, on ``device`` and as ``on_replayed`` returns it."""
        batch: TensorDictBase = self.sample(number).to(device, non_blocking=True)
        if self.on_replayed is None:
            return batch
        batch = self.on_replayed(batch)
        if self._open.whole_episodes:
            self._open.renew(batch)
        return batch

    @property
    def reads_priorities(self) -> bool:  # type: ignore[override]
        """Whether the replay samples by priority."""
        return self._open.sampler.prioritized

    def feedback(self, batch: TensorDictBase) -> None:
        """Gives a prioritised sampler the errors that the loss wrote into a batch; fresh rows are left out.

        Raises:
            ValueError: the loss wrote none.
        """
        index = batch.get(INDEX, None)
        if index is None or not self.reads_priorities:
            return
        priority = batch.get(PRIORITY, None)
        if priority is None:
            raise ValueError(
                f"the replay samples by priority, and the loss wrote no {PRIORITY!r} into the batch; make the loss "
                "with priorities=True, or sample uniformly where it has no priorities"
            )
        index = index.cpu()
        sampled = index.reshape(len(index), -1)[:, 0] >= 0  # of fresh rows it is -1
        self._open.update_priorities(index[sampled], priority.detach().cpu()[sampled])

    def save(self, rank: int) -> str | None:
        """As :meth:`ActingData.save`: the replay; its name is the number of frames."""
        if self.folder is None or self.replay is None:
            return None
        name = f"{self.frames:012d}"
        self.replay.dump(self._place_of(rank, name))
        return name

    def prune(self, rank: int) -> None:
        """As :meth:`ActingData.prune`.

        The replay that was named before the newest stays: it is that of the checkpoint before, and of several ranks one
        alone cannot know that the first has written the newest one. One that this rank wrote and another could not is
        named by no checkpoint.
        """
        if self.folder is None:
            return
        if self.saved is not None and self.saved not in self._named:
            self._named = [*self._named[-1:], self.saved]
        place = self._place_of(rank, "")
        for path in place.iterdir() if place.exists() else ():
            if not path.suffix and path.name not in self._named:
                shutil.rmtree(path, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`ActingData`, and the name of the saved replay."""
        return {**super().state_dict(), "replay": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters, and where training is set up already, fill the replay."""
        super().load_state_dict(state_dict)
        self.saved = state_dict["replay"]
        self._named = [] if self.saved is None else [self.saved]
        if self.collector is not None:
            self.fill_replay(self.learner.rank)

    def shutdown(self) -> None:
        """End the actors, and delete the files that the replay worked on."""
        super().shutdown()
        files = self._files(self.learner.rank)
        if files is not None:
            shutil.rmtree(files, ignore_errors=True)

    @property
    def _open(self) -> Replay:
        assert self.replay is not None, "training has not begun"
        return self.replay

    def _files(self, rank: int) -> Path | None:
        """Where a replay in files works; what is saved lies elsewhere."""
        return None if self.folder is None else self.folder.with_name(f"{self.folder.name}.live{rank}")

    def _place_of(self, rank: int, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"rank{rank}" / name
