"""Scores: whole episodes, evenly dealt, and normalised as published."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from offtrace.agents.runs.atari_scores import RANDOM_HUMAN, human_normalised
from offtrace.agents.runs.curves import plot_curves, read_curves
from offtrace.agents.runs.evaluation import evaluate
from offtrace.agents.runs.recording import save_gif
from offtrace.modules.envs import GymEnv, make_env
from offtrace.modules.networks import build_policy
from tests.agents.published_scores import IMPALA


@pytest.mark.parametrize(("column", "median"), [(0, 0.932), (1, 1.918)])
def test_published_medians_come_out(column: int, median: float) -> None:
    scores = [human_normalised(game, row[column]) for game, row in IMPALA.items()]
    assert len(scores) == len(RANDOM_HUMAN) == 57
    assert all(score is not None for score in scores)
    assert statistics.median(score for score in scores if score is not None) == pytest.approx(median, abs=5e-4)


def test_only_atari_is_normalised() -> None:
    assert human_normalised("CartPole-v1", 500) is None
    assert human_normalised("ALE/Pong-v5", 14.6) == pytest.approx(1.0)


def test_games_are_dealt_evenly_and_counted_whole() -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    result = evaluate(policy, make_env("CartPole-v1", 4, seed=1), 8)
    assert len(result.returns) == len(result.lengths) == 8
    assert result.returns == [float(length) for length in result.lengths]  # CartPole gives 1 a step
    assert result.mean == pytest.approx(np.mean(result.returns))
    assert result.std == pytest.approx(np.std(result.returns, ddof=1))


def test_modes() -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    greedy = [evaluate(policy, make_env("CartPole-v1", 2, seed=1), 2, mode="greedy").returns for _ in range(2)]
    assert greedy[0] == greedy[1]
    torch.manual_seed(0)
    sampled = [evaluate(policy, make_env("CartPole-v1", 6, seed=1), 6).returns for _ in range(2)]
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize(
    ("episodes", "mode", "words"), [(3, "sample", "positive multiple of the 2"), (2, "best", "mode must")]
)
def test_bad_arguments(episodes: int, mode: str, words: str) -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    with pytest.raises(ValueError, match=words):
        evaluate(policy, make_env("CartPole-v1", 2), episodes, mode=mode)  # type: ignore[arg-type]


class Breaking(gymnasium.Env[Any, Any]):
    """Episodes of five steps; from the ``good``-th on the third step of each is not finite."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, good: int) -> None:
        self.good, self.episode, self.steps = good, -1, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.episode, self.steps = self.episode + (self.steps > 0 or self.episode < 0), 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        broken = self.episode >= self.good and self.steps == 3
        return np.full(2, np.nan if broken else 0, np.float32), 1.0, self.steps == 5, False, {}


@pytest.mark.filterwarnings("ignore:broken:RuntimeWarning")
@pytest.mark.parametrize(("good", "returns"), [(9, [5.0] * 6), (2, [5.0] * 4), (0, [])])
def test_an_episode_in_which_the_simulator_fails_takes_its_turn(good: int, returns: list[float]) -> None:
    """A policy that always drives it there would be evaluated for ever."""
    policy = build_policy(network="mlp", observation_shape=[2], action_dim=1)
    env = GymEnv(lambda: Breaking(good), 2, name="broken")
    result = evaluate(policy, env, 6, max_steps=20)
    assert result.returns == returns
    assert result.dropped == 6 - len(returns) == env.dropped
    assert result.mean == 5 if returns else math.isnan(result.mean)


def test_curve_and_gif(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("eval/return,step,train/return\n,1000,1.5\n2.5,2000,\n,3000,2.0\n")
    assert read_curves(metrics)[:2] == ([(1000, 1.5), (3000, 2.0)], [(2000, 2.5)])
    plot_curves({"seed 0": [read_curves(metrics)]}, tmp_path / "curve.png", title="x", goal=2.0)
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    frames = [np.full((8, 8), value, np.uint8) for value in range(0, 250, 10)]
    save_gif(frames, tmp_path / "g.gif", scale=3, limit=10)
    gif = Image.open(tmp_path / "g.gif")
    assert gif.size == (24, 24)
    assert 1 < gif.n_frames <= 10  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "none.gif")


class Scripted(TensorDictModuleBase):
    """Plays the same list of actions [N], of one dimension, or [N, A] over and over, wherever the episodes stand."""

    in_keys: ClassVar[list[str]] = ["observation"]
    out_keys: ClassVar[list[str]] = ["action"]

    def __init__(self, actions: list[Any]) -> None:
        super().__init__()
        self.actions = actions
        self.steps = 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, step: TensorDict) -> TensorDict:
        step["action"] = torch.tensor(self.actions[self.steps % len(self.actions)]).view(len(step), -1)
        self.steps += 1
        return step


class Ends(gymnasium.Env[Any, Any]):
    """Episodes of three steps in the first environment, of two in the next, with actions from -2 to 6."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 6, (1,), np.float32)
    made = 0

    def __init__(self) -> None:
        self.length = 3 - Ends.made % 2
        Ends.made += 1
        self.steps = 0

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, np.float32), 0.0, False, self.steps == self.length, {}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_action_change_is_of_executed_actions_inside_episodes_that_count(scale: float) -> None:
    """Six steps: episodes 0 0 0 1 1 1 and 0 0 1 1 2 2, two of which count in each environment.

    Changes in parts of the range: environment 0 has 1/2, 1/2 | 1/4, 1/4 and environment 1 has 1 | 1/2 and a third
    episode that counts for nothing. Where an episode ends the action jumps, which is no change.
    """
    centred = [[-1, -1], [0, 1], [-1, -1], [1, 0], [0.5, 1], [1, -1]]
    actions = [[(x if scale == 1 else 2 + scale * x) for x in row] for row in centred]
    actions[1][1] *= 50  # clipped where it is executed
    env = GymEnv(Ends, 2, rescale_actions=scale == 1)
    result = evaluate(Scripted(actions), env, 4, mode="greedy")
    assert result.lengths == [3, 3, 2, 2]
    squares = [0.25, 0.25, 0.0625, 0.0625, 1, 0.25]
    assert result.action_change == pytest.approx((sum(squares) / len(squares)) ** 0.5)


class OneMoves(gymnasium.Env[Any, Any]):
    """Episodes of three steps; the range of the second action is a single number."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, low: list[float]) -> None:
        self.action_space = gymnasium.spaces.Box(np.array(low, np.float32), np.array([6, 3], np.float32))
        self.steps = 0

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(1, np.float32), 0.0, False, self.steps % 3 == 0, {}


def test_action_change_leaves_out_what_cannot_change() -> None:
    policy = Scripted([[[-2.0, 3.0]], [[6.0, 5.0]]])
    assert evaluate(policy, GymEnv(lambda: OneMoves([-2, 3]), 1), 2).action_change == pytest.approx(1)
    assert evaluate(policy, GymEnv(lambda: OneMoves([6, 3]), 1), 2).action_change is None


def test_action_change_of_extremes() -> None:
    env = GymEnv(Ends, 2)
    for actions, change in (([[6.0, 6.0], [-2.0, -2.0]], 1.0), ([[1.0, 3.0]], 0.0)):
        assert evaluate(Scripted(actions), env, 2).action_change == pytest.approx(change)
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    assert evaluate(policy, make_env("CartPole-v1", 2), 2).action_change is None
