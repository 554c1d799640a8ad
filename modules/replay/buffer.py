"""Replay of transitions and sequences: nothing stored twice, sequences inside episodes, saved without pickle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.keys import INDEX, IS_INIT, NEXT, OBSERVATION, WEIGHT, WORKER
from offtrace.modules.replay.batches import Batches
from offtrace.modules.replay.entries import Key, check, choose, entries_of, flags_of
from offtrace.modules.replay.files import DamagedReplay, read_folder, write_folder
from offtrace.modules.replay.frames import STACK, check_shifted, newest_only
from offtrace.modules.replay.rings import Rings, joined
from offtrace.modules.replay.samplers import Sampler, Uniform
from offtrace.modules.replay.storage import Storage

__all__ = ["Replay"]


class Replay:
    """The newest steps of several environments, sampled with replacement, uniformly or by priority.

    Every environment of every actor has a ring of slots of its own, in which the oldest step is overwritten first.
    Observations are stored once: the successor of a step is the observation of the next, or behind the last step of an
    episode the true final observation, which takes a slot but is never sampled as a step. Whatever else the policy
    wrote travels with the step. A sequence never crosses episodes, nor a step with ``valid`` False, which is not
    stored, nor the place where a ring is being written. Where a rollout does not go on from the state in which the last
    one of its ring ended, because an actor was restarted, the episode ends there, with the bootstrap intact.

    With ``frame_stack`` k the observation is a stack of k frames, of which each is stored once: that of a slot is the
    newest, and a sample's stacks are put together from k slots in a row. They come back bit for bit, whatever the
    environment pads the first stack of an episode with, because its k - 1 older frames take slots too.

    A recurrent network finds in a sequence's first step the state that its actor had there. Two options are for those
    that compute it again:

    - ``burn_in``: the sequences are drawn as they are, at the start of an episode too, and come with so many steps of
      their episode in front, as far as there are any. ``valid`` is False in place of the others, whose entries, state
      included, are those of the first that is there.
    - ``whole_episodes``: the rows of a batch go through episodes from their beginning, ``length`` steps in each batch,
      and come with the sequence before in front. A row whose episode has ended, whose sequence before is overwritten,
      or which has come up with the actor, begins another one: uniform over the episodes whose first step is still
      there; where there is none, as where a single one fills its ring, any sequence. :meth:`renew` stores the state
      that was computed, for the next time.

    Args:
        capacity: slots, rounded up to a multiple of the rings; an ended episode takes ``frame_stack`` more than its
            steps.
        num_envs: N, environments of one actor.
        batch_size: samples in a batch.
        num_workers: actors; one for collection in process.
        length: steps of a sample. 1 gives transitions ``[B]``, more sequences ``[B, length]``.
        pad: of sequences: also begin samples in the last ``length - 1`` steps of an episode. They are filled up with
            repetitions that have ``valid`` False. Without it only whole sequences are sampled, and episodes shorter
            than ``length`` never are.
        overlap: of sequences: one begins at every step, as n-step windows and priorities need them. Step t of an
            episode, counted from 0, is then in ``min(t + 1, length)`` of them, so its first steps are learnt from more
            rarely where all steps of a sequence are. False, with ``pad``: they begin at every ``length``-th step of
            an episode and tile it, its last one padded, so that each step is in exactly one.
        storage: ``"tensor"`` in memory, ``"memmap"`` in files, whose space is taken at once.
        path: folder of the files; a temporary one if not given.
        seed: of the sampling, which draws from a generator of its own.
        device: where a ``"tensor"`` storage lies and samples come from.
        frame_stack: frames of equal size along the first dimension of the one observation ``[k * C, ...]``, the newest
            last; 1 stores observations whole.
        sampler: what draws the steps with which samples begin; :class:`Uniform` if not given.
        burn_in: steps in front of each sequence.
        whole_episodes: rows go through whole episodes; ``burn_in`` is then ``length``, and not to be given.

    Raises:
        ValueError: a number is out of range or does not fit the others, or the sampler belongs to another replay.

    Attributes:
        inserted: steps inserted so far, those that are not valid left out.
        sampled: steps sampled so far, B times ``length`` a batch.
        dropped: steps that came with ``valid`` False.
        sampler: the sampler.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_envs: int,
        batch_size: int,
        num_workers: int = 1,
        length: int = 1,
        pad: bool = False,
        overlap: bool = True,
        storage: Literal["tensor", "memmap"] = "tensor",
        path: str | Path | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        frame_stack: int = 1,
        sampler: Sampler | None = None,
        burn_in: int = 0,
        whole_episodes: bool = False,
    ) -> None:
        sizes = {"num_envs": num_envs, "batch_size": batch_size, "num_workers": num_workers, "length": length}
        for name, value in {"capacity": capacity, **sizes, "frame_stack": frame_stack}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if capacity < batch_size:
            raise ValueError(f"capacity is {capacity}; a batch of {batch_size} needs a replay of {batch_size} at least")
        rings = num_envs * num_workers
        size = -(-capacity // rings) + 1  # one for the provisional state at the head
        if length >= size:
            raise ValueError(
                f"length is {length}; a capacity of {capacity} leaves each of {rings} environments {size - 1} steps, "
                f"so it must be below {size}"
            )
        if not (overlap or pad):
            raise ValueError(
                "overlap is False, and pad is False; sequences that tile an episode end with a padded one: pad must be "
                "True, or overlap True"
            )
        _check_recurrent(burn_in, whole_episodes, length, size, sampler)
        size += frame_stack - 1  # the oldest slots of a ring lack older frames
        self.burn_in, self.whole_episodes = length if whole_episodes else burn_in, whole_episodes
        self.capacity, self.num_envs, self.num_workers = capacity, num_envs, num_workers
        self.batch_size, self.length, self.pad = batch_size, length, pad and length > 1
        self.overlap = overlap
        self.frame_stack = frame_stack
        self.inserted = self.sampled = self.dropped = 0
        self._storage = Storage(rings * size, storage, path, torch.device(device))
        self.sampler: Sampler = Uniform() if sampler is None else sampler
        self._rings = Rings(
            rings, size, length, self.sampler, pad=self.pad, stride=1 if overlap else length, older=frame_stack - 1,
            before=self.burn_in, episodes=whole_episodes,
        )  # fmt: skip
        self._batches = Batches(self._storage, self._rings, frame_stack)
        self.sampler.bind(self._rings.sampled_slots)
        self._begun = np.zeros(0, np.int64)  # with whole_episodes, the items with which the newest rows began
        self._generator = torch.Generator().manual_seed(seed)
        self._inserting = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Steps that are stored."""
        return self._rings.held

    @property
    def device(self) -> torch.device:
        """Where samples come from."""
        return self._storage.device

    @property
    def num_starts(self) -> int:
        """Steps that may be drawn for a sample to begin with."""
        return len(self.sampler)

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one step, bookkeeping included; 0 before the first insertion."""
        data = self._storage.bytes_per_slot
        return data + self._rings.flags.itemsize + self.sampler.bytes_per_slot if data else 0

    @torch.no_grad()
    def extend(self, rollout: TensorDictBase, *, worker: int | None = None) -> int:
        """Inserts a rollout ``[N, T]`` of one actor, in the order in which its environments went on.

        Args:
            rollout: what a collector gives.
            worker: which actor made it. If not given the rollout says it by ``"worker"``, int64 ``[N, T]``, and one
                without that entry is the first actor's.

        Returns:
            The number of valid steps.

        Raises:
            ValueError: the rollout has another number of environments, lacks an entry, has one of another shape or
                type, or is longer than a ring; or its observations are no stacks of ``frame_stack`` frames. Nothing is
                inserted then.
        """
        if rollout.ndim != 2 or rollout.shape[0] != self.num_envs:
            raise ValueError(
                f"the replay has {self.num_envs} environments per actor; it takes rollouts [{self.num_envs}, T], "
                f"got one of shape {list(rollout.shape)}"
            )
        if not rollout.shape[1]:
            return 0
        if worker is None:
            made_by = rollout.get(WORKER, None)
            worker = 0 if made_by is None or not made_by.numel() else int(made_by[0, 0])
        if not 0 <= worker < self.num_workers:
            raise ValueError(f"worker is {worker}; the replay has rings for actors 0 to {self.num_workers - 1}")
        with self._lock:
            self._check_whole()
            entries = whole = entries_of(rollout)
            flags = flags_of(entries, *rollout.shape)
            if self.frame_stack > 1:
                entries = newest_only(whole, self.frame_stack)
                check_shifted(whole, self.frame_stack, flags["valid"], joined(**flags))
            if not self._storage.leaves:
                self._storage.state, layout = choose(entries)
                self._storage.allocate(layout)
            check(entries, self._storage.state, self._storage.leaves)
            self._storage.has_init |= (IS_INIT,) in entries
            self._inserting = True  # stays so where a signal's exception breaks in: the books are ahead of the data
            number = self._insert(entries, whole, flags, worker)
            self._inserting = False
            return number

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A batch ``[B]``, or ``[B, burn_in + length]`` with ``length`` above 1, in memory of its own.

        Holds what the rollouts held, the successors under ``"next"``, the three flags there as bool ``[*, 1]``, and
        with ``pad`` or ``burn_in`` the bool ``"valid"`` ``[*, 1]``. ``"index"``, int64 ``[*]``, names the sample for
        :meth:`update_priorities`; a prioritised sampler adds ``"weight"``, float32 ``[*]``. In sequences all steps of
        a sample have its name and weight, in the memory of one, and a state and its successor share memory: change
        them out of place. Of sequences ``"finals"``, ``[B, length, K, 0]``, tells losses by its shape whether a step
        before the last one of a sequence is truncated, K 1, or none is, K 0.

        Raises:
            ValueError: no step to begin with, or all priorities are 0.
            DamagedReplay: an insertion was interrupted half-way.
        """
        number = self.batch_size if batch_size is None else batch_size
        with self._lock:
            self._check_whole()
            self._check_starts()
            slots, weight = self._draw(number)
            self.sampled += number * self.length
            items = self._rings.items(slots)
            if self.whole_episodes:
                self._begun = items
            found = {INDEX: self._storage.tensor(items)}
            if weight is not None:
                found[WEIGHT] = self._storage.tensor(weight)
            return (
                self._batches.transitions(slots, found) if self.length == 1 else self._batches.sequences(slots, found)
            )

    def renew(self, batch: TensorDictBase) -> None:
        """Stores the state of the newest batch's first steps again, but for the observation: what was computed anew.

        Args:
            batch: ``[B, length]``, its rows in the order in which :meth:`sample` gave them, without the steps in front.
                Those that were overwritten since are passed over.

        Raises:
            ValueError: the replay does not go through whole episodes, or it is not the newest batch. Where the replay
                lies on a device only the number of rows tells, for the host would wait for the rest.
            DamagedReplay: an insertion was interrupted half-way.
        """
        if not self.whole_episodes:
            raise ValueError("whole_episodes is False; a state is renewed for the row that goes on, and no row does")
        with self._lock:
            self._check_whole()
            newest = len(batch) == len(self._begun)
            if newest and self.device.type == "cpu":
                newest = bool((batch[INDEX][:, 0].cpu().numpy() == self._begun).all())
            if not newest:
                raise ValueError(
                    f"this batch of {len(batch)} rows is not the newest, of {len(self._begun)}; give what sample "
                    "returned last, its rows in their order"
                )
            slots, there = self._rings.slots_of(self._begun)
            index, rows = self._storage.tensor(slots[there]), self._storage.tensor(there.nonzero()[0])
            for key in self._storage.state:
                if key[0] != OBSERVATION:
                    first = batch[key][:, 0].detach().to(self.device)
                    self._storage.leaves[key].index_copy_(0, index, first[rows])

    def update_priorities(self, index: Tensor, priority: Tensor) -> int:
        """Gives samples new priorities, for instance the absolute TD error of each.

        Args:
            index: ``batch["index"]``, int64 ``[B]``, or ``[B, length]`` of which each row names one sample.
            priority: at least 0 and finite, ``[B]``, or ``[B, length]`` of which the first column counts.

        Returns:
            How many of them there still are; those that were overwritten since are passed over. Of a sample that is
            there twice the last priority counts.

        Raises:
            ValueError: a priority is negative or not finite, an index was never given, or the replay samples
                uniformly. Nothing has changed then.
            DamagedReplay: an insertion was interrupted half-way.
        """
        items, values = _of_each(index, "index", torch.int64), _of_each(priority, "priority", torch.float64)
        if len(items) != len(values):
            raise ValueError(f"there are {len(values)} priorities for {len(items)} indices; there must be one of each")
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(f"priority[{place}] is {values[place]}; it must be at least 0 and finite")
        with self._lock:
            self._check_whole()
            slots, there = self._rings.slots_of(items)
            self.sampler.update(self._rings.sampled(slots[there]), values[there])
            return int(there.sum())

    def dump(self, path: str | Path) -> None:
        """Writes everything into the folder ``path``, replacing what an earlier call wrote there.

        Tensors go into plain files and the rest into JSON. The folder is complete or not there at all.

        Raises:
            OSError: it cannot be written.
            DamagedReplay: an insertion was interrupted half-way.
            ValueError: something else than a replay has that name, or this replay's own files lie in it.
        """
        folder = Path(path).absolute()
        live = self._storage.path if self._storage.kind == "memmap" else None
        if live is not None and Path(live).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{str(path)!r} holds the files this replay works on; dump it into another folder")
        rings = self._rings
        with self._lock:
            self._check_whole()
            arrays, numbers = self.sampler.save(rings.sampled(rings.starts))
            write_folder(
                folder,
                data=self._storage.by_ring(rings.number),
                filled=rings.filled,
                books={
                    **{f"sampler_{name}": array for name, array in arrays.items()},
                    "flags": rings.flags,
                    "written": rings.written,
                    "open": rings.open,
                    "run": rings.run,
                    "generator": self._generator.get_state().numpy(),
                    **({"begun": self._begun} if self.whole_episodes else {}),
                },
                facts={
                    **self._shape(),
                    **{name: getattr(self, name) for name in ("inserted", "sampled", "dropped")},
                    "held": rings.held,
                    "longest": rings.longest,
                    "state": self._storage.state,
                    "has_init": self._storage.has_init,
                    "sampler_numbers": numbers,
                },
            )

    def load(self, path: str | Path) -> None:
        """Takes over what :meth:`dump` wrote; the next samples are those that would have come then.

        Raises:
            DamagedReplay: the folder is not there, incomplete or altered. The replay stays as it is.
            ValueError: it was written by a replay of other numbers, or with another sampler.
        """
        with self._lock:
            folder = read_folder(Path(path))
            for name, value in self._shape().items():
                if folder.facts.get(name) != value:
                    raise ValueError(
                        f"the replay in {str(path)!r} has {name} {folder.facts.get(name)}, this one has {value}"
                    )
            self._storage.allocate(folder.leaves())
            rings, books, facts = self._rings, folder.books, folder.facts
            self._storage.state = [tuple(key) for key in facts["state"]]
            self._storage.has_init = bool(facts["has_init"])
            folder.fill(self._storage.by_ring(rings.number))
            rings.flags[:] = books["flags"]
            rings.written[:], rings.open[:], rings.run[:] = books["written"], books["open"], books["run"]
            rings.held, rings.longest = int(facts["held"]), int(facts["longest"])
            arrays = {key.removeprefix("sampler_"): book for key, book in books.items() if key.startswith("sampler_")}
            self.sampler.restore(rings.sampled(rings.starts), arrays, facts["sampler_numbers"])
            self._begun = books["begun"].copy() if self.whole_episodes else self._begun
            self._generator.set_state(torch.from_numpy(books["generator"].copy()))
            self._inserting = False
            self.inserted, self.sampled, self.dropped = (int(facts[x]) for x in ("inserted", "sampled", "dropped"))

    def _shape(self) -> dict[str, Any]:
        names = ("capacity", "num_envs", "num_workers", "length", "pad", "overlap", "frame_stack")
        sampler = f"{self.sampler}, whole episodes" if self.whole_episodes else str(self.sampler)
        return {**{name: getattr(self, name) for name in names}, "sampler": sampler}

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Slots with which samples begin, ``[number]``, and their importance weights."""
        if not self.whole_episodes:
            named, weight = self.sampler.draw(number, self._generator)
            return self._rings.drawn(named), weight
        if len(self.sampler):
            slots = self._rings.drawn(self.sampler.draw(number, self._generator)[0])
        else:
            starts = self._rings.starts
            slots = starts[torch.randint(len(starts), (number,), generator=self._generator).numpy()]
        rows = min(number, len(self._begun))
        following, goes_on = self._rings.following(self._begun[:rows])
        slots[:rows] = np.where(goes_on, following, slots[:rows])
        return slots, None

    def _insert(
        self, entries: dict[Key, Tensor], whole: dict[Key, Tensor], flags: dict[str, np.ndarray], worker: int
    ) -> int:
        envs, steps = flags["valid"].shape
        rings = slice(worker * envs, worker * envs + envs)
        continues = flags["valid"][:, 0] & ~flags["init"][:, 0] & self._rings.open[rings]
        if continues.any():
            continues &= self._same_state(whole, rings, envs)
        try:
            plan = self._rings.insert(rings, **flags, continues=continues)
        except ValueError:  # it does not fit, and nothing has changed
            self._inserting = False
            raise
        every = len(plan.step_rows) == envs * steps
        rows, slots, final_rows, final_slots = map(self._storage.tensor, plan[:4])
        for key, leaf in self._storage.leaves.items():
            data = entries[key].flatten(0, 1).to(self.device)
            leaf.index_copy_(0, slots, data if every else data.index_select(0, rows))
        for key in self._storage.state if len(plan.final_slots) else ():
            data = entries[(NEXT, *key)].flatten(0, 1)
            self._storage.leaves[key].index_copy_(0, final_slots, data.to(self.device).index_select(0, final_rows))
        if plan.older_slots.size:
            leaf = self._storage.leaves[STACK]
            stacks = whole[STACK].flatten(0, 1).to(self.device).index_select(0, self._storage.tensor(plan.first_rows))
            frames = stacks.view(len(stacks), self.frame_stack, *leaf.shape[1:])[:, :-1]
            leaf.index_copy_(0, self._storage.tensor(plan.older_slots.ravel()), frames.flatten(0, 1))
        self.inserted += len(plan.step_rows)
        self.dropped += envs * steps - len(plan.step_rows)
        return len(plan.step_rows)

    def _same_state(self, whole: dict[Key, Tensor], rings: slice, envs: int) -> np.ndarray:
        slots = self._storage.tensor(self._rings.provisional(rings))
        same = np.ones(envs, bool)
        for key in self._storage.state:
            if key[0] == OBSERVATION:
                stored, first = self._batches.take(key, slots), whole[key][:, 0].to(self.device)
                same &= (stored == first).reshape(envs, -1).all(1).cpu().numpy()
        return same

    def _check_whole(self) -> None:
        if self._inserting:
            raise DamagedReplay(
                "an insertion was interrupted, and what the replay holds is not whole; load a saved one"
            )

    def _check_starts(self) -> None:
        if len(self.sampler) or (self.whole_episodes and len(self._rings.starts)):
            return
        if self.inserted and not self.pad and self._rings.longest < self.length:
            raise ValueError(
                f"length is {self.length}, and the longest of the episodes so far has {self._rings.longest} steps; "
                f"give a length of {self._rings.longest} or less, or pad=True"
            )
        raise ValueError(
            f"no sample of length {self.length} can begin anywhere: the replay has {len(self)} steps; insert more of "
            "them before the first batch (min_size)"
        )


def _check_recurrent(burn_in: int, whole_episodes: bool, length: int, size: int, sampler: Sampler | None) -> None:
    if burn_in < 0:
        raise ValueError(f"burn_in is {burn_in}; it must be at least 0")
    if whole_episodes and burn_in:
        raise ValueError(
            f"burn_in is {burn_in}, and whole_episodes is True: the sequence before is in front then, and it must be 0"
        )
    if (burn_in or whole_episodes) and length < 2:
        name = "whole_episodes is True" if whole_episodes else f"burn_in is {burn_in}"
        raise ValueError(f"{name}; that is for sequences, of a length of 2 or more, and length is {length}")
    steps = length if whole_episodes else burn_in
    if steps + length >= size:
        raise ValueError(
            f"{steps} steps in front of sequences of {length} need {steps + length}; the capacity leaves each "
            f"environment {size - 1} steps, so both together must be below {size}"
        )
    if whole_episodes and sampler is not None and sampler.prioritized:
        raise ValueError(f"whole_episodes is True, and the sampler is {sampler}; rows that go on have no priorities")


def _of_each(value: Tensor, name: str, dtype: torch.dtype) -> np.ndarray:
    """One number of each sample, ``[B]``."""
    value = torch.as_tensor(value).detach()
    if value.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [B], or [B, length]")
    of_each: np.ndarray = (value if value.ndim == 1 else value[:, 0]).to("cpu", dtype).numpy()
    return of_each
