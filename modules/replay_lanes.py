"""Where the steps of a replay lie, and which of them a sample may begin with. Numbers only; the data is elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# One byte says all about a slot. A slot without STEP holds the state after the last step of an episode.
STEP, TERMINATED, TRUNCATED, INIT, START = 1, 2, 4, 8, 16

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


def joined(*, valid: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, init: np.ndarray) -> np.ndarray:
    """Which steps of a rollout ``[N, T]`` are of one run with the step after them, ``[N, T - 1]``."""
    parted = (terminated | truncated)[:, :-1] | init[:, 1:]
    both: np.ndarray = valid[:, :-1] & valid[:, 1:] & ~parted
    return both


class Lanes:
    """Rings of slots, one for each environment, with the steps of its episodes in time order.

    The successor of a step is the state in the next slot. So the last step of an episode is followed by a slot with
    the final state alone, and the newest step of a lane by a provisional one, which the next step replaces. A run is a
    stretch of valid steps of one episode.

    A slot is a start when a sample may begin there: the whole window of ``length`` steps is known; with ``pad`` also
    the last steps of an ended run, whose windows are shorter. The starts are kept as a list in which one that is
    overwritten is replaced by the last, so drawing uniformly is one lookup.

    Where a state is a stack of frames and a slot holds the newest one, the others lie in the ``older`` slots before it:
    those of the steps before, and ahead of a run's first step as many slots that hold nothing else. So whatever an
    environment pads its first stack with comes back. The oldest slots of a full lane are no steps any more, but still
    give frames to those behind them.

    Args:
        number: lanes.
        size: slots of each.
        length: steps of a sample.
        pad: shorter windows at the end of a run.
        older: frames of a state besides the newest.

    Attributes:
        flags: uint8 ``[number * size]``.
        starts: int32, the first ``count`` are the starts.
        held: steps that are stored.
        longest: steps of the longest run so far.
    """

    def __init__(self, number: int, size: int, length: int, pad: bool, older: int = 0) -> None:
        self.number, self.size, self.length, self.pad, self.older = number, size, length, pad, older
        self.flags = np.zeros(number * size, np.uint8)
        self.starts = np.zeros(number * size, np.int32)
        self._place = np.zeros(number * size, np.int32)
        self.written = np.zeros(number, np.int64)  # slots of each lane so far, the provisional one not counted
        self.open = np.zeros(number, bool)  # there is a provisional one
        self.run = np.zeros(number, np.int64)  # steps of the newest run so far
        self.count = 0
        self.held = 0
        self.longest = 0

    def provisional(self, lanes: slice) -> np.ndarray:
        """Slots of the provisional states of ``lanes``, meaningful where ``open``."""
        return np.arange(lanes.start, lanes.stop) * self.size + self.written[lanes] % self.size

    def insert(
        self,
        lanes: slice,
        *,
        valid: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        init: np.ndarray,
        continues: np.ndarray,
    ) -> Plan:
        """Takes in a rollout ``[N, T]`` of bool flags.

        Args:
            lanes: the N lanes.
            valid: steps that are data; others end their run and are not stored.
            terminated, truncated, init: of the steps.
            continues: ``[N]``, whether the rollout goes on from the lane's provisional state.

        Raises:
            ValueError: the rollout is longer than a lane. Nothing has changed then.
        """
        size, steps = self.size, valid.shape[1]
        stops = ~joined(valid=valid, terminated=terminated, truncated=truncated, init=init)
        ended = valid.copy()
        ended[:, :-1] &= stops
        ended[:, -1] &= terminated[:, -1] | truncated[:, -1]
        was_open, carried = self.open[lanes], self.run[lanes]
        lead = was_open & ~continues  # the provisional state stays, as the last of its run
        breaks = np.zeros_like(valid)  # where no run goes on
        breaks[:, 0] = ~continues
        breaks[:, 1:] = stops
        emitted = valid.astype(np.int64) + ended
        if self.older:
            ahead = self.older * (valid & breaks)
            emitted += ahead
        offset = np.cumsum(emitted, 1) - emitted + lead[:, None]
        if self.older:
            offset += ahead
        total = emitted.sum(1) + lead
        is_open = valid[:, -1] & ~ended[:, -1]
        usable = size - self.older
        if int((total + is_open).max()) > usable:
            raise ValueError(
                f"a rollout of {steps} steps does not fit the {usable} slots that the replay has for an environment; "
                "raise its capacity or shorten the rollouts"
            )
        written = self.written[lanes]
        base = (np.arange(lanes.start, lanes.stop) * size)[:, None]
        absolute = written[:, None] + offset
        step_slots = self._slots(base, absolute)[valid]
        final_slots = self._slots(base, absolute + 1)[ended]
        tail_slots = self._slots(base, (written + total)[:, None])[is_open][:, 0]
        lead_slots = self._slots(base, written[:, None])[lead][:, 0]
        final_rows = np.concatenate(
            [ended.ravel().nonzero()[0], is_open.nonzero()[0] * steps + steps - 1]  # the tail is the state after it
        )
        final_slots = np.concatenate([final_slots, tail_slots])
        head = (written + total + is_open)[:, None]
        no_steps = [final_slots, lead_slots]
        first_rows = older_slots = _NONE
        if self.older:
            first_rows = ahead.ravel().nonzero()[0]
            before = absolute[..., None] + np.arange(-self.older, 0)
            older_slots = self._slots(base[..., None], before).reshape(-1, self.older)[first_rows]
            # the slots behind the head are the oldest ones: frames of their states are lost
            no_steps += [older_slots.ravel(), self._slots(base, head + np.arange(self.older)).ravel()]

        flags = (STEP + TERMINATED * terminated + TRUNCATED * truncated + INIT * init).astype(np.uint8)[valid]
        self._overwrite(step_slots, np.concatenate(no_steps), flags)

        # run[n, t]: steps of the run that ends at t, t included
        time = np.arange(steps)
        last_break = np.maximum.accumulate(np.where(breaks, time, -carried[:, None]), 1)
        run = time - last_break + 1
        floor = head - usable
        # the step that completes a window makes the window's first step a start
        first = absolute - (self.length - 1)
        self._add(self._slots(base, first)[valid & (run >= self.length) & (first >= floor)])
        if self.pad:
            self._add_last(base, absolute, run, ended, floor)
            self._add_last(base, (written - 1)[:, None], carried[:, None], lead[:, None], floor)

        self.written[lanes] = written + total
        self.open[lanes] = is_open
        self.run[lanes] = np.where(is_open, run[:, -1], 0)
        self.longest = max(self.longest, int((run * valid).max(initial=0)))
        return Plan(valid.ravel().nonzero()[0], step_slots, final_rows, final_slots, first_rows, older_slots)

    def _overwrite(self, step_slots: np.ndarray, other_slots: np.ndarray, flags: np.ndarray) -> None:
        every = np.concatenate([step_slots, other_slots])
        old = self.flags[every]
        self.held += len(step_slots) - int((old & STEP != 0).sum())
        self._dismiss(every[old & START != 0])
        self.flags[step_slots] = flags
        self.flags[other_slots] = 0

    def _slots(self, base: np.ndarray, absolute: np.ndarray) -> np.ndarray:
        return base + absolute % self.size

    def _add_last(
        self, base: np.ndarray, absolute: np.ndarray, run: np.ndarray, ended: np.ndarray, floor: np.ndarray
    ) -> None:
        # the last steps of an ended run, whose windows never become whole
        if not ended.any():
            return
        for back in range(self.length - 1):
            first = absolute - back
            self._add(self._slots(base, first)[ended & (run > back) & (first >= floor)])

    def _add(self, slots: np.ndarray) -> None:
        number = len(slots)
        if not number:
            return
        places = np.arange(self.count, self.count + number)
        self.starts[places] = slots
        self._place[slots] = places
        self.flags[slots] |= START
        self.count += number

    def _dismiss(self, slots: np.ndarray) -> None:
        if not len(slots):
            return
        self.flags[slots] &= 255 - START
        left = self.count - len(slots)
        last = self.starts[left : self.count]
        stay = last[self.flags[last] & START != 0]
        places = self._place[slots]
        holes = places[places < left]
        self.starts[holes] = stay
        self._place[stay] = holes
        self.count = left

    def successors(self, slots: np.ndarray) -> np.ndarray:
        """The next slots, ``[B]``."""
        following = slots + 1
        following[following % self.size == 0] -= self.size
        return following

    def stacks(self, slots: Tensor) -> Tensor:
        """The slots with the frames of the states in ``slots`` ``[B]``, oldest first, ``[B, older + 1]``."""
        place = (slots % self.size)[:, None]
        back = torch.arange(self.older, -1, -1, device=slots.device)
        return slots[:, None] - place + (place - back) % self.size

    def windows(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """States ``[B, length + 1]``, steps ``[B, length]`` and, with ``pad``, which of them are valid ``[B, length]``.

        In the padding, the steps repeat the window's last one and the states the one after it.
        """
        place = (slots % self.size)[:, None] + np.arange(self.length + 1)
        place[place >= self.size] -= self.size
        states = (slots - slots % self.size)[:, None] + place
        if not self.pad:
            return states, states[:, :-1], None
        valid = np.logical_and.accumulate(self.flags[states[:, :-1]] & STEP != 0, 1)
        known = valid.sum(1, keepdims=True)
        time = np.arange(self.length + 1)
        steps = np.take_along_axis(states, np.minimum(time[:-1], known - 1), 1)
        return np.take_along_axis(states, np.minimum(time, known), 1), steps, valid

    @property
    def filled(self) -> np.ndarray:
        """Slots of each lane that hold something; they are its first ones, int64 ``[number]``."""
        return np.minimum(self.written + self.open, self.size)

    def restore(self, starts: np.ndarray) -> None:
        """Puts a saved list of starts back."""
        self.count = len(starts)
        self.starts[: self.count] = starts
        self._place[starts] = np.arange(self.count, dtype=np.int32)
