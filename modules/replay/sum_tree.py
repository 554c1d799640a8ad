"""Numbers of which every change and every search by cumulative sum takes a few vectorised steps."""

from __future__ import annotations

import numpy as np

_FAN = 16  # children of a node; 2 takes four times as many levels, 64 reads four times as much of each


class SumTree:
    """Non-negative float64 numbers, the sums of each 16 neighbours, the sums of each 16 of these, and so on.

    A sum is always added up anew from its children, in one order. So it is a function of the numbers alone: it does not
    drift, whatever the changes were, and a tree that is built from saved numbers is the same tree.

    Args:
        size: how many numbers; 0 at first.

    Attributes:
        leaves: float64 ``[size]``, to be read only.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[np.ndarray] = []
        nodes = size
        while not self._levels or nodes > 1:
            nodes = -(-nodes // _FAN)
            self._levels.append(np.zeros((nodes, _FAN)))
        self._flat = [level.reshape(-1) for level in self._levels]
        self.leaves = self._flat[0][:size]
        self._total = 0.0
        self._whole = True  # False while the sums are behind the numbers

    @property
    def total(self) -> float:
        """Sum of all."""
        self._mend()
        return self._total

    def set(self, index: np.ndarray, value: np.ndarray | float) -> None:
        """Sets the numbers at ``index`` ``[M]``; of one that is there twice the last value counts."""
        self._whole = False
        self.leaves[index] = value
        self._sum_up(index)

    def fill(self, value: np.ndarray) -> None:
        """Sets all numbers, ``[size]``."""
        self._whole = False
        self.leaves[:] = value
        self._sum_up(np.arange(len(self.leaves)))

    def find(self, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index and value of the numbers at which the cumulative sum passes ``mass`` ``[B]``, ``0 <= mass <= total``.

        Never of a zero, whatever rounding does: at each node the mass is kept below the node's own sum, so it is a
        child above zero that passes it. The total must be above 0.
        """
        self._mend()
        mass = np.minimum(mass, np.nextafter(self._total, 0.0))
        rows, node = np.arange(len(mass)), np.zeros(len(mass), np.int64)
        sums = np.zeros((len(mass), _FAN + 1))
        value = np.zeros(0)
        for level in reversed(self._levels):
            children = level.take(node, 0)
            np.cumsum(children, 1, out=sums[:, 1:])
            child = (sums[:, 1:] > mass[:, None]).argmax(1)  # the first
            value = children[rows, child]
            mass = np.minimum(mass - sums[rows, child], np.nextafter(value, 0.0))
            node = node * _FAN + child
        return node, value

    def _sum_up(self, index: np.ndarray) -> None:
        """Adds up what is above the numbers at ``index``."""
        for below, above in zip(self._levels, self._flat[1:], strict=False):
            index = index // _FAN
            if len(index) > 1:  # neighbours share their node
                index = index[np.concatenate([[True], index[1:] != index[:-1]])]
            above[index] = np.cumsum(below.take(index, 0), 1)[:, -1]
        self._total = float(np.cumsum(self._levels[-1])[-1])
        self._whole = True

    def _mend(self) -> None:
        # A signal's exception may break in between a number and its sums.
        if not self._whole:
            self._sum_up(np.arange(len(self.leaves)))
