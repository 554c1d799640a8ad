"""Return estimators on TensorDicts: TorchRL value estimators over the functions of :mod:`offtrace.modules.returns`."""

from offtrace.modules.estimators.action_values import ImportanceSampling, QLambda, Retrace, TreeBackup
from offtrace.modules.estimators.state_values import LambdaReturn, VTrace

__all__ = ["ImportanceSampling", "LambdaReturn", "QLambda", "Retrace", "TreeBackup", "VTrace"]
