"""Returns of categorical critics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from offtrace.modules import host
from offtrace.modules.returns.checks import check, check_float, check_numbers, computing_dtype, discount, narrowed
from offtrace.modules.returns.state_values import saturated

BLOCK, GPU_BLOCK = 2**15, 2**20  # atoms of n-step distributions that are projected at once, some 40 bytes each


@torch.no_grad()
def categorical_projection(*, atoms: Tensor, probs: Tensor, support: Tensor) -> Tensor:
    """Mass at arbitrary places, moved to the two neighbours on a grid so that mass and mean are kept.

    Mass beyond the ends of the grid goes to its end atoms, which does change the mean.

    Args:
        atoms: where the mass is, ``[*B, N]``.
        probs: how much, ``[*B, N]``; may be negative.
        support: the grid, ``[K]``, increasing.

    Returns:
        ``[*B, K]``, with the sum of ``probs``.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Bellemare et al. 2017, arXiv 1707.06887 (C51).
    """
    check_float("atoms", atoms)
    _like("probs", probs, "atoms", atoms)
    _like("support", support, "atoms", atoms)
    if atoms.shape != probs.shape:
        raise ValueError(f"probs must have the shape of atoms, {list(atoms.shape)}, got {list(probs.shape)}")
    if support.ndim != 1 or len(support) < 2:
        raise ValueError(f"support must be [K] with K at least 2, got {list(support.shape)}")
    given, dtype = probs.dtype, computing_dtype(probs)
    atoms, probs, support = (x.to(dtype) for x in (atoms, probs, support))
    below, share = _Grid(support).between(atoms)
    out = torch.zeros(*probs.shape[:-1], len(support), dtype=probs.dtype, device=probs.device)
    out = out.scatter_add(-1, below + 1, probs * share).scatter_add(-1, below, probs * (1 - share))
    return narrowed(out, given)


@torch.no_grad()
def distributional_return(
    *,
    reward: Tensor,
    q_dist: Tensor,
    next_state_dist: Tensor,
    trace: Tensor | float,
    terminated: Tensor,
    done: Tensor,
    gamma: float | Tensor,
    support: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The operator of :func:`q_return` on categorical distributions, ``[T, *B, K]``.

    The target at s mixes, over n = 1, 2, ..., the n-step distributions z^n = sum_{i<n} gamma^i r_{s+i} + gamma^n z,
    projected on the support, with the weights (P_n = c_{s+1} ... c_{s+n-1}, and c := 0 where the trace is cut)::

        P_n ( sum_a pi(a|x_{s+n}) q(x_{s+n}, a)  -  c_{s+n} q(x_{s+n}, a_{s+n}) )

    They sum to one; single ones, and so single probabilities of the target, can be negative, and must stay so. If no
    mass meets an end of the support, the mean is that of :func:`q_return` on the means. Costs O(T^2) time, and memory
    of some inputs and a block. Half precision is computed in float32, and what overflows saturates, as there.

    Args:
        reward: r_t, ``[T, *B]``.
        q_dist: probabilities of the atoms at (x_t, a_t), ``[T, *B, K]``.
        next_state_dist: the policy's mixture at the true successor x'_t, ``[T, *B, K]``.
        trace: c_t of the action at t, ``[T, *B]``, or one number.
        terminated, done, gamma, valid: as of :func:`q_return`; the target of an invalid step is its own ``q_dist``.
        support: the atoms, ``[K]``, increasing.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit, by the argument's name.

    Source: Gruslys et al. 2018, arXiv 1704.04651, section 3.2.
    """
    check_float("reward", reward)
    for name, tensor in (("q_dist", q_dist), ("next_state_dist", next_state_dist), ("support", support)):
        _like(name, tensor, "reward", reward)
    if support.ndim != 1 or len(support) < 2:
        raise ValueError(f"support must be [K] with K at least 2, got {list(support.shape)}")
    if not isinstance(trace, Tensor):
        check_numbers(trace=trace)
    floats = {"reward": reward, **({"trace": trace} if isinstance(trace, Tensor) else {})}
    check(floats, {"terminated": terminated, "done": done, "valid": valid})
    for name, dist in (("q_dist", q_dist), ("next_state_dist", next_state_dist)):
        if dist.shape != (*reward.shape, len(support)):
            raise ValueError(f"{name} must be [T, *B, K], {[*reward.shape, len(support)]}, got {list(dist.shape)}")
    dtype, given = computing_dtype(q_dist), q_dist.dtype
    reward, q_dist, next_state_dist, support = (x.to(dtype) for x in (reward, q_dist, next_state_dist, support))
    number, discounts = discount(gamma, reward)
    per_step = torch.full_like(reward, number) if number is not None else discounts
    assert per_step is not None
    known = torch.ones_like(done) if valid is None else valid
    reward = reward.masked_fill(~known, 0)
    c = trace.to(dtype) if isinstance(trace, Tensor) else torch.full_like(reward, trace)
    bounded = not isinstance(trace, Tensor) and abs(trace) <= 1
    # behind step t: c of the next action, 0 where the trace is cut or the next successor is unknown
    cut = torch.cat([(done | terminated | ~known)[:-1] | ~known[1:], torch.ones_like(done[:1])])
    behind = torch.cat([c[1:], c[-1:]]).masked_fill(cut, 0)
    # behind an end of the MDP all atoms coincide: any distribution will do, and what was stored there need not be one
    nowhere = torch.zeros_like(support)
    nowhere[0].fill_(1)
    mixture = torch.where((terminated | ~known).unsqueeze(-1), nowhere, next_state_dist)
    # what stands behind a cut need not be a distribution
    following = behind.unsqueeze(-1)
    taken = torch.where(following == 0, 0, following * torch.cat([q_dist[1:], q_dist[-1:]]))
    mixture = mixture - taken

    first = (torch.arange(reward.numel(), device=reward.device) * len(support)).view(reward.shape)  # of row s in out
    out, grid = torch.zeros_like(q_dist).flatten(), _Grid(support)
    weight, gained, factor = torch.ones_like(reward), torch.zeros_like(reward), torch.ones_like(reward)
    length, waiting, size = len(reward), [], 0
    for n in range(length):  # weight, gained and factor belong to the first action s; row s + n follows it
        rest = length - n
        weight, gained, factor = weight[:rest], gained[:rest], factor[:rest]
        gained = gained + factor * reward[n:]
        factor = factor * per_step[n:]
        waiting.append((weight, gained, factor * ~terminated[n:], mixture[n:], first[:rest]))
        size += mixture[n:].numel()
        weight = weight * behind[n:]
        if not bounded:  # products of ratios may overflow, and infinities meet zeros
            weight = saturated(weight)
        # a few large operations cost less than many small ones, until they no longer fit the cache
        if size + mixture[n + 1 :].numel() > (BLOCK if reward.device.type == "cpu" else GPU_BLOCK) or rest == 1:
            out = _mixed(out, [torch.cat(part) for part in zip(*waiting, strict=True)], grid, bounded=bounded)
            waiting, size = [], 0
    out = out.view(q_dist.shape)
    return narrowed(torch.where(known.unsqueeze(-1), out, q_dist), given)


