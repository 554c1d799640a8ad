"""How a replay draws: uniformly, by priority, or by priority where one is known."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from offtrace.modules.replay.neighbour_tree import NeighbourTree
from offtrace.modules.replay.sum_tree import SumTree


class Sampler(Protocol):
    """Draws the slots with which samples begin. A replay tells it which slots may be drawn, and owns it.

    Attributes:
        bytes_per_slot: memory.
        block: 1, where it does not matter which slots are neighbours; then slots are those of the replay. Else the
            replay counts them for it anew, so that each block of so many slots, from a multiple of it on, holds steps
            of one environment that came one after the other: none of another one, and none of the ring's turn before.
        prioritized: whether it draws by priorities, which a loss must then give back for every sample.
    """

    bytes_per_slot: int
    block: int
    prioritized: bool

    def bind(self, slots: int) -> None:
        """Called once, by the replay that counts ``slots`` slots, before all else."""

    def __len__(self) -> int:
        """Slots that may be drawn."""

    def __str__(self) -> str:
        """Name and settings. A replay that was saved with others is refused."""

    def add(self, slots: np.ndarray) -> None:
        """From now on ``slots`` ``[M]`` may be drawn; they could not be before."""

    def remove(self, slots: np.ndarray) -> None:
        """``slots`` ``[M]``, which could be drawn, no longer may."""

    def draw(self, number: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Slots int64 ``[number]``, with replacement, and their importance weights float32, None where all are 1."""

    def anneal(self, progress: float) -> None:
        """The part of the training that is done, in [0, 1], before every draw."""

    def update(self, slots: np.ndarray, priority: np.ndarray) -> None:
        """New priorities float64 ``[M]``, finite and not negative, of slots that may be drawn."""

    def save(self, starts: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Arrays and numbers to be saved; ``starts`` are the slots that may be drawn."""

    def restore(self, starts: np.ndarray, arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
        """Takes over what :meth:`save` gave of the same ``starts``. The next draws are those that came then."""


class Uniform:
    """Every slot alike. They are kept in a list, in which one that goes is replaced by the last: a draw is a lookup."""

    bytes_per_slot = 8
    block = 1
    prioritized = False

    def __init__(self) -> None:
        self._slots = self._place = np.zeros(0, np.int32)
        self._count = 0

    def bind(self, slots: int) -> None:
        """As :meth:`Sampler.bind`."""
        _check_free(self._slots.size)
        self._slots = np.zeros(slots, np.int32)
        self._place = np.full(slots, -1, np.int32)  # in the list; -1 of a slot that is not in it

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        return "uniform"

    def add(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.add`."""
        places = np.arange(self._count, self._count + len(slots))
        self._slots[places] = slots
        self._place[slots] = places
        self._count += len(slots)

    def remove(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.remove`."""
        left = self._count - len(slots)
        places = self._place[slots]
        self._place[slots] = -1
        last = self._slots[left : self._count]
        stay = last[self._place[last] >= 0]
        holes = places[places < left]
        self._slots[holes] = stay
        self._place[stay] = holes
        self._count = left

    def draw(self, number: int, generator: torch.Generator) -> tuple[np.ndarray, None]:
        """As :meth:`Sampler.draw`."""
        draw = torch.randint(self._count, (number,), generator=generator).numpy()
        return self._slots.take(draw).astype(np.int64), None

    def anneal(self, progress: float) -> None:
        """As :meth:`Sampler.anneal`: nothing changes."""

    def update(self, slots: np.ndarray, priority: np.ndarray) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("the replay samples uniformly and has no priorities; give it sampler=Prioritized()")

    def save(self, starts: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The list, whose order decides what a draw gives."""
        return {"slots": self._slots[: self._count]}, {}

    def restore(self, starts: np.ndarray, arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
        """As :meth:`Sampler.restore`."""
        slots = arrays["slots"]
        self._count = len(slots)
        self._slots[: self._count] = slots
        self._place[:] = -1
        self._place[slots] = np.arange(self._count, dtype=np.int32)


class Prioritized:
    """In proportion to priorities (Schaul et al. 2016, arXiv 1511.05952, section 3.3).

    Item i has priority ``p_i``, the largest of all so far when it is new, 1 at first, and ``priority + epsilon`` after
    an update. It is drawn with probability ``P(i) = p_i^alpha / sum_k p_k^alpha``, where k runs over all N items, and
    has the importance weight ``(N P(i))^-beta``. Weights are not normalised: losses divide them by the largest of
    their batch, and ReactorLoss takes them as they are.

    Args:
        alpha: at least 0; 0 draws uniformly.
        beta: in [0, 1]; 1 corrects fully, 0 not at all.
        epsilon: at least 0; lets an item without error be drawn again.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        beta: the exponent as it is now, which :meth:`anneal` raises. It is saved with the replay.
    """

    bytes_per_slot = 9  # a sixteenth of the sums, rounded up
    block = 1
    prioritized = True

    def __init__(self, alpha: float = 0.6, beta: float = 0.4, epsilon: float = 1e-6) -> None:
        _check_finite(alpha=alpha, epsilon=epsilon)
        _check_fraction(beta=beta)
        self.alpha, self.beta, self.epsilon = alpha, beta, epsilon
        self._first_beta = beta
        self._largest = 1.0
        self._tree = SumTree(0)
        self._count = 0

    def bind(self, slots: int) -> None:
        """As :meth:`Sampler.bind`."""
        _check_free(self._tree.leaves.size)
        self._tree = SumTree(slots)

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        return f"prioritized(alpha={self.alpha}, epsilon={self.epsilon})"

    def add(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.add`."""
        self._tree.set(slots, self._largest**self.alpha)
        self._count += len(slots)

    def remove(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.remove`."""
        self._tree.set(slots, 0.0)
        self._count -= len(slots)

    def draw(self, number: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Sampler.draw`.

        Raises:
            ValueError: there is nothing in proportion to which to draw.
        """
        total = self._tree.total
        if not 0 < total < float("inf"):
            raise ValueError(
                f"the priorities, to the power alpha {self.alpha}, add up to {total}; it must be above 0 and finite"
            )
        mass = torch.rand(number, dtype=torch.float64, generator=generator).numpy() * total
        slots, value = self._tree.find(mass)
        return slots, ((self._count * value / total) ** -self.beta).astype(np.float32)

    def anneal(self, progress: float) -> None:
        """``beta`` grows from what was given to 1 with the training (Schaul et al. 2016, section 3.4)."""
        self.beta = self._first_beta + (1 - self._first_beta) * min(1.0, progress)

    def update(self, slots: np.ndarray, priority: np.ndarray) -> None:
        """As :meth:`Sampler.update`; of a slot that is there twice the last priority counts.

        Raises:
            ValueError: a priority to the power alpha is not finite; then none is set.
        """
        if not len(slots):
            return
        priority = priority + self.epsilon
        with np.errstate(over="ignore"):
            powers = priority**self.alpha
        if not np.isfinite(powers).all():
            raise ValueError(f"a priority is {priority.max():g}; to the power alpha, {self.alpha}, it must be finite")
        self._largest = max(self._largest, float(priority.max()))
        self._tree.set(slots, powers)

    def save(self, starts: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """As :meth:`Sampler.save`."""
        return {"powers": self._tree.leaves[starts]}, {"beta": self.beta, "largest": self._largest}

    def restore(self, starts: np.ndarray, arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
        """As :meth:`Sampler.restore`."""
        leaves = np.zeros(len(self._tree.leaves))
        leaves[starts] = arrays["powers"]
        self._tree.fill(leaves)
        self._count = len(starts)
        self.beta, self._largest = numbers["beta"], numbers["largest"]


class LazyPrioritized:
    """In proportion to priorities that are not given to what is new, but taken from its neighbours in time.

    The sequences of an episode overlap, so that the priority of one says much of the next one's. An item has one once
    it was updated; before that it counts as the mean of the known ones in the smallest block of 16, 256, 4096, ...
    slots around it that has any, and where none is known all are alike: :class:`NeighbourTree`. With p_i the priority
    or the mean, one of N items is drawn with probability::

        P(i) = (1 - epsilon) p_i^alpha / sum_k p_k^alpha  +  epsilon / N

    and has the importance weight ``(N P(i))^-beta``; where all p_i are 0, P is uniform. Lazy initialisation and the
    mixture are those of Gruslys et al. 2018, arXiv 1704.04651, section 3.3, whose tree of cells of any length is here
    one of aligned blocks.

    Blocks of 16 and 256 hold steps of one environment that came one after the other, of one episode or several. Larger
    ones also hold steps of long ago and of other environments; their mean is taken where none of the 256 has a
    priority, as is often so at the beginning of a block. A slot that is overwritten forgets its priority.

    Args:
        alpha: at least 0; the paper's is 1.
        beta: in [0, 1]; the paper's is 1 from the beginning.
        epsilon: share of the draws in which all items are alike, in [0, 1]. Weights are at most ``epsilon^-beta``.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        beta: the exponent as it is now, which :meth:`anneal` raises. It is saved with the replay.
    """

    bytes_per_slot = 12  # a priority, a byte, and a sixteenth of five sums, rounded up
    block = 256
    prioritized = True

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, epsilon: float = 0.1) -> None:
        _check_finite(alpha=alpha)
        _check_fraction(beta=beta, epsilon=epsilon)
        self.alpha, self.beta, self.epsilon = alpha, beta, epsilon
        self._first_beta = beta
        self._tree = NeighbourTree(0, alpha)

    def bind(self, slots: int) -> None:
        """As :meth:`Sampler.bind`."""
        _check_free(self._tree.kinds.size)
        self._tree = NeighbourTree(slots, self.alpha)

    def __len__(self) -> int:
        return self._tree.count

    def __str__(self) -> str:
        return f"lazy(alpha={self.alpha}, epsilon={self.epsilon})"

    def add(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.add`."""
        self._tree.add(slots)

    def remove(self, slots: np.ndarray) -> None:
        """As :meth:`Sampler.remove`."""
        self._tree.remove(slots)

    def draw(self, number: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Sampler.draw`.

        Raises:
            ValueError: the priorities do not add up to a finite number.
        """
        total, count = self._tree.total, self._tree.count
        if not total < float("inf"):
            raise ValueError(f"the priorities, to the power alpha {self.alpha}, add up to {total}; it must be finite")
        chance, place = torch.rand(2, number, dtype=torch.float64, generator=generator).numpy()
        uniform = (chance < self.epsilon) | (total == 0)
        slots, weight = self._tree.find(place * np.where(uniform, count, total), uniform)
        # P times N; where all weigh 0 each is 1
        share = (1 - self.epsilon) * count * weight / total + self.epsilon if total else np.ones(number)
        return slots, (share**-self.beta).astype(np.float32)

    def anneal(self, progress: float) -> None:
        """``beta`` grows from what was given to 1 with the training."""
        self.beta = self._first_beta + (1 - self._first_beta) * min(1.0, progress)

    def update(self, slots: np.ndarray, priority: np.ndarray) -> None:
        """As :meth:`Sampler.update`; of a slot that is there twice the last priority counts."""
        self._tree.set(slots, priority)

    def save(self, starts: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """As :meth:`Sampler.save`."""
        return {"kinds": self._tree.kinds[starts], "priorities": self._tree.priorities[starts]}, {"beta": self.beta}

    def restore(self, starts: np.ndarray, arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
        """As :meth:`Sampler.restore`."""
        self._tree.fill(starts, arrays["kinds"], arrays["priorities"])
        self.beta = numbers["beta"]


def _check_finite(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be at least 0 and finite")


def _check_fraction(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be between 0 and 1")


def _check_free(slots: int) -> None:
    if slots:
        raise ValueError("the sampler belongs to a replay already; give each replay a sampler of its own")
