"""What the losses do with the values of K critics: the smallest, those of an action, distributions over atoms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def min_q(values: Tensor) -> Tensor:
    """The smallest of K critics' values [*, K], [*]."""
    return values.squeeze(-1) if values.shape[-1] == 1 else values.min(-1).values


class MinCritic(NamedTuple):
    """``q_value`` [*] of the critic with the smallest, and what bootstraps from it: that again, or [*, atoms]."""

    q_value: Tensor
    bootstrap: Tensor


def min_critic(outputs: Tensor, support: Tensor | None) -> MinCritic:
    """Of K critics the one with the smallest value; of distributions over atoms, with the smallest mean.

    Args:
        outputs: values [*, K], or logits [*, K, atoms].
        support: the atoms, [atoms]; None of values.
    """
    if support is None:
        value = min_q(outputs)
        return MinCritic(value, value)
    probs = outputs.softmax(-1)
    means = mean_of(probs, support)
    if outputs.shape[-2] == 1:
        return MinCritic(means.squeeze(-1), probs.squeeze(-2))
    value, which = means.min(-1)
    index = which[..., None, None].expand(*which.shape, 1, probs.shape[-1])
    return MinCritic(value, probs.gather(-2, index).squeeze(-2))


def of_action(values: Tensor, action: Tensor) -> Tensor:
    """Of ``values`` [M, K, A] those of ``action`` int64 [M]: [M, K]; of [M, K, A, atoms]: [M, K, atoms]."""
    index = action.view(-1, 1, 1, *(1,) * (values.ndim - 3)).expand(-1, values.shape[1], 1, *values.shape[3:])
    return values.gather(2, index).squeeze(2)


def mean_of(probs: Tensor, support: Tensor) -> Tensor:
    """Means [*B] of distributions [*B, atoms] over ``support`` [atoms]: a sum, which autocast does not round."""
    return (probs * support).sum(-1)


class CategoricalTerms(NamedTuple):
    """``cross_entropy`` to the target [M], summed over critics; constant means ``q_value`` [M, K], ``target`` [M]."""

    cross_entropy: Tensor
    q_value: Tensor
    target: Tensor


def categorical_terms(logits: Tensor, target: Tensor, support: Tensor) -> CategoricalTerms:
    """What categorical critics learn from, of ``logits`` [M, K, atoms] and a distribution ``target`` [M, atoms].

    Source: Bellemare et al. 2017, arXiv 1707.06887 (C51).
    """
    cross_entropy = -(target.unsqueeze(-2) * logits.log_softmax(-1)).sum((-2, -1))
    return CategoricalTerms(cross_entropy, mean_of(logits.detach().softmax(-1), support), mean_of(target, support))


def divergence(cross_entropy: Tensor, target: Tensor, critics: int) -> Tensor:
    """Mean over critics of KL(target || critic), [M], constant, of what :func:`categorical_terms` takes and gives.

    A target of traces may have negative entries, which are taken as 0 in its entropy; the result is never below 0.
    """
    mass = target.clamp(min=0)
    return (cross_entropy.detach() / critics + torch.xlogy(mass, mass).sum(-1)).clamp(min=0)
