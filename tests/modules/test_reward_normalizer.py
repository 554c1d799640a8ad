"""Rewards divided by the running standard deviation of the discounted return: against a direct sum in float64."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from offtrace.modules.losses import PPOLoss
from offtrace.modules.networks import ObservationNormalizer, RewardNormalizer
from tests.modules.test_impala_loss import make, rollout
from tests.modules.test_ppo_loss import OPTIONS

GAMMA = 0.97


class Direct:
    """Every discounted return of every environment, as the definition says: the sum since its episode's beginning."""

    def __init__(self, number: int) -> None:
        self.rewards: list[list[float]] = [[] for _ in range(number)]  # of the episode under way
        self.returns: list[float] = []

    def step(self, environment: int, reward: float, done: bool, valid: bool = True) -> None:
        so_far = self.rewards[environment]
        so_far.append(reward if valid else 0.0)
        if valid:
            self.returns.append(math.fsum(GAMMA**age * x for age, x in enumerate(reversed(so_far))))
        if done:
            so_far.clear()


@pytest.mark.parametrize("masked", [False, True])
def test_the_variance_is_that_of_all_returns_over_hundreds_of_rollouts(masked: bool) -> None:
    rng = np.random.default_rng(0)
    normalizer, direct = RewardNormalizer(GAMMA), Direct(3)
    assert normalizer.variance == 1
    for _ in range(300):
        time = int(rng.integers(1, 9))
        reward, done = 3 + 5 * rng.normal(size=(3, time)), rng.random((3, time)) < 0.15
        valid = (rng.random((3, time)) < 0.9) if masked else np.ones((3, time), bool)
        for environment in range(3):
            for step in range(time):
                direct.step(environment, reward[environment, step], done[environment, step], valid[environment, step])
        given = torch.as_tensor(np.where(valid, reward, np.nan))
        normalizer.update(given, torch.as_tensor(done), valid=torch.as_tensor(valid) if masked else None)
        expected = np.var(direct.returns)
        assert float(normalizer.variance) == pytest.approx(expected, rel=1e-10)
        assert float(normalizer.returns.mean) == pytest.approx(np.mean(direct.returns), rel=1e-10)
    assert float(normalizer.returns.count) == len(direct.returns)
    x = torch.tensor([1.0, -2.0, 1e6, -1e6])
    scale = math.sqrt(np.var(direct.returns) + 1e-8)
    torch.testing.assert_close(normalizer(x), torch.tensor([1 / scale, -2 / scale, 10, -10]))
    assert normalizer(x).dtype == torch.float32


def test_rows_in_any_order_of_several_actors_go_on_where_their_environment_was() -> None:
    rng = np.random.default_rng(1)
    normalizer, direct = RewardNormalizer(GAMMA), Direct(6)
    for turn in range(40):
        worker, order = turn % 2, rng.permutation(3)
        reward, done = rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.2
        for row, environment in enumerate(order):
            for step in range(4):
                direct.step(3 * worker + environment, reward[row, step], done[row, step])
        environments = torch.as_tensor(3 * worker + order), 6
        normalizer.update(torch.as_tensor(reward), torch.as_tensor(done), environments=environments)
        assert float(normalizer.variance) == pytest.approx(np.var(direct.returns), rel=1e-10)


def test_a_row_that_begins_an_episode_goes_on_from_nothing() -> None:
    """An actor that was replaced never told of the end."""
    normalizer = RewardNormalizer(0.5)
    no = torch.zeros(2, 1, dtype=torch.bool)
    normalizer.update(torch.tensor([[8.0], [8.0]]), no)
    normalizer.update(torch.tensor([[2.0], [2.0]]), no, first=torch.tensor([False, True]))
    assert float(normalizer.returns.mean) == pytest.approx((8 + 8 + 6 + 2) / 4)


def test_statistics_are_saved_and_the_episodes_under_way_are_not() -> None:
    one = RewardNormalizer(GAMMA)
    one.update(torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    other = RewardNormalizer(GAMMA)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.variance, other.variance)
    assert "running" not in one.state_dict()


def test_ppo_learns_from_divided_rewards_and_leaves_those_of_the_rollout() -> None:
    policy = make()
    loss, plain = PPOLoss(policy, normalize_reward=True, **OPTIONS), PPOLoss(policy, **OPTIONS)
    td = rollout()
    raw = td["next", "reward"].clone()
    before = copy.deepcopy(td)
    told = loss.prepare(td)
    assert torch.equal(td["next", "reward"], raw)
    normalizer: Any = RewardNormalizer(OPTIONS["gamma"])
    normalizer.update(raw.squeeze(-1), td["next", "done"].squeeze(-1))
    assert told["return_std"] == normalizer.variance.sqrt() != 1
    before["next", "reward"] = normalizer(raw)
    plain.prepare(before)
    for key in ("advantage", "value_target", "state_value"):
        assert torch.equal(td[key], before[key]), key
    torch.testing.assert_close(loss(td), plain(before))
    # a rollout that was not prepared is divided by what is known, and changes nothing
    std = loss.prepare(copy.deepcopy(td))["return_std"]
    unprepared = rollout()
    unprepared["next", "reward"] = loss.reward_normalizer(raw)  # type: ignore[misc]
    torch.testing.assert_close(loss(rollout()), plain(unprepared))
    assert loss.reward_normalizer.variance.sqrt() == std  # type: ignore[union-attr]
    assert any(name.startswith("reward_normalizer.") for name in loss.state_dict())
    assert not any(name.startswith("reward_normalizer.") for name in plain.state_dict())


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"normalize_reward is True and reward_clip 1\.0; only one of them can be given"
    ):
        PPOLoss(make(), normalize_reward=True, reward_clip=1.0)
    with pytest.raises(ValueError, match="clip must be positive or None, got 0"):
        RewardNormalizer(GAMMA, clip=0)


@pytest.mark.parametrize("epsilon", [0.0, float("nan"), float("inf")])
def test_an_epsilon_that_would_divide_by_zero(epsilon: float) -> None:
    kinds: list[Any] = [partial(RewardNormalizer, 0.99), partial(ObservationNormalizer, [3])]
    for kind in kinds:
        with pytest.raises(ValueError, match=f"epsilon must be positive and finite, got {epsilon}"):
            kind(epsilon=epsilon)
