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
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded

from offtrace.modules.envs.base import EnvironmentFailure, StepResult, VectorEnv
from offtrace.modules.envs.names import check_takes, unknown
from offtrace.modules.envs.spaces import Actions, Observations, Row, is_finite, row_of
from offtrace.modules.envs.suite import choose_renderer, has_display


class GymEnv(VectorEnv):
    """``N`` Gymnasium environments stepped one after the other.

    Observations: ``Box`` as it comes, integers of 8 bits kept, everything else float32; images ``[height, width,
    channels]`` of 8 bits, of 1, 3 or 4 channels, as ``[channels, height, width]``; ``Discrete`` as one-hot;
    ``Dict`` and ``Tuple`` as one vector ``[D]``, see :class:`~offtrace.modules.envs.spaces.Observations`.
    Actions: ``Discrete`` as int64 indices from 0, ``MultiDiscrete`` and ``MultiBinary`` as one index over all
    combinations, ``Box`` as float32 that is clipped to its bounds here, so that a policy may sample outside of them,
    and given on in the dtype of the space, rounded where that is of integers.
    ``info["action_mask"]`` is passed on where the environment gives one, as the mask of the combinations where there
    are some; see :class:`~offtrace.modules.envs.spaces.Actions`.

    With ``Box`` actions an observation or a reward that is not finite is taken for a simulator's failure: the episode
    is dropped, as it is in :class:`ControlEnv`. So is one in which MuJoCo warned that it diverged: it starts in the
    middle of an episode then, and Gymnasium goes on as if nothing had happened. With ``Discrete`` ones it is an error.

    Args:
        env: a Gymnasium id, or a function that makes one environment.
        num_envs: N.
        seed: environment i is seeded with ``seed + i`` at its first reset.
        last_step: also write the last action and reward.
        flatten: False: ``Dict`` and ``Tuple`` observations as ``("observation", name)`` each, for a network that reads
            them.
        rescale_actions: ``Box`` actions in [-1, 1], clipped to that and mapped linearly to the bounds. A bound that is
            infinite leaves the clipped action as it is.
        name: for messages; the id by default.
        kwargs: passed to ``gymnasium.make``, or to the function.

    Raises:
        ValueError: on an unknown id, an option that the environment or the function does not take, or a space the
            agents cannot deal with.
    """

    def __init__(
        self,
        env: str | Callable[..., gymnasium.Env[Any, Any]],
        num_envs: int,
        *,
        seed: int = 0,
        last_step: bool = False,
        flatten: bool = True,
        rescale_actions: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
        label = name or (env if isinstance(env, str) else str(getattr(env, "__name__", "environment")))
        if not isinstance(env, str):
            check_takes(label, env, **kwargs)
        make = partial(_make, env, kwargs) if isinstance(env, str) else partial(env, **kwargs)
        self._envs = [make() for _ in range(num_envs)]
        first = self._envs[0]
        self._observations = Observations(label, first.observation_space, flatten=flatten)
        self._actions = Actions(label, first.action_space)
        action, self._low, self._high = self._actions.spec, self._actions.low, self._actions.high
        self._scale: tuple[Any, Any] | None = None
        if rescale_actions and self._low is not None and self._high is not None:
            bounded = np.isfinite(self._high) & np.isfinite(self._low)
            low, high = np.where(bounded, self._low, -1), np.where(bounded, self._high, 1)
            self._scale = low / 2 + high / 2, high / 2 - low / 2  # the bounds may be the largest numbers
            action = Bounded(-1.0, 1.0, shape=action.shape, dtype=torch.float32)
        self.renders = first.render_mode == "rgb_array"
        self._mujoco = any(base.__name__ == "MujocoEnv" for base in type(first.unwrapped).__mro__)
        self._warnings = _divergence_warnings() if self._mujoco else []
        self._masked = first.reset(seed=seed)[1].get("action_mask") is not None
        if self._masked and not self._actions.discrete:
            raise ValueError(f"{label} gives an action_mask, but its actions are {first.action_space}, which take none")
        super().__init__(
            label,
            num_envs,
            observation=self._observations.spec,
            action=action,
            last_step=last_step,
            masked=self._masked,
            fallible=not self._actions.discrete,
        )
        bounds = None if self._low is None or self._high is None else (self._low, self._high)
        if self._scale is None and bounds is not None and bool(np.isfinite(bounds).all()):
            self.action_bounds = torch.from_numpy(bounds[0]), torch.from_numpy(bounds[1])
        self._seed = seed
        self._started = False
        self._watched = False
        self._final_frame: np.ndarray | None = None
        self._current: Tensor | TensorDictBase = torch.empty(0)
        self._masks: list[np.ndarray] = []

    def render(self) -> np.ndarray:
        """A picture of environment 0, uint8 ``[height, width, 3]``.

        An episode that ended in the last step is seen where it ended, if pictures were taken before.

        Raises:
            EnvironmentFailure: it was not made with ``render_mode="rgb_array"``, its ``render()`` returned nothing, or
                this machine lacks what it needs.
        """
        if not self.renders:
            raise EnvironmentFailure(f"{self.name} was not made with render_mode='rgb_array'; it has no pictures")
        if not self._watched:
            self._watched = True
            if self._mujoco:
                choose_renderer()
            if not has_display():
                os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without one, but complains
        if self._final_frame is not None:
            return self._final_frame
        try:
            picture = self._envs[0].render()
        except Exception as error:  # whatever a missing library leads to
            raise EnvironmentFailure(
                f"{self.name}: this machine cannot render ({type(error).__name__}: {error})"
            ) from error
        if picture is None:
            raise EnvironmentFailure(f"{self.name}: render() returned None; it must return a picture")
        return np.array(picture)  # an environment may draw into one canvas all the time

    def _start(self) -> tuple[Tensor | TensorDictBase, Tensor | None]:
        self._final_frame = None
        seeds = [None if self._started else self._seed + index for index in range(len(self._envs))]
        self._started = True
        resets = [env.reset(seed=seed) for env, seed in zip(self._envs, seeds, strict=True)]
        self._current = self._observations.stack([self._observations.row(observation) for observation, _ in resets])
        self._check("first observation", self._current)
        self._masks = [self._mask_of(info) for _, info in resets] if self._masked else []
        return self._following(), _batch(self._masks)

    def _advance(self, action: Tensor) -> StepResult:
        numbers = self._numbers(action)
        successors, currents, rewards, terminated, truncated, valid = [], [], [], [], [], []
        masks, following = [*self._masks], [*self._masks]
        self._final_frame = None
        for index, env in enumerate(self._envs):
            try:
                observation, reward, term, trunc, info = env.step(numbers[index])
                row, failure = self._observed(env, observation, reward)
                valid.append(failure is None)
                if failure is not None:
                    row, reward, term, trunc = row_of(self._current, index), 0.0, False, True
                    self._drop(index, failure)
                successors.append(row)
                if self._masked:
                    masks[index] = following[index] = self._mask_of(info, over=term or trunc)
                if term or trunc:
                    if self._watched and index == 0:
                        self._final_frame = self.render()
                    observation, info = env.reset()
                    row = self._observations.row(observation)
                    if self._masked:
                        following[index] = self._mask_of(info)
            except Exception as error:
                raise EnvironmentFailure(
                    f"{self.name}: environment {index} raised {type(error).__name__} at step {self._steps}: {error}"
                ) from error
            currents.append(row)
            rewards.append(float(reward))
            terminated.append(bool(term))
            truncated.append(bool(trunc))
        successor = self._observations.stack(successors)
        ended = torch.tensor(terminated) | torch.tensor(truncated)
        self._current = successor
        if bool(ended.any()):
            self._current = self._observations.stack(currents)
            self._check("first observation", self._current)
        self._masks = following
        return StepResult(
            _given(successor),
            torch.tensor(rewards),
            torch.tensor(terminated),
            torch.tensor(truncated),
            ended,
            _batch(masks),
            torch.tensor(valid) if self.fallible else None,
            _batch(following),
        )

    def _numbers(self, action: Tensor) -> np.ndarray:
        """What the environments get for the actions ``[N, ...]`` of a policy."""
        numbers = action.numpy()
        if self._low is None:
            return self._actions.decode(numbers)
        if self._scale is not None:
            middle, half = self._scale
            numbers = middle + np.clip(numbers, -1.0, 1.0) * half
        numbers = np.clip(numbers, self._low, self._high)
        if not np.isfinite(numbers).all():  # not the simulator's fault
            raise EnvironmentFailure(f"{self.name}: the policy gave an action that is not finite at step {self._steps}")
        return self._actions.fit(numbers)

    def _observed(self, env: gymnasium.Env[Any, Any], observation: Any, reward: Any) -> tuple[Row, str | None]:
        """An observation in the precision in which it is given away, and what became of a simulator that failed."""
        if not self.fallible:
            return self._observations.row(observation), None
        with np.errstate(over="ignore"):
            row, number = self._observations.row(observation), np.float32(reward)
        # warnings are counted from the last reset on
        if self._mujoco and env.unwrapped.data.warning.number[self._warnings].any():
            return row, "MuJoCo's state diverged"
        if not is_finite(row):
            return row, "an observation that is not finite"
        return row, None if np.isfinite(number) else "a reward that is not finite"

    def _following(self) -> Tensor | TensorDictBase:
        return _given(self._current)

    def _mask_of(self, info: dict[str, Any], over: bool = False) -> np.ndarray:
        """The mask of a step, or of the last observation of an episode, in which there may be nothing left to do."""
        mask = info.get("action_mask")
        if mask is None and not over:
            raise ValueError("info has no action_mask, which it had at the first reset")
        legal = None if mask is None else self._actions.mask(mask)
        return legal if legal is not None and (legal.any() or not over) else self._actions.all_legal

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # one that raises keeps no other from being closed
            for env in self._envs:
                stack.callback(env.close)


def _given(observation: Tensor | TensorDictBase) -> Tensor | TensorDictBase:
    # who gets a TensorDict may write into it
    return observation.copy() if isinstance(observation, TensorDictBase) else observation


def _batch(masks: list[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(masks)) if masks else None


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
