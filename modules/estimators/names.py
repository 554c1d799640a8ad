"""What the estimators are called: their names, the options of each, and how a text names one. Imports no tensors."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from offtrace.modules.naming import nearest

KINDS = ("state", "action")


class Range(NamedTuple):
    """What a number may be: in words, and whether it ``holds`` of one."""

    right: str
    holds: Callable[[Any], bool]


_FRACTION = Range("in [0, 1]", lambda number: 0 <= number <= 1)
_POSITIVE = Range("above 0", lambda number: number > 0)
_COUNT = Range("1 or more, and whole", lambda number: isinstance(number, Integral) and int(number) >= 1)

RANGES: dict[str, Range] = {
    "gamma": _FRACTION,
    "lmbda": _FRACTION,
    "leak": _FRACTION,
    "rho_clip": _POSITIVE,
    "c_clip": _POSITIVE,
    "pg_rho_clip": _POSITIVE,
    "n": _COUNT,
    "root": _COUNT,
}
"""Of every option of the package's estimators, for their constructors and for texts that name them."""


class Named(NamedTuple):
    """The class at ``path``, the ``options`` that the name has with their defaults, and what is ``fixed`` by it.

    ``only_discrete``: it needs probabilities of discrete actions.
    """

    path: str
    options: Mapping[str, float] = {}
    fixed: Mapping[str, Any] = {}
    only_discrete: bool = False


_STATE = "offtrace.modules.estimators.state_values"
_ACTION = "offtrace.modules.estimators.action_values"
_UNCLIPPED = {"rho_clip": math.inf, "c_clip": math.inf, "pg_rho_clip": math.inf}

STATE_ESTIMATORS: dict[str, Named] = {
    "vtrace": Named(
        f"{_STATE}:VTrace", {"lmbda": 1.0, "rho_clip": 1.0, "c_clip": 1.0, "pg_rho_clip": 1.0, "leak": 1.0}
    ),
    "importance_sampling": Named(f"{_STATE}:VTrace", {"lmbda": 1.0}, _UNCLIPPED),
    "one_step": Named(f"{_STATE}:WeightedGAE", {"lmbda": 1.0, "pg_rho_clip": 1.0}),
    "gae": Named(f"{_STATE}:GAE", {"lmbda": 1.0}),
    "n_step": Named(f"{_STATE}:NStepReturn", {"n": 5}),
}
"""Estimators of state values: IMPALA, A2C, PPO, TRPO, V-MPO."""

ACTION_ESTIMATORS: dict[str, Named] = {
    "one_step": Named(f"{_ACTION}:OneStep"),
    "n_step": Named(f"{_ACTION}:NStep", {"n": 5}),
    "retrace": Named(f"{_ACTION}:Retrace", {"lmbda": 1.0, "root": 1}),
    "importance_sampling": Named(f"{_ACTION}:ImportanceSampling", {"lmbda": 1.0}),
    "tree_backup": Named(f"{_ACTION}:TreeBackup", {"lmbda": 1.0}, only_discrete=True),
    "q_lambda": Named(f"{_ACTION}:QLambda", {"lmbda": 1.0}),
}
"""Estimators of action values: SAC, MPO, DQN, the Q-actor-critic, ACER, Reactor."""

ESTIMATORS: dict[str, dict[str, Named]] = {"state": STATE_ESTIMATORS, "action": ACTION_ESTIMATORS}

OF_THE_LOSS = ("gamma", "value_network", "qvalue_network", "actor_network", "num_samples", "alpha", "validate")
"""Arguments of every estimator that serve it alone; a loss that takes it has its own."""

_SPEC = re.compile(r"\s*(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_][\w.]*)?)\s*(?:\((?P<options>.*)\))?\s*", re.DOTALL)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Name, or import path ``package.module:Class``, and options of a text such as ``"vtrace(lmbda=0.9, c_clip=inf)"``.

    Options are literals by their names, as in a call of Python; ``inf`` is one of them.

    Raises:
        ValueError: on a text of another form.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"an estimator is a name, options in brackets behind it, as 'gae(lmbda=0.9)', got {spec!r}")
    name, inside = match["name"], match["options"] or ""
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError(f"options of an estimator go by their names, as 'gae(lmbda=0.9)', got {spec!r}")
        options = [str(keyword.arg) for keyword in call.keywords]
        for option in options:
            if options.count(option) > 1:
                raise ValueError(f"an estimator takes an option once, and {option!r} is given twice, in {spec!r}")
        return name, {str(keyword.arg): _literal(keyword.value, spec) for keyword in call.keywords}
    except SyntaxError:
        raise ValueError(
            f"options of an estimator are those of a Python call, as 'gae(lmbda=0.9)' (lmbda, not lambda), got {spec!r}"
        ) from None


def find_named(name: str, kind: str) -> Named:
    """The entry of ``name`` among the estimators of ``kind``, ``"state"`` or ``"action"``.

    Raises:
        ValueError: on a name that the kind has not; the nearest is told.
    """
    known, other = ESTIMATORS[kind], KINDS[kind == KINDS[0]]
    if name in known:
        return known[name]
    if name in ESTIMATORS[other]:
        raise ValueError(f"estimator {name!r} is of {other} values, and one of {kind} values is needed: {_list(known)}")
    raise ValueError(
        f"there is no estimator {name!r} among those of {kind} values, {_list(known)}{nearest(name, known)}"
    )


def check_options(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse options that are not ``known``; what a loss refuses, :data:`OF_THE_LOSS`, is known and not offered.

    Raises:
        ValueError: the nearest is told.
    """
    known = tuple(known)
    offered = [option for option in known if option not in OF_THE_LOSS]
    for option in options:
        if option not in known:
            has = f"its options are {_list(offered)}" if offered else "it has none"
            raise ValueError(f"estimator {name!r} has no option {option!r}, {has}{nearest(option, offered)}")


def check_ranges(**options: Any) -> None:
    """Refuse values that options of the package's estimators cannot have.

    Args:
        options: by the names in :data:`RANGES`; those given together are also compared.

    Raises:
        TypeError: on what is no number.
        ValueError: on a number out of range.
    """
    for name, number in options.items():
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name} must be a number, got {number!r}")
        if not RANGES[name].holds(number):
            raise ValueError(f"{name} must be {RANGES[name].right}, got {number!r}")
    c_clip, rho_clip = options.get("c_clip", 0), options.get("rho_clip", math.inf)
    if c_clip > rho_clip:  # would not contract
        raise ValueError(f"c_clip must be at most rho_clip, {rho_clip}, got {c_clip}")


def check_spec(spec: str, kind: str) -> None:
    """Check all of ``spec``, for a loss, that needs no import: an import path is not followed.

    Raises:
        ValueError, TypeError: if it names no estimator of ``kind``, an option that it has not, or gamma, which is the
            loss's, or if a value is out of range; in one sentence.
    """
    name, options = parse_spec(spec)
    if "gamma" in options:
        raise ValueError(f"the estimator has the gamma of its loss: give loss.gamma, and leave it out of {spec!r}")
    if ":" in name:
        return
    named = find_named(name, kind)
    check_options(name, options, named.options)
    check_ranges(**{**named.options, **options})


def _literal(node: ast.expr, spec: str) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, spec)
        if isinstance(value, int | float):
            return -value
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)!r} is no literal that an estimator can be given, in {spec!r}") from None


def _list(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
