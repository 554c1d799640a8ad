"""Command lines of the recipes: flags from the configuration's fields, errors in one sentence, nothing heavy imported."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import os
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from offtrace.agents.config import ConfigError, ImpalaConfig
from offtrace.agents.runs import RunError, new_run, read_config, write_config
from offtrace.modules.envs.names import check_name

MAY_CHANGE = ("train.total_frames", "train.devices", "train.accelerator", "train.log_every", "train.checkpoint_every")
"""Flags that a resumed run may be given; everything else is what the run began with."""

_FOLDER = "OFFTRACE_RUN_FOLDER"

Presets = dict[str, Callable[[], ImpalaConfig]]


def run_recipe(argv: list[str] | None, *, presets: Presets, description: str) -> int:
    """A whole recipe: parse, check, make the run's folder, train, draw. Returns the exit code.

    0: trained to the end; 2: the command line, configuration or checkpoint is wrong, told in one sentence; 1: training
    failed, the last checkpoint is kept; 128 + n: stopped by signal n, likewise.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, resume = parse(argv, presets=presets, description=description)
        check(config)
        folder = resume.parent.parent if resume is not None else _folder(config)
        from offtrace.recipes.running import run  # torch and Lightning only for what is going to run

        return run(config, folder, resume)
    except (ConfigError, RunError) as error:
        return fail(str(error))
    except KeyboardInterrupt:  # before training took the signals over: nothing to save yet
        print("interrupted", file=sys.stderr)
        return 130


def _folder(config: ImpalaConfig) -> Path:
    # Lightning starts the other ranks with this command line again: they join the folder of the first
    if "LOCAL_RANK" in os.environ and _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
    folder = new_run(config)
    write_config(config, folder)
    os.environ[_FOLDER] = str(folder)
    return folder


def fail(message: str) -> int:
    """Prints one sentence and returns the exit code of a wrong command line."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def parse(argv: list[str], *, presets: Presets, description: str) -> tuple[ImpalaConfig, Path | None]:
    """The configuration of a command line, and the checkpoint to go on from.

    Raises:
        ConfigError: an unknown flag or key (with the nearest known), a value of a wrong type, an unreadable file.
        RunError: ``--resume`` names what is no run.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    preset = _value_of("--preset", argv) or "default"
    if preset not in presets:
        raise ConfigError(f"--preset is {preset!r}; it must be one of {', '.join(presets)}{nearest(preset, presets)}")
    resume = _value_of("--resume", argv)
    parser = _parser(presets[preset](), presets, description)
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    source = _value_of("--config", argv)
    if resume:
        _check_resumed(argv)
        read_config(Path(resume))
        source = str(Path(resume) / "config.yaml")
    content = _read_file(Path(source)) if source is not None else {}
    values = _parsed(parser, _numbers(argv), content, source)
    config: ImpalaConfig = _build(ImpalaConfig, values)
    if any(word.startswith("--print_config") for word in argv):
        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        raise SystemExit(0)
    if not resume:
        return config, None
    checkpoint = Path(resume) / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise RunError(f"{resume} has no checkpoints/last.ckpt to go on from")
    return config, checkpoint_file(checkpoint)


def checkpoint_file(path: Path) -> Path:
    """``path``, if the file there has the form of a checkpoint; finds most damage without importing torch.

    Raises:
        RunError: one sentence.
    """
    if not path.is_file():
        raise RunError(f"there is no checkpoint file at {path}")
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is truncated or not a checkpoint")
    return path


