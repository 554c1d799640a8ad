"""Learning curves of several runs in one figure: python recipes/curves.py IMPALA=runs/a IMPALA=runs/b PPO=runs/c"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offtrace.agents.config import ConfigError
from offtrace.recipes.cli import fail
from offtrace.recipes.flags import SentenceParser, check_flags


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each run and writes the figure.

    Returns:
        the exit code: 0, or 2 for a wrong command line, or a run that has logged nothing.
    """
    try:
        return _draw(parse(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        return fail(str(error))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``runs`` is a dictionary of folders by their label.

    Raises:
        ConfigError: an unknown flag (with the nearest one), or a value that does not fit.
    """
    parser = SentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN", help="folder of a run; runs of one label have one colour"
    )
    parser.add_argument("--figure", type=Path, default=Path("curves.png"), help="the PNG (default curves.png)")
    parser.add_argument("--title", default="", help="above it")
    parser.add_argument("--goal", type=float, help="score at which a dashed line is drawn")
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    if args.figure.suffix != ".png":
        raise ConfigError(f"--figure is {args.figure}; it must be the name of a file that ends in .png")
    if not args.figure.absolute().parent.is_dir():
        raise ConfigError(f"--figure is {args.figure}; there is no folder {args.figure.absolute().parent}")
    runs: dict[str, list[Path]] = {}
    for word in args.runs:
        label, found, name = word.rpartition("=")
        folder = Path(name)
        if not any(folder.glob("metrics*.csv")):
            raise ConfigError(f"{folder} has no metrics.csv; give the folder of a run, such as runs/NAME")
        runs.setdefault(label if found else folder.name, []).append(folder)
    args.runs = runs
    return args


def _draw(args: argparse.Namespace) -> int:
    from offtrace.agents.runs.curves import plot_curves, read_curves

    for label, folders in args.runs.items():
        for folder in folders:
            curves = read_curves(folder / "metrics.csv")
            if not curves.training and not curves.scores:
                raise ConfigError(f"{folder} has logged no return yet; wait for its first episodes, or leave it out")
            frames, last = (curves.scores or curves.training)[-1]
            hours = curves.seconds_at([frames])[0] / 3600
            best = f", best {max(score for _, score in curves.scores):.1f}" if curves.scores else ""
            kind = "score" if curves.scores else "return of training"
            print(f"{label}: {folder}: {kind} {last:.1f} at {frames:,} frames{best}; {hours:.2f} hours of training")
    metrics = {label: [folder / "metrics.csv" for folder in folders] for label, folders in args.runs.items()}
    try:
        plot_curves(metrics, args.figure, title=args.title, goal=args.goal, against_time=True)
    except OSError as error:
        raise ConfigError(f"--figure is {args.figure}, which cannot be written: {error.strerror}") from error
    print(f"written: {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
