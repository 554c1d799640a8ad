"""What the estimators are called: their names, the options of each, and how a text names one. Imports no tensors."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

KINDS = ("state", "action")


class Named(NamedTuple):
    """The class at ``path``, the ``options`` that the name has, and what is ``fixed`` by it."""

    path: str
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = {}


_STATE = "offtrace.modules.estimators.state_values"
_ACTION = "offtrace.modules.estimators.action_values"
_UNCLIPPED = {"rho_clip": math.inf, "c_clip": math.inf, "pg_rho_clip": math.inf}

STATE_ESTIMATORS: dict[str, Named] = {
    "vtrace": Named(f"{_STATE}:VTrace", ("lmbda", "rho_clip", "c_clip", "pg_rho_clip", "leak")),
    "importance_sampling": Named(f"{_STATE}:VTrace", ("lmbda",), _UNCLIPPED),
    "one_step": Named(f"{_STATE}:WeightedGAE", ("lmbda", "pg_rho_clip")),
    "gae": Named(f"{_STATE}:GAE", ("lmbda",)),
    "n_step": Named(f"{_STATE}:NStepReturn", ("n",)),
}
"""Estimators of state values: IMPALA, A2C, PPO, V-MPO."""

ACTION_ESTIMATORS: dict[str, Named] = {
    "one_step": Named(f"{_ACTION}:OneStep"),
    "n_step": Named(f"{_ACTION}:NStep", ("n",)),
    "retrace": Named(f"{_ACTION}:Retrace", ("lmbda", "root")),
    "importance_sampling": Named(f"{_ACTION}:ImportanceSampling", ("lmbda",)),
    "tree_backup": Named(f"{_ACTION}:TreeBackup", ("lmbda",)),
    "q_lambda": Named(f"{_ACTION}:QLambda", ("lmbda",)),
}
"""Estimators of action values: SAC, MPO, DQN, the Q-actor-critic."""

ESTIMATORS: dict[str, dict[str, Named]] = {"state": STATE_ESTIMATORS, "action": ACTION_ESTIMATORS}

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
        f"there is no estimator {name!r}{_nearest(name, known)}; those of {kind} values are {_list(known)}"
    )


def check_options(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse options that ``name`` has not.

    Raises:
        ValueError: the nearest is told.
    """
    for option in options:
        if option not in known:
            has = f"it has {_list(known)}" if known else "it has none"
            raise ValueError(f"estimator {name!r} has no option {option!r}{_nearest(option, known)}; {has}")


def check_spec(spec: str, kind: str) -> None:
    """Check that ``spec`` names an estimator of ``kind`` and options that it has; an import path is not followed.

    Raises:
        ValueError: if not, or if an option is no number, in one sentence.
    """
    name, options = parse_spec(spec)
    if ":" in name:
        return
    check_options(name, options, (*find_named(name, kind).options, "gamma"))
    for option, value in options.items():
        wanted: Any = int if option in ("n", "root") else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            right = "a whole number" if wanted is int else "a number"
            raise ValueError(f"option {option!r} of the estimator {name!r} is {value!r}; it must be {right}")


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


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name.lower().replace("-", ""), list(known), n=1, cutoff=0.5)
    return f", the nearest is {found[0]!r}" if found else ""


def _list(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
