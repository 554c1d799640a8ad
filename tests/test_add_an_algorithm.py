"""docs/add_an_algorithm.md is true: its files train, are resumed, act, and train with two learners."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, load_policy, read_checkpoint

PAGE = Path(__file__).resolve().parent.parent / "docs" / "add_an_algorithm.md"
SMALL = ["--env.num_envs=4", "--collector.unroll=16", "--train.eval_episodes=2", "--train.record=false"]


def files() -> dict[str, str]:
    return dict(re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    return tmp_path


def recipe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_files_are_short() -> None:
    assert set(files()) == {"reinforce_loss.py", "reinforce.py", "train.py"}
    assert sum(len(text.splitlines()) for text in files().values()) < 150


@pytest.mark.slow
def test_it_trains_is_resumed_and_acts(folder: Path) -> None:
    done = recipe(folder, *SMALL, "--train.name=one", "--train.total_frames=640")
    assert done.returncode == 0, done.stderr
    last = folder / "runs" / "one" / "checkpoints" / "last.ckpt"
    before = read_checkpoint(last)[CHECKPOINT_KEY]["updates"]
    assert before == 10
    done = recipe(folder, "--resume=runs/one", "--train.total_frames=1280")
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(last)[CHECKPOINT_KEY]["updates"] == 20
    policy = load_policy(last)
    assert policy.num_actions == 2


@pytest.mark.slow
def test_two_learners_share_the_frames(folder: Path) -> None:
    done = recipe(
        folder, *SMALL, "--train.name=two", "--train.total_frames=640", "--train.devices=2", "--train.accelerator=cpu"
    )
    assert done.returncode == 0, done.stderr
    checkpoint = read_checkpoint(folder / "runs" / "two" / "checkpoints" / "last.ckpt")
    assert checkpoint[CHECKPOINT_KEY]["updates"] == 5
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


@pytest.mark.slow
def test_mistakes_are_one_sentence(folder: Path) -> None:
    for words, message in (
        (["--loss.estimator=gea"], "; did you mean gae?"),
        (["--loss.gamma=2"], "loss.gamma is 2.0; it must be between 0 and 1"),
        (["--loss.value_coeff=1"], "there is no flag --loss.value_coeff; did you mean --loss.value_coef?"),
    ):
        done = recipe(folder, *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (folder / "runs").exists()
