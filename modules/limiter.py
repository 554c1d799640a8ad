"""How much is learned from each step that is collected."""

from __future__ import annotations

from fractions import Fraction
from typing import Any


class SamplesPerInsert:
    """Holds the number of sampled steps at ``ratio`` times the inserted ones, counted from ``min_size`` on.

    As the rate limiter of Reverb (Cassirer et al. 2021, arXiv 2102.04736), with one account. The first ``min_size``
    inserted steps are for filling the replay and entitle to nothing; each step after them entitles to ``ratio`` sampled
    steps. The learner asks :meth:`may_sample`, the actors ask :meth:`may_insert`; both are told no when they are ahead,
    and at any time at least one of them is told yes. So once the replay is filled, with a batch of B steps and
    insertions of n steps,

        0 <= ratio * (inserted - min_size) - sampled < B + ratio * max(n, ahead),

    which is a fixed number: the ratio over a whole run is ``ratio``, in whatever order the two sides come. Counted
    exactly, in fractions.

    Args:
        ratio: sampled steps per inserted step. A batch of B transitions counts B, one of B sequences of T steps B T.
        min_size: inserted steps before the first sample.
        ahead: inserted steps that the actors may be ahead of the learner, so that both can work at a time.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        inserted, sampled: steps so far.
    """

    def __init__(self, ratio: float, min_size: int, ahead: int = 0) -> None:
        if not 0 < ratio < float("inf"):
            raise ValueError(f"the samples-per-insert ratio is {ratio}; it must be above 0 and finite")
        for name, value in (("min_size", min_size), ("ahead", ahead)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        self.ratio = Fraction(str(ratio))
        self.min_size = min_size
        self.ahead = ahead
        self.inserted = 0
        self.sampled = 0
        self._batch = 0

    @property
    def owed(self) -> Fraction:
        """Steps that may be sampled before more are inserted; negative while the replay is filled."""
        return self.ratio * (self.inserted - self.min_size) - self.sampled

    def may_sample(self, steps: int) -> bool:
        """Whether ``steps`` may be sampled now."""
        self._batch = max(self._batch, steps)
        return self.inserted >= self.min_size and steps <= self.owed

    def may_insert(self, steps: int) -> bool:
        """Whether ``steps`` may be inserted now."""
        if self.inserted < self.min_size:
            return True
        # what the learner cannot take as a whole batch must not keep the actors waiting
        return self.owed + self.ratio * steps < max(self._batch, 1) + self.ratio * max(steps, self.ahead)

    def insert(self, steps: int) -> None:
        """Notes that ``steps`` were inserted."""
        self.inserted += steps

    def sample(self, steps: int) -> None:
        """Notes that ``steps`` were sampled."""
        self.sampled += steps

    def check(self, *, capacity: int, batch: int) -> None:
        """Refuses numbers with which no sample would ever come.

        Args:
            capacity: steps that the replay holds.
            batch: steps of one sample.

        Raises:
            ValueError: ``min_size`` does not fit the replay, or a step would be sampled from after it was overwritten.
        """
        if self.min_size > capacity:
            raise ValueError(
                f"min_size is {self.min_size}, but the replay holds {capacity} steps; it must be {capacity} or less"
            )
        steps = batch / self.ratio
        if steps > capacity:
            raise ValueError(
                f"a samples-per-insert ratio of {float(self.ratio):g} allows one batch of {batch} steps per "
                f"{float(steps):g} inserted ones, more than the replay's {capacity}; raise it to "
                f"{batch / capacity:g} at least"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"inserted": self.inserted, "sampled": self.sampled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.inserted, self.sampled = int(state_dict["inserted"]), int(state_dict["sampled"])
