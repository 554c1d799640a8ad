"""Rollouts from environments, in the learner's process or from actor processes: nothing dropped, lag bounded."""

from offtrace.modules.collectors.frames import PackedRollout
from offtrace.modules.collectors.make import lag_bound, make_collector
from offtrace.modules.collectors.protocol import Backend, Collector
from offtrace.modules.collectors.rollouts import RolloutCollector

__all__ = ["Backend", "Collector", "PackedRollout", "RolloutCollector", "lag_bound", "make_collector"]
