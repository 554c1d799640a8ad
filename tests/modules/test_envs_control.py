"""dm_control against its own ``Environment.step``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import check_env_specs

from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import EnvironmentFailure, check_name, env_info, make_env
from offtrace.modules.envs.suite import MISSING, TASKS, control_suite, control_tasks, has_dm_control

if not has_dm_control():
    pytest.skip(f"this file {MISSING}", allow_module_level=True)

suite = control_suite()

from dm_control.rl.control import PhysicsError  # noqa: E402 - after a renderer was chosen

from offtrace.modules.envs import ControlEnv  # noqa: E402 - which cannot be imported without MuJoCo


def flat(observation: Any) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten": False}, {"last_step": True}, {"action_repeat": 3}, {"pixels": True, "height": 32, "width": 40}],
)
def test_specs(options: dict[str, Any]) -> None:
    check_env_specs(make_env("walker-walk", 2, **options))


def test_the_names_of_the_tasks() -> None:
    assert {domain: tuple(tasks) for domain, tasks in suite.TASKS_BY_DOMAIN.items()} == TASKS
    assert control_tasks() == tuple("-".join(task) for task in suite.ALL_TASKS)


QUICK = ("cartpole-swingup", "walker-walk", "manipulator-bring_ball", "lqr-lqr_2_1")
"""An easy task, one with a body, one with targets that move, and one whose actions have no bounds."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in control_tasks()]
)
def test_every_task_is_dm_control_stepped_by_hand(name: str) -> None:
    """Bit for bit, action repeat included, through the time limit and the restart after it."""
    domain, task = name.split("-")
    kwargs = {"time_limit": 0.15}
    number, repeat = (1, 1) if domain in ("dog", "quadruped") else (2, 2)
    env = make_env(name, number, seed=3, action_repeat=repeat, **kwargs)
    singles = [suite.load(domain, task, task_kwargs={"random": 3 + i, **kwargs}) for i in range(number)]
    steps = [single.reset() for single in singles]
    state, rng, ends = env.reset(), np.random.default_rng(0), 0
    spec = singles[0].action_spec()
    bounded = spec.maximum < 1e9
    for _ in range(12):
        for index, step in enumerate(steps):
            np.testing.assert_array_equal(state["observation"][index].numpy(), flat(step.observation))
        action = rng.uniform(-1, 1, (number, *spec.shape)).astype(np.float32)
        state["action"] = torch.from_numpy(action)
        got, state = env.step_and_maybe_reset(state)
        for index, single in enumerate(singles):
            middle = np.where(bounded, (spec.maximum + spec.minimum) / 2, 0)
            half = np.where(bounded, (spec.maximum - spec.minimum) / 2, 1)
            reward = 0.0
            for _ in range(repeat):
                steps[index] = single.step(middle + action[index].astype(np.float64) * half)
                reward += float(steps[index].reward)
                if steps[index].last():
                    break
            following = got["next"][index]
            np.testing.assert_array_equal(following["observation"].numpy(), flat(steps[index].observation))
            assert float(following["reward"]) == np.float32(reward)
            assert bool(following["truncated"]) == (steps[index].last() and steps[index].discount == 1)
            assert bool(following["terminated"]) == (steps[index].last() and steps[index].discount == 0)
            assert bool(following["valid"])
            if steps[index].last():
                ends += 1
                steps[index] = single.reset()
    assert ends


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole-swingup", "cheetah-run"])
def test_whole_episodes(name: str) -> None:
    env = make_env(name, 2, seed=7)
    singles = [suite.load(*name.split("-"), task_kwargs={"random": 7 + index}) for index in range(2)]
    for single in singles:
        single.reset()
    state, rng = env.reset(), np.random.default_rng(0)
    for count in range(1, 1002):
        action = rng.uniform(-1, 1, (2, *env.action_spec.shape[1:])).astype(np.float32)
        state["action"] = torch.from_numpy(action)
        got, state = env.step_and_maybe_reset(state)
        for index, single in enumerate(singles):
            step = single.step(action[index]) if count <= 1000 else single.reset()
            wanted = got["next", "observation"][index].numpy() if count <= 1000 else None
            if wanted is not None:
                np.testing.assert_array_equal(wanted, flat(step.observation))
                assert float(got["next", "reward"][index]) == np.float32(step.reward)
        assert got["next", "truncated"].all() == (count == 1000)
        assert not got["next", "terminated"].any()
        if count == 1000:
            assert got["next", "episode_end"].all()
            assert got["next", "episode_length"].tolist() == [[1000], [1000]]
            assert not torch.equal(got["next", "observation"], state["observation"])
    assert got["next", "episode_length"].tolist() == [[1], [1]]


