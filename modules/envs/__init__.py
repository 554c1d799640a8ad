"""Environments: Atari, dm_control, any Gymnasium id, your own; all batched ``[N]``.

Names are imported when they are first used: checking an environment's name needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.modules.envs.atari import AtariEnv as AtariEnv
    from offtrace.modules.envs.base import EnvironmentFailure as EnvironmentFailure
    from offtrace.modules.envs.base import StepResult as StepResult
    from offtrace.modules.envs.base import VectorEnv as VectorEnv
    from offtrace.modules.envs.control import ControlEnv as ControlEnv
    from offtrace.modules.envs.gym import GymEnv as GymEnv
    from offtrace.modules.envs.make import EnvInfo as EnvInfo
    from offtrace.modules.envs.make import env_info as env_info
    from offtrace.modules.envs.make import make_env as make_env
    from offtrace.modules.envs.names import check_name as check_name
    from offtrace.modules.envs.names import check_task_options as check_task_options

_MODULE = {
    "AtariEnv": "atari",
    "ControlEnv": "control",
    "EnvInfo": "make",
    "EnvironmentFailure": "base",
    "GymEnv": "gym",
    "StepResult": "base",
    "VectorEnv": "base",
    "check_name": "names",
    "check_task_options": "names",
    "env_info": "make",
    "make_env": "make",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules.envs' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.envs.{_MODULE[name]}"), name)
