"""Gymnasium environments and the user's own, against the same environments stepped by hand."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import EnvironmentFailure, GymEnv, env_info, make_env


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("last_step", [False, True])
def test_specs(name: str, last_step: bool) -> None:
    check_env_specs(make_env(name, 2, last_step=last_step))


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_it_is_the_environment_stepped_by_hand(name: str) -> None:
    """500 steps of three environments, through ends and time limits, with the true final observation each time."""
    env = make_env(name, 3, seed=5, last_step=True)
    singles = [gymnasium.make(name) for _ in range(3)]
    current = [single.reset(seed=5 + index)[0] for index, single in enumerate(singles)]
    state, rng, ends = env.reset(), np.random.default_rng(0), 0
    init, sums = [True] * 3, [0.0] * 3
    for _ in range(500):
        torch.testing.assert_close(state["observation"], torch.tensor(np.stack(current), dtype=torch.float32))
        assert state["is_init"].flatten().tolist() == init
        if name == "CartPole-v1":
            actions = torch.tensor(rng.integers(2, size=3))
        else:
            actions = torch.tensor(rng.normal(size=(3, 1)) * 3, dtype=torch.float32)  # out of bounds: clipped
        state["action"] = actions
        step, state = env.step_and_maybe_reset(state)
        for index, single in enumerate(singles):
            action = actions[index].numpy() if name == "Pendulum-v1" else int(actions[index])
            if name == "Pendulum-v1":
                action = np.clip(action, -2, 2)
            observation, reward, terminated, truncated, _ = single.step(action)
            got, sums[index] = step["next"][index], sums[index] + float(reward)
            torch.testing.assert_close(got["observation"], torch.tensor(observation, dtype=torch.float32))
            assert float(got["reward"]) == pytest.approx(float(reward), rel=1e-6)
            assert (bool(got["terminated"]), bool(got["truncated"])) == (terminated, truncated)
            assert float(got["episode_reward"]) == pytest.approx(sums[index], rel=1e-4)
            assert torch.equal(got["last_action"], actions[index])
            init[index] = terminated or truncated
            if init[index]:
                ends += 1
                assert bool(got["episode_end"])
                observation, sums[index] = single.reset()[0], 0.0
                assert float(state["last_reward"][index]) == 0
            current[index] = observation
    assert ends >= 6


def test_bounds_are_rescaled_on_request() -> None:
    env, raw = (make_env("Pendulum-v1", 1, seed=2, rescale_actions=value) for value in (True, False))
    check_env_specs(env)
    env, raw = (make_env("Pendulum-v1", 1, seed=2, rescale_actions=value) for value in (True, False))
    first, second = env.reset(), raw.reset()
    for action in (0.25, -0.75, 3.0):
        first["action"], second["action"] = torch.tensor([[action]]), torch.tensor([[2 * action]])
        one, first = env.step_and_maybe_reset(first)
        two, second = raw.step_and_maybe_reset(second)
        assert torch.equal(one["next", "observation"], two["next", "observation"])
        assert torch.equal(one["next", "reward"], two["next", "reward"])


class Broken(gymnasium.Env[Any, Any]):
    """Fails in a chosen way at its fifth step."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def __init__(self, how: str) -> None:
        self.how, self.steps = how, 0

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward = np.zeros(2, np.float32), 1.0
        if self.steps == 5:
            if self.how == "raise":
                raise KeyError("no such wall")
            if self.how == "observation":
                observation = np.array([0, np.nan], np.float32)
            if self.how == "reward":
                reward = float("inf")
        return observation, reward, False, False, {}


