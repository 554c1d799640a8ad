"""The steps and states of a batch that the losses look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import cleared

States = dict[Any, Tensor]


class Sites(NamedTuple):
    """The M steps whose values are learnt. One-step and n-step targets are ``reward + discount * value after``.

    ``root`` and ``after``: observations of the step and of the state where it bootstraps, [M, *shape]; every entry can
    be evaluated, whatever was stored. ``valid``: bool [M], or None where all are.
    """

    root: States
    after: States
    action: Tensor
    reward: Tensor
    discount: Tensor
    valid: Tensor | None


class Batch(NamedTuple):
    """Entries of the batch as [N, T]."""

    reward: Tensor
    terminated: Tensor
    done: Tensor
    valid: Tensor | None

    def time_first(self) -> Batch:
        """The same as [T, N], as the returns want it."""
        valid = None if self.valid is None else self.valid.t()
        return Batch(self.reward.t(), self.terminated.t(), self.done.t(), valid)


class Window(NamedTuple):
    """Reward sum, ``discount`` of what follows, whether anything does, and the ``last`` step: [N] each."""

    reward: Tensor
    discount: Tensor
    bootstraps: Tensor
    last: Tensor


def first_window(batch: Batch, *, gamma: float, n: int) -> Window:
    """The window of at most n steps that starts at step 0.

    It is shortened at a done, before a step that is not valid, and at T. Where step 0 itself is not valid the sum is 0
    and the last step is 0.
    """
    reward, terminated, done = (x[:, :n] for x in (batch.reward, batch.terminated, batch.done))
    inside = torch.cat([torch.ones_like(done[:, :1]), ~(done | terminated)[:, :-1]], 1)
    if batch.valid is not None:
        inside = inside & batch.valid[:, :n]
        reward = reward.masked_fill(~batch.valid[:, :n], 0)
    inside = inside.cumprod(1)
    length = inside.sum(1)
    powers = gamma ** torch.arange(reward.shape[1] + 1, dtype=reward.dtype, device=reward.device)
    total = (reward * inside) @ powers[:-1]
    bootstraps = ~(terminated & (inside > 0)).any(1)
    return Window(total, powers[length] * bootstraps, bootstraps, (length - 1).clamp(min=0))


def read_sites(
    tensordict: TensorDictBase, batch: Batch, *, state_keys: Sequence[Any], action_key: Any, gamma: float, n: int | None
) -> Sites:
    """The steps of ``tensordict`` [N] or [N, T] whose values are learnt: all, or the first of each row if ``n``."""
    dims = tensordict.ndim
    action = tensordict.get(action_key)
    if n is not None:
        reward, discount, bootstraps, last = first_window(batch, gamma=gamma, n=n)
        rows = torch.arange(len(last), device=last.device)
        valid = None if batch.valid is None else batch.valid[:, 0]
        action = action[:, 0]
    else:
        reward, bootstraps = batch.reward.flatten(), ~batch.terminated.flatten()
        discount = bootstraps.to(reward.dtype) * gamma
        valid = None if batch.valid is None else batch.valid.flatten()
        action = action.flatten(0, dims - 1)
    if valid is not None:
        bootstraps = bootstraps & valid
    root, after = {}, {}
    for key in state_keys:
        first, following = tensordict.get(key), tensordict.get((k.NEXT, key))
        if n is not None:
            first, following = first[:, 0], following[rows, last]
        else:
            first, following = first.flatten(0, dims - 1), following.flatten(0, dims - 1)
        root[key] = cleared(first, valid)
        # what stands behind a terminal or invalid step may be anything, and no network may see it
        after[key] = torch.where(bootstraps.view(-1, *(1,) * (first.ndim - 1)), following, root[key])
    return Sites(root, after, cleared(action, valid), cleared(reward, valid), discount, valid)
