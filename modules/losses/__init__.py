"""Losses, one to a file."""

from offtrace.modules.losses.impala import ImpalaLoss
from offtrace.modules.losses.sac import SACLoss
from offtrace.modules.losses.sac_discrete import DiscreteSACLoss
from offtrace.modules.losses.sac_v1 import SACv1Loss

__all__ = ["DiscreteSACLoss", "ImpalaLoss", "SACLoss", "SACv1Loss"]
