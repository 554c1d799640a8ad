"""The parts: returns, estimators, losses, networks, environments, collectors, replay. None of them needs Lightning.

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.modules.collectors import make_collector as make_collector
    from offtrace.modules.envs.make import make_env as make_env
    from offtrace.modules.estimators import GAE as GAE
    from offtrace.modules.estimators import ImportanceSampling as ImportanceSampling
    from offtrace.modules.estimators import NStep as NStep
    from offtrace.modules.estimators import NStepReturn as NStepReturn
    from offtrace.modules.estimators import OneStep as OneStep
    from offtrace.modules.estimators import QLambda as QLambda
    from offtrace.modules.estimators import Retrace as Retrace
    from offtrace.modules.estimators import TreeBackup as TreeBackup
    from offtrace.modules.estimators import VTrace as VTrace
    from offtrace.modules.losses import A2CLoss as A2CLoss
    from offtrace.modules.losses import ACERLoss as ACERLoss
    from offtrace.modules.losses import DiscreteMPOLoss as DiscreteMPOLoss
    from offtrace.modules.losses import DiscreteSACLoss as DiscreteSACLoss
    from offtrace.modules.losses import DQNLoss as DQNLoss
    from offtrace.modules.losses import FastHardUpdate as FastHardUpdate
    from offtrace.modules.losses import FastSoftUpdate as FastSoftUpdate
    from offtrace.modules.losses import ImpalaLoss as ImpalaLoss
    from offtrace.modules.losses import MPOLoss as MPOLoss
    from offtrace.modules.losses import PPOLoss as PPOLoss
    from offtrace.modules.losses import QActorCriticLoss as QActorCriticLoss
    from offtrace.modules.losses import ReactorLoss as ReactorLoss
    from offtrace.modules.losses import SACLoss as SACLoss
    from offtrace.modules.losses import SACv1Loss as SACv1Loss
    from offtrace.modules.losses import TRPOLoss as TRPOLoss
    from offtrace.modules.losses import VMPOLoss as VMPOLoss
    from offtrace.modules.networks import build_critic as build_critic
    from offtrace.modules.networks import build_policy as build_policy
    from offtrace.modules.networks import build_value as build_value
    from offtrace.modules.replay import LazyPrioritized as LazyPrioritized
    from offtrace.modules.replay import Prioritized as Prioritized
    from offtrace.modules.replay import Replay as Replay
    from offtrace.modules.replay import Uniform as Uniform

_MODULE = {
    "A2CLoss": "losses",
    "ACERLoss": "losses",
    "DQNLoss": "losses",
    "DiscreteMPOLoss": "losses",
    "DiscreteSACLoss": "losses",
    "FastHardUpdate": "losses",
    "FastSoftUpdate": "losses",
    "GAE": "estimators",
    "ImpalaLoss": "losses",
    "ImportanceSampling": "estimators",
    "LazyPrioritized": "replay",
    "MPOLoss": "losses",
    "NStep": "estimators",
    "NStepReturn": "estimators",
    "OneStep": "estimators",
    "PPOLoss": "losses",
    "Prioritized": "replay",
    "QActorCriticLoss": "losses",
    "QLambda": "estimators",
    "ReactorLoss": "losses",
    "Replay": "replay",
    "Retrace": "estimators",
    "SACLoss": "losses",
    "SACv1Loss": "losses",
    "TRPOLoss": "losses",
    "TreeBackup": "estimators",
    "Uniform": "replay",
    "VMPOLoss": "losses",
    "VTrace": "estimators",
    "build_critic": "networks",
    "build_policy": "networks",
    "build_value": "networks",
    "make_collector": "collectors",
    "make_env": "envs",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.{_MODULE[name]}"), name)
