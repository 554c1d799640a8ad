"""What studies of many trainings share: how their command ends, a row for each training, numbers in a table."""

from __future__ import annotations

import argparse
import csv
import io
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from offtrace.agents.config import ConfigError
from offtrace.recipes.cli import run_command

_ENDS = (signal.SIGTERM, signal.SIGHUP)

Key = TypeVar("Key")
Value = TypeVar("Value")


def run_study(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    study: Callable[[argparse.Namespace], int],
) -> int:
    """The command of a study.

    Args:
        argv: the command line; None: that of the process.
        parse: checks it.
        study: trains what is missing, and returns the exit code.

    Returns:
        that code; 2 for a wrong command line or folder; 1 for a training that ended the study, or a file that could not
        be written; 130 when interrupted, by Ctrl-C, SIGTERM or the end of the terminal.
    """

    def do(args: argparse.Namespace) -> int:
        ends = [end for end in _ENDS if signal.getsignal(end) is signal.SIG_DFL]  # nohup ignores one
        for end in ends:
            signal.signal(end, signal.default_int_handler)
        try:
            return study(args)
        except (OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            for end in ends:
                signal.signal(end, signal.SIG_DFL)

    return run_command(
        argv, parse, do, interrupted="interrupted; what has finished is kept, and the same command goes on"
    )


def usable_folder(folder: Path) -> None:
    """Makes the folder ``--folder``, if it is not there.

    Raises:
        ConfigError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--folder is {folder}, which cannot be written: {error.strerror}") from error


def read_rows(path: Path, key: type[Key], value: type[Value]) -> dict[Key, Value]:
    """The rows of a file, of several with one key the last; none where there is no file.

    Where the machine stopped while a row was written, that row is taken away.

    Args:
        path: a CSV file that :func:`append_row` wrote.
        key, value: dataclasses of texts and numbers, whose fields are the columns.

    Raises:
        ConfigError: if the file has other columns, or is damaged.
    """
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_bytes(whole.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read and written: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: {error}; remove it, and the study begins anew") from error
    if not whole:
        return {}
    columns = _columns(key, value)
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if reader.fieldnames != columns:
        raise ConfigError(f"{path} has columns {reader.fieldnames}; those of this study are {columns}")
    try:
        return {_build(key, row): _build(value, row) for row in reader}
    except (TypeError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}, line {reader.line_num}, is damaged: {error}") from error


def append_row(path: Path, key: Any, value: Any) -> None:
    """Adds a row to the file, which begins with the names of the columns."""
    new = not path.exists() or not path.stat().st_size
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, _columns(type(key), type(value)))
        if new:
            writer.writeheader()
        writer.writerow(asdict(key) | asdict(value))


def _columns(*kinds: Any) -> list[str]:
    return [field.name for kind in kinds for field in fields(kind)]


def _build(kind: Any, row: dict[str, str]) -> Any:
    return kind(**{name: wanted(row[name]) for name, wanted in get_type_hints(kind).items()})


def line(entries: Iterable[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(entries)} |"


def number(x: float) -> str:
    """Three digits; what rounds to zero has no sign."""
    return f"{round(x, 6) + 0.0:.3g}"
