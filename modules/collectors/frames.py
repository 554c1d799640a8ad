"""Rollouts of images on their way to the learner: every frame is in them once, stacks are put together at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.collectors.buffer_pool import BufferPool
from offtrace.modules.collectors.memory import Key
from offtrace.modules.keys import DONE, NEXT, OBSERVATION, VALID

FRAMES: Key = "_frames"
FIRST: Key = "_first"
_SPARE = 128  # of so many frames one more, so that a few ends more do not need new memory
_STACK, _NEXT_STACK = OBSERVATION, (NEXT, OBSERVATION)


class Plan(NamedTuple):
    """Where the stacks of a rollout begin in a list of ``number`` frames.

    The frames of environment 0 come first, oldest first: those of its first stack, then the newest of every successor,
    and behind the end of an episode those of the next first stack.

    Attributes:
        first: of the stack at each step, int64 ``[N, T]``; that of its successor begins one behind.
        resets: bool ``[N, T]``, the steps whose stack does not go on from the step before.
        number: frames in the list.
    """

    first: Tensor
    resets: Tensor
    number: int


def plan_frames(rollout: TensorDictBase, stack: int) -> Plan:
    """The plan of a rollout ``[N, T]`` whose observations are stacks of ``stack`` frames, the newest last."""
    rows, steps = rollout.shape
    done = rollout[NEXT, DONE].squeeze(-1)
    resets = torch.cat([torch.ones(rows, 1, dtype=torch.bool), done[:, :-1]], 1)
    inside = torch.arange(steps) + stack * (resets.cumsum(1) - 1)
    lengths = inside[:, -1] + stack + 1
    ends = lengths.cumsum(0)
    return Plan(inside + (ends - lengths).unsqueeze(1), resets, int(ends[-1]))


def write_frames(rollout: TensorDictBase, stack: int, plan: Plan, out: Tensor) -> None:
    """Writes the frames of ``rollout`` into ``out`` ``[number or more, *frame]``."""
    observation, successor = (_framewise(rollout[key], stack).numpy() for key in (_STACK, _NEXT_STACK))
    # numpy writes whole frames, torch their bytes one by one
    frames = out.numpy()
    frames[(plan.first + stack).numpy()] = successor[:, :, -1]
    places = plan.first[plan.resets].unsqueeze(1) + torch.arange(stack)
    frames[places.numpy()] = observation[plan.resets.numpy()]


def check_stacks(rollout: TensorDictBase, stack: int) -> None:
    """Refuses observations that single frames would not give back.

    Raises:
        ValueError: naming the first environment and step.
    """
    plan = plan_frames(rollout, stack)
    observation, successor = (_framewise(rollout[key], stack) for key in (_STACK, _NEXT_STACK))
    wrong = (successor[:, :, :-1] != observation[:, :, 1:]).flatten(2).any(2)
    wrong[:, :-1] |= (observation[:, 1:] != successor[:, :-1]).flatten(2).any(2) & ~plan.resets[:, 1:]
    valid = rollout.get((NEXT, VALID), None)
    if valid is not None:  # where a simulator failed the successor is not known, whatever stands there
        wrong &= valid.squeeze(-1)
    if wrong.any():
        env, step = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"frame_stack is {stack}, but from step {step} of environment {env} to the next the observation does not "
            "move by one frame: give the number of frames that it stacks, the newest last, or no frame_stack"
        )


def frame_shape(rollout: TensorDictBase, stack: int) -> torch.Size:
    """Of one frame.

    Raises:
        ValueError: the observation is no stack of so many frames.
    """
    observation = rollout.get(_STACK, None)
    shape = list(observation.shape[2:]) if isinstance(observation, Tensor) else []
    if not shape or shape[0] % stack:
        raise ValueError(
            f"frame_stack is {stack}; the observation must be one tensor whose first dimension is a multiple of it, "
            f"got {shape if isinstance(observation, Tensor) else type(observation).__name__}"
        )
    return torch.Size([shape[0] // stack, *shape[1:]])


class Packer:
    """Makes of a rollout the entries of a :class:`PackedRollout`.

    Args:
        stack: frames in an observation; 1: the entries stay as they are.
    """

    def __init__(self, stack: int) -> None:
        self._stack = stack
        self._checked = stack == 1

    def pack(self, rollout: TensorDictBase, frames: Tensor | None = None) -> dict[Key, Tensor]:
        """The entries; the frames are written into ``frames`` where these are enough.

        Raises:
            ValueError: the observations are no stacks of so many frames. The first rollout alone is looked at.
        """
        entries: dict[Key, Tensor] = dict(rollout.items(True, True))
        if self._stack == 1:
            return entries
        shape = frame_shape(rollout, self._stack)
        if not self._checked:
            check_stacks(rollout, self._stack)
            self._checked = True
        plan = plan_frames(rollout, self._stack)
        if frames is None or len(frames) < plan.number:
            observation = entries[_STACK]
            frames = torch.empty(plan.number + plan.number // _SPARE, *shape, dtype=observation.dtype)
        write_frames(rollout, self._stack, plan, frames)
        del entries[_STACK], entries[_NEXT_STACK]
        return {**entries, FRAMES: frames, FIRST: plan.first}


class PackedRollout:
    """A rollout ``[N, T]``, each of its frames once.

    Args:
        entries: all but the stacks, by their keys; and where there are stacks, the list of frames and where each
            begins.
        shape: [N, T].
        stack: frames in an observation; 1 where the entries are whole.
        memory: gives that for the stacks, on the CPU.
    """

    def __init__(
        self, entries: Mapping[Key, Tensor], shape: torch.Size, stack: int, memory: BufferPool | None = None
    ) -> None:
        self._memory = BufferPool() if memory is None else memory
        self.entries = dict(entries)
        self.shape = shape
        self.stack = stack

    def get(self, key: Key) -> Tensor | None:
        """An entry that is no stack, where it lies; None where there is none of that name."""
        return self.entries.get(key)

    def unpack(self, device: torch.device | str = "cpu") -> TensorDict:
        """The rollout as a TensorDict on ``device``, bit for bit what the actor saw; transfers do not wait.

        Where a step is not valid what stands for its successor is not kept. A state and its successor share memory:
        change them out of place.
        """
        entries = {key: tensor.to(device, non_blocking=True) for key, tensor in self.entries.items()}
        if self.stack > 1:
            frames, first = entries.pop(FRAMES), entries.pop(FIRST)
            # of each step the stack and the frame behind it
            places = first.unsqueeze(-1) + torch.arange(self.stack + 1, device=first.device)
            channels = frames.shape[1]
            both = torch.index_select(frames, 0, places.flatten(), out=self._empty(places.numel(), frames))
            both = both.view(*self.shape, -1, *frames.shape[2:])
            entries[_STACK], entries[_NEXT_STACK] = both[:, :, :-channels], both[:, :, channels:]
        return TensorDict(dict(entries), self.shape)

    def _empty(self, number: int, frames: Tensor) -> Tensor:
        shape = torch.Size([number, *frames.shape[1:]])
        if frames.device.type == "cpu":
            return self._memory.empty(shape, frames.dtype)
        return torch.empty(shape, dtype=frames.dtype, device=frames.device)


def _framewise(stacks: Tensor, stack: int) -> Tensor:
    """[N, T, stack, C, ...] of [N, T, stack * C, ...]."""
    return stacks.unflatten(2, (stack, -1))
