"""The paper's throughput table: every row runs, and the synchronous ones are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_actor_begins_no_rollout_before_its_turn(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.ones(1, np.int64).tofile(tmp_path / "gate")
    monkeypatch.setenv(script.GATE, str(tmp_path / "gate"))
    gate = np.memmap(tmp_path / "gate", np.int64, "r+")
    env = script.steady(2, 0)
    env.reset()
    action = torch.zeros(2, dtype=torch.int64)
    for _ in range(script.UNROLL):
        env._advance(action)
    step = threading.Thread(target=env._advance, args=(action,), daemon=True)
    step.start()
    step.join(0.2)
    assert step.is_alive()
    gate[0] = 2
    step.join(60)
    assert not step.is_alive()
    env.close()


def test_the_table_says_what_failed_and_what_waiting_costs(script: ModuleType) -> None:
    speeds = {(0, "varying"): 100.0, (1, "varying"): 200.0, (3, "varying"): 300.0, (3, "steady"): 1234.5}
    assert script.line(3, ["steady", "varying"], speeds) == "| IMPALA | a rollout ahead | 1,234 | 300 |"
    assert script.line(1, ["steady", "varying"], speeds).endswith("| failed | 200 |")
    assert "IMPALA makes 3.00 times the steps of batched A2C, sync step" in script.ratios(speeds)
    assert "IMPALA makes 1.50 times the steps of batched A2C, sync trajectory" in script.ratios(speeds)
    assert "dynamic" not in script.ratios(speeds)


@pytest.mark.slow
def test_synchronous_and_asynchronous_rows_run(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", str(SCRIPT), "--rows", "0", "4", "--tasks", "varying", "--actors", "2",
        "--games", "1", "--seconds", "0.1", "--rounds", "1", "--figure", str(tmp_path / "bars.png"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True, cwd=tmp_path)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "batched" in line]
    assert [row[0] for row in rows] == ["| batched A2C, sync step", "| IMPALA, dynamic batching"]
    assert all(int(row[2].removesuffix(" |")) > 0 for row in rows), done.stdout + done.stderr
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
