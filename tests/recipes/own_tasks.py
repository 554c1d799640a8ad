"""Tasks with a fault, by import path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.data import Bounded

from offtrace.agents.runs.training import EVALUATION_SEED
from offtrace.modules.envs import ControlEnv
from offtrace.modules.envs.suite import control_suite


class Short(gymnasium.Env[Any, Any]):
    """Episodes of three steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps % 3 == 0, False, {}


class Stopped(Short):
    """Ends the process as a cluster's scheduler does, at step 60 of a run that finds no file ``again``."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        found = super().step(action)
        if self.steps == 60 and not Path("again").exists():
            Path("again").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return found


def dead(num_envs: int, seed: int) -> ControlEnv:
    """A simulator that never comes back from its thirtieth step on."""
    return diverging(num_envs, seed, last=30)


def hopeless(num_envs: int, seed: int) -> ControlEnv:
    """As :func:`diverging`, in every twentieth step of evaluation too: no episode comes to its end."""
    return diverging(num_envs, seed, evaluation=True)


def diverging(num_envs: int, seed: int, evaluation: bool = False, last: int = 10**9) -> ControlEnv:
    """Cartpoles with episodes of 25 steps; MuJoCo diverges in every twentieth step of training."""

    def load(seed: int) -> Any:
        env = control_suite().load("cartpole", "swingup", task_kwargs={"random": seed, "time_limit": 0.25})
        steps, before = [0], env.task.before_step

        def before_step(action: Any, physics: Any) -> None:
            before(action, physics)
            steps[0] += 1
            if steps[0] % 20 == 0 or steps[0] > last:
                physics.data.qvel[:] = np.nan

        if evaluation or not EVALUATION_SEED <= seed < EVALUATION_SEED + 16:
            env.task.before_step = before_step
        return env

    return ControlEnv(load, num_envs, seed=seed, name="diverging")


def wide(num_envs: int, seed: int) -> ControlEnv:
    """Actions from -2 to 2, as TorchRL's environments may have them."""
    env = ControlEnv("cartpole-swingup", num_envs, seed=seed)
    env.action_spec = Bounded(-2.0, 2.0, shape=(num_envs, 1), dtype=torch.float32)
    return env


def repeated(num_envs: int, seed: int) -> ControlEnv:
    """Four frames for an action."""
    return ControlEnv("cartpole-swingup", num_envs, seed=seed, action_repeat=4)