def broken() -> gymnasium.Env[Any, Any]:
    return Broken("raise")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "broken: environment 0 raised KeyError at step 5: 'no such wall'"),
        ("observation", "environment 0 returned a observation that is not finite at step 5"),
        ("reward", "environment 0 returned a reward that is not finite at step 5"),
    ],
)
def test_failures_name_environment_step_and_reason(how: str, words: str) -> None:
    env = GymEnv(lambda: Broken(how), 2, name="broken")
    state = env.reset()
    for _ in range(4):
        state["action"] = torch.zeros(2, dtype=torch.int64)
        _, state = env.step_and_maybe_reset(state)
    state["action"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(EnvironmentFailure, match=words):
        env.step_and_maybe_reset(state)


class Wild(gymnasium.Env[Any, Any]):
    """Episodes of four steps, and ``how`` numbers become too large or none at all."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, how: str) -> None:
        self.how, self.steps, self.resets = how, 0, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.resets += 1
        broken = self.how == "reset" and self.resets > 2  # the constructor resets once
        return np.full(2, np.nan if broken else 0.0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        large = 1e300 if self.steps == 2 else 1.0
        observation = np.full(2, large if self.how == "observation" else 1.0)
        return observation, large if self.how == "reward" else 1.0, self.steps % 4 == 0, False, {}


@pytest.mark.filterwarnings("ignore:wild:RuntimeWarning")
@pytest.mark.parametrize("how", ["observation", "reward"])
def test_numbers_that_single_precision_does_not_hold_cost_their_episode(how: str) -> None:
    env = GymEnv(lambda: Wild(how), 1, name="wild")
    rollout = env.rollout(6, break_when_any_done=False)
    assert rollout["next", "valid"].flatten().tolist() == [True, False, True, True, True, True]
    assert rollout["next", "observation"].isfinite().all()
    assert rollout["next", "reward"].isfinite().all()


def test_a_first_observation_that_is_not_finite_is_an_error() -> None:
    env = GymEnv(lambda: Wild("reset"), 1, name="wild")
    with pytest.raises(EnvironmentFailure, match="wild: environment 0 returned a first observation that is not finite"):
        env.rollout(6, break_when_any_done=False)


def test_actions_of_another_shape_are_refused() -> None:
    env = make_env("Pendulum-v1", 2)
    state = env.reset().set("action", torch.zeros(2, 3))
    with pytest.raises(EnvironmentFailure, match=r"Pendulum-v1: .* actions of shape \[2, 3\]; they must be \[2, 1\]"):
        env.step(state)


def test_a_reset_in_the_middle_of_an_episode_is_refused() -> None:
    """The old episode would go on under the name of a new one."""
    env = TransformedEnv(GymEnv("CartPole-v1", 2, seed=0), StepCounter(max_steps=3))
    state = env.reset()
    for _ in range(2):
        state["action"] = torch.ones(2, dtype=torch.int64)
        state = env.step(state)["next"]
    state["_reset"] = torch.tensor([[False], [True]])
    with pytest.raises(EnvironmentFailure, match=r"CartPole-v1: environment 1 is reset in the middle of its episode"):
        env.reset(state)
    one = TransformedEnv(GymEnv("CartPole-v1", 1, seed=0), StepCounter(max_steps=3))
    rollout = one.rollout(7, break_when_any_done=False)  # all of them are one
    assert rollout["is_init"].flatten().tolist() == [True, False, False] * 2 + [True]
    assert (rollout["observation"][0, [0, 3, 6]].abs() < 0.05).all()  # CartPole's starts
    state = env.base_env.reset()  # all at once
    assert state["is_init"].all()
    for _ in range(60):  # and each where it ended
        state["action"] = torch.ones(2, dtype=torch.int64)
        _, state = env.base_env.step_and_maybe_reset(state)


OWN = """
import gymnasium
from offtrace.modules.envs import GymEnv
def single(): return gymnasium.make("CartPole-v1")
def batched(num_envs, seed): return GymEnv("CartPole-v1", num_envs, seed=seed)
def typo(): return wrong_name
def wrong_inside(num_envs, seed): return len(num_envs)
def plain(num_envs, seed):
    from torchrl.envs import GymEnv, SerialEnv
    return SerialEnv(num_envs, lambda: GymEnv("CartPole-v1"))
def nothing(): return 3
def one_hot(num_envs, seed):
    from torchrl.data import OneHot
    env = batched(num_envs, seed)
    env.action_spec = OneHot(2).expand(num_envs, 2)
    return env
def several(num_envs, seed):
    from torchrl.data import MultiCategorical
    env = batched(num_envs, seed)
    env.action_spec = MultiCategorical([2, 3]).expand(num_envs, 2)
    return env
"""


def test_own_environments_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_envs.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    reference = make_env("CartPole-v1", 3, seed=4).reset()["observation"]
    for function in ("single", "batched"):
        env = make_env(f"own_envs:{function}", 3, seed=4)
        assert env.batch_size == (3,)
        assert torch.equal(env.reset()["observation"], reference)
    with pytest.raises(NameError, match=r"wrong_name"):
        make_env("own_envs:typo", 1)
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        make_env("own_envs:wrong_inside", 1)
    with pytest.raises(ValueError, match=r"'own_envs:plain' has no 'is_init' among its observations; a TorchRL"):
        env_info("own_envs:plain")
    for function, spec in (("one_hot", "OneHot"), ("several", "MultiCategorical")):
        with pytest.raises(
            ValueError, match=rf"'own_envs:{function}' has actions of the spec {spec}; it must be Categ"
        ):
            env_info(f"own_envs:{function}")
    with pytest.raises(
        ValueError, match=r"'own_envs:nothing' returned int; it must return a TorchRL EnvBase or a gymnasium"
    ):
        make_env("own_envs:nothing", 1)
    with pytest.raises(
        ValueError, match=r"'own_envs:missing' cannot be imported: the module 'own_envs' has no 'missing'"
    ):
        make_env("own_envs:missing", 1)
    sys.modules.pop("own_envs")


def test_cartpole_without_velocities_is_cartpole() -> None:
    env = make_env("offtrace.modules.envs.memory:cartpole_positions", 3, seed=4)
    whole = make_env("CartPole-v1", 3, seed=4)
    seen, expected = env.reset(), whole.reset()
    for _ in range(60):
        assert torch.equal(seen["observation"], expected["observation"][:, [0, 2]])
        action = torch.randint(2, (3,))
        step, other = (x.step_and_maybe_reset(td.set("action", action)) for x, td in ((env, seen), (whole, expected)))
        for key in ("reward", "terminated", "truncated", "done"):
            assert torch.equal(step[0]["next", key], other[0]["next", key])
        seen, expected = step[1], other[1]


def test_descriptions() -> None:
    cartpole, pendulum, pong = (env_info(name) for name in ("CartPole-v1", "Pendulum-v1", "pong"))
    assert (cartpole.observation_shape, cartpole.num_actions, cartpole.action_dim) == ((4,), 2, None)
    assert (pendulum.observation_shape, pendulum.num_actions, pendulum.action_dim) == ((3,), None, 1)
    assert (pong.observation_shape, pong.num_actions, pong.frame_skip) == ((4, 84, 84), 6, 4)
    assert [info.kind for info in (cartpole, pendulum, pong)] == ["discrete", "continuous", "discrete"]
    assert [info.frame_stack for info in (cartpole, pendulum, pong)] == [1, 1, 4]
    assert not any(info.masked for info in (cartpole, pendulum, pong))


def test_pictures_show_the_end_of_an_episode() -> None:
    pytest.importorskip("pygame", reason="Gymnasium draws CartPole with pygame")
    env, single = (
        make_env("CartPole-v1", 2, seed=3, pictures=True),
        gymnasium.make("CartPole-v1", render_mode="rgb_array"),
    )
    single.reset(seed=3)
    state = env.reset()
    np.testing.assert_array_equal(env.render(), single.render())
    for count in range(1, 12):
        state["action"] = torch.ones(2, dtype=torch.int64)
        step, state = env.step_and_maybe_reset(state)
        over = single.step(1)[2]
        assert bool(step["next", "terminated"][0]) == over
        np.testing.assert_array_equal(env.render(), single.render(), err_msg=str(count))
        if over:
            single.reset()
    assert count > 10
    with pytest.raises(EnvironmentFailure, match="CartPole-v1 was not made with render_mode='rgb_array'"):
        make_env("CartPole-v1", 1).render()


class Canvas(gymnasium.Env[Any, Any]):
    """Draws the number of its step into the one picture that it has, if it has one."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = "rgb_array"

    def __init__(self, blank: bool = False, time_limit: int = 100) -> None:
        self.picture = None if blank else np.zeros((8, 8, 3), np.uint8)
        self.steps, self.time_limit = 0, time_limit

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, False, self.steps == self.time_limit, {}

    def render(self) -> Any:
        if self.picture is not None:
            self.picture[:] = self.steps
        return self.picture


def test_pictures_are_kept_by_who_takes_them() -> None:
    env = GymEnv(Canvas, 1)
    state, pictures = env.reset(), []
    for _ in range(4):
        pictures.append(env.render())
        _, state = env.step_and_maybe_reset(state.set("action", torch.zeros(1, dtype=torch.int64)))
    assert [int(picture[0, 0, 0]) for picture in pictures] == [0, 1, 2, 3]


def test_a_function_gets_the_options() -> None:
    env = GymEnv(Canvas, 2, time_limit=3)
    assert env.rollout(3)["next", "truncated"][:, :, 0].tolist() == [[False, False, True]] * 2
    with pytest.raises(ValueError, match=r"^Canvas was given speed=3; its function takes \(blank=False, time_limit="):
        GymEnv(Canvas, 2, speed=3)


def test_no_picture_is_refused() -> None:
    env = GymEnv(lambda: Canvas(blank=True), 1, name="mine")
    env.reset()
    with pytest.raises(EnvironmentFailure, match=r"^mine: render\(\) returned None; it must return a picture$"):
        env.render()


def test_catch_is_won_by_following_the_ball_and_seldom_by_chance() -> None:
    """As images: the ball's column and the paddle's are where the pixels are."""
    env = make_env("offtrace.modules.envs.catch:Catch", 8, seed=0)
    check_env_specs(env)
    assert env.observation_spec["observation"].shape == (8, 1, 84, 84)
    for follow in (True, False):
        state, rewards = env.reset(), []
        for _ in range(9 * 40):
            image = state["observation"][:, 0].bool()
            ball, paddle = image[:, :72].any(1).int().argmax(1), image[:, 72:80].any(1).int().argmax(1)
            towards = 1 + torch.sign(ball - paddle)
            state["action"] = towards if follow else torch.randint(3, (8,))
            step, state = env.step_and_maybe_reset(state)
            rewards += step["next", "reward"][step["next", "done"]].tolist()
        mean = sum(rewards) / len(rewards)
        assert len(rewards) == 8 * 40
        assert mean == 1 if follow else -0.85 < mean < -0.55


class Closing(gymnasium.Env[Any, Any]):
    """Leaves a mark in a folder each time it is closed; number 1 raises then."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.closed = folder, number, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1.0, False, False, {}

    def close(self) -> None:
        self.closed += 1
        (self.folder / f"{self.number} closed {self.closed}").touch()
        if self.number == 1:
            raise OSError("the server is gone")


def make_closing(folder: Path, seed: int = 0) -> GymEnv:
    numbers = itertools.count()
    return GymEnv(lambda: Closing(folder, next(numbers)), 3, name="mine")


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_environment_is_closed_once(tmp_path: Path) -> None:
    """One that raises then keeps no other from it, and ends nothing: it is not needed any more."""
    env = TransformedEnv(make_closing(tmp_path), StepCounter())
    env.reset()
    assert not marks(tmp_path)
    with pytest.warns(RuntimeWarning, match="mine: the environment raised OSError when it was closed: the server is"):
        env.close()
    env.close()
    assert marks(tmp_path) == ["0 closed 1", "1 closed 1", "2 closed 1"]


@pytest.mark.filterwarnings("ignore:mine:RuntimeWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collector_closes_its_environments(num_workers: int, tmp_path: Path) -> None:
    policy = TensorDictModule(lambda x: x[..., 0].long(), in_keys=["observation"], out_keys=["action"])
    collector = make_collector(partial(make_closing, tmp_path), policy, frames_per_batch=12, num_workers=num_workers)
    next(iter(collector))
    collector.shutdown()
    assert marks(tmp_path) == ["0 closed 1", "1 closed 1", "2 closed 1"]
