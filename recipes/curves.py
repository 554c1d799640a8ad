"""Learning curves of several runs in one figure: python recipes/curves.py IMPALA=runs/a IMPALA=runs/b PPO=runs/c"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from offtrace.agents.config import ConfigError
from offtrace.agents.runs.folders import metric_parts
from offtrace.recipes.cli import run_command
from offtrace.recipes.flags import SentenceParser, check_flags

if TYPE_CHECKING:
    from offtrace.agents.runs.curves import Curves


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each run and writes the figure.

    Returns:
        the exit code: 0, or 2 for a wrong command line, or a run that has logged nothing.
    """
    return run_command(argv, parse, _draw)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``runs`` is a dictionary of folders by their label.

    Raises:
        ConfigError: an unknown flag (with the nearest one), or a value that does not fit.
    """
    parser = SentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN", help="folder of a run; those of one label have one colour"
    )
    parser.add_argument("--figure", type=Path, default=Path("curves.png"), help="the PNG (default curves.png)")
    parser.add_argument("--title", default="", help="above it")
    parser.add_argument("--goal", type=float, help="score at which a dashed line is drawn")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="also write the curves there, small, as runs that this command draws",
    )
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    if args.figure.suffix != ".png":
        raise ConfigError(f"--figure is {args.figure}; it must be the name of a file that ends in .png")
    if not args.figure.absolute().parent.is_dir():
        raise ConfigError(f"--figure is {args.figure}; there is no folder {args.figure.absolute().parent}")
    if args.export is not None and args.export.exists() and (not args.export.is_dir() or any(args.export.iterdir())):
        raise ConfigError(f"--export is {args.export}, which is there already; give a new or an empty folder")
    runs: dict[str, list[Path]] = {}
    for word in args.runs:
        label, folder = _named(word)
        runs.setdefault(label, []).append(folder)
    args.runs = runs
    return args


def _named(word: str) -> tuple[str, Path]:
    """Label and folder of a run; the folder's name may hold a = as well."""
    parts = word.split("=")
    for place in range(len(parts)):
        label, folder = "=".join(parts[:place]), Path("=".join(parts[place:]))
        metrics = folder / "metrics.csv"
        if (label or not place) and (metrics.is_file() or metric_parts(metrics)):
            return label or str(folder), folder
    given = "=".join(parts[1:]) or word
    raise ConfigError(f"{given} has no metrics.csv; give the folder of a run, such as runs/NAME or PPO=runs/NAME")


def _draw(args: argparse.Namespace) -> int:
    from offtrace.agents.runs.curves import plot_curves, time_unit

    found = {label: [_read(folder) for folder in folders] for label, folders in args.runs.items()}
    for label, folders in args.runs.items():
        for folder, curves in zip(folders, found[label], strict=True):
            frames, last = (curves.scores or curves.training)[-1]
            said = f"score {last:.1f}" if curves.scores else f"return of training {last:.1f}"
            said += f" at {frames:,} frames"
            if curves.scores:
                said += f", best {max(score for _, score in curves.scores):.1f}"
            if curves.seconds:
                spent = curves.seconds_at([frames])[0]
                unit, length = time_unit(spent)
                said += f"; {spent / length:.2f} {unit} of training"
            print(f"{label}: {folder}: {said}")
    timed = any(curves.seconds for several in found.values() for curves in several)
    try:
        plot_curves(found, args.figure, title=args.title, goal=args.goal, against_time=timed)
    except OSError as error:
        raise ConfigError(f"--figure is {args.figure}, which cannot be written: {error.strerror}") from error
    print(f"written: {args.figure}")
    if args.export is not None:
        _export(found, args.export)
    return 0


def _export(found: dict[str, list[Curves]], out: Path) -> None:
    """Each run as ``out/LABEL-N/metrics.csv``, N from 0 for the runs of a label."""
    from offtrace.agents.runs.curves import write_curves

    numbers: Counter[str] = Counter()
    try:
        for label, several in found.items():
            name = re.sub(r"[^\w.=+-]", "_", label)  # of two labels, perhaps
            for curves in several:
                write_curves(curves, out / f"{name}-{numbers[name]}" / "metrics.csv")
                numbers[name] += 1
    except OSError as error:
        raise ConfigError(f"--export is {out}, which cannot be written: {error.strerror}") from error
    print(f"written: {out}")


def _read(folder: Path) -> Curves:
    from offtrace.agents.runs.curves import read_curves

    metrics = folder / "metrics.csv"
    try:
        curves = read_curves(metrics)
    except OSError as error:
        raise ConfigError(f"{metrics} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{metrics}, or a part of it, is damaged ({error}); mend or remove the row") from error
    if not curves.training and not curves.scores:
        raise ConfigError(f"{folder} has logged no return yet; wait for its first episodes, or leave it out")
    return curves


if __name__ == "__main__":
    sys.exit(main())
