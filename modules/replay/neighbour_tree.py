"""Priorities of which some are not known yet and are taken from the neighbours'."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_FAN = 16  # children of a node, and slots of the smallest block
_FREE, _WAITING, _KNOWN = 0, 1, 2


class _Sums(NamedTuple):
    """Of the items below a node, or of several nodes, ``[*B]`` each.

    ``priority`` and ``known``: sum and number of the known priorities; ``items``: number of all. Where one priority at
    least is known, ``weight`` is that of all items, and ``mean`` that of one for which the mean priority stands in.
    Else weight is minus the number of items, which wait for the mean of a larger block, and mean is -1.
    """

    priority: np.ndarray
    known: np.ndarray
    items: np.ndarray
    weight: np.ndarray
    mean: np.ndarray


class NeighbourTree:
    """Items in slots, with a weight each that a draw is proportional to: a power of a priority, known or inferred.

    An item whose priority is not known takes the mean of the known ones in the smallest block of 16, 256, 4096, ...
    slots around it that has one; a block begins at a multiple of its size. Where none is known at all, all items weigh
    1. The nodes of the tree are these blocks: of each it holds sum and number of the known priorities, the number of
    items, and the weight of them all, added up anew from its children in one order at every change. So it is a
    function of the items alone, and a tree that is built from saved ones is the same tree.

    Args:
        size: slots; 0 at first.
        power: of the priorities.
    """

    def __init__(self, size: int, power: float) -> None:
        self._power = power
        rows = max(1, -(-size // _FAN))
        self._kinds, self._priorities = np.zeros((rows, _FAN), np.uint8), np.zeros((rows, _FAN))
        # of the nodes above: the sums, 16 neighbours in a row
        self._levels: list[_Sums] = []
        while rows > 1:
            rows = -(-rows // _FAN)
            self._levels.append(_Sums(*np.zeros((len(_Sums._fields), rows, _FAN))))
        self.kinds = self._kinds.reshape(-1)[:size]
        self.priorities = self._priorities.reshape(-1)[:size]
        self._root = _Sums(*np.zeros((len(_Sums._fields), 1)))
        self._whole = True  # False while the sums are behind the items

    @property
    def count(self) -> int:
        """Number of items."""
        self._mend()
        return int(self._root.items[0])

    @property
    def total(self) -> float:
        """Weight of all items."""
        self._mend()
        return float(np.abs(self._root.weight)[0])

    def add(self, slots: np.ndarray) -> None:
        """Items into ``slots`` ``[M]``, without priorities."""
        self._set(slots, _WAITING, 0.0)

    def remove(self, slots: np.ndarray) -> None:
        """The items in ``slots`` ``[M]`` go."""
        self._set(slots, _FREE, 0.0)

    def set(self, slots: np.ndarray, priority: np.ndarray) -> None:
        """The items in ``slots`` ``[M]`` have these priorities; of one that is there twice the last counts."""
        self._set(slots, _KNOWN, priority)

    def fill(self, slots: np.ndarray, kinds: np.ndarray, priorities: np.ndarray) -> None:
        """What the attributes ``kinds`` and ``priorities`` held at ``slots``, all items of another tree."""
        self._whole = False
        self.kinds[:], self.priorities[:] = _FREE, 0.0
        self.kinds[slots], self.priorities[slots] = kinds, priorities
        self._mend()

    def find(self, mass: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots and weights ``[B]`` of the items at which a cumulative sum over the slots passes ``mass`` ``[B]``.

        Where ``uniform``, bool ``[B]``, every item counts 1, and ``0 <= mass <= count``; else its weight, and ``mass``
        is at most the total. Never of what counts 0, whatever rounding does: at each node the mass is kept below the
        sum.
        """
        self._mend()
        rows, node = np.arange(len(mass)), np.zeros(len(mass), np.int64)
        alike, some = uniform[:, None], bool(uniform.any())
        mean = np.full(len(mass), self._root.mean if self._root.mean >= 0 else 1.0)
        sums = np.zeros((len(mass), _FAN + 1))
        for level in range(len(self._levels), -1, -1):
            weights = _weights(self._weight_below(level, node), mean)
            counted = np.where(alike, self._items_below(level, node), weights) if some else weights
            np.cumsum(counted, 1, out=sums[:, 1:])
            mass = np.minimum(mass, np.nextafter(sums[:, -1], 0.0))
            child = (sums[:, 1:] > mass[:, None]).argmax(1)  # the first
            node = node * _FAN + child
            if level:
                mass = mass - sums[rows, child]
                own = self._levels[level - 1].mean.reshape(-1)[node]
                mean = np.where(own < 0, mean, own)
        return node, weights[rows, child]

    def _set(self, slots: np.ndarray, kind: int, priority: np.ndarray | float) -> None:
        self._whole = False
        self.kinds[slots], self.priorities[slots] = kind, priority
        self._sum_up(slots)

    def _weight_below(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """As ``weight`` of :class:`_Sums`, of the children of ``nodes`` ``[M]``, ``[M, 16]``; on level 0, of slots."""
        if level:
            return self._levels[level - 1].weight.take(nodes, 0)
        kinds = self._kinds.take(nodes, 0)
        return np.where(kinds == _KNOWN, self._raised(self._priorities.take(nodes, 0)), -1.0 * (kinds == _WAITING))

    def _items_below(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """Likewise, the number of items."""
        if level:
            return self._levels[level - 1].items.take(nodes, 0)
        return 1.0 * (self._kinds.take(nodes, 0) != _FREE)

    def _joined(self, level: int, nodes: np.ndarray) -> _Sums:
        """Of ``nodes`` ``[M]``, added up from their children."""
        if level:
            parts = (self._levels[level - 1].priority.take(nodes, 0), self._levels[level - 1].known.take(nodes, 0))
        else:
            parts = (self._priorities.take(nodes, 0), 1.0 * (self._kinds.take(nodes, 0) == _KNOWN))
        priority, known, items = (np.cumsum(x, 1)[:, -1] for x in (*parts, self._items_below(level, nodes)))
        mean = self._raised(priority / np.maximum(known, 1.0))
        weight = np.cumsum(_weights(self._weight_below(level, nodes), mean), 1)[:, -1]
        return _Sums(priority, known, items, np.where(known > 0, weight, -items), np.where(known > 0, mean, -1.0))

    def _raised(self, priority: np.ndarray) -> np.ndarray:
        raised: np.ndarray = priority if self._power == 1 else priority**self._power
        return raised

    def _sum_up(self, slots: np.ndarray) -> None:
        """Adds up what is above ``slots``."""
        for level in range(len(self._levels) + 1):
            slots = slots // _FAN
            if len(slots) > 1:  # neighbours share their node
                slots = slots[np.concatenate([[True], slots[1:] != slots[:-1]])]
            joined = self._joined(level, slots)
            if level < len(self._levels):
                for above, found in zip(self._levels[level], joined, strict=True):
                    above.reshape(-1)[slots] = found
            elif len(slots):
                self._root = joined
        self._whole = True

    def _mend(self) -> None:
        # A signal's exception may break in between an item and its sums.
        if not self._whole:
            self._sum_up(np.arange(len(self.kinds)))


def _weights(weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Of children ``[M, 16]``: their own, or that which the mean ``[M]`` gives all items of one that knows nothing."""
    found: np.ndarray = np.maximum(weight, np.minimum(weight, 0.0) * -mean[:, None])
    return found
