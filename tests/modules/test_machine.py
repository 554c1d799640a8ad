"""Cores and GPUs that a process may use, whatever the machine has."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from offtrace.modules import machine
from offtrace.modules.machine import Machine, available_cores, memory_limit, this_machine

GPUS = "0, GPU-aaaa\n1, GPU-bbbb\n"


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),
        # the tightest of those around it; a path of the host's, which a container does not see
        (
            {
                "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            4,
        ),
        ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "500000 100000\n"}, 5),
        # the first version
        (
            {
                "proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/x\n0::/x\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/x\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)  # fmt: skip
def test_cores_are_what_the_control_groups_allow(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    write(tmp_path, **files)
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 64_000),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/memory.max": "500\n"}, 500),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 64_000),
        ({"proc/self/cgroup": "2:cpu:/\n1:memory:/a\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "600\n"}, 600),
        ({"proc/self/cgroup": "1:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63}\n"}, 64_000),
    ],
)
def test_memory_is_what_the_control_groups_allow(
    files: dict[str, str], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 64}.get)
    write(tmp_path, **files)
    assert memory_limit(tmp_path) == limit


@pytest.mark.parametrize(
    ("shown", "built", "wanted"),
    [
        (None, "'12.8'", 2),
        (None, "None", 0),
        ("", "'12.8'", 0),
        ("0", "'12.8'", 1),
        ("1,0", "'12.8'", 2),
        ("GPU-bb", "'12.8'", 1),
    ],
)
def test_gpus_are_those_that_torch_can_use(
    shown: str | None, built: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the driver's program, without importing torch, or a command line would wait for that."""
    write(tmp_path, **{"nvidia-smi": f"#!/bin/sh\nprintf '{GPUS}'\n", "torch/version.py": f"cuda = {built}\n"})
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "may_have_gpu", lambda: True)
    spec = type("Spec", (), {"origin": str(tmp_path / "torch" / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = this_machine()
    assert found == Machine(available_cores(), wanted)
    monkeypatch.setenv("PATH", "")
    assert this_machine() == Machine(available_cores()), "without that program nothing is taken for granted"