def test_each_environment_has_a_seed_of_its_own() -> None:
    both = make_env("walker-walk", 2, seed=5).reset()["observation"]
    second = make_env("walker-walk", 1, seed=6).reset()["observation"]
    assert torch.equal(both[1:], second)
    assert not torch.equal(both[0], both[1])


def test_entries_instead_of_one_vector() -> None:
    whole, parts = (make_env("walker-walk", 2, seed=1, flatten=value) for value in (True, False))
    vector, entries = whole.reset()["observation"], parts.reset()["observation"]
    assert list(entries.keys()) == ["orientations", "height", "velocity"]
    assert [tuple(value.shape) for value in entries.values()] == [(2, 14), (2,), (2, 9)]
    torch.testing.assert_close(torch.cat([x.view(2, -1) for x in entries.values()], 1), vector, rtol=0, atol=0)


def test_bounds_of_any_size() -> None:
    """quadruped: the second actuator goes from -1 to 1.1, the third from -0.8 to 0.8; lqr has no bounds."""
    env = ControlEnv("quadruped-walk", 1)
    scale = env._simulators[0].scale
    ones = np.ones((1, 12), np.float32)
    np.testing.assert_allclose(scale(ones)[0, :3], [1, 1.1, 0.8], rtol=1e-12)
    np.testing.assert_allclose(scale(-5 * ones)[0, :3], [-1, -1, -0.8], rtol=1e-12)
    np.testing.assert_allclose(scale(0 * ones)[0, :3], [0, 0.05, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(ControlEnv("lqr-lqr_2_1", 1)._simulators[0].scale(np.full((1, 1), 0.3)), [[0.3]])
    assert (env.action_spec.space.low == -1).all()
    assert (env.action_spec.space.high == 1).all()


def test_action_repeat_counts_as_frames() -> None:
    env = make_env("cartpole-swingup", 1, action_repeat=8)
    assert env_info("cartpole-swingup", action_repeat=8).frame_skip == 8
    rollout = env.rollout(126, break_when_any_done=False)
    assert rollout["next", "truncated"][0].flatten().nonzero().flatten().tolist() == [124]


def test_images() -> None:
    env = make_env("cartpole-swingup", 2, pixels=True, frame_stack=2, height=24, width=32)
    state = env.reset()
    assert state["observation"].shape == (2, 6, 24, 32)
    assert state["observation"].dtype == torch.uint8
    assert torch.equal(state["observation"][:, :3], state["observation"][:, 3:])
    physics = [simulator.physics for simulator in env._simulators]
    for _ in range(3):
        before = state["observation"]
        state["action"] = torch.ones(2, 1)
        _, state = env.step_and_maybe_reset(state)
        assert torch.equal(state["observation"][:, :3], before[:, 3:])
        for index in range(2):
            frame = physics[index].render(24, 32, camera_id=0)
            np.testing.assert_array_equal(state["observation"][index, 3:].numpy(), frame.transpose(2, 0, 1))
    assert env_info("cartpole-swingup", pixels=True).observation_shape == (9, 84, 84)


def test_pictures_for_a_video_show_the_end_of_an_episode() -> None:
    env = make_env("cartpole-swingup", 2, time_limit=0.05)
    state = env.reset()
    first = env.render()
    assert (first.shape, first.dtype) == ((240, 320, 3), np.uint8)
    for _ in range(5):
        state["action"] = torch.ones(2, 1)
        step, state = env.step_and_maybe_reset(state)
        shown = env.render()
    assert step["next", "truncated"].all()
    fresh = env._simulators[0].physics.render(240, 320, camera_id=0)
    assert (shown != fresh).any()
    state["action"] = torch.zeros(2, 1)
    env.step_and_maybe_reset(state)
    np.testing.assert_array_equal(env.render(), env._simulators[0].physics.render(240, 320, camera_id=0))
    env.reset()
    np.testing.assert_array_equal(env.render(), env._simulators[0].physics.render(240, 320, camera_id=0))


@pytest.mark.slow
def test_without_a_renderer_states_work_and_images_say_what_is_missing() -> None:
    code = """
from offtrace.modules.envs import EnvironmentFailure, make_env
make_env("cartpole-swingup", 1).rollout(3)
try:
    make_env("cartpole-swingup", 1, pixels=True)
except EnvironmentFailure as error:
    print(error)
"""
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("cartpole-swingup: this machine cannot render (RuntimeError: No OpenGL rendering")
    assert "images need EGL or OSMesa" in out.stdout


class Failing:
    """A cartpole whose simulator fails in a chosen way at its fifth step, in the environment of seed 1 only."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, seed: int) -> Any:
        env = suite.load("cartpole", "swingup", task_kwargs={"random": seed})
        if seed != 1:
            return env
        task, how, calls = env.task, self.how, [0]
        before, reward, observation = task.before_step, task.get_reward, task.get_observation

        def before_step(action: Any, physics: Any) -> None:
            calls[0] += 1
            before(action, physics)
            if calls[0] == 5 and how == "raise":
                raise PhysicsError("Physics state is invalid")
            if calls[0] == 5 and how == "diverge":
                physics.data.qvel[:] = np.nan

        def get_observation(physics: Any) -> Any:
            found = observation(physics)
            if calls[0] == 5 and how == "observation":
                calls[0] += 1  # once
                found["position"][1] = np.nan
            return found

        def get_reward(physics: Any) -> float:
            return float("inf") if calls[0] == 5 and how in ("reward", "terminal") else reward(physics)

        task.before_step, task.get_reward, task.get_observation = before_step, get_reward, get_observation
        task.get_termination = lambda physics: 0.0 if calls[0] == 5 and how == "terminal" else None
        return env


@pytest.mark.parametrize("how", ["raise", "diverge", "observation", "reward", "terminal"])
def test_a_failing_simulator_drops_the_episode_and_goes_on(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into a file
    env = ControlEnv(Failing(how), 3, seed=0, name="cartpole")
    sound = ControlEnv("cartpole-swingup", 3, seed=0)
    state, other = env.reset(), sound.reset()
    for count in range(1, 12):
        state["action"] = other["action"] = torch.full((3, 1), 0.5)
        before = state["observation"][1].clone()
        if count == 5:
            with pytest.warns(RuntimeWarning, match=r"cartpole: environment 1 failed at step 5 .* dropped, number 1"):
                step, state = env.step_and_maybe_reset(state)
        else:
            step, state = env.step_and_maybe_reset(state)
        wanted, other = sound.step_and_maybe_reset(other)
        for key in ("observation", "reward"):
            assert step["next", key].isfinite().all()
            assert torch.equal(step["next", key][::2], wanted["next", key][::2])  # the others notice nothing
        assert step["next", "valid"].flatten().tolist() == [True, count != 5, True]
        assert step["next", "truncated"].flatten().tolist() == [False, count == 5, False]
        assert not step["next", "terminated"].any()
        assert not step["next", "episode_end"].any()
        if count == 5:
            assert torch.equal(step["next", "observation"][1], before)
            assert float(step["next", "reward"][1]) == 0
            assert state["valid"].all()
            assert state["is_init"].flatten().tolist() == [False, True, False]
    assert env.dropped == 1
    assert step["next", "episode_length"].flatten().tolist() == [11, 6, 11]


def test_a_collector_says_of_each_step_whether_it_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policy = TensorDictModule(nn.Linear(5, 1), in_keys=["observation"], out_keys=["action"])
    env_fn = lambda seed: ControlEnv(Failing("diverge"), 2, seed=0, name="cartpole")  # noqa: E731
    with make_collector(env_fn, policy, frames_per_batch=16, num_workers=0) as collector:
        with pytest.warns(RuntimeWarning, match=r"environment 1 failed at step"):
            rollout = next(collector)
        failed = (~rollout["valid"]).nonzero()[:, :2].tolist()
        assert failed == (rollout["next", "truncated"]).nonzero()[:, :2].tolist()
        assert len(failed) == 1
        assert "valid" not in rollout["next"].keys()  # noqa: SIM118 - a TensorDict
        assert next(collector)["valid"].all()


def test_what_is_no_fault_of_the_simulator_stops_the_run() -> None:
    env = make_env("cartpole-swingup", 2)
    state = env.reset()
    state["action"] = torch.tensor([[0.0], [float("nan")]])
    with pytest.raises(EnvironmentFailure, match=r"policy gave environment 1 an action that is not finite at step 1"):
        env.step(state)


def test_a_simulator_that_never_starts() -> None:
    def broken(seed: int) -> Any:
        env = suite.load("cartpole", "swingup", task_kwargs={"random": seed})
        env.task.get_observation = lambda physics: {"position": np.array([np.nan])}
        return env

    with pytest.raises(EnvironmentFailure, match=r"10 episodes in a row could not be started: .* not finite"):
        ControlEnv(broken, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("walker-wlak", r"the domain 'walker' has no task 'wlak'; did you mean walker-walk"),
        ("wlaker-walk", r"unknown environment 'wlaker-walk'; did you mean walker-walk"),
        ("cheeta-run", r"did you mean cheetah-run"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    for function in (check_name, lambda name: make_env(name, 1), lambda name: ControlEnv(name, 1)):
        with pytest.raises(ValueError, match=words):
            function(name)


def own_cartpole(seed: int, time_limit: float = 1.0) -> Any:
    return control_suite().load("cartpole", "swingup", task_kwargs={"random": seed, "time_limit": time_limit})


def test_a_function_gets_the_options() -> None:
    env, expected = ControlEnv(own_cartpole, 2, seed=3, time_limit=0.1), make_env("cartpole-swingup", 2, seed=3)
    assert torch.equal(env.reset()["observation"], expected.reset()["observation"])
    assert env.rollout(10)["next", "truncated"][0, :, 0].tolist() == [False] * 9 + [True]
    with pytest.raises(ValueError, match=r"^own_cartpole was given speed=3; its function takes \(seed, time_limit="):
        ControlEnv(own_cartpole, 1, speed=3)


@pytest.mark.parametrize("argument", ["num_envs", "action_repeat", "height", "frame_stack"])
def test_numbers_out_of_range(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} is 0; it must be at least 1"):
        ControlEnv("cartpole-swingup", **{"num_envs": 1, argument: 0})


def test_images_have_no_entries() -> None:
    with pytest.raises(ValueError, match=r"flatten is False; with pixels an observation is one image: it must be True"):
        make_env("cartpole-swingup", 1, pixels=True, flatten=False)


def test_names_and_descriptions() -> None:
    for name in ("walker-walk", "ball_in_cup-catch", "humanoid_CMU-run", "HalfCheetah-v5"):
        check_name(name)
    info = env_info("walker-walk")
    assert (info.observation_shape, info.num_actions, info.action_dim, info.frame_skip) == ((24,), None, 6, 1)
    assert (info.kind, info.masked, info.frame_stack) == ("continuous", False, 1)
    parts = env_info("walker-walk", flatten=False)
    assert parts.observation_shape == {"orientations": (14,), "height": (), "velocity": (9,)}
    with pytest.raises(ValueError, match=r"'walker-walk' cannot be made: .*speed"):
        make_env("walker-walk", 1, speed=3)


def test_a_closed_environment_has_freed_its_simulators() -> None:
    env = make_env("cartpole-swingup", 2)
    env.reset()
    physics = [simulator.physics for simulator in env._simulators]
    assert all(hasattr(one, "_data") for one in physics)
    env.close()
    assert not any(hasattr(one, "_data") for one in physics)
