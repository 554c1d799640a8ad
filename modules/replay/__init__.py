"""Replay: the newest steps of many environments, sampled uniformly or by priority, and how often they are learnt from.

Names are imported when they are first used: a configuration needs the limiter, and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtrace.modules.replay.buffer import Replay as Replay
    from offtrace.modules.replay.files import DamagedReplay as DamagedReplay
    from offtrace.modules.replay.limiter import SamplesPerInsert as SamplesPerInsert
    from offtrace.modules.replay.samplers import LazyPrioritized as LazyPrioritized
    from offtrace.modules.replay.samplers import Prioritized as Prioritized
    from offtrace.modules.replay.samplers import Sampler as Sampler
    from offtrace.modules.replay.samplers import Uniform as Uniform

_MODULE = {
    "DamagedReplay": "files",
    "LazyPrioritized": "samplers",
    "Prioritized": "samplers",
    "Replay": "buffer",
    "Sampler": "samplers",
    "SamplesPerInsert": "limiter",
    "Uniform": "samplers",
}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'offtrace.modules.replay' has no attribute {name!r}")
    return getattr(import_module(f"offtrace.modules.replay.{_MODULE[name]}"), name)
