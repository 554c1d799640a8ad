"""The GPU kernels without a GPU. With one, test_returns_execution.py compares it with the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "fused_script.py"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton comes with the GPU builds of torch; pip install triton runs these without a GPU",
)
@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_kernels(what: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    if what == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
