"""Rollouts from environments, in the learner's process or from actor processes: nothing dropped, lag bounded."""

from offtrace.modules.collectors.actors import actor_seed
from offtrace.modules.collectors.frames import PackedRollout
from offtrace.modules.collectors.make import lag_bound, make_collector
from offtrace.modules.collectors.protocol import Backend, Collector
from offtrace.modules.collectors.rollouts import RolloutCollector
from offtrace.modules.collectors.server import ServerOptions

__all__ = [
    "Backend",
    "Collector",
    "PackedRollout",
    "RolloutCollector",
    "ServerOptions",
    "actor_seed",
    "lag_bound",
    "make_collector",
]
