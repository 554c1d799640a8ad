"""Algorithms: configuration and assembly, the Lightning module, data modules, callbacks, runs.

Names are imported when they are first used: reading a configuration needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.agents.a2c import A2CConfig as A2CConfig
    from offtrace.agents.a2c import make_a2c as make_a2c
    from offtrace.agents.acer import ACERConfig as ACERConfig
    from offtrace.agents.acer import make_acer as make_acer
    from offtrace.agents.agent import Agent as Agent
    from offtrace.agents.agent import TrainingDivergedError as TrainingDivergedError
    from offtrace.agents.callbacks import Checkpoints as Checkpoints
    from offtrace.agents.callbacks import Evaluation as Evaluation
    from offtrace.agents.callbacks import GracefulStop as GracefulStop
    from offtrace.agents.callbacks import Meters as Meters
    from offtrace.agents.callbacks import WeightSync as WeightSync
    from offtrace.agents.config import Config as Config
    from offtrace.agents.config import ConfigError as ConfigError
    from offtrace.agents.data import MixedData as MixedData
    from offtrace.agents.data import ReplayData as ReplayData
    from offtrace.agents.data import RolloutData as RolloutData
    from offtrace.agents.dqn import DQNConfig as DQNConfig
    from offtrace.agents.dqn import make_dqn as make_dqn
    from offtrace.agents.impala import ImpalaConfig as ImpalaConfig
    from offtrace.agents.impala import make_impala as make_impala
    from offtrace.agents.mpo import MPOConfig as MPOConfig
    from offtrace.agents.mpo import make_mpo as make_mpo
    from offtrace.agents.optim import RMSpropTF as RMSpropTF
    from offtrace.agents.optim import make_optimizer as make_optimizer
    from offtrace.agents.ppo import PPOConfig as PPOConfig
    from offtrace.agents.ppo import make_ppo as make_ppo
    from offtrace.agents.q_actor_critic import QActorCriticConfig as QActorCriticConfig
    from offtrace.agents.q_actor_critic import make_q_actor_critic as make_q_actor_critic
    from offtrace.agents.registry import AGENTS as AGENTS
    from offtrace.agents.runs.checkpoint import CheckpointError as CheckpointError
    from offtrace.agents.runs.checkpoint import load_env as load_env
    from offtrace.agents.runs.checkpoint import load_policy as load_policy
    from offtrace.agents.runs.evaluation import EvaluationResult as EvaluationResult
    from offtrace.agents.runs.evaluation import evaluate as evaluate
    from offtrace.agents.runs.training import Summary as Summary
    from offtrace.agents.runs.training import train as train
    from offtrace.agents.sac import SACConfig as SACConfig
    from offtrace.agents.sac import make_sac as make_sac
    from offtrace.agents.targets import hard_update as hard_update
    from offtrace.agents.targets import soft_update as soft_update
    from offtrace.agents.trpo import TRPOConfig as TRPOConfig
    from offtrace.agents.trpo import make_trpo as make_trpo
    from offtrace.agents.vmpo import VMPOConfig as VMPOConfig
    from offtrace.agents.vmpo import make_vmpo as make_vmpo

_WHERE = {
    "a2c": ("A2CConfig", "make_a2c"),
    "acer": ("ACERConfig", "make_acer"),
    "agent": ("Agent", "TrainingDivergedError"),
    "callbacks": ("Checkpoints", "Evaluation", "GracefulStop", "Meters", "WeightSync"),
    "config": ("Config", "ConfigError"),
    "data": ("MixedData", "ReplayData", "RolloutData"),
    "dqn": ("DQNConfig", "make_dqn"),
    "impala": ("ImpalaConfig", "make_impala"),
    "mpo": ("MPOConfig", "make_mpo"),
    "optim": ("RMSpropTF", "make_optimizer"),
    "ppo": ("PPOConfig", "make_ppo"),
    "q_actor_critic": ("QActorCriticConfig", "make_q_actor_critic"),
    "registry": ("AGENTS",),
    "runs.checkpoint": ("CheckpointError", "load_env", "load_policy"),
    "runs.evaluation": ("EvaluationResult", "evaluate"),
    "runs.training": ("Summary", "train"),
    "sac": ("SACConfig", "make_sac"),
    "targets": ("hard_update", "soft_update"),
    "trpo": ("TRPOConfig", "make_trpo"),
    "vmpo": ("VMPOConfig", "make_vmpo"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.agents' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.agents.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
