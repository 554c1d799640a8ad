"""Losses, one to a file."""

from offtrace.modules.losses.impala import ImpalaLoss

__all__ = ["ImpalaLoss"]
