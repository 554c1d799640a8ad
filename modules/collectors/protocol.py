"""What a collector is to those who use one, and what runs its actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from offtrace.modules.collectors.frames import PackedRollout
from offtrace.modules.collectors.memory import Key

Copy = Callable[[Mapping[Key, Tensor]], dict[Key, Tensor]]
"""Copies the entries of a rollout into the learner's own memory."""


class Collector(Protocol):
    """An endless iterator of rollouts ``[N, T]`` that owns its actors. Nobody who uses one knows where these run.

    Attributes:
        version: number of weight pushes so far; may be set, by a run that goes on.
        restarts: actors (and inference servers) that took the place of one that failed, so far.
        frames_per_batch: N T, the size of a rollout.
        order: maps N to the permutation in which the environments of the next rollout are copied out, or None.
        pin_memory: whether rollouts come in page-locked memory.
    """

    version: int
    frames_per_batch: int
    order: Callable[[int], Tensor] | None
    pin_memory: bool

    @property
    def num_envs(self) -> int:
        """N, the environments of one actor."""

    @property
    def restarts(self) -> int:
        """Replacements so far."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        """The collector itself."""

    def __next__(self) -> TensorDictBase:
        """The next rollout, in memory of its own; ``"worker"`` says who made it, ``"policy_version"`` with what."""

    def take(self) -> PackedRollout:
        """The same, each frame in it once: ``unpack(device)`` puts the stacks together there."""

    def update_policy(self, policy_or_weights: nn.Module | TensorDictBase | Mapping[str, Tensor]) -> int:
        """Gives the actors new weights, a copy, and returns the new version."""

    def shutdown(self) -> None:
        """Ends the actors. Further calls do nothing."""

    def __enter__(self) -> Collector:
        """The collector itself."""

    def __exit__(self, *_: object) -> None:
        """Ends the actors."""


class Backend(Protocol):
    """Runs the actors of a :class:`~offtrace.modules.collectors.rollouts.RolloutCollector`: the seam for new ones.

    Attributes:
        version: number of weight pushes so far.
        restarts: as of the collector; a :class:`~offtrace.modules.collectors.restarts.Restarts` decides on them.
    """

    version: int

    @property
    def restarts(self) -> int:
        """Replacements so far."""

    @property
    def num_envs(self) -> int:
        """N, the environments of one actor."""

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """Copies weights by dotted name, on any device; every policy call that begins afterwards uses them.

        Returns:
            The new version.

        Raises:
            KeyError: a weight is missing or unknown.
        """

    def take(self, copied: Copy) -> tuple[dict[Key, Tensor], torch.Size, int]:
        """The next rollout's packed entries, as ``copied`` gives them, [N, T], and the number of its actor, from 0.

        The actor's memory may be written again once ``copied`` has returned. The actors' rollouts come in turn, so that
        the lag is bounded, and none is lost. What an actor has delivered comes, whatever becomes of the actor; what it
        had under way when it failed does not.

        Raises:
            EnvironmentFailure: an actor raised, died or hung, and is not replaced; its own message is in the text.
        """

    def shutdown(self) -> None:
        """Ends the actors and lets go of all memory; called once."""
