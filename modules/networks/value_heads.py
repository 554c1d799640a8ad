"""Value heads: features ``[*B, F]`` in, the value of the state or of every discrete action out."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from offtrace.modules.keys import ACTION_VALUE, VALUE, VALUE_LOGITS
from offtrace.modules.networks.initialise import SMALL_GAIN, VALUE_GAIN, orthogonal


class ValueHead(nn.Module):
    """A state value ``[*B, 1]``. Weights orthogonal with gain 1, bias zero."""

    out_keys: ClassVar[tuple[str, ...]] = (VALUE,)
    masked: bool = False
    """Whether ``mask``, of the legal actions, is given."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 1)
        orthogonal(self, VALUE_GAIN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[*B, 1]``."""
        return self.linear(x)

    def outputs(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the network writes, in the order of ``out_keys``; first what :meth:`forward` gives."""
        return (self(x, mask),)


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
        # in single precision the variance of returns of 100 and a few hundredths would be rounding noise
        for name, value in (("mean", 0.0), ("square", 1.0), ("count", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the returns, a float64 scalar of 1e-4 at least; 1 before the first update."""
        return (self.square - self.mean.square()).clamp(min=1e-8).sqrt()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[*B, 1]``."""
        return self.linear(x) * self.scale + self.mean

    @torch.no_grad()
    def update(self, mean: Tensor, square: Tensor, *, where: Tensor | None = None) -> None:
        """Take in a batch of returns by the means of them and of their squares, float64 scalars; in place.

        Where ``where``, a bool scalar, is False, nothing changes.
        """
        kept = (self.mean, self.square, self.count, self.linear.weight, self.linear.bias)
        old = [tensor.clone() for tensor in kept]
        before, scale = old[0], self.scale
        self.count += 1
        weight = (1 / self.count).clamp(min=self.rate)
        self.mean.lerp_(mean.to(self.mean), weight)
        self.square.lerp_(square.to(self.square), weight)
        self.linear.weight.mul_(scale / self.scale)
        self.linear.bias.mul_(scale).add_(before - self.mean).div_(self.scale)
        if where is not None:
            for tensor, unchanged in zip(kept, old, strict=True):
                tensor.copy_(torch.where(where, tensor, unchanged))


class _ActionHead(nn.Module):
    """``outputs`` numbers of every discrete action, dueling or not."""

    def __init__(
        self, in_features: int, num_actions: int, outputs: int, *, dueling: bool, masked: bool, gain: float
    ) -> None:
        super().__init__()
        if num_actions < 1:
            raise ValueError(f"num_actions is {num_actions}; it must be at least 1")
        self.masked = masked and dueling
        self.num_actions = num_actions
        self.linear = nn.Linear(in_features, num_actions * outputs)
        self.state = nn.Linear(in_features, outputs) if dueling else None
        orthogonal(self, gain)

    def _values(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[*B, A, outputs]."""
        advantage = self.linear(x).unflatten(-1, (self.num_actions, -1))
        if self.state is None:
            return advantage
        if mask is None:
            mean = advantage.mean(-2, keepdim=True)
        else:
            legal = mask.unsqueeze(-1)
            mean = (advantage * legal).sum(-2, keepdim=True) / legal.sum(-2, keepdim=True).clamp(min=1)
        return advantage + (self.state(x).unsqueeze(-2) - mean)


class ActionValueHead(_ActionHead):
    """Values of ``num_actions`` discrete actions, by one critic. Weights orthogonal with gain 1, biases zero.

    With ``dueling`` the head tells the value of the state from the advantages of the actions::

        Q(x, a) = V(x) + A(x, a) - mean over legal actions b of A(x, b)

    Wang et al. 2016, arXiv 1511.06581, equation 9.

    Args:
        in_features: F.
        num_actions: A.
        dueling: see above.
        masked: read a mask of legal actions; only ``dueling`` depends on it. The values of illegal actions are finite
            and mean nothing.
    """

    out_keys: ClassVar[tuple[str, ...]] = (ACTION_VALUE,)

    def __init__(self, in_features: int, num_actions: int, *, dueling: bool = False, masked: bool = False) -> None:
        super().__init__(in_features, num_actions, 1, dueling=dueling, masked=masked, gain=VALUE_GAIN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[*B, 1, A]``; ``mask`` bool [*B, A], True = legal."""
        return self._values(x, mask).transpose(-2, -1)

    def outputs(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(action_value,)``."""
        return (self(x, mask),)


class CategoricalValueHead(_ActionHead):
    """Distributions of the return of ``num_actions`` discrete actions over fixed atoms, by one critic (C51).

    The buffer ``support`` [atoms] holds the returns that the atoms stand for; Q(x, a) is softmax(logits) @ support.
    Weights orthogonal with gain 0.1, biases zero: values start near 0. With ``dueling`` the identity of
    :class:`ActionValueHead` holds for the logits of each atom (Hessel et al. 2018, arXiv 1710.02298).

    Bellemare et al. 2017, arXiv 1707.06887.

    Args:
        in_features, num_actions, dueling, masked: as :class:`ActionValueHead`.
        atoms: how many, at least 2.
        v_max: the atoms lie evenly in [-v_max, v_max].
    """

    out_keys: ClassVar[tuple[str, ...]] = (VALUE_LOGITS, ACTION_VALUE)
    support: Tensor

    def __init__(
        self,
        in_features: int,
        num_actions: int,
        *,
        dueling: bool = False,
        atoms: int = 51,
        v_max: float = 10.0,
        masked: bool = False,
    ) -> None:
        if atoms < 2 or not 0 < v_max < math.inf:
            raise ValueError(f"a support needs atoms >= 2 and a finite v_max > 0, got atoms={atoms} and v_max={v_max}")
        super().__init__(in_features, num_actions, atoms, dueling=dueling, masked=masked, gain=SMALL_GAIN)
        self.register_buffer("support", torch.linspace(-v_max, v_max, atoms))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[*B, 1, A, atoms]``; ``mask`` bool [*B, A], True = legal."""
        return self._values(x, mask).unsqueeze(-3)

    def outputs(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(value_logits, action_value)``: [*B, 1, A, atoms] and [*B, 1, A]."""
        logits = self(x, mask)
        return logits, logits.softmax(-1) @ self.support
