"""Estimators by their text, such as ``retrace(lmbda=0.9)``; those of the package are checked without torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from offtrace.agents.config.base import ConfigError
from offtrace.modules.estimators.names import check_spec, parse_spec

Kind = Literal["state", "action"]


class Samples(NamedTuple):
    """What an estimator learns from: sequences of ``length`` steps, of ``every_step`` in them or of the first alone."""

    length: int
    every_step: bool


def check_estimator(at: str, spec: str, kind: Kind) -> None:
    """Refuse an estimator that is not known, of another kind, or with options that it has not.

    One of the user's own is imported and made, and torch with it.

    Raises:
        ConfigError: one sentence.
    """
    try:
        check_spec(spec, kind)
        if ":" in parse_spec(spec)[0]:
            from offtrace.modules.estimators import make_estimator

            make_estimator(spec, kind)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{at}.estimator: {error}") from error


def samples_of(spec: str, length: int) -> Samples:
    """What the estimator of action values that ``spec`` names is given.

    Args:
        spec: its text.
        length: steps of a sequence, where the estimator leaves them open.
    """
    name, options = parse_spec(spec)
    if ":" in name:  # an own one says it itself
        from offtrace.modules.estimators import make_estimator

        estimator: Any = make_estimator(spec, "action")
        own = estimator.sequence_length(length)
        return Samples(own, estimator.steps_per_sequence(own) == own)
    if name == "one_step":
        return Samples(1, True)
    if name == "n_step":
        return Samples(int(options.get("n", 5)), False)
    return Samples(length, True)
