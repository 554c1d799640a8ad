"""Two tasks as arrays, many at a time: a step of thirty-two costs as much as one of Gymnasium's does of two."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.networks import Policy

Array = np.ndarray[Any, Any]


class ArrayTask:
    """N tasks in arrays, each begun anew where it ended; subclasses say how one begins and goes on.

    Args:
        num_envs: N.
        seed: of its own generator.

    Attributes:
        first_return: of the first episode of each, NaN until it has ended, ``[N]``.
    """

    features: int
    num_actions: int
    limit: int
    """Steps after which an episode is cut off."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.num_envs = num_envs
        self.first_return = np.full(num_envs, np.nan)
        self._random = np.random.default_rng(seed)
        self._state = self._begin(num_envs)
        self._steps = np.zeros(num_envs, int)
        self._return = np.zeros(num_envs)

    def observation(self) -> Tensor:
        """``[N, features]``, float32."""
        return torch.from_numpy(self._seen(self._state).astype(np.float32))

    def step(self, action: Tensor) -> dict[str, Tensor]:
        """``"reward"``, ``"terminated"``, ``"done"`` ``[N]``, and the true successor ``[N, features]``."""
        self._state, reward, terminated = self._advance(self._state, action.numpy())
        self._steps += 1
        self._return += reward
        done = terminated | (self._steps >= self.limit)
        successor = self.observation()
        if done.any():
            first = done & np.isnan(self.first_return)
            self.first_return[first] = self._return[first]
            self._state[done] = self._begin(int(done.sum()))
            self._steps[done], self._return[done] = 0, 0
        flags = {"reward": reward.astype(np.float32), "terminated": terminated, "done": done}
        return {"observation": successor} | {name: torch.from_numpy(x) for name, x in flags.items()}

    def _begin(self, number: int) -> Array:
        raise NotImplementedError

    def _advance(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """State, reward and whether the MDP ended."""
        raise NotImplementedError

    def _seen(self, state: Array) -> Array:
        return state


class CartPole(ArrayTask):
    """Gymnasium's CartPole-v0 (Barto, Sutton and Anderson 1983): 1 for every step, 200 at most."""

    features, num_actions, limit = 4, 2, 200

    def _begin(self, number: int) -> Array:
        return self._random.uniform(-0.05, 0.05, (number, 4))

    def _advance(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        x, speed, angle, turning = state.T
        push = np.where(action == 1, 10.0, -10.0)
        mass, pole = 1.1, 0.05  # cart and pole; the pole's mass times half its length
        shared = (push + pole * turning**2 * np.sin(angle)) / mass
        falling = 9.8 * np.sin(angle) - np.cos(angle) * shared
        turn = falling / (0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / mass))
        drive = shared - pole * turn * np.cos(angle) / mass
        moved = np.stack([x + 0.02 * speed, speed + 0.02 * drive, angle + 0.02 * turning, turning + 0.02 * turn], 1)
        over = (np.abs(moved[:, 0]) > 2.4) | (np.abs(moved[:, 2]) > np.deg2rad(12))
        return moved, np.ones(len(moved)), over


class Catch(ArrayTask):
    """A ball falls through ten rows of seven, a paddle below moves by one a step: 1 if it meets the ball, else -1."""

    rows, columns = 10, 7
    features, num_actions, limit = 70, 3, 1000

    def _begin(self, number: int) -> Array:
        balls = self._random.integers(self.columns, size=number)
        return np.stack([np.zeros(number, int), balls, np.full(number, self.columns // 2)], 1)

    def _advance(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        row, ball, paddle = state.T
        paddle = np.clip(paddle + action - 1, 0, self.columns - 1)
        over = row + 1 == self.rows - 1
        return np.stack([row + 1, ball, paddle], 1), np.where(ball == paddle, 1.0, -1.0) * over, over

    def _seen(self, state: Array) -> Array:
        board, each = np.zeros((len(state), self.rows, self.columns)), np.arange(len(state))
        board[each, state[:, 0], state[:, 1]] = board[each, -1, state[:, 2]] = 1
        return board.reshape(len(state), -1)


@torch.no_grad()
def rollout(task: ArrayTask, policy: Policy, length: int) -> TensorDictBase:
    """``length`` steps ``[N, T]`` in the layout of TorchRL's collectors, from where the task stands."""
    encoder, head = policy.network.encoder, policy.network.head
    steps: dict[str, list[Tensor]] = defaultdict(list)
    successors: dict[str, list[Tensor]] = defaultdict(list)
    for _ in range(length):
        observation = task.observation()
        # on plain tensors: a TensorDict costs more than a step of these networks
        (logits,) = head(encoder(observation))
        dist = head.distribution(logits)
        action = dist.sample()
        found = {
            "observation": observation,
            "action": action,
            "logits": logits,
            "action_log_prob": dist.log_prob(action),
        }
        for name, value in found.items():
            steps[name].append(value)
        for name, value in task.step(action).items():
            successors[name].append(value)
    now = {name: torch.stack(values, 1) for name, values in steps.items()}
    following = {name: torch.stack(values, 1) for name, values in successors.items()}
    for name in ("reward", "terminated", "done"):
        following[name] = following[name].unsqueeze(-1)
    return TensorDict({**now, "next": following}, [task.num_envs, length])


def play(task: type[ArrayTask], policy: Policy, episodes: int, seed: int) -> float:
    """Mean return of whole episodes, actions sampled."""
    env = task(episodes, seed)
    while np.isnan(env.first_return).any():  # the first of each: whoever counts more of the short ones is biased
        rollout(env, policy, 1)
    return float(env.first_return.mean())
