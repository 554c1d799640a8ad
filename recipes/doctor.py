"""What this machine has for offtrace, whether it works, and which flags fit: python recipes/doctor.py [--help]

One line an item: ok; missing, which is not needed; or failed. The exit code is 1 where something needed has failed.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from offtrace.agents.config import ConfigError
from offtrace.agents.runs.doctor import checks_of
from offtrace.agents.runs.folders import RUNS
from offtrace.agents.runs.isolated import Check, Line, run_isolated
from offtrace.modules.envs.names import check_name
from offtrace.recipes.cli import run_command
from offtrace.recipes.flags import SentenceParser, check_flags, import_from_here


def main(argv: list[str] | None = None) -> int:
    """Looks at everything, and prints a line for each.

    Returns:
        the exit code: 0; 1 where something needed has failed; 2 for a wrong command line; 130 when interrupted.
    """
    import_from_here()
    return run_command(argv, parse, _look)


def _look(args: argparse.Namespace) -> int:
    groups = checks_of(args.task, args.folder, args.address or ("" if args.ray else None))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return examine(groups, as_json=args.json)
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, as far as they can be checked without torch.

    Raises:
        ConfigError: an unknown flag or task (with the nearest one), or an address that is none.
    """
    parser = SentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--task", help="also act in this one, named as in --env.task")
    parser.add_argument("--folder", type=Path, default=RUNS, help=f"where runs go (default {RUNS}, of this folder)")
    parser.add_argument("--ray", action="store_true", help="also start a Ray cluster of this machine, and an actor")
    parser.add_argument("--address", help="also start an actor on the Ray cluster with this head, host:port, or auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    if args.task is not None:
        try:
            check_name(args.task)
        except ValueError as error:
            raise ConfigError(f"--task: {error}") from error
    if args.address not in (None, "auto") and not re.fullmatch(r"[^/]+:\d+", args.address):
        raise ConfigError(f"--address is {args.address!r}; it must be host:port of a Ray cluster's head, or auto")
    return args


def examine(groups: Sequence[Sequence[Check]], *, as_json: bool = False) -> int:
    """Makes the checks, of which groups run at the same time, and prints their lines in order; the exit code."""
    order = [check.name for group in groups for check in group]
    width, found = max(map(len, order)), dict[str, Line]()
    waiting = list(order)
    for line in run_isolated(groups):
        found[line.name] = line
        while waiting and waiting[0] in found:
            told = found[waiting.pop(0)]
            if not as_json:
                print(f"{told.state:7}  {told.name:{width}}  {told.text}", flush=True)
    failed = [name for name in order if found[name].state == "failed" and found[name].needed]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [found[name]._asdict() for name in order]}, indent=2))
    else:
        print(f"failed and needed: {', '.join(failed)}" if failed else "all that is needed works")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
