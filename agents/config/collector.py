"""The actors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from offtrace.agents.config.base import Checks, Group


@dataclass
class CollectorConfig(Group):
    """The actors."""

    num_workers: int = 1
    """Actor processes, which act while the learner learns; 0 collects in the learner's process, in turn with it."""
    unroll: int = 64
    """Agent steps of an environment in one rollout."""
    threads: int = 1
    """Torch threads of an actor process."""
    device: str = "cpu"
    """Where the actors run their copy of the policy: cpu, cuda or cuda:<n>."""
    step_timeout: float = 60.0
    """Seconds after which a step that did not return counts as hung."""
    sync_every: int = 0
    """Updates between two pushes of weights to the actors; 0: as many as a rollout has fresh batches (train.minibatches
    times train.epochs), or 1 where all batches come from a replay. Updates on replayed batches count too."""
    lag: int = 0
    """Study tool: the actors get weights that are at least this many updates old."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(1, "unroll", "threads")
        checks.at_least(0, "num_workers", "sync_every", "lag")
        checks.positive("step_timeout")
        checks.require("device", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value), "cpu, cuda or cuda:<number>")
