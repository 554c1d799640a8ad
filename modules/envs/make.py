"""Environments by name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from offtrace.modules.envs.atari import AtariEnv
from offtrace.modules.envs.gym import GymEnv
from offtrace.modules.envs.names import Protocol, check_task_options, own_environment, task_kind
from offtrace.modules.keys import (
    ACTION_MASK,
    EPISODE_END,
    EPISODE_LENGTH,
    EPISODE_REWARD,
    IS_INIT,
    OBSERVATION,
)


@dataclass(frozen=True)
class EnvInfo:
    """What an agent has to know of an environment; exactly one of ``num_actions`` and ``action_dim`` is set.

    Attributes:
        observation_shape: of one observation; with ``flatten=False`` of each entry of a dictionary, by its name.
        num_actions: of discrete actions.
        action_dim: of continuous actions.
        frame_skip: environment frames per step.
        masked: the environment tells which actions are legal.
        frame_stack: frames in an observation, 1 where it is no stack.
    """

    observation_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    num_actions: int | None
    action_dim: int | None
    frame_skip: int
    masked: bool
    frame_stack: int = 1

    @property
    def kind(self) -> Literal["discrete", "continuous"]:
        """What the actions are."""
        return "continuous" if self.num_actions is None else "discrete"


def make_env(
    name: str,
    num_envs: int,
    *,
    seed: int = 0,
    evaluation: bool = False,
    last_step: bool = False,
    num_threads: int = 1,
    rescale_actions: bool = False,
    pictures: bool = False,
    protocol: Protocol = "classic",
    action_repeat: int = 1,
    pixels: bool = False,
    flatten: bool = True,
    **kwargs: Any,
) -> EnvBase:
    """A batched environment ``[num_envs]``.

    Args:
        name: an Atari game (``"pong"``), a Gymnasium id (``"CartPole-v1"``), a task of dm_control (``"walker-walk"``),
            or the import path ``"package.module:function"`` of your own: a function ``(num_envs, seed) -> EnvBase``, or
            one without arguments that makes a Gymnasium environment.
        num_envs: how many.
        seed: of the first; the others follow it.
        evaluation: whole games of Atari, where training ends with a life.
        last_step: also write the last action and reward, which recurrent networks read.
        num_threads: of Atari's emulator, see :class:`AtariEnv`.
        rescale_actions: actions of a Gymnasium environment in [-1, 1] are mapped to the bounds. Those of dm_control
            always are.
        pictures: a Gymnasium environment is made for ``render()``, as tasks of dm_control always are.
        protocol: Atari only: ``"classic"`` or ``"sticky"``, see :class:`AtariEnv`.
        action_repeat: dm_control only: steps of the task per action.
        pixels: dm_control only: images instead of states.
        flatten: not Atari: one vector for a dictionary of observations, or with False ``("observation", name)`` each. A
            TorchRL environment of your own gives what it gives.
        kwargs: for :class:`GymEnv` and ``gymnasium.make``, or for :class:`ControlEnv`; an Atari game and an own
            environment take none.

    Raises:
        ValueError: on an unknown name, an option that the task does not have, which may be given at its default, or
            spaces the agents cannot deal with.
    """
    options = {"protocol": protocol, "action_repeat": action_repeat, "pixels": pixels, "flatten": flatten}
    check_task_options(name, options | kwargs)
    kind = task_kind(name)
    if kind == "own":
        return _imported(
            name, num_envs, seed=seed, last_step=last_step, rescale_actions=rescale_actions, flatten=flatten
        )
    if kind == "atari":
        return AtariEnv(
            name, num_envs, protocol=protocol, evaluation=evaluation, seed=seed, num_threads=num_threads,
            last_step=last_step,
        )  # fmt: skip
    if kind == "dm_control":
        from offtrace.modules.envs.control import ControlEnv  # MuJoCo takes half a second, and memory in each actor

        return ControlEnv(
            name, num_envs, seed=seed, last_step=last_step, action_repeat=action_repeat, pixels=pixels,
            flatten=flatten, **kwargs,
        )  # fmt: skip
    if pictures:
        kwargs["render_mode"] = "rgb_array"
    return GymEnv(
        name, num_envs, seed=seed, last_step=last_step, rescale_actions=rescale_actions, flatten=flatten, **kwargs
    )


def env_info(name: str, **kwargs: Any) -> EnvInfo:
    """Shapes of an environment, from one that is made and closed again.

    Raises:
        ValueError: as :func:`make_env`.
    """
    env = make_env(name, 1, **kwargs)
    try:
        action = env.action_spec
        discrete = isinstance(action, Categorical)
        return EnvInfo(
            observation_shape=_shape(name, env.observation_spec[OBSERVATION]),
            num_actions=int(action.space.n) if discrete else None,
            action_dim=None if discrete else int(action.shape[-1]),
            frame_skip=int(getattr(env, "frame_skip", 1)),
            masked=ACTION_MASK in env.observation_spec.keys(),  # noqa: SIM118 - a spec
            frame_stack=int(getattr(env, "frame_stack", 1)),
        )
    finally:
        env.close()


def _shape(name: str, observation: TensorSpec) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if not isinstance(observation, Composite):
        return tuple(observation.shape[1:])
    for key, entry in observation.items():
        if isinstance(entry, Composite):
            raise ValueError(
                f"{name!r} has entries inside the entry {key!r} of its observation; the agents read one level of them"
            )
    return {key: tuple(entry.shape[1:]) for key, entry in observation.items()}


_NEEDED = (OBSERVATION, IS_INIT, EPISODE_REWARD, EPISODE_LENGTH, EPISODE_END)


def _imported(path: str, num_envs: int, *, seed: int, last_step: bool, rescale_actions: bool, flatten: bool) -> EnvBase:
    make, sized = own_environment(path)
    made = make(num_envs=num_envs, seed=seed) if sized else make()
    if isinstance(made, EnvBase):
        missing = [key for key in _NEEDED if key not in made.observation_spec.keys()]  # noqa: SIM118 - a spec
        if missing:
            with contextlib.suppress(Exception):
                made.close()
            raise ValueError(
                f"{path!r} has no {missing[0]!r} among its observations; a TorchRL environment needs "
                f"{', '.join(_NEEDED)}, as VectorEnv gives them: derive it from that, or return a gymnasium.Env"
            )
        spec = made.action_spec
        choices = isinstance(spec, Categorical) and not isinstance(spec, Binary | MultiCategorical)
        if not choices and not isinstance(spec, Bounded | Unbounded):
            made.close()
            raise ValueError(
                f"{path!r} has actions of the spec {type(spec).__name__}; it must be Categorical for discrete actions, "
                "or Bounded or Unbounded for continuous ones"
            )
        space = spec.space if rescale_actions and isinstance(spec, Bounded) else None
        if space is not None and not bool((space.low == -1).all() and (space.high == 1).all()):
            made.close()
            raise ValueError(
                f"{path!r} has actions from {space.low.min():g} to {space.high.max():g}; the agents act in [-1, 1]: "
                "give it those bounds, or let it be a gymnasium.Env, which is rescaled"
            )
        return made
    if isinstance(made, gymnasium.Env):
        made.close()
        return GymEnv(
            make, num_envs, seed=seed, last_step=last_step, rescale_actions=rescale_actions, flatten=flatten, name=path
        )
    raise ValueError(f"{path!r} returned {type(made).__name__}; it must return a TorchRL EnvBase or a gymnasium.Env")
