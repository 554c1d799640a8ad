"""Smoothed actions from the policy to the environment and into the replay: everything is about what was executed."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from offtrace.modules import Replay, make_collector
from offtrace.modules.envs import GymEnv
from offtrace.modules.networks import build_policy

BETA, STEPS = 0.6, 12


class Recording(gymnasium.Env[Any, Any]):
    """Episodes of five steps; keeps the actions that it gets."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    received: ClassVar[list[Any]] = []
    steps = 0

    def _observation(self) -> Any:
        return np.random.default_rng(self.steps).uniform(-1, 1, 3).astype(np.float32)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Recording.received.append(np.array(action))
        self.steps += 1
        return self._observation(), 1.0, False, self.steps % 5 == 0, {}


def density(kind: str, loc: Tensor, scale: Tensor, sample: Tensor) -> Tensor:
    """log pi(sample|x), from the definition."""
    if kind == "gaussian":
        return Normal(loc, scale).log_prob(sample).sum(-1)
    return (Normal(loc, scale).log_prob(torch.atanh(sample)) - torch.log1p(-sample.square())).sum(-1)


@pytest.mark.parametrize("kind", ["tanh", "gaussian"])
def test_what_is_executed_is_what_is_stored(kind: str) -> None:
    torch.manual_seed(0)
    Recording.received.clear()
    policy = build_policy(
        head=kind, critic=None, activation="relu", observation_shape=[3], action_dim=2, hidden=[8], smoothing=BETA,
        head_options={"init_scale": 0.2} if kind == "gaussian" else {},
    )  # fmt: skip
    replay = Replay(100, num_envs=1, batch_size=64)
    env_fn = lambda seed: GymEnv(Recording, 1, seed=seed, rescale_actions=True)  # noqa: E731
    with make_collector(env_fn, policy, frames_per_batch=STEPS, num_workers=0) as collector:
        rollout = next(collector)
        replay.extend(rollout)
    executed, first = rollout["action"][0].double(), rollout["is_init"][0, :, 0]
    assert first.nonzero().flatten().tolist() == [0, 5, 10]
    received = torch.from_numpy(np.stack(Recording.received[-STEPS:])).double()
    torch.testing.assert_close(received, executed.clamp(-1, 1), rtol=0, atol=1e-6)

    before = torch.cat([torch.zeros(1, 2), executed[:-1]])
    sample = torch.where(first.unsqueeze(-1), executed, (executed - BETA * before) / (1 - BETA))
    assert (sample - executed)[~first].abs().min(0).values.max() > 1e-3, "the low pass changes something"
    log_prob = density(kind, rollout["loc"][0].double(), rollout["scale"][0].double(), sample)
    log_prob = torch.where(first, log_prob, log_prob - 2 * math.log(1 - BETA))
    torch.testing.assert_close(rollout["action_log_prob"][0].double(), log_prob, rtol=0, atol=1e-3)

    batch = replay.sample()
    for index in range(64):
        place = int((rollout["observation"][0] == batch["observation"][index]).all(-1).nonzero()[0, 0])
        for key in ("action", "action_log_prob", "loc", *(["pre_tanh"] if kind == "tanh" else [])):
            assert torch.equal(batch[key][index], rollout[key][0, place]), key
    if kind == "tanh":
        torch.testing.assert_close(batch["pre_tanh"].tanh(), batch["action"], rtol=0, atol=1e-5)
