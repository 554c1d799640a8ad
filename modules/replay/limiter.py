"""How much is learned from each step that is collected."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any


class SamplesPerInsert:
    """Holds the number of samples at ``ratio`` times the inserted ones, counted from ``min_size`` on.

    As the rate limiter of Reverb (Cassirer et al. 2021, arXiv 2102.04736), with one account. The first ``min_size``
    inserted steps are for filling the replay and entitle to nothing; each step after them entitles to ``ratio``
    samples. The learner asks :meth:`may_sample` and inserts only when it is told no. So once the replay is filled, with
    a batch of B samples and insertions of n steps,

        0 <= ratio * (inserted - min_size) - sampled < B + ratio * n,

    which is a fixed number: the ratio over a whole run is ``ratio``. Counted exactly, in fractions.

    Args:
        ratio: samples per inserted step: transitions, sequences, or steps of them, as the caller counts.
        min_size: inserted steps before the first sample.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        inserted, sampled: steps and samples so far.
    """

    def __init__(self, ratio: float, min_size: int) -> None:
        if not 0 < ratio < float("inf"):
            raise ValueError(f"the samples-per-insert ratio is {ratio}; it must be above 0 and finite")
        if min_size < 0:
            raise ValueError(f"min_size is {min_size}; it must be at least 0")
        self.ratio = Fraction(str(ratio))
        self.min_size = min_size
        self.inserted = 0
        self.sampled = 0

    @property
    def owed(self) -> Fraction:
        """Samples that may be taken before more steps are inserted; negative while the replay is filled."""
        return self.ratio * (self.inserted - self.min_size) - self.sampled

    def may_sample(self, number: int) -> bool:
        """Whether ``number`` samples may be taken now."""
        return self.inserted >= self.min_size and number <= self.owed

    def insert(self, steps: int) -> None:
        """Notes that ``steps`` were inserted."""
        self.inserted += steps

    def sample(self, number: int) -> None:
        """Notes that ``number`` samples were taken."""
        self.sampled += number

    def restart(self) -> None:
        """Back to an empty replay, which has to be filled first."""
        self.inserted = self.sampled = 0

    def check(self, *, capacity: int, batch: int) -> None:
        """Refuses numbers with which no sample would ever come.

        Args:
            capacity: steps that the replay holds.
            batch: samples of one batch.

        Raises:
            ValueError: ``min_size`` does not fit the replay, or a step would be sampled from after it was overwritten.
        """
        if self.min_size > capacity:
            raise ValueError(
                f"min_size is {self.min_size}, but the replay holds {capacity} steps; it must be {capacity} or less"
            )
        steps = batch / self.ratio
        if steps > capacity:
            least = _in_digits(batch / capacity, lambda ratio: batch / Fraction(ratio) <= capacity)
            raise ValueError(
                f"a samples-per-insert ratio of {float(self.ratio):g} allows one batch of {batch} per "
                f"{float(steps):g} inserted ones, more than the replay's {capacity}; raise it to {least} at least"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"inserted": self.inserted, "sampled": self.sampled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.inserted, self.sampled = int(state_dict["inserted"]), int(state_dict["sampled"])


def rows_of_share(fresh: int, share: float) -> int:
    """Replayed rows of a batch that has ``fresh`` other ones, where they are to be a share of it: a whole number.

    Args:
        fresh: rows that are not replayed, at least 1.
        share: above 0 and below 1; two digits will do for a third.

    Raises:
        ValueError: it is no whole number of rows.
    """

    def rows_of(share: float) -> tuple[float, int]:
        exact = fresh * share / (1 - share)
        return exact, max(1, round(exact))

    def is_whole(share: float) -> bool:
        exact, rows = rows_of(share)
        return abs(exact - rows) <= 0.02

    exact, rows = rows_of(share)
    if not is_whole(share):
        nearest = _in_digits(rows / (fresh + rows), lambda text: is_whole(float(text)))
        raise ValueError(
            f"share is {share:g}; a batch of {fresh} fresh rows would have {exact:.2f} replayed ones: the nearest "
            f"share that makes whole rows is {nearest}"
        )
    return rows


def _in_digits(number: float, fits: Callable[[str], bool]) -> str:
    """``number``, or what is next above it, in the fewest digits, 3 or more, that fit: advice that can be taken."""
    first = math.floor(math.log10(number))
    for place in range(2 - first, 17 - first):
        for text in (f"{number + up * 10.0**-place:.{max(place, 0)}f}" for up in (0, 1)):
            if fits(text):
                return text.rstrip("0").rstrip(".") if "." in text else text
    return repr(number)
