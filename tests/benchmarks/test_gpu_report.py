"""The report of a machine: it goes on whatever fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_report.py"
pytestmark = pytest.mark.slow


def test_parts_follow_each_other_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator is not there for it, and that is one line; what comes behind is measured."""
    (tmp_path / "ale_py.py").write_text("raise ImportError('no emulator here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, str(SCRIPT), "--minutes", "0.2", "--parts", "machine", "emulator", "learner"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    parts = done.stdout.split("\n### ")[1:]
    assert [part.split("\n", 1)[0] for part in parts] == ["machine", "emulator", "learner"]
    assert "cores" in parts[0]
    assert "**failed**" in parts[1]
    assert "| shallow |" in parts[2]
