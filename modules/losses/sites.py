"""The steps and states of a batch that the losses look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import Batch, cleared
from offtrace.modules.networks.critics import ActionCritic, DiscreteCritic, StateValue

States = dict[Any, Tensor]


class Sites(NamedTuple):
    """The M steps whose values are learnt. One-step and n-step targets are ``reward + discount * value after``.

    ``root`` and ``after``: observations of the step and of the state where it bootstraps, [M, *shape]; every entry can
    be evaluated, whatever was stored. ``valid``: bool [M], or None where all are. ``length``: steps of the n-step
    window, [M], or None where all are 1.
    """

    root: States
    after: States
    action: Tensor
    reward: Tensor
    discount: Tensor
    valid: Tensor | None
    length: Tensor | None


class Window(NamedTuple):
    """Reward sum, ``discount`` of what follows, whether anything does, and the number of steps: [N] each."""

    reward: Tensor
    discount: Tensor
    bootstraps: Tensor
    length: Tensor


def first_window(batch: Batch, *, gamma: float, n: int) -> Window:
    """The window of at most n steps that starts at step 0.

    It is shortened at a done, before a step that is not valid, and at T. Where step 0 itself is not valid the sum is 0
    and one step is looked at.
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
    return Window(total, powers[length] * bootstraps, bootstraps, length.clamp(min=1))


def at_sites(x: Tensor, dims: int, n: int | None) -> Tensor:
    """Of ``x`` [N, ...] or [N, T, ...] those steps whose values are learnt: all, or the first of each row if ``n``."""
    return x[:, 0] if n is not None else x.flatten(0, dims - 1)


def read_sites(
    entry: Callable[[Any], Tensor],
    batch: Batch,
    *,
    dims: int,
    state_keys: Sequence[Any],
    action_key: Any,
    gamma: float,
    n: int | None,
) -> Sites:
    """The steps of a batch with ``dims`` dimensions whose values are learnt, see :func:`at_sites`.

    ``entry`` gives those of the batch by their keys.
    """
    length = None
    if n is not None:
        reward, discount, bootstraps, length = first_window(batch, gamma=gamma, n=n)
        rows = torch.arange(len(length), device=length.device)
        valid = None if batch.valid is None else batch.valid[:, 0]
    else:
        reward, bootstraps = batch.reward.flatten(), ~batch.terminated.flatten()
        discount = bootstraps.to(reward.dtype) * gamma
        valid = None if batch.valid is None else batch.valid.flatten()
    if valid is not None:
        bootstraps = bootstraps & valid
    root, after = {}, {}
    for key in state_keys:
        first, following = at_sites(entry(key), dims, n), entry((k.NEXT, key))
        following = following.flatten(0, dims - 1) if length is None else following[rows, length - 1]
        root[key] = cleared(first, valid)
        # what stands behind a terminal or invalid step may be anything, and no network may see it
        after[key] = torch.where(bootstraps.view(-1, *(1,) * (first.ndim - 1)), following, root[key])
    action = at_sites(entry(action_key), dims, n)
    return Sites(root, after, cleared(action, valid), cleared(reward, valid), discount, valid, length)


def evaluate(network: Any, key: str, states: States, action: Tensor | None = None) -> Tensor:
    """What ``network`` writes under ``key`` for ``states`` [M] and, where it reads one, ``action`` [M, A] or [S, M, A].

    The critics of this package are called on tensors: a TensorDict costs as much as one of their smaller layers.
    """
    keys = network.in_keys
    if isinstance(network, (ActionCritic, DiscreteCritic, StateValue)):
        return network.values(states[keys[0]], *(() if action is None else (action,)))
    found = {name: states[name] for name in keys if name in states}
    batch = next(iter(found.values())).shape[:1] if action is None else action.shape[:-1]
    if action is not None:
        found = {name: x.expand(*batch, *x.shape[1:]) for name, x in found.items()}
        found[k.ACTION] = action
    return network(TensorDict(found, batch)).get(key)
