"""The optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtrace.agents.config.base import Checks, Group


@dataclass
class AdamConfig(Group):
    """Adam."""

    lr: float = 4e-4
    """Step size at the start."""
    eps: float = 1e-5
    """Added to the root (inside it in rmsprop_tf)."""
    schedule: Literal["linear", "constant"] = "linear"
    """linear falls to 0 at the last frame."""
    clip_grad_norm: float | None = 0.5
    """Maximum of the gradient's global norm; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.positive("lr", "eps")
        checks.positive_or_null("clip_grad_norm")


@dataclass
class OptimConfig(AdamConfig):
    """The optimiser."""

    name: Literal["adam", "rmsprop", "rmsprop_tf"] = "adam"
    """adam, torch's rmsprop, or the paper's rmsprop_tf."""
    decay: float = 0.99
    """Of rmsprop's mean of squares."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).require("decay", lambda value: 0 <= value < 1, "at least 0 and below 1")


@dataclass
class TargetAdamConfig(AdamConfig):
    """Adam, and the target network."""

    beta1: float = 0.0
    """Of Adam's mean of gradients; 0: without momentum."""
    target_every: int = 1_000
    """Updates between two copies into the target network."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.require("beta1", lambda value: 0 <= value < 1, "at least 0 and below 1")
        checks.at_least(1, "target_every")


@dataclass
class SeparateOptimConfig(Group):
    """Adam, with a step size for each network."""

    lr_actor: float = 3e-4
    """Step size of the policy."""
    lr_critic: float = 3e-4
    """Step size of the critics."""
    clip_grad_norm: float | None = None
    """Maximum of the gradient's norm in each of the networks; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.positive("lr_actor", "lr_critic")
        checks.positive_or_null("clip_grad_norm")
