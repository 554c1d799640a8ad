"""Heads: features ``[*B, F]`` in, parameters of the action distribution or a value out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offtrace.modules.keys import ACTION_VALUE, LOC, LOGITS, SCALE, VALUE
from offtrace.modules.networks.distributions import Categorical, DiagonalNormal, mask_logits
from offtrace.modules.networks.initialise import POLICY_GAIN, VALUE_GAIN, orthogonal

_LOG_SCALE_RANGE = (-5.0, 2.0)


class CategoricalHead(nn.Module):
    """Logits of ``num_actions`` actions. Weights orthogonal with gain 0.01, biases zero.

    Args:
        masked: read a mask of legal actions; illegal ones get probability exactly 0.
    """

    out_keys = (LOGITS,)
    distribution = Categorical

    def __init__(self, in_features: int, num_actions: int, *, masked: bool = False) -> None:
        super().__init__()
        if num_actions < 1:
            raise ValueError(f"num_actions is {num_actions}; it must be at least 1")
        self.masked = masked
        self.num_actions = num_actions
        self.linear = nn.Linear(in_features, num_actions)
        orthogonal(self, POLICY_GAIN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(logits,)`` [*B, A]; ``mask`` bool [*B, A], True = legal."""
        logits = self.linear(x)
        return (logits if mask is None else mask_logits(logits, mask),)


class NormalHead(nn.Module):
    """Mean and standard deviation of ``action_dim`` independent normals. Mean orthogonal with gain 0.01, biases zero.

    Args:
        init_scale: standard deviation at the start, in units of the action.
        state_dependent: compute the scale from the features; otherwise it is a parameter of its own.

    The log of the scale is kept in [-5, 2].
    """

    out_keys = (LOC, SCALE)
    distribution = DiagonalNormal
    masked = False

    def __init__(
        self, in_features: int, action_dim: int, *, init_scale: float = 1.0, state_dependent: bool = False
    ) -> None:
        super().__init__()
        if action_dim < 1 or init_scale <= 0:
            raise ValueError(f"action_dim {action_dim} and init_scale {init_scale} must both be positive")
        self.loc = nn.Linear(in_features, action_dim)
        self.scale = nn.Linear(in_features, action_dim) if state_dependent else None
        orthogonal(self, POLICY_GAIN)
        self.log_scale = nn.Parameter(torch.full((action_dim,), init_scale).log())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc = self.loc(x)
        log_scale = self.log_scale if self.scale is None else self.log_scale + self.scale(x)
        return loc, log_scale.clamp(*_LOG_SCALE_RANGE).exp().expand_as(loc)


class ValueHead(nn.Module):
    """A state value ``[*B, 1]``. Weights orthogonal with gain 1, bias zero."""

    out_key = VALUE

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 1)
        orthogonal(self, VALUE_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, 1]``."""
        return self.linear(x)


class PopArtHead(ValueHead):
    """A state value ``[*B, 1]``, scale * (w x + b) + mean, whose mean and scale follow the returns (PopArt).

    :meth:`update` moves the two and changes w and b so that every value stays what it was. An error in units of
    ``scale``, which is what the loss is then made of, is of one size whatever that of the returns, and what the layers
    before learn from values is too.

    van Hasselt et al. 2016, arXiv 1602.07714; with several learners Hessel et al. 2019, arXiv 1809.04474.

    Args:
        in_features: F.
        rate: weight of a batch in the moments, 3e-4 in the papers. The first ones count as much as each other: at batch
            n the weight is 1 / n where that is more.
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, in_features: int, *, rate: float = 3e-4) -> None:
        super().__init__(in_features)
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
        self.rate = rate
        for name, value in (("mean", 0.0), ("square", 1.0), ("count", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the returns, a scalar of 1e-4 at least; 1 before the first update."""
        return (self.square - self.mean.square()).clamp(min=1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, 1]``."""
        return self.linear(x) * self.scale + self.mean

    @torch.no_grad()
    def update(self, mean: Tensor, square: Tensor) -> None:
        """Take in a batch of returns by the means of them and of their squares, scalars; in place."""
        before, scale = self.mean.clone(), self.scale
        self.count += 1
        weight = (1 / self.count).clamp(min=self.rate)
        self.mean.lerp_(mean.to(self.mean), weight)
        self.square.lerp_(square.to(self.square), weight)
        self.linear.weight.mul_(scale / self.scale)
        self.linear.bias.mul_(scale).add_(before - self.mean).div_(self.scale)


class ActionValueHead(nn.Module):
    """Values of ``num_actions`` discrete actions, by one critic. Weights orthogonal with gain 1, biases zero."""

    out_key = ACTION_VALUE

    def __init__(self, in_features: int, num_actions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_actions)
        orthogonal(self, VALUE_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, 1, A]``."""
        return self.linear(x).unsqueeze(-2)
