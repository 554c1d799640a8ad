"""Any Gymnasium environment, several at a time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torchrl.data import Bounded, Categorical, TensorSpec, Unbounded

from offtrace.modules.envs.base import EnvironmentFailure, StepResult, VectorEnv
from offtrace.modules.envs.names import unknown
from offtrace.modules.envs.suite import control_suite, has_display


class GymEnv(VectorEnv):
    """``N`` Gymnasium environments stepped one after the other.

    Observations: ``Box``, integers of 8 bits kept, everything else float32; vectors ``[D]``, images as they come.
    Actions: ``Discrete`` as int64 indices from 0, ``Box`` as float32 that is clipped to its bounds here, so that a
    policy may sample outside of them. ``info["action_mask"]`` is passed on where the environment gives one.

    With ``Box`` actions an observation or a reward that is not finite is taken for a simulator's failure: the episode
    is dropped, as it is in :class:`ControlEnv`. So is one in which MuJoCo warned that it diverged: it starts in the
    middle of an episode then, and Gymnasium goes on as if nothing had happened. With ``Discrete`` ones it is an error.

    Args:
        env: a Gymnasium id, or a function that makes one environment.
        num_envs: N.
        seed: environment i is seeded with ``seed + i`` at its first reset.
        last_step: also write the last action and reward.
        rescale_actions: ``Box`` actions in [-1, 1], clipped to that and mapped linearly to the bounds. A bound that is
            infinite leaves the clipped action as it is.
        name: for messages; the id by default.
        kwargs: passed to ``gymnasium.make``.

    Raises:
        ValueError: on an unknown id, or a space the agents cannot deal with.
    """

    def __init__(
        self,
        env: str | Callable[[], gymnasium.Env[Any, Any]],
        num_envs: int,
        *,
        seed: int = 0,
        last_step: bool = False,
        rescale_actions: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        make = partial(_make, env, kwargs) if isinstance(env, str) else env
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
        self._envs = [make() for _ in range(num_envs)]
        label = name or (env if isinstance(env, str) else str(getattr(env, "__name__", "environment")))
        first = self._envs[0]
        observation, self._image = _observation_spec(label, first.observation_space)
        action, self._low, self._high = _action_spec(label, first.action_space)
        self._scale: tuple[Any, Any] | None = None
        if rescale_actions and self._low is not None:
            bounded = np.isfinite(self._high) & np.isfinite(self._low)
            low, high = np.where(bounded, self._low, -1), np.where(bounded, self._high, 1)
            self._scale = (low + high) / 2, (high - low) / 2
            action = Bounded(-1.0, 1.0, shape=action.shape, dtype=torch.float32)
        self.renders = first.render_mode == "rgb_array"
        self._mujoco = any(base.__name__ == "MujocoEnv" for base in type(first.unwrapped).__mro__)
        self._warnings = _divergence_warnings() if self._mujoco else []
        self._offset = int(getattr(first.action_space, "start", 0))
        mask = first.reset(seed=seed)[1].get("action_mask")
        super().__init__(
            label,
            num_envs,
            observation=observation,
            action=action,
            last_step=last_step,
            masked=mask is not None,
            fallible=self._low is not None,
        )
        if self._scale is None and self._low is not None and bool(np.isfinite([self._low, self._high]).all()):
            self.action_bounds = torch.from_numpy(self._low), torch.from_numpy(self._high)
        self._seed = seed
        self._started = False
        self._watched = False
        self._final_frame: np.ndarray | None = None
        self._current = torch.empty(0)
        self._masks: list[Any] = [None] * num_envs

    def render(self) -> np.ndarray:
        """A picture of environment 0, uint8 ``[height, width, 3]``.

        An episode that ended in the last step is seen where it ended, if pictures were taken before.

        Raises:
            EnvironmentFailure: it was not made with ``render_mode="rgb_array"``, or this machine lacks what it needs.
        """
        if not self.renders:
            raise EnvironmentFailure(f"{self.name} was not made with render_mode='rgb_array'; it has no pictures")
        if not self._watched:
            self._watched = True
            if self._mujoco:
                control_suite()  # it finds an OpenGL that works without a display
            if not has_display():
                os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without one, but complains
        if self._final_frame is not None:
            return self._final_frame
        try:
            return np.asarray(self._envs[0].render())
        except Exception as error:  # whatever a missing library leads to
            raise EnvironmentFailure(
                f"{self.name}: this machine cannot render ({type(error).__name__}: {error})"
            ) from error

    def _start(self) -> tuple[Tensor, Tensor | None]:
        self._final_frame = None
        seeds = [None if self._started else self._seed + index for index in range(len(self._envs))]
        self._started = True
        resets = [env.reset(seed=seed) for env, seed in zip(self._envs, seeds, strict=True)]
        self._current = self._stack([observation for observation, _ in resets])
        self._check("first observation", self._current)
        self._masks = [info.get("action_mask") for _, info in resets]
        return self._current, self._mask_tensor()

    def _advance(self, action: Tensor) -> StepResult:
        numbers = action.numpy()
        if self._scale is not None:
            middle, half = self._scale
            numbers = middle + np.clip(numbers, -1.0, 1.0) * half
        if self._low is not None:
            numbers = np.clip(numbers, self._low, self._high)
        else:
            numbers = numbers + self._offset
        if self.fallible and not np.isfinite(numbers).all():  # not the simulator's fault
            raise EnvironmentFailure(f"{self.name}: the policy gave an action that is not finite at step {self._steps}")
        successors, currents, rewards, terminated, truncated, valid = [], [], [], [], [], []
        self._final_frame = None
        for index, env in enumerate(self._envs):
            try:
                observation, reward, term, trunc, info = env.step(numbers[index])
                failure = self._failure(env, observation, reward) if self.fallible else None
                valid.append(failure is None)
                if failure is not None:
                    observation, reward, term, trunc = self._current[index].numpy(), 0.0, False, True
                    self._drop(index, failure)
                successors.append(observation)
                if term or trunc:
                    if self._watched and index == 0:
                        self._final_frame = self.render()
                    observation, info = env.reset()
            except Exception as error:
                raise EnvironmentFailure(
                    f"{self.name}: environment {index} raised {type(error).__name__} at step {self._steps}: {error}"
                ) from error
            currents.append(observation)
            rewards.append(float(reward))
            terminated.append(bool(term))
            truncated.append(bool(trunc))
            self._masks[index] = info.get("action_mask")
        successor = self._stack(successors)
        ended = torch.tensor(terminated) | torch.tensor(truncated)
        self._current = successor
        if bool(ended.any()):
            self._current = self._stack(currents)
            self._check("first observation", self._current)
        return StepResult(
            successor,
            torch.tensor(rewards),
            torch.tensor(terminated),
            torch.tensor(truncated),
            ended,
            self._mask_tensor(),
            torch.tensor(valid) if self.fallible else None,
        )

    def _failure(self, env: gymnasium.Env[Any, Any], observation: Any, reward: Any) -> str | None:
        """What became of the simulator in a step, if it failed."""
        # warnings are counted from the last reset on
        if self._mujoco and env.unwrapped.data.warning.number[self._warnings].any():
            return "MuJoCo's state diverged"
        with np.errstate(over="ignore"):  # in the precision in which they are given away
            given: tuple[Any, Any] = np.asarray(observation, np.float32), np.float32(reward)
        for what, value in zip(("an observation", "a reward"), given, strict=True):
            if not np.isfinite(value).all():
                return f"{what} that is not finite"
        return None

    def _following(self) -> Tensor:
        return self._current

    def _stack(self, observations: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(observations).astype(np.uint8 if self._image else np.float32, copy=False))

    def _mask_tensor(self) -> Tensor | None:
        if self._masks[0] is None:
            return None
        return torch.from_numpy(np.stack(self._masks).astype(bool))

    def close(self, *, raise_if_closed: bool = True, **_: Any) -> None:
        """Closes all environments."""
        if not self.is_closed:
            for env in self._envs:
                env.close()
        super().close(raise_if_closed=raise_if_closed)


def _make(env_id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        with _without_deprecations(env_id):
            return gymnasium.make(env_id, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(unknown(env_id)) from error
    except (gymnasium.error.Error, ImportError, TypeError) as error:  # TypeError: an option that it does not have
        raise ValueError(f"the environment {env_id!r} cannot be made: {error}") from error


@contextlib.contextmanager
def _without_deprecations(env_id: str) -> Iterator[None]:
    """While Gymnasium's models are read: MuJoCo prints what is outdated in them, and leaves a file right here."""
    known = gymnasium.registry.get(env_id)
    if known is None or "gymnasium.envs.mujoco" not in str(known.entry_point):
        yield
        return
    import mujoco

    if not hasattr(mujoco, "set_mju_user_warning"):
        yield
        return
    before = mujoco.get_mju_user_warning()
    tell = before or (lambda text: print(text, file=sys.stderr))
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else tell(text))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _divergence_warnings() -> list[int]:
    import mujoco

    return [int(number) for name, number in mujoco.mjtWarning.__members__.items() if "BAD" in name]


def _observation_spec(name: str, space: spaces.Space[Any]) -> tuple[TensorSpec, bool]:
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{name} has observations of {space}; the agents read Box spaces only: wrap the environment")
    if space.dtype == np.uint8:
        return Bounded(0, 255, shape=space.shape, dtype=torch.uint8), True
    return Unbounded(space.shape, dtype=torch.float32), False


def _action_spec(name: str, space: spaces.Space[Any]) -> tuple[TensorSpec, Any, Any]:
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), dtype=torch.int64), None, None
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        return Unbounded(space.shape, dtype=torch.float32), low, high
    raise ValueError(f"{name} has actions of {space}; the agents act in Discrete and one-dimensional Box spaces only")
