"""Return estimators: what every loss takes as ``estimator=``, and TorchRL's losses as their value estimator."""

from offtrace.modules.estimators.action_values import (
    ActionEstimate,
    ActionValueEstimator,
    ImportanceSampling,
    NStep,
    OneStep,
    QLambda,
    Retrace,
    TraceEstimator,
    TreeBackup,
)
from offtrace.modules.estimators.base import Outcome, ReturnEstimator, bind, make_estimator
from offtrace.modules.estimators.selection import Selection
from offtrace.modules.estimators.state_values import (
    GAE,
    NStepReturn,
    StateEstimate,
    StateValueEstimator,
    VTrace,
    WeightedGAE,
)

__all__ = [
    "GAE",
    "ActionEstimate",
    "ActionValueEstimator",
    "ImportanceSampling",
    "NStep",
    "NStepReturn",
    "OneStep",
    "Outcome",
    "QLambda",
    "Retrace",
    "ReturnEstimator",
    "Selection",
    "StateEstimate",
    "StateValueEstimator",
    "TraceEstimator",
    "TreeBackup",
    "VTrace",
    "WeightedGAE",
    "bind",
    "make_estimator",
]
