"""Estimators by their text, such as ``retrace(lmbda=0.9)``; those of the package are checked without torch."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from offtrace.agents.config.base import ConfigError
from offtrace.modules.envs.names import known_actions
from offtrace.modules.estimators.names import ACTION_ESTIMATORS, STATE_ESTIMATORS, check_spec, parse_spec

Kind = Literal["state", "action"]


class Samples(NamedTuple):
    """What an estimator learns from: sequences of ``length`` steps, of ``every_step`` in them or of the first alone."""

    length: int
    every_step: bool


def check_estimator(at: str, spec: str, kind: Kind, *, every_step: bool = False) -> None:
    """Refuse an estimator that is not known, of another kind, or with options that it has not or cannot have.

    One of the user's own is imported and made, and torch with it. ``every_step`` refuses one of action values that
    learns from the first step of a sequence alone.

    Raises:
        ConfigError: one sentence.
    """
    try:
        check_spec(spec, kind)
        if ":" in parse_spec(spec)[0]:
            _own(spec, kind).check_bound("the loss")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{at}.estimator: {error}") from error
    if every_step and not samples_of(spec, 2).every_step:
        raise ConfigError(
            f"{at}.estimator is {spec}, which learns from the first step of a sequence alone; here every step of a "
            "rollout is learnt from: it must be another, such as retrace"
        )


def check_truncates(at: str, spec: str, max_kl: float) -> None:
    """Refuse an estimator of state values, known and of the right form, that does not truncate ratios.

    Args:
        at: name of the loss's group.
        spec: the estimator's text.
        max_kl: the bound that needs it.

    Raises:
        ConfigError: one sentence.
    """
    name, options = parse_spec(spec)
    if ":" in name:
        truncates = _own(spec, "state").truncates
    else:
        named = STATE_ESTIMATORS[name]
        known = {**named.options, **named.fixed, **options}
        truncates = known.get("rho_clip", math.inf) < math.inf and known.get("leak", 1) == 1
    if not truncates:
        raise ConfigError(
            f"{at}.max_kl is {max_kl}; {at}.estimator {spec} does not truncate ratios: it must be null, or the "
            "estimator one such as vtrace, with its leak of 1"
        )


def check_actions(at: str, spec: str, task: str, actions: str | None = None) -> None:
    """Refuse an estimator of action values, or an option of one, that does not go with the task's actions.

    Args:
        at: name of the loss's group.
        spec: the estimator's text, of the right form.
        task: its name.
        actions: ``"discrete"`` or ``"continuous"``; None: what is known of the task without running the user's code.

    Raises:
        ConfigError: one sentence.
    """
    name, options = parse_spec(spec)
    found = actions or known_actions(task)
    if found == "discrete" and options.get("root", 1) != 1 and ":" not in name:
        raise ConfigError(
            f"{at}.estimator is {spec}, whose root is for continuous actions; those of {task} are discrete: it must be "
            "1, or left out"
        )
    needed = _own(spec, "action").only_discrete if ":" in name else ACTION_ESTIMATORS[name].only_discrete
    if needed and found == "continuous":
        raise ConfigError(
            f"{at}.estimator is {spec}, which needs probabilities of discrete actions; those of {task} are continuous: "
            "it must be another, such as retrace"
        )


def samples_of(spec: str, length: int) -> Samples:
    """What the estimator of action values that ``spec`` names is given.

    Args:
        spec: its text, of the right form.
        length: steps of a sequence, where the estimator leaves them open.
    """
    name, options = parse_spec(spec)
    if ":" in name:  # an own one says it itself
        estimator = _own(spec, "action")
        own = estimator.sequence_length(length)
        return Samples(own, estimator.steps_per_sequence(own) == own)
    if name == "n_step":
        length = int({**ACTION_ESTIMATORS[name].options, **options}["n"])
        return Samples(length, length == 1)
    return Samples(1 if name == "one_step" else length, True)


def _own(spec: str, kind: Kind) -> Any:
    from offtrace.modules.estimators import make_estimator

    return make_estimator(spec, kind)
