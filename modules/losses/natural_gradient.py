"""A step of the natural gradient: its direction, its length, and how much of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix as what it does to a vector: [N] to [N]."""


def conjugate_gradients(product: Product, target: Tensor, *, iterations: int) -> Tensor:
    """x with A x = ``target``, approximately: the least of 1/2 x.A x - target.x in a Krylov space.

    Hestenes and Stiefel 1952, from x = 0; exact after as many iterations as A has different eigenvalues. No value is
    read by the host.

    Args:
        product: v to A v; A is symmetric, its eigenvalues are above 0.
        target: ``[N]``.
        iterations: products that are taken.

    Returns:
        x, ``[N]``; 0 where ``target`` is.
    """
    x, residual = torch.zeros_like(target), target
    direction, square = residual, residual @ residual
    for _ in range(iterations):
        image = product(direction)
        curvature = direction @ image
        length = torch.where(curvature > 0, square / curvature, 0)  # 0 / 0 once the residual is exactly 0
        x = x + length * direction
        residual = residual - length * image
        before, square = square, residual @ residual
        direction = residual + torch.where(before > 0, square / before, 0) * direction
    return x


def step_length(curvature: Tensor, *, delta: float) -> Tensor:
    """sqrt(2 delta / x.F x), by which x is multiplied to be where 1/2 x.F x, the KL to second order, is ``delta``.

    Args:
        curvature: x.F x, a scalar.
        delta: in nats.

    Returns:
        A scalar; 0 where the curvature is not above 0.
    """
    return torch.where(curvature > 0, (2 * delta / curvature).sqrt(), 0)


class Move(NamedTuple):
    """Where a line search ended: the part of the step that was taken, 0 for none, and what was found there."""

    fraction: float
    surrogate: Tensor
    kl: Tensor


def line_search(
    measure: Callable[[float], tuple[Tensor, Tensor]],
    surrogate: Tensor,
    *,
    delta: float,
    tries: int,
    shrink: float = 0.5,
) -> Move:
    """The first of the fractions 1, s, s^2 ... that raises the surrogate and keeps the KL within ``delta``.

    Args:
        measure: moves the policy by a fraction of the step; the surrogate and the KL there.
        surrogate: before the step, a scalar.
        delta: largest KL, in nats.
        tries: fractions that are tried.
        shrink: s, above 0 and below 1.

    Returns:
        The move; of a failed search the fraction 0, the surrogate as it was and a KL of 0, and the policy stands where
        it was measured last.
    """
    fraction = 1.0
    for _ in range(tries):
        found, kl = measure(fraction)
        if (found > surrogate) & (kl <= delta):  # not where one of the two is NaN
            return Move(fraction, found, kl)
        fraction *= shrink
    return Move(0.0, surrogate, torch.zeros_like(surrogate))


def flat_gradient(x: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """Of the scalar ``x``, as one vector [N]; 0 for weights that it does not depend on. The graph is kept."""
    found = torch.autograd.grad(
        x, weights, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in found])


def sum_of_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over the ranks of ``torch.distributed``; without a graph where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.detach().clone()
        torch.distributed.all_reduce(x)
    return x


@torch.no_grad()
def write(vector: Tensor, weights: Sequence[nn.Parameter]) -> None:
    """Copy ``vector`` [N], a part for each of them, into the weights."""
    parts = vector.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.copy_(part.view_as(weight))


@contextmanager
def differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters require a gradient while this lasts, and what is computed has a graph."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
