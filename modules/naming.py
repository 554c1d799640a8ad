"""Names that users write: the known one that is meant, and what an import path leads to. Imports no tensors."""

from __future__ import annotations

import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from typing import Any

LIKE = 0.65
"""Names less alike than this, by difflib's ratio, are two names and no misspelling: lamda and gamma have 0.6."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean x?"`` with the name among ``known`` that is spelt most like ``word``; ``""`` if none is.

    Of names in groups, such as ``--optim.lr``, what stands behind the group is compared, as two names of one group
    would be alike for that alone. Where the word's own group is known, another one has it only by the very name.
    """
    known = list(known)
    grouped = any("." in name for name in known)
    group, own = _parts(word, grouped)
    strict = group in {_parts(name, grouped)[0] for name in known}
    matcher = SequenceMatcher(b=own)

    def likeness(name: str) -> tuple[float, bool, str]:
        other, last = _parts(name, grouped)
        if strict and other != group and last != own:
            return 0.0, False, name
        matcher.set_seq1(last)
        return matcher.ratio(), other == group, name

    ratio, _, found = max(map(likeness, known), default=(0.0, False, ""))
    return f"; did you mean {found}?" if ratio >= LIKE else ""


def _parts(name: str, grouped: bool) -> tuple[str, str]:
    """Group and name of what is written as a flag or a key."""
    plain = name.lstrip("-").lower().replace("-", "_")
    group, _, last = plain.rpartition(".") if grouped else ("", "", plain)
    return group, last


def split_path(path: str) -> tuple[str, str]:
    """Module and name of an import path.

    Raises:
        ValueError: it has another form.
    """
    module, _, name = path.partition(":")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"an import path is 'package.module:function', got {path!r}")
    return module, name


def imported(path: str, what: str, *arguments: str) -> Any:
    """The class or function at an import path ``package.module:name``; importing it runs the user's code.

    Args:
        path: the user's.
        what: what is named, for messages: ``"network"``.
        arguments: names of those that it will be called with, one behind the other; none: it is not asked.

    Raises:
        ValueError: in one sentence: the path has another form, there is no such module or nothing of that name in it,
            the module cannot be imported, or what is there is neither class nor function, or takes other arguments.
    """
    place, name = split_path(path)
    refused = f"the {what} {path!r} cannot be imported: "
    try:
        module = import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):  # one that the user's own code imports
            raise ValueError(f"{refused}{error}{_where(error)}") from error
        here = "in the current folder or " if {"", os.getcwd()} & set(sys.path) else ""
        raise ValueError(f"{refused}there is no module {error.name!r} {here}on PYTHONPATH") from error
    except Exception as error:
        told = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{refused}{type(error).__name__}: {told}{_where(error)}") from error
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        raise ValueError(f"{refused}the module {place!r} has no {name!r}{nearest(name, vars(module))}") from error
    if not callable(found):
        raise ValueError(f"the {what} {path!r} is no class and no function, but of the type {type(found).__name__}")
    if arguments and not takes(found, *arguments):
        raise ValueError(f"the {what} {path!r} must take ({', '.join(arguments)}), and takes {signature(found)}")
    return found


def takes(make: Callable[..., Any], *arguments: str, **named: Any) -> bool:
    """Whether ``make`` can be called with these arguments; not, where it does not say what it takes."""
    try:
        inspect.signature(make).bind(*arguments, **named)
    except (TypeError, ValueError):
        return False
    return True


def signature(make: Callable[..., Any]) -> str:
    """What ``make`` takes, as ``(shape, hidden)``, for messages."""
    try:
        found = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return "what it does not say"
    return f"({', '.join(str(argument.replace(annotation=argument.empty)) for argument in found)})"


def _where(error: BaseException) -> str:
    """The line of the user's code that an import failed at."""
    if isinstance(error, SyntaxError):  # its message has it
        return ""
    frames = [x for x in traceback.extract_tb(error.__traceback__) if "importlib" not in x.filename]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames[1:] else ""
