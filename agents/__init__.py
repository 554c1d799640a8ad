"""Algorithms: configuration and assembly, the Lightning module, data modules, callbacks.

Names are imported when they are first used: reading a configuration needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent as Agent
    from offtrace.agents.agent import TrainingDivergedError as TrainingDivergedError
    from offtrace.agents.callbacks import Checkpoints as Checkpoints
    from offtrace.agents.callbacks import Evaluation as Evaluation
    from offtrace.agents.callbacks import WeightSync as WeightSync
    from offtrace.agents.checkpoint import CheckpointError as CheckpointError
    from offtrace.agents.checkpoint import load_policy as load_policy
    from offtrace.agents.config import ConfigError as ConfigError
    from offtrace.agents.config import ImpalaConfig as ImpalaConfig
    from offtrace.agents.data import OnPolicyData as OnPolicyData
    from offtrace.agents.evaluation import EvaluationResult as EvaluationResult
    from offtrace.agents.evaluation import evaluate as evaluate
    from offtrace.agents.impala import make_impala as make_impala
    from offtrace.agents.mpo import make_mpo as make_mpo
    from offtrace.agents.mpo import make_vmpo as make_vmpo
    from offtrace.agents.mpo_config import MPOConfig as MPOConfig
    from offtrace.agents.mpo_config import VMPOConfig as VMPOConfig
    from offtrace.agents.optim import RMSpropTF as RMSpropTF
    from offtrace.agents.optim import make_optimizer as make_optimizer
    from offtrace.agents.progress import Meters as Meters
    from offtrace.agents.replay_data import ReplayData as ReplayData
    from offtrace.agents.sac import make_sac as make_sac
    from offtrace.agents.sac_config import SACConfig as SACConfig
    from offtrace.agents.stopping import GracefulStop as GracefulStop
    from offtrace.agents.targets import hard_update as hard_update
    from offtrace.agents.targets import soft_update as soft_update
    from offtrace.agents.training import Summary as Summary
    from offtrace.agents.training import train as train

_WHERE = {
    "agent": ("Agent", "TrainingDivergedError"),
    "callbacks": ("Checkpoints", "Evaluation", "WeightSync"),
    "checkpoint": ("CheckpointError", "load_policy"),
    "config": ("ConfigError", "ImpalaConfig"),
    "data": ("OnPolicyData",),
    "evaluation": ("EvaluationResult", "evaluate"),
    "impala": ("make_impala",),
    "mpo": ("make_mpo", "make_vmpo"),
    "mpo_config": ("MPOConfig", "VMPOConfig"),
    "optim": ("RMSpropTF", "make_optimizer"),
    "progress": ("Meters",),
    "replay_data": ("ReplayData",),
    "sac": ("make_sac",),
    "sac_config": ("SACConfig",),
    "stopping": ("GracefulStop",),
    "targets": ("hard_update", "soft_update"),
    "training": ("Summary", "train"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.agents' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.agents.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