def check(config: ImpalaConfig) -> None:
    """Everything that can be found wrong before a process starts or torch is imported.

    Raises:
        ConfigError: one sentence.
    """
    config.validate()
    try:
        check_name(config.env.game)
    except ValueError as error:
        raise ConfigError(f"env.game: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` or nothing."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1, 0.4)
    if not near:  # the right name in the wrong group
        near = [name for name in known if name.split(".")[-1] == word.split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else ""


def _parser(base: ImpalaConfig, presets: Presets, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with the keys below.")
    parser.add_argument("--preset", default="default", help=f"Starting point: {', '.join(presets)}.")
    parser.add_argument("--resume", default=None, help="Folder of a run to go on with, such as runs/NAME.")
    for group in fields(base):
        parser.add_class_arguments(type(getattr(base, group.name)), group.name)
    parser.set_defaults({group.name: asdict(getattr(base, group.name)) for group in fields(base)})
    return parser


def _parsed(parser: ArgumentParser, argv: list[str], content: dict[str, Any], source: str | None) -> dict[str, Any]:
    words = [word for word in _without("--config", argv) if not word.startswith("--print_config")]
    if content:
        words = ["--config", yaml.safe_dump(content), *words]
    # argparse's own ways out print usage and exit; everything wrong becomes one sentence instead
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return parser.parse_args(words).as_dict()
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(_sentence(noise.getvalue())) from error
    except Exception as error:
        given = any(word.split("=")[0].removeprefix("--") in str(error) for word in argv if word.startswith("--"))
        raise ConfigError(_sentence(str(error), f" in {source}" if content and not given else "")) from error


def _kinds() -> dict[str, Any]:
    """The type of every key, such as ``train.seed``."""
    groups = get_type_hints(ImpalaConfig)
    return {f"{group}.{name}": hint for group in groups for name, hint in get_type_hints(groups[group]).items()}


def _wanted(hint: Any) -> str:
    """A type in the user's words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return "a list of whole numbers, such as [256]"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[hint]


def _sentence(text: str, where: str = "") -> str:
    """The gist of jsonargparse's message, which spans lines and speaks of classes."""
    flat = " ".join(text.split())
    kinds = _kinds()
    keys = [key for key in re.findall(r'key "([\w.]+)"', flat) if key in kinds]
    value = re.search(r"(?:Got|Given) value: (.*)$", flat)
    if keys and value:
        return f"{keys[-1]} is {value[1]}{where}; it must be {_wanted(kinds[keys[-1]])}"
    stray = re.search(r"[Uu]nrecognized arguments: (.*)$", flat)
    if stray:
        return f"{stray[1]} stands behind no flag; flags are written --group.name value"
    return flat.removeprefix("error: ")


def check_flags(argv: list[str], known: Iterable[str]) -> None:
    """Raises ``ConfigError`` for a flag that is not ``known``, with the nearest one that is."""
    known = list(known)
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known and not flag.startswith("--print_config"):
            raise ConfigError(f"there is no flag {flag}{nearest(flag, known)}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    kinds = _kinds()
    groups = {key.split(".")[0] for key in kinds}
    for group, values in content.items():
        if group not in groups:
            raise ConfigError(f"{path} has an unknown key {group}{nearest(str(group), [*groups, *kinds])}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {group} is {values!r}; it must hold keys and values")
        for name in values:
            if f"{group}.{name}" not in kinds:
                raise ConfigError(f"{path} has an unknown key {group}.{name}{nearest(f'{group}.{name}', kinds)}")
            values[name] = _number(values[name], kinds[f"{group}.{name}"])
    return content


def _check_resumed(argv: list[str]) -> None:
    for word in argv:
        flag = word.split("=")[0].removeprefix("--")
        if word.startswith("--") and flag not in (*MAY_CHANGE, "resume"):
            raise ConfigError(f"--{flag} cannot change in a resumed run; only {', '.join(MAY_CHANGE)} can")


def _build(kind: Any, values: dict[str, Any]) -> Any:
    arguments = {}
    defaults = kind()
    for field in fields(kind):
        value = values[field.name]
        inner = getattr(defaults, field.name)
        arguments[field.name] = _build(type(inner), value) if is_dataclass(inner) else value
    return kind(**arguments)


def _value_of(flag: str, argv: list[str]) -> str | None:
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value")
            return argv[index + 1]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1]
    return None


def _without(flag: str, argv: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = not skip and word == flag
    return kept


def _numbers(argv: list[str]) -> list[str]:
    """Writes counts such as ``1e6`` and the limit ``inf`` as the parser reads them."""
    kinds = _kinds()
    words: list[str] = []
    before = ""
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if flag.removeprefix("--") in kinds and (equals or flag is before):
            number = _number(value, kinds[flag.removeprefix("--")])
            text = {math.inf: ".inf"}.get(number, str(number)) if isinstance(number, int | float) else value
            word = f"{flag}={text}" if equals else text
        words.append(word)
        before = word if word.startswith("--") and not equals else ""
    return words


def _number(value: Any, hint: Any) -> Any:
    """``value`` as the number a key of type ``hint`` wants, if it is one in another spelling; else as it is.

    YAML takes ``1e6`` and ``inf`` for text, and ``1e6`` is no whole number to Python.
    """
    wanted = set(get_args(hint)) or {hint}
    if isinstance(value, bool) or not wanted & {int, float}:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    if float in wanted:
        return number
    return int(number) if number.is_integer() else value


__all__ = ["check", "check_flags", "checkpoint_file", "fail", "nearest", "parse", "run_recipe"]
