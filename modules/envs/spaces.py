"""Gymnasium's spaces as the agents see them: observations as tensors, actions as one number or one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

MOST_COMBINATIONS = 4096
"""Of several discrete actions taken at once: each combination is an action, with an output of the network."""

Row = list[np.ndarray]
"""One observation: an array for each of its entries, of which there is one unless a dictionary is kept as it is."""


class Observations:
    """Observations of a space, first as arrays of one environment, then as tensors of all.

    A ``Box`` stays as it is, a single number as ``[1]``: integers of 8 bits kept, everything else float32. An image of
    8 bits ``[height, width, channels]``, of 1, 3 or 4 channels and more pixels than that either way, becomes
    ``[channels, height, width]``, as the networks read it. ``Discrete`` becomes one-hot, ``MultiDiscrete`` a row of
    them. ``Dict`` and ``Tuple`` become one float32 vector, in the order of ``gymnasium.spaces.flatten``; without
    ``flatten`` an entry for each of their members, those of a ``Tuple`` named by their number, those of a member's own
    members ``"arm.angle"``.

    Args:
        name: of the environment, for messages.
        space: of one observation.
        flatten: ``Dict`` and ``Tuple`` as one vector.

    Attributes:
        spec: of one observation.

    Raises:
        ValueError: a space that is no numbers, or an image that would become part of a vector.
    """

    def __init__(self, name: str, space: spaces.Space[Any], *, flatten: bool = True) -> None:
        members = list(_members(space))
        for path, member in members:
            if not isinstance(member, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
                inside = f" among its observations, {path!r}" if path else " as observations"
                raise ValueError(
                    f"{name} has {_short(member)}{inside}; the agents read Box, Discrete, MultiDiscrete, MultiBinary, "
                    "and Dict and Tuple of them: wrap the environment"
                )
        self._space = space
        self._names: list[str] | None = None
        self._whole = flatten or not isinstance(space, spaces.Dict | spaces.Tuple)
        self.spec: TensorSpec
        if not members:
            raise ValueError(f"{name} has observations of {_short(space)}, which are empty")
        if self._whole:
            if isinstance(space, spaces.Dict | spaces.Tuple):
                _refuse_images(name, members)
            self.spec, read = _entry(space)
            self._reads = [read]
            return
        entries = {path: _entry(member) for path, member in members}
        if len(entries) < len(members):
            raise ValueError(f"{name} has two observations of one name: {', '.join(path for path, _ in members)}")
        self.spec = Composite({path: spec for path, (spec, _) in entries.items()})
        self._names, self._reads = list(entries), [read for _, read in entries.values()]

    def row(self, observation: Any) -> Row:
        """One observation as arrays of its own, of the dtypes that are given away."""
        values = [observation] if self._whole else _values(self._space, observation)
        return [read(value) for read, value in zip(self._reads, values, strict=True)]

    def stack(self, rows: list[Row]) -> Tensor | TensorDictBase:
        """The observations of all environments, ``[N, ...]``."""
        parts = [torch.from_numpy(np.stack(entry)) for entry in zip(*rows, strict=True)]
        if self._names is None:
            return parts[0]
        return TensorDict(dict(zip(self._names, parts, strict=True)), [len(rows)])


def row_of(observation: Tensor | TensorDictBase, index: int) -> Row:
    """The observation of one environment, out of those of all."""
    parts = [observation] if isinstance(observation, Tensor) else observation.values()
    return [part[index].numpy() for part in parts]


def is_finite(row: Row) -> bool:
    """Whether all numbers of an observation are."""
    return all(bool(np.isfinite(part).all()) for part in row)


class Actions:
    """Actions of a space: ``Discrete`` as int64 indices from 0, one-dimensional ``Box`` as float32.

    What the environment gets of a ``Box`` is of its dtype, rounded where that is of integers, and within its bounds.

    ``MultiDiscrete`` and ``MultiBinary`` become one index over all combinations, in the order of
    ``itertools.product``: the last number changes fastest.

    Args:
        name: of the environment, for messages.
        space: of one action.

    Attributes:
        spec: of one action.
        low, high: bounds of a ``Box``, float32 ``[A]``, infinite where there is none; else None.

    Raises:
        ValueError: another space, or more combinations than 4,096.
    """

    def __init__(self, name: str, space: spaces.Space[Any]) -> None:
        self.name = name
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None
        self._box: spaces.Box | None = None
        self._start = 0
        self._combinations: np.ndarray | None = None
        self._sizes: tuple[int, ...] = ()
        self._binary = isinstance(space, spaces.MultiBinary)
        self.spec: TensorSpec
        if isinstance(space, spaces.Discrete):
            self._start = int(space.start)
            self.spec = Categorical(int(space.n), dtype=torch.int64)
        elif isinstance(space, spaces.Box) and len(space.shape) == 1:
            self._box = space
            # without a bound, integers have their dtype's own
            self.low = np.where(space.bounded_below, space.low, -np.inf).astype(np.float32)
            self.high = np.where(space.bounded_above, space.high, np.inf).astype(np.float32)
            self.spec = Unbounded(space.shape, dtype=torch.float32)
        elif isinstance(space, spaces.MultiDiscrete):
            self._sizes = tuple(int(size) for size in space.nvec.flatten())
            self.spec = self._combine(space, space.start)
        elif isinstance(space, spaces.MultiBinary):
            self._sizes = (2,) * math.prod(space.shape)
            self.spec = self._combine(space, 0)
        else:
            raise ValueError(
                f"{name} has actions of {_short(space)}; the agents act in Discrete, MultiDiscrete, MultiBinary and "
                "one-dimensional Box spaces only"
            )

    def _combine(self, space: spaces.MultiDiscrete | spaces.MultiBinary, start: Any) -> Categorical:
        number = math.prod(self._sizes)
        if number > MOST_COMBINATIONS:
            raise ValueError(
                f"{self.name} has {number:,} combinations of actions, of {_short(space)}; each becomes one action, and "
                f"the agents choose among {MOST_COMBINATIONS:,} at most"
            )
        digits = np.stack(np.unravel_index(np.arange(number), self._sizes), axis=-1)
        self._combinations = (digits.reshape(number, *space.shape) + start).astype(space.dtype)
        return Categorical(number, dtype=torch.int64)

    @property
    def discrete(self) -> bool:
        """Whether an action is an index."""
        return self.low is None

    @property
    def all_legal(self) -> np.ndarray:
        """The mask of discrete actions that forbids none."""
        return np.ones(int(self.spec.space.n), bool)

    def decode(self, index: np.ndarray) -> np.ndarray:
        """What ``Env.step`` gets for the indices ``[N]``."""
        return index + self._start if self._combinations is None else self._combinations[index]

    def fit(self, numbers: np.ndarray) -> np.ndarray:
        """What ``Env.step`` gets for the float32 numbers ``[N, A]``, all finite, of a ``Box``."""
        box = self._box
        assert box is not None
        if not np.issubdtype(box.dtype, np.floating):
            # what the dtype does not hold would wrap around; its own largest number may be none of float64
            whole = np.rint(numbers.astype(np.float64))
            above, below = whole >= box.high.astype(np.float64), whole <= box.low.astype(np.float64)
            inside = np.where(above | below, 0.0, whole).astype(box.dtype)
            return np.where(above, box.high, np.where(below, box.low, inside))
        # float32 may round a bound, or a number, out of the space
        return np.clip(numbers.astype(box.dtype), box.low, box.high)

    def mask(self, value: Any) -> np.ndarray:
        """``info["action_mask"]`` as bool ``[A]``, True where the action is legal.

        Of several actions taken at once it may be an array over their combinations, or what ``sample(mask=)`` of the
        space takes: for ``MultiDiscrete`` an array for each of them, and a combination is legal where all of its
        actions are; for ``MultiBinary`` 0 where a number must be 0, 1 where it must be 1, 2 where it is free.

        Raises:
            ValueError: it has another size.
        """
        number = int(self.spec.space.n)
        found = None
        if self._sizes and not self._binary:
            parts = list(_flat_tuple(value))
            if [np.shape(part) for part in parts] == [(size,) for size in self._sizes]:
                found = self._product([np.asarray(part).astype(bool) for part in parts])
        elif self._binary and np.size(value) == len(self._sizes):
            found = self._product([np.array([digit != 1, digit != 0]) for digit in np.ravel(value)])
        if found is None and not isinstance(value, tuple) and np.shape(value) == (number,):
            found = np.asarray(value).astype(bool)
        if found is None:
            other = f", or an array for each of the sizes {self._sizes}" if self._sizes else ""
            other = f", or one of {len(self._sizes)} numbers 0, 1 or 2" if self._binary else other
            raise ValueError(f"{self.name} gave the action_mask {value!r}; it must be an array of {number}{other}")
        return found

    def _product(self, parts: list[np.ndarray]) -> np.ndarray:
        legal = np.ones(1, bool)
        for part in parts:
            legal = (legal[:, None] & part).flatten()
        return legal


def _short(space: spaces.Space[Any]) -> str:
    text = str(space)
    return text if len(text) <= 80 else f"{type(space).__name__}(...)"


def _members(space: spaces.Space[Any], path: str = "") -> Iterator[tuple[str, spaces.Space[Any]]]:
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield path, space
        return
    named: Any = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
    for key, member in named:
        yield from _members(member, f"{path}.{key}" if path else str(key))


def _values(space: spaces.Space[Any], value: Any) -> Iterator[Any]:
    """The values of the members, in the order of :func:`_members`."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield value
        return
    named: Any = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
    for key, member in named:
        yield from _values(member, value[key])


