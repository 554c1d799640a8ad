"""What a recipe does once its configuration is right. Imports torch and Lightning."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from offtrace.agents.config import Config
from offtrace.agents.runs.run import RunFailed, RunRefused, lines
from offtrace.agents.runs.run import run as run_config
from offtrace.recipes.cli import fail


def run(config: Config, folder: Path, resume: Path | None) -> int:
    """Trains in ``folder`` and prints what came of it.

    Returns:
        the exit code, as :func:`offtrace.recipes.cli.run_recipe`.
    """
    try:
        summary = run_config(config, folder, resume)
    except RunRefused as error:
        return fail(str(error))
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not int(os.environ.get("LOCAL_RANK", 0)):  # only the first of several learners sums up
        print("\n".join(lines(config, summary, folder)))
    return 128 + summary.signal if summary.signal else 0
