"""The actors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from offtrace.agents.config.base import Checks, ConfigError, Group
from offtrace.modules.collectors.ray_cluster import check_ray


@dataclass
class CollectorConfig(Group):
    """The actors."""

    num_workers: int = 1
    """Actor processes, which act while the learner learns; 0 collects in the learner's process, in turn with it.
    Where IMPALA reads images, what is not given of actors, environments, unrolls and acting fits the machine."""
    backend: Literal["processes", "ray"] = "processes"
    """Where they run: processes of this machine, or actors of a Ray cluster, which needs offtrace[ray]."""
    address: str = ""
    """Of the Ray cluster: host:port of its head, or auto for the one that this machine is a node of; empty: one of this
    machine, for this run alone."""
    placement: Literal["spread", "near"] = "spread"
    """Of Ray actors: spread over the nodes, or near: on the learner's own as far as there is room."""
    unroll: int = 64
    """Agent steps of an environment in one rollout."""
    threads: int = 1
    """Torch threads of an actor process."""
    emulator_threads: int = 1
    """Atari only: threads that step the games of an actor; games and actions are the same with any number."""
    acting: Literal["copies", "server"] = "copies"
    """copies: every actor has a copy of the policy; server: one process acts for all, on what requests have arrived."""
    server_batch: int = 0
    """Of the server: environments at which a batch is full; 0: all actors."""
    server_wait: float = 0.001
    """Of the server: seconds that a batch waits for more requests after its first."""
    device: str = "cpu"
    """Where the actors run their copy of the policy, or the server its one: cpu, cuda (of several learners each one's
    own GPU) or cuda:<n>."""
    step_timeout: float = 60.0
    """Seconds after which a step that did not return counts as hung."""
    max_restarts: int = 1000
    """Most actor processes that may take the place of one that died, hung or raised, once there was a rollout; five in
    a row that deliver nothing end the run before. 0: the first such fault ends it."""
    sync_every: int = 0
    """Updates between two pushes of weights to the actors; 0: as many as a rollout has fresh batches (train.minibatches
    times train.epochs), or 1 where all batches come from a replay. Updates on replayed batches count too."""
    lag: int = 0
    """Study tool: the actors get weights that are at least this many updates old."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(1, "unroll", "threads", "emulator_threads")
        checks.at_least(0, "num_workers", "sync_every", "lag", "server_batch", "max_restarts")
        checks.require("server_wait", lambda value: 0 <= value < self.step_timeout, "at least 0, below step_timeout")
        checks.positive("step_timeout")
        for name, lost in (("max_restarts", "an error in it ends the run"), ("step_timeout", "it may hang for ever")):
            if not self.num_workers and (value := getattr(self, name)) != getattr(type(self), name):
                raise ConfigError(
                    f"{at}.{name} is {value:g}, and {at}.num_workers is 0: an environment in the learner's process "
                    f"cannot be replaced, and {lost}; give num_workers above 0, or leave {name} out"
                )
        if self.acting == "server" and not self.num_workers:
            raise ConfigError(
                f"{at}.acting is server, which acts for actor processes, and {at}.num_workers is 0: it must be above 0"
            )
        if self.backend == "ray":
            self._check_ray(at)
        else:
            checks.require("address", lambda value: not value, "empty where backend is processes")
            checks.require("placement", lambda value: value == "spread", "spread where backend is processes")
        checks.require("device", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value), "cpu, cuda or cuda:<number>")

    def _check_ray(self, at: str) -> None:
        if not self.num_workers:
            raise ConfigError(
                f"{at}.backend is ray, and {at}.num_workers is 0, which acts in the learner: it must be above 0"
            )
        if self.acting == "server":
            raise ConfigError(
                f"{at}.acting is server, and {at}.backend is ray, whose actors have a copy of the policy each: it must "
                "be copies"
            )
        if self.device != "cpu":
            raise ConfigError(f"{at}.device is {self.device}, and {at}.backend is ray, whose actors act on the CPU")
        try:
            check_ray(self.address)
        except ValueError as error:
            raise ConfigError(f"{at}.{error}") from error
