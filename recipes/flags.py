"""Flags and configuration files in the user's words: numbers in any spelling, one sentence for a mistake."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from offtrace.agents.config import Config, ConfigError
from offtrace.modules.naming import nearest


class SentenceParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises ``ConfigError`` in place of usage and exit."""
        raise ConfigError(message.removeprefix("argument "))


def import_from_here() -> None:
    """Lets ``package.module:function`` be found in the folder a recipe is called from, and by its actor processes."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_flags(argv: Sequence[str], known: Iterable[str]) -> None:
    """Raises ``ConfigError`` for a flag that is not ``known``, with the nearest one that is, or those of its group."""
    known = list(known)
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known and not flag.startswith("--print_config"):
            known = [name for name in known if not name.endswith("+")]  # jsonargparse's way to add to a list
            group = flag.rpartition(".")[0]
            own = [name.rpartition(".")[2] for name in known if group and name.rpartition(".")[0] == group]
            has = f"; {group.lstrip('-')} has {', '.join(own)}" if own else ""
            raise ConfigError(f"there is no flag {flag}{nearest(flag, known) or has}")


def types_of_keys(kind: type[Config]) -> dict[str, Any]:
    """The type of every key of a configuration, such as ``train.seed``."""
    groups = {name: group for name, group in get_type_hints(kind).items() if is_dataclass(group)}
    return {f"{group}.{name}": wanted for group in groups for name, wanted in get_type_hints(groups[group]).items()}


def read_file(path: Path, types_of: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """The groups of a configuration file, its keys known, its numbers as the parser reads them.

    Args:
        path: a YAML file.
        types_of: what :func:`types_of_keys` gives.
        algorithm: what the file's ``algorithm`` must be, where it has one.

    Raises:
        ConfigError: if the file cannot be read, is no YAML, is of another algorithm, or has an unknown key.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    own = content.pop("algorithm", algorithm)
    if own != algorithm:
        raise ConfigError(f"{path} configures {own}, and this recipe trains {algorithm}; give it to a recipe of {own}")
    groups = {key.split(".")[0] for key in types_of}
    for group, values in content.items():
        if group in types_of:
            first, _, name = group.partition(".")
            raise ConfigError(f"{path} has the key {group}; it must be {name}, in the group {first}")
        if group not in groups:
            raise ConfigError(f"{path} has an unknown key {group}{nearest(str(group), [*groups, *types_of])}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {group} is {values!r}; it must hold keys and values")
        for name in values:
            if f"{group}.{name}" not in types_of:
                raise ConfigError(f"{path} has an unknown key {group}.{name}{nearest(f'{group}.{name}', types_of)}")
            values[name] = _number(values[name], types_of[f"{group}.{name}"])
    return content


def numbers(argv: Sequence[str], types_of: dict[str, Any]) -> list[str]:
    """``argv`` with counts such as ``1e6`` and the limit ``inf`` as the parser reads them."""
    words: list[str] = []
    key = ""  # that the next word is the value of
    for word in argv:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            words.append(f"--{key}={_spelt(value, types_of.get(key))}" if equals else word)
            key = "" if equals else key
        else:
            words.append(_spelt(word, types_of.get(key)))
            key = ""
    return words


def whole_number(word: str) -> int:
    """The type of a flag that takes counts such as ``1e6``."""
    value = _number(word, int)
    if not isinstance(value, int):
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number")
    return value


def _spelt(value: str, wanted: Any) -> str:
    number = _number(value, wanted)
    if not isinstance(number, float):
        return str(number)
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(number), str(number))


def _number(value: Any, wanted: Any) -> Any:
    """``value`` as the number that a key of type ``wanted`` takes, if it is one in another spelling; else as it is.

    YAML takes ``1e6`` and ``inf`` for text, and ``1e6`` is no whole number to Python.
    """
    choices = set(get_args(wanted)) or {wanted}
    if isinstance(value, bool) or not choices & {int, float}:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    if float in choices:
        return number
    return int(number) if number.is_integer() else value


def sentence(text: str, types_of: dict[str, Any], argv: Sequence[str] = (), source: str | None = None) -> str:
    """The gist of jsonargparse's message, which spans lines and speaks of classes.

    Args:
        text: the message.
        types_of: what :func:`types_of_keys` gives.
        argv: the command line, to tell its values from those of the file.
        source: the configuration file, if there is one.
    """
    flat = " ".join(text.split())
    keys = [key for key in re.findall(r'key "([\w.]+)"', flat) if key in types_of]
    value = re.search(r"(?:Got|Given) value: ?(.*)$", flat)
    if keys and value:
        given = _given(f"--{keys[-1]}", argv) or value[1] or "empty"
        flags = {word.split("=")[0] for word in argv}
        in_file = source is not None and not flags & {f"--{keys[-1]}", f"--{keys[-1].split('.')[0]}"}
        where = f" in {source}" if in_file else ""
        return f"{keys[-1]} is {given}{where}; it must be {_in_words(types_of[keys[-1]])}"
    unloadable = re.search(r"key \"(\w+)\": Unable to load config '([^']*)'", flat)
    if unloadable:
        return (
            f"--{unloadable[1]} is {unloadable[2]}; it must be a YAML file, or keys and values such as {{key: value}}"
        )
    foreign = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", flat)
    if foreign:
        group, key = foreign.groups()
        given = f"--{group} is {_given(f'--{group}', argv)}, which has"
        if key.startswith(f"{group}."):  # a whole configuration in place of a group's
            return f"{given} the group {group} inside; it must have keys of {group} alone, or be given as --config"
        return f"{given} an unknown key {group}.{key}{nearest(f'{group}.{key}', types_of)}"
    stray = re.search(r"[Uu]nrecognized arguments: (.*)$", flat)
    if stray:
        return f"{stray[1]} stands behind no flag; flags are written --group.name value"
    bare = re.search(r"argument (--[\w.]+): expected one argument", flat)
    if bare:
        return f"{bare[1]} needs a value"
    return flat.removeprefix("error: ")


def _given(flag: str, argv: Sequence[str]) -> str:
    """All that the last ``flag`` is given, up to the next one: a list may come in several words."""
    for index in reversed(range(len(argv))):
        name, equals, value = argv[index].partition("=")
        if name == flag:
            behind = itertools.takewhile(lambda word: not word.startswith("--"), argv[index + 1 :])
            return value if equals else " ".join(behind)
    return ""


def _in_words(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, get_args(wanted)))}"
    if get_origin(wanted) is list:
        return "a list of whole numbers in one word such as [64,64]"
    if isinstance(wanted, types.UnionType):
        return " or ".join(map(_in_words, get_args(wanted)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[wanted]
