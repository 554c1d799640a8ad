"""PPO's agent: whose rewards a row of a rollout goes on with, and what its configuration refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from offtrace.agents.config import ConfigError
from offtrace.agents.ppo import atari_config, control_config, pendulum_config

ENVS = 3


def settings(workers: int, unrolls: int, deal: str) -> Any:
    config: Any = pendulum_config()
    config.env.num_envs, config.collector.unroll, config.collector.num_workers = ENVS, 4, workers
    config.train.deal, config.train.unrolls, config.train.minibatches, config.train.epochs = deal, unrolls, 1, 1
    config.train.total_frames = 10 * ENVS * 4 * max(1, unrolls // ENVS)
    config.loss.normalize_reward = True
    config.validate()
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "unrolls", "deal"), [(0, 0, "steps"), (0, 0, "environments"), (2, 0, "steps"), (2, 6, "environments")]
)
def test_a_row_goes_on_where_the_last_one_of_its_environment_ended(workers: int, unrolls: int, deal: str) -> None:
    config = settings(workers, unrolls, deal)
    torch.manual_seed(0)
    agent, data = config.build()
    hook = data.on_rollout
    last: dict[int, torch.Tensor] = {}
    orders: set[tuple[int, ...]] = set()
    compared = 0

    def check(rollout: TensorDictBase) -> Any:
        nonlocal compared
        rows = data.environments(rollout, of_actor=ENVS).tolist()
        assert len(set(rows)) == len(rows) == (unrolls or ENVS)
        orders.add(tuple(row % ENVS for row in rows))
        for row, environment in enumerate(rows):
            if environment in last:
                compared += 1
                assert torch.equal(rollout["observation"][row, 0], last[environment])
            last[environment] = rollout["next", "observation"][row, -1].clone()
        return hook(rollout)

    data.on_rollout = check
    for _ in data.train_dataloader():
        pass
    data.shutdown()
    assert compared >= 20
    assert len(last) == ENVS * max(1, workers)
    assert (len(orders) > 1) == (deal == "environments"), "the rows came in another order"
    normalizer = agent.loss.reward_normalizer
    assert normalizer.running.shape == (ENVS * max(1, workers),)
    assert normalizer.returns.count == config.train.total_frames
    # the mean reward of random actions is some -6, and what was summed in ten rollouts of four steps more
    assert normalizer.variance.sqrt() > 5


def test_rewards_are_normalised_or_clipped() -> None:
    config = atari_config()
    assert not config.loss.normalize_reward
    assert not control_config().loss.normalize_reward
    config.loss.normalize_reward = True
    with pytest.raises(ConfigError) as raised:
        config.validate()
    assert str(raised.value) == (
        "loss.normalize_reward is true, and loss.reward_clip 1.0: normalize_reward must be false, or reward_clip null"
    )
