"""Observations that are stacks of frames, of which a replay stores the newest frame alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from offtrace.modules.keys import NEXT, OBSERVATION
from offtrace.modules.replay.entries import Key

STACK: Key = (OBSERVATION,)


def newest_only(entries: Mapping[Key, Tensor], frames: int) -> dict[Key, Tensor]:
    """The entries with the newest frame, ``[N, T, C, ...]``, in place of each stack ``[N, T, frames * C, ...]``.

    Raises:
        ValueError: the observation is not one tensor, or its first dimension no multiple of ``frames``.
    """
    found = dict(entries)
    for key in (STACK, (NEXT, *STACK)):
        if key not in entries:
            if any(name[: len(key)] == key for name in entries):
                raise ValueError(f"frame_stack is {frames}; the observation must be one tensor then, got several")
            continue  # said where every entry is looked for
        shape = list(entries[key].shape[2:])
        if not shape or shape[0] % frames:
            raise ValueError(
                f"frame_stack is {frames}; the first dimension of an observation must be a multiple of it, got {shape}"
            )
        found[key] = entries[key][:, :, -(shape[0] // frames) :]
    return found


def check_shifted(entries: Mapping[Key, Tensor], frames: int, valid: np.ndarray, joined: np.ndarray) -> None:
    """Refuses stacks that the frames which are stored would not give back.

    Within a run every state must be the one before, moved by one frame. The first state of a run may hold anything.

    Args:
        entries: of the rollout ``[N, T]``, with whole stacks.
        frames: in a stack.
        valid: bool ``[N, T]``, the steps that are stored.
        joined: bool ``[N, T - 1]``, whether a step and the next belong to one run.

    Raises:
        ValueError: naming the first environment and step where the frames do not move by one.
    """
    stacks, next_stacks = entries.get(STACK), entries.get((NEXT, *STACK))
    if stacks is None or next_stacks is None or stacks.shape != next_stacks.shape:
        return  # said where every entry is looked for and compared with what is stored
    older, newer = slice(None, -(stacks.shape[2] // frames)), slice(stacks.shape[2] // frames, None)
    # numpy compares bytes several times faster than torch
    states, successors = _array(stacks), _array(next_stacks)
    wrong = np.zeros(valid.shape, bool)
    wrong[:, :-1] = joined & _differ(states[:, 1:, older], states[:, :-1, newer])
    last = valid.copy()  # of a run, or of the rollout: of these alone the successor is stored
    last[:, :-1] &= ~joined
    wrong[last] = _differ(successors[last][None, :, older], states[last][None, :, newer])[0]
    if wrong.any():
        env, step = (int(x) for x in np.argwhere(wrong)[0])
        raise ValueError(
            f"frame_stack is {frames}, but from step {step} of environment {env} to the next the observation does not "
            "move by one frame: give the number of frames that it stacks, the newest last, or no frame_stack"
        )


def _array(stacks: Tensor) -> np.ndarray:
    stacks = stacks.cpu()  # numpy has no bfloat16; its bits will do
    array: np.ndarray = (stacks.view(torch.int16) if stacks.dtype == torch.bfloat16 else stacks).numpy()
    return array


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two arrays ``[N, T, ...]`` differ, ``[N, T]``."""
    different: np.ndarray = (one != other).any(tuple(range(2, one.ndim)))
    return different