def _entry(space: spaces.Space[Any]) -> tuple[TensorSpec, Callable[[Any], np.ndarray]]:
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        shape: tuple[int, ...] = space.shape or (1,)  # a network reads rows
        if isinstance(space, spaces.Box) and space.dtype == np.uint8:
            if _is_channels_last(shape):
                height, width, channels = shape
                spec = Bounded(0, 255, shape=(channels, height, width), dtype=torch.uint8)
                return spec, lambda value: np.array(np.moveaxis(np.asarray(value), -1, 0), np.uint8, order="C")
            spec = Bounded(0, 255, shape=shape, dtype=torch.uint8)
            return spec, lambda value: np.array(value, np.uint8, ndmin=1)
        return Unbounded(shape, dtype=torch.float32), lambda value: np.array(value, np.float32, ndmin=1)
    size = spaces.flatdim(space)
    return Unbounded((size,), dtype=torch.float32), lambda value: spaces.flatten(space, value).astype(np.float32)


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) > shape[2]


def _refuse_images(name: str, members: list[tuple[str, spaces.Space[Any]]]) -> None:
    for path, member in members:
        if isinstance(member, spaces.Box) and member.dtype == np.uint8 and len(member.shape) > 1:
            raise ValueError(
                f"{name} has an image of shape {list(member.shape)} among its observations, {path!r}, which would be "
                "made part of one vector: pass flatten=False, and a network of your own for the entries"
            )


def _flat_tuple(value: Any) -> Iterator[Any]:
    """The arrays of nested tuples, as ``MultiDiscrete.sample(mask=)`` takes them."""
    if not isinstance(value, tuple):
        yield value
        return
    for part in value:
        yield from _flat_tuple(part)
