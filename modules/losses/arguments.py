"""What the arguments of a loss may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any


def check_arguments(*, reduction: str, **unit_interval: float) -> None:
    """Refuse a reduction that is not known and numbers outside [0, 1]."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    _check(lambda value: 0 <= value <= 1, "in [0, 1]", unit_interval)


def check_positive(**numbers: float) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        ValueError: by the argument's name.
    """
    _check(lambda value: 0 < value < math.inf, "positive and finite", numbers)


def check_clip(**numbers: float) -> None:
    """Refuse what is no number above 0; inf is one, which never clips.

    Raises:
        ValueError: by the argument's name.
    """
    _check(lambda value: value > 0, "positive; inf never clips", numbers)


def check_positive_or_none(**numbers: float | None) -> None:
    """Refuse what is no finite number above 0; None is none.

    Raises:
        ValueError: by the argument's name.
    """
    given = {name: value for name, value in numbers.items() if value is not None}
    _check(lambda value: 0 < value < math.inf, "positive and finite, or None", given)


def check_not_negative(**numbers: float) -> None:
    """Refuse what is no finite number of at least 0.

    Raises:
        ValueError: by the argument's name.
    """
    _check(lambda value: 0 <= value < math.inf, "at least 0 and finite", numbers)


def check_count(**numbers: int) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ValueError: by the argument's name.
    """
    _check(lambda value: isinstance(value, Integral) and int(value) >= 1, "an int of 1 or more", numbers)


def _check(holds: Callable[[Any], bool], right: str, numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Real) or not holds(value):
            raise ValueError(f"{name} must be {right}, got {value!r}")


def check_action_bounds(action_bounds: tuple[float, float]) -> None:
    """Refuse bounds that are not (low, high).

    Raises:
        ValueError: by the argument's name.
    """
    if not action_bounds[0] < action_bounds[1]:
        raise ValueError(f"action_bounds must be (low, high) with low < high, got {action_bounds}")
