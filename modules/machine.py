"""What this machine has for a run. Imports no torch: a command line is answered before that."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Machine(NamedTuple):
    """What actors and learners share.

    Attributes:
        cores: that this process may use.
        gpus: that torch can use.
    """

    cores: int
    gpus: int = 0


def this_machine() -> Machine:
    """The machine that this process runs on, as far as it may use it."""
    return Machine(available_cores(), _gpus() if may_have_gpu() else 0)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, by its affinity, and by the time that its control groups allow it.

    Args:
        root: of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(root))]))


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: those of the machine, or fewer by its control groups.

    Args:
        root: of the file system.

    Raises:
        OSError: the system does not tell.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError) as error:
        raise OSError("the system does not tell how much memory it has") from error
    for folder, second in _groups(root, "memory"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / ("memory.max" if second else "memory.limit_in_bytes")).read_text()))
    return min(limits)


def _quotas(root: Path) -> Iterator[float]:
    """Limits of the control groups that this process is in, in cores."""
    for folder, second in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
            yield _quota(folder, second=second)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, and of those around them; whether of the second version.

    Some of them are not there.
    """
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (mounted / controllers, mounted / (controller if controllers else "unified")):
            place = mount / path.lstrip("/")  # in a container often not there, but what is around it is
            for folder in (place, *place.parents):
                if not folder.is_relative_to(mount):
                    break
                yield folder, not controllers


def _quota(folder: Path, *, second: bool) -> float:
    """The limit of one control group, of the second version or the first, in cores."""
    if second:
        allowed, period = (folder / "cpu.max").read_text().split()
    else:
        allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(allowed) < 0:
        raise ValueError("no limit")
    return int(allowed) / int(period)


def may_have_gpu() -> bool:
    """Whether a GPU driver that torch could use shows itself; only torch can tell how many GPUs there are."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, WSL
    return not sys.platform.startswith("linux") or any(os.path.exists(path) for path in drivers)


def _gpus() -> int:
    """GPUs that CUDA shows to this process; none where torch is not built for CUDA, or nvidia-smi is not there."""
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch is None or torch.origin is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        built = runpy.run_path(str(Path(torch.origin).with_name("version.py"))).get("cuda")
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = [line.split(", ") for line in told.splitlines()]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        wanted = [word.strip() for word in shown.split(",") if word.strip()]
        found = [gpu for gpu in found if any(gpu[0] == word or gpu[1].startswith(word) for word in wanted)]
    return len(found) if built else 0
