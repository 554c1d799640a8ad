"""Return estimators: what every loss takes as ``estimator=``, and TorchRL's losses as their value estimator.

Names are imported when they are first used: a configuration needs the estimators' names, and no torch.
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
    from offtrace.modules.estimators.selection import Selection as Selection
    from offtrace.modules.estimators.state_values import GAE as GAE
    from offtrace.modules.estimators.state_values import NStepReturn as NStepReturn
    from offtrace.modules.estimators.state_values import StateEstimate as StateEstimate
    from offtrace.modules.estimators.state_values import StateValueEstimator as StateValueEstimator
    from offtrace.modules.estimators.state_values import VTrace as VTrace
    from offtrace.modules.estimators.state_values import WeightedGAE as WeightedGAE

_WHERE = {
    "action_values": (
        "ActionEstimate", "ActionValueEstimator", "ImportanceSampling", "NStep", "OneStep", "QLambda", "Retrace",
        "TraceEstimator", "TreeBackup",
    ),
    "base": ("Outcome", "ReturnEstimator", "bind", "make_estimator"),
    "selection": ("Selection",),
    "state_values": ("GAE", "NStepReturn", "StateEstimate", "StateValueEstimator", "VTrace", "WeightedGAE"),
}  # fmt: skip
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules.estimators' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.estimators.{_MODULE[name]}"), name)
