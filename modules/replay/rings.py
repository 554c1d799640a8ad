"""Where the steps of a replay lie, and which of them a sample may begin with. Numbers only; the data is elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offtrace.modules.replay.samplers import Sampler

# One byte says all about a slot. A slot without STEP holds the state after the last step of an episode.
STEP, TERMINATED, TRUNCATED, INIT, START = 1, 2, 4, 8, 16

_ENDS = np.array([TERMINATED, TRUNCATED, TERMINATED | TRUNCATED, INIT], np.uint8)
_NONE = np.zeros(0, np.int64)


class Plan(NamedTuple):
    """What to write where; rows count ``environment * T + time`` in the rollout.

    ``older_slots`` ``[F, older]`` take the older frames, oldest first, of the states with which F runs begin.
    """

    step_rows: np.ndarray
    step_slots: np.ndarray
    final_rows: np.ndarray
    final_slots: np.ndarray
    first_rows: np.ndarray
    older_slots: np.ndarray


class _Layout(NamedTuple):
    """Where a rollout ``[N, T]`` goes, in slots counted from each ring's beginning; ``[N, 1]`` if not said otherwise.

    Attributes:
        base: first slot of the ring.
        written: slots before the rollout.
        absolute: of each step, ``[N, T]``.
        end: slots after it, without the provisional one; ``head``: with it.
        ended: ``[N, T]``, a final state follows.
        breaks: ``[N, T]``, where no run goes on.
        lead: ``[N]``, the provisional state stays, as the last of its run.
        is_open: ``[N]``, there is a provisional state after it.
    """

    base: np.ndarray
    written: np.ndarray
    absolute: np.ndarray
    end: np.ndarray
    head: np.ndarray
    ended: np.ndarray
    breaks: np.ndarray
    lead: np.ndarray
    is_open: np.ndarray


def joined(*, valid: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, init: np.ndarray) -> np.ndarray:
    """Which steps of a rollout ``[N, T]`` are of one run with the step after them, ``[N, T - 1]``."""
    parted = (terminated | truncated)[:, :-1] | init[:, 1:]
    both: np.ndarray = valid[:, :-1] & valid[:, 1:] & ~parted
    return both


class Rings:
    """Rings of slots, one for each environment, with the steps of its episodes in time order.

    The successor of a step is the state in the next slot. So the last step of an episode is followed by a slot with
    the final state alone, and the newest step of a ring by a provisional one, which the next step replaces. A run is a
    stretch of valid steps of one episode.

    A slot is a start when a sample may begin there: the whole window of ``length`` steps is known; with ``pad`` also
    the last steps of an ended run, whose windows are shorter. Of these, every ``stride``-th step of a run is one, from
    the first on, whether or not that is still there. The sampler is told of starts that come and go, with ``episodes``
    only of those with which an episode begins.

    Where a state is a stack of frames and a slot holds the newest one, the others lie in the ``older`` slots before it:
    those of the steps before, and ahead of a run's first step as many slots that hold nothing else. So whatever an
    environment pads its first stack with comes back. The oldest slots of a full ring are no steps any more, but still
    give frames to those behind them.

    Args:
        number: rings.
        size: slots of each.
        length: steps of a sample.
        sampler: draws the starts.
        pad: shorter windows at the end of a run.
        stride: steps of a run from one start to the next: 1, or ``length`` for windows that lie side by side.
        older: frames of a state besides the newest.
        before: steps of the run in front of a sample, as far as they are there.
        episodes: the sampler draws the first steps of episodes alone.

    Attributes:
        flags: uint8 ``[number * size]``.
        held: steps that are stored.
        longest: steps of the longest run so far.
    """

    def __init__(
        self,
        number: int,
        size: int,
        length: int,
        sampler: Sampler,
        *,
        pad: bool = False,
        stride: int = 1,
        older: int = 0,
        before: int = 0,
        episodes: bool = False,
    ) -> None:
        self.number, self.size, self.length, self.pad, self.older = number, size, length, pad, older
        self.before, self.stride = before, stride
        self._drawn = START | INIT if episodes else START
        self.sampler = sampler
        # slots of a ring as the sampler counts them: ahead of the newest one the rest of its block stays empty
        self._lane = size if sampler.block == 1 else -(-(size + sampler.block - 1) // sampler.block) * sampler.block
        self.flags = np.zeros(number * size, np.uint8)
        self.written = np.zeros(number, np.int64)  # slots of each ring so far, the provisional one not counted
        self.open = np.zeros(number, bool)  # there is a provisional one
        self.run = np.zeros(number, np.int64)  # steps of the newest run so far
        self.held = 0
        self.longest = 0

    @property
    def starts(self) -> np.ndarray:
        """Slots with which a sample may begin, in ascending order."""
        return np.flatnonzero(self.flags & START)

    def provisional(self, rings: slice) -> np.ndarray:
        """Slots of the provisional states of ``rings``, meaningful where ``open``."""
        return np.arange(rings.start, rings.stop) * self.size + self.written[rings] % self.size

    def insert(
        self,
        rings: slice,
        *,
        valid: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        init: np.ndarray,
        continues: np.ndarray,
    ) -> Plan:
        """Takes in a rollout ``[N, T]`` of bool flags.

        Args:
            rings: the N rings.
            valid: steps that are data; others end their run and are not stored.
            terminated, truncated, init: of the steps.
            continues: ``[N]``, whether the rollout goes on from the ring's provisional state.

        Raises:
            ValueError: the rollout is longer than a ring. Nothing has changed then.
        """
        lay = self._lay_out(rings, valid, terminated, truncated, init, continues)
        steps, ended, is_open = valid.shape[1], lay.ended, lay.is_open
        step_slots = self._slots(lay.base, lay.absolute)[valid]
        tail_slots = self._slots(lay.base, lay.end)[is_open][:, 0]
        final_slots = np.concatenate([self._slots(lay.base, lay.absolute + 1)[ended], tail_slots])
        final_rows = np.concatenate(
            [ended.ravel().nonzero()[0], is_open.nonzero()[0] * steps + steps - 1]  # the tail is the state after it
        )
        no_steps = [final_slots, self._slots(lay.base, lay.written)[lay.lead][:, 0]]
        first_rows = older_slots = _NONE
        if self.older:
            first_rows = (valid & lay.breaks).ravel().nonzero()[0]
            before = lay.absolute[..., None] + np.arange(-self.older, 0)
            older_slots = self._slots(lay.base[..., None], before).reshape(-1, self.older)[first_rows]
            # the slots behind the head are the oldest ones: frames of their states are lost
            no_steps += [older_slots.ravel(), self._slots(lay.base, lay.head + np.arange(self.older)).ravel()]

        flags = (STEP + TERMINATED * terminated + TRUNCATED * truncated + INIT * init).astype(np.uint8)[valid]
        self._overwrite(step_slots, np.concatenate(no_steps), flags)
        carried = self.run[rings]
        # run[n, t]: steps of the run that ends at t, t included
        time = np.arange(steps)
        run = time - np.maximum.accumulate(np.where(lay.breaks, time, -carried[:, None]), 1) + 1
        self.written[rings] = lay.end[:, 0]
        self.open[rings] = is_open
        self._add_starts(lay, valid, run, carried)
        self.run[rings] = np.where(is_open, run[:, -1], 0)
        self.longest = max(self.longest, int((run * valid).max(initial=0)))
        return Plan(valid.ravel().nonzero()[0], step_slots, final_rows, final_slots, first_rows, older_slots)

    def _lay_out(
        self,
        rings: slice,
        valid: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        init: np.ndarray,
        continues: np.ndarray,
    ) -> _Layout:
        """Counts slots; the arguments are those of :meth:`insert`."""
        stops = ~joined(valid=valid, terminated=terminated, truncated=truncated, init=init)
        ended = valid.copy()
        ended[:, :-1] &= stops
        ended[:, -1] &= terminated[:, -1] | truncated[:, -1]
        breaks = np.zeros_like(valid)
        breaks[:, 0] = ~continues
        breaks[:, 1:] = stops
        lead = self.open[rings] & ~continues
        is_open = valid[:, -1] & ~ended[:, -1]
        emitted = valid.astype(np.int64) + ended
        if self.older:
            ahead = self.older * (valid & breaks)
            emitted += ahead
        offset = np.cumsum(emitted, 1) - emitted + lead[:, None]
        if self.older:
            offset += ahead
        total = emitted.sum(1) + lead
        usable = self.size - self.older
        if int((total + is_open).max()) > usable:
            raise ValueError(
                f"a rollout of {valid.shape[1]} steps does not fit the {usable} slots that the replay has for an "
                "environment; raise its capacity or shorten the rollouts"
            )
        base = (np.arange(rings.start, rings.stop) * self.size)[:, None]
        written = self.written[rings][:, None].copy()  # what is counted on has to stay
        end = written + total[:, None]
        return _Layout(base, written, written + offset, end, end + is_open[:, None], ended, breaks, lead, is_open)

    def _add_starts(self, lay: _Layout, valid: np.ndarray, run: np.ndarray, carried: np.ndarray) -> None:
        """Tells the sampler of the steps whose windows are known now."""
        floor = lay.head - (self.size - self.older)
        # the step that completes a window makes the window's first step a start
        first = lay.absolute - (self.length - 1)
        whole = valid & (run >= self.length) & ((run - self.length) % self.stride == 0)
        found = [self._slots(lay.base, first)[whole & (first >= floor)]]
        if self.pad:
            found += self._last(lay.base, lay.absolute, run, lay.ended, floor)
            found += self._last(lay.base, lay.written - 1, carried[:, None], lay.lead[:, None], floor)
        slots = np.concatenate(found)
        if len(slots):
            self.flags[slots] |= START
            self.sampler.add(self.sampled(slots[self.flags[slots] & self._drawn == self._drawn]))

    def _last(
        self, base: np.ndarray, absolute: np.ndarray, run: np.ndarray, ended: np.ndarray, floor: np.ndarray
    ) -> list[np.ndarray]:
        # the last steps of an ended run, whose windows never become whole
        if not ended.any():
            return []
        found = []
        for back in range(self.length - 1):
            first = absolute - back
            begins = ended & (run > back) & ((run - 1 - back) % self.stride == 0)
            found.append(self._slots(base, first)[begins & (first >= floor)])
        return found

    def _overwrite(self, step_slots: np.ndarray, other_slots: np.ndarray, flags: np.ndarray) -> None:
        every = np.concatenate([step_slots, other_slots])
        old = self.flags[every]
        self.held += len(step_slots) - int((old & STEP != 0).sum())
        gone = self.sampled(every[old & self._drawn == self._drawn])
        self.flags[step_slots] = flags
        self.flags[other_slots] = 0
        if len(gone):
            self.sampler.remove(gone)

    def _slots(self, base: np.ndarray, absolute: np.ndarray) -> np.ndarray:
        return base + absolute % self.size

    def items(self, slots: np.ndarray) -> np.ndarray:
        """Names of what lies in ``slots`` ``[B]``, int64: never given again, unlike the slots."""
        ring = slots // self.size
        items: np.ndarray = self._absolute(ring, slots, self.size) * self.number + ring
        return items

    @property
    def sampled_slots(self) -> int:
        """All slots as the sampler counts them."""
        return self.number * self._lane

    def sampled(self, slots: np.ndarray) -> np.ndarray:
        """What the sampler calls ``slots`` ``[B]``, which hold something."""
        if self._lane == self.size:
            return slots
        ring = slots // self.size
        named: np.ndarray = ring * self._lane + self._absolute(ring, slots, self.size) % self._lane
        return named

    def drawn(self, named: np.ndarray) -> np.ndarray:
        """The slots that the sampler calls ``named`` ``[B]``."""
        if self._lane == self.size:
            return named
        ring = named // self._lane
        slots: np.ndarray = ring * self.size + self._absolute(ring, named, self._lane) % self.size
        return slots

    def _absolute(self, ring: np.ndarray, slots: np.ndarray, size: int) -> np.ndarray:
        """The number in their ring of what lies in ``slots`` ``[B]``, where each ring has ``size`` of them."""
        newest = (self.written + self.open - 1).take(ring)
        absolute: np.ndarray = newest - (newest - slots) % size  # a ring begins at a multiple of its size
        return absolute

    def slots_of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of ``items`` ``[B]``, and whether they are still there, bool ``[B]``.

        Raises:
            ValueError: naming the first that was never given.
        """
        ring, absolute = items % self.number, items // self.number
        head = (self.written + self.open)[ring]
        unknown = (absolute < 0) | (absolute >= head)
        if unknown.any():
            place = int(unknown.argmax())
            raise ValueError(f"index[{place}] is {items[place]}, which this replay has not given to any item")
        slots = ring * self.size + absolute % self.size
        return slots, (absolute >= head - self.size) & (self.flags[slots] & START != 0)

    def following(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of samples that began with ``items`` ``[B]``, where the next ones begin: the ``length``-th slots behind them.

        Returns:
            The slots, and whether a sample may begin there that goes on from the whole one before, which must still
            be there itself; bool ``[B]``.
        """
        ring, absolute = items % self.number, items // self.number
        head, base = (self.written + self.open)[ring], ring * self.size
        piece = base[:, None] + (absolute[:, None] + np.arange(self.length)) % self.size
        slots = base + (absolute + self.length) % self.size
        goes_on = (absolute >= head - self.size) & (absolute + self.length < head)
        # behind the last step of a run stands a slot that is none
        goes_on &= (self.flags.take(piece) & STEP != 0).all(1) & (self.flags.take(slots) & START != 0)
        return slots, goes_on

    def successors(self, slots: np.ndarray) -> np.ndarray:
        """The next slots, ``[B]``."""
        successors = slots + 1
        successors -= (successors % self.size == 0) * self.size
        return successors

    def stacks(self, slots: Tensor) -> Tensor:
        """The slots with the frames of the states in ``slots`` ``[B]``, oldest first, ``[B, older + 1]``."""
        place = (slots % self.size)[:, None]
        back = torch.arange(self.older, -1, -1, device=slots.device)
        return slots[:, None] - place + (place - back) % self.size

    def ends(self, slots: np.ndarray) -> np.ndarray:
        """Whether the steps in ``slots`` ``[*B]`` are terminated, truncated, done, init; bool ``[4, *B]``."""
        ends: np.ndarray = self.flags.take(slots) & _ENDS.reshape(4, *[1] * slots.ndim) != 0
        return ends

    def windows(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """States ``[B, before + length + 1]``, steps ``[B, before + length]`` and which of them are valid, as many.

        In the padding behind a run, the steps repeat the window's last one and the states the one after it. Where a run
        has fewer than ``before`` steps in front of the window, its first one there stands for those that are missing.
        All are valid, and that is None, without ``pad`` and ``before``.
        """
        base = slots - slots % self.size
        states = slots[:, None] + np.arange(-self.before, self.length + 1)
        if self.before:
            states += (states < base[:, None]) * self.size
        states -= (states >= base[:, None] + self.size) * self.size
        if not self.pad and not self.before:
            return states, states[:, :-1], None
        there = self.flags.take(states[:, :-1]) & STEP != 0
        # from the window's first step outwards, in both directions
        valid = np.logical_and.accumulate(there[:, self.before :], 1)
        first, known = np.int64(0), self.before + valid.sum(1, keepdims=True)
        if self.before:
            front = np.logical_and.accumulate(there[:, : self.before][:, ::-1], 1)[:, ::-1]
            valid, first = np.concatenate([front, valid], 1), self.before - front.sum(1, keepdims=True)
        time = np.arange(self.before + self.length + 1)
        steps = np.take_along_axis(states, np.clip(time[:-1], first, known - 1), 1)
        return np.take_along_axis(states, np.clip(time, first, known), 1), steps, valid

    @property
    def filled(self) -> np.ndarray:
        """Slots of each ring that hold something; they are its first ones, int64 ``[number]``."""
        return np.minimum(self.written + self.open, self.size)
