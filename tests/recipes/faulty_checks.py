"""Checks that end in every way; a process of its own finds them by name."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path


def found() -> str:
    print("noise")
    return "here"


def raises() -> str:
    raise OSError("the disk\nis gone")


def leaves() -> str:
    sys.exit(3)


def dies() -> str:
    os._exit(7)


def hangs(pids: Path) -> str:
    """With a process of its own, as an actor is; both in ``pids``."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    pids.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
    pids.with_suffix(".new").rename(pids)
    while True:  # an interruption does not end it
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(1000)