def _mixed(out: Tensor, pairs: list[Tensor], grid: _Grid, *, bounded: bool) -> Tensor:
    """``out`` with n-step distributions, projected on the grid, added to the rows that begin at ``first``."""
    weight, gained, factor, mixture, first = (x if x.ndim == pairs[3].ndim else x.unsqueeze(-1) for x in pairs)
    # where the weight is 0 the sum has ended; what stands there may belong to another episode
    mass = (weight * mixture).masked_fill(weight == 0, 0)
    if not bounded:
        mass = saturated(mass)
    below, share = grid.between(gained + factor * grid.support)
    below = (first + below).flatten()
    upper = mass * share
    out = out.scatter_add(0, below + 1, upper.flatten()).scatter_add(0, below, (mass - upper).flatten())
    return out if bounded else saturated(out)


class _Grid:
    """The atoms ``[K]``, and where between them a place is: by a division where the host knows them to be even."""

    def __init__(self, support: Tensor) -> None:
        self.support = support
        self._even: tuple[float, float] | None = None
        # vmap cannot ask what its rows hold
        if host.readable(support) and not is_batchedtensor(support):
            low, high = float(support[0]), float(support[-1])
            even = low + torch.arange(len(support), dtype=support.dtype) * ((high - low) / (len(support) - 1))
            rounding = 4 * torch.finfo(support.dtype).eps * max(abs(low), abs(high))
            if float((support - even).abs().max()) <= rounding:
                self._even = low, high

    def between(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The atom below ``place``, and the share of the way to the next; beyond the ends it is at the end."""
        last = len(self.support) - 2
        if self._even is None:  # a search costs some 20 times as much as the division
            place = place.clamp(self.support[0], self.support[-1])
            below = torch.searchsorted(self.support, place.contiguous(), right=True).clamp(1, last + 1) - 1
            return below, (place - self.support[below]) / self.support.diff()[below]
        low, high = self._even
        place = (place.clamp(low, high) - low) * ((last + 1) / (high - low))
        below = place.long().clamp(0, last)
        return below, place - below


def _like(name: str, tensor: Tensor, anchor: str, like: Tensor) -> None:
    check_float(name, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {anchor}, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {anchor}, {like.device}, got {tensor.device}")
