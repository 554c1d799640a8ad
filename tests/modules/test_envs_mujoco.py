"""Gymnasium's MuJoCo tasks, which need no dm_control."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from offtrace.modules.envs import GymEnv, make_env

pytest.importorskip("mujoco", reason="needs MuJoCo")

from gymnasium.envs.mujoco import MujocoEnv


def test_it_is_the_environment_stepped_by_hand() -> None:
    env = make_env("HalfCheetah-v5", 2, seed=3)
    single = gymnasium.make("HalfCheetah-v5")
    observation, _ = single.reset(seed=4)
    state, rng = env.reset(), np.random.default_rng(0)
    for count in range(1, 1003):
        np.testing.assert_array_equal(state["observation"][1].numpy(), observation.astype(np.float32))
        action = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
        state["action"] = torch.from_numpy(action)
        step, state = env.step_and_maybe_reset(state)
        observation, _, _, truncated, _ = single.step(action[1])
        np.testing.assert_array_equal(step["next", "observation"][1].numpy(), observation.astype(np.float32))
        assert step["next", "truncated"].all() == truncated == (count == 1000)
        assert not step["next", "terminated"].any()
        if truncated:
            observation, _ = single.reset()
    assert step["next", "valid"].all()


@pytest.mark.slow
def test_mujocos_word_on_gymnasiums_models_is_not_ours(tmp_path: Path) -> None:
    """It would be printed for each environment, and left behind as a file."""
    script = "from offtrace.modules.envs import make_env; make_env('HalfCheetah-v5', 2).rollout(3)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "deprecated" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_simulator_that_diverges_costs_its_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = GymEnv("HalfCheetah-v5", 2)
    unwrapped = env._envs[1].unwrapped
    assert isinstance(unwrapped, MujocoEnv)
    state = env.reset()
    for count in range(1, 5):
        if count == 3:
            unwrapped.data.qvel[:] = np.nan
        state["action"] = torch.zeros(2, 6)
        if count == 3:
            with pytest.warns(RuntimeWarning, match=r"environment 1 failed at step 3"):
                step, state = env.step_and_maybe_reset(state)
        else:
            step, state = env.step_and_maybe_reset(state)
        assert step["next", "observation"].isfinite().all()
        assert step["next", "valid"].flatten().tolist() == [True, count != 3]
        assert step["next", "truncated"].flatten().tolist() == [False, count == 3]
    assert env.dropped == 1


WITHOUT_DM_CONTROL = """
import importlib.util
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dm_control", "labmaze"):
            raise ImportError(name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "dm_control" else found(name, *rest)
sys.meta_path.insert(0, Blocked())

import offtrace.modules
from offtrace.modules.envs import ControlEnv, check_task_options, make_env

env = make_env("HalfCheetah-v5", 2, pictures=True)
env.rollout(3)
try:
    print(env.render().shape)
except RuntimeError as error:
    print("cannot render" in str(error))
walker = "walker-walk"
for refused in (check_task_options, {}), (make_env, 1), (ControlEnv, 1):
    try:
        refused[0](walker, refused[1])
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_works_without_dm_control(tmp_path: Path) -> None:
    """As on Python 3.13, on which it cannot be installed: only its own tasks are refused, in one sentence."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DM_CONTROL], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rendered, *refusals = done.stdout.splitlines()
    assert rendered in ("(480, 480, 3)", "True")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (
        refusals
        == [
            "the task 'walker-walk' needs dm_control, which is not installed; offtrace installs it on Python 3.11 and "
            f"3.12, and this is {version}: use one of these, or a MuJoCo task of Gymnasium, such as HalfCheetah-v5"
        ]
        * 3
    )
