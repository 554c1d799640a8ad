"""Rollouts from environments, in the learner's process, in actor processes or on Ray: nothing dropped, lag bounded.

Names are imported when they are first used: a configuration asks whether Ray is there, and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.modules.collectors.actors import actor_seed as actor_seed
    from offtrace.modules.collectors.frames import PackedRollout as PackedRollout
    from offtrace.modules.collectors.make import lag_bound as lag_bound
    from offtrace.modules.collectors.make import make_collector as make_collector
    from offtrace.modules.collectors.protocol import Backend as Backend
    from offtrace.modules.collectors.protocol import Collector as Collector
    from offtrace.modules.collectors.ray_backend import RayOptions as RayOptions
    from offtrace.modules.collectors.ray_cluster import ray_connection as ray_connection
    from offtrace.modules.collectors.rollouts import RolloutCollector as RolloutCollector
    from offtrace.modules.collectors.server import ServerOptions as ServerOptions

_MODULE = {
    "Backend": "protocol",
    "Collector": "protocol",
    "PackedRollout": "frames",
    "RayOptions": "ray_backend",
    "RolloutCollector": "rollouts",
    "ServerOptions": "server",
    "actor_seed": "actors",
    "lag_bound": "make",
    "make_collector": "make",
    "ray_connection": "ray_cluster",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules.collectors' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.collectors.{_MODULE[name]}"), name)
