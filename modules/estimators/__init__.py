"""Return estimators: what every loss takes as ``estimator=``, and TorchRL's losses as their value estimator.

Names are imported when they are first used: checking an estimator's name needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.modules.estimators.action_values import ActionEstimate as ActionEstimate
    from offtrace.modules.estimators.action_values import ActionValueEstimator as ActionValueEstimator
    from offtrace.modules.estimators.action_values import ImportanceSampling as ImportanceSampling
    from offtrace.modules.estimators.action_values import NStep as NStep
    from offtrace.modules.estimators.action_values import OneStep as OneStep
    from offtrace.modules.estimators.action_values import QLambda as QLambda
    from offtrace.modules.estimators.action_values import Retrace as Retrace
    from offtrace.modules.estimators.action_values import TraceEstimator as TraceEstimator
    from offtrace.modules.estimators.action_values import TreeBackup as TreeBackup
    from offtrace.modules.estimators.base import Outcome as Outcome
    from offtrace.modules.estimators.base import ReturnEstimator as ReturnEstimator
    from offtrace.modules.estimators.base import bind as bind
    from offtrace.modules.estimators.base import make_estimator as make_estimator
    from offtrace.modules.estimators.names import check_spec as check_spec
    from offtrace.modules.estimators.names import parse_spec as parse_spec
    from offtrace.modules.estimators.selection import Selection as Selection
    from offtrace.modules.estimators.state_values import GAE as GAE
    from offtrace.modules.estimators.state_values import NStepReturn as NStepReturn
    from offtrace.modules.estimators.state_values import StateEstimate as StateEstimate
    from offtrace.modules.estimators.state_values import StateValueEstimator as StateValueEstimator
    from offtrace.modules.estimators.state_values import VTrace as VTrace
    from offtrace.modules.estimators.state_values import WeightedGAE as WeightedGAE

_MODULE = {
    "ActionEstimate": "action_values",
    "ActionValueEstimator": "action_values",
    "GAE": "state_values",
    "ImportanceSampling": "action_values",
    "NStep": "action_values",
    "NStepReturn": "state_values",
    "OneStep": "action_values",
    "Outcome": "base",
    "QLambda": "action_values",
    "Retrace": "action_values",
    "ReturnEstimator": "base",
    "Selection": "selection",
    "StateEstimate": "state_values",
    "StateValueEstimator": "state_values",
    "TraceEstimator": "action_values",
    "TreeBackup": "action_values",
    "VTrace": "state_values",
    "WeightedGAE": "state_values",
    "bind": "base",
    "check_spec": "names",
    "make_estimator": "base",
    "parse_spec": "names",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules.estimators' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.estimators.{_MODULE[name]}"), name)
