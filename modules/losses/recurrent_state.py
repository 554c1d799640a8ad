"""The recurrent state of replayed sequences, computed again by the weights of now."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules.tensordict_module.rnn import set_recurrent_mode

from offtrace.modules.keys import NEXT, RECURRENT_C, RECURRENT_H, VALID
from offtrace.modules.losses.views import own_network_of, recurrent_keys


@torch.no_grad()
def burn_in(policy: Any, batch: TensorDictBase, steps: int) -> TensorDictBase:
    """Runs the policy's network over the first steps of sequences, and puts its state where learning begins.

    Kapturowski et al. 2019 (R2D2): the state that a replay stored is that of old weights. From it the network is run
    over ``steps`` steps, without gradient and one after the other as an actor does, and what comes out replaces the
    stored state of the step behind them. A step with ``valid`` False leaves the state as it is. Of this package's
    networks the core alone takes the steps one after the other.

    The paper shortens the burn-in at the start of an episode. So does the replay (``Replay(burn_in=...)``): it draws
    sequences as without burn-in and adds the steps in front that there are, so that every step of an episode is learnt
    from as often as without, the first ones with a shorter burn-in, or none, where the state is 0 anyway. Of other
    sequences, whose episode ends inside the first ``steps``, nothing behind them is valid, and nothing is learnt from.

    Args:
        policy: what the losses take: its ``get_dist_params`` writes the next state, its ``in_keys`` are read.
        batch: ``[B, steps + T]``, with the state of its first step.
        steps: at least 0; 0 leaves the stored state.

    Returns:
        ``[B, T]``, a copy.

    Raises:
        ValueError: the policy has no recurrent state, or the batch no step behind the burn-in.
        KeyError: when an entry is missing, by its name.
    """
    keys = recurrent_keys(policy)
    if not keys:
        raise ValueError("the policy has no recurrent state that steps in front of a sequence could renew")
    if batch.ndim != 2 or not 0 <= steps < batch.shape[1]:
        raise ValueError(
            f"the batch is {list(batch.shape)}, and the burn-in {steps} steps; it must be [B, steps + T] with a T of 1 "
            "or more"
        )
    valid = batch.get(VALID, None)
    valid = None if valid is None else valid.view(batch.shape)
    for key in policy.in_keys:
        if batch.get(key, None) is None:
            raise KeyError(f"the policy reads {key!r}, which the batch lacks")
    front = batch[:, :steps].select(*policy.in_keys)
    state: dict[Any, Tensor] = {key: batch[key][:, 0] for key in keys}
    network = own_network_of(policy)
    if steps and network is not None:  # it needs no heads for it, and encodes all steps at once
        state = dict(zip((RECURRENT_H, RECURRENT_C), network.state_behind(front, valid), strict=True))
    else:
        state = _step_by_step(policy, front, state, valid)
    rest = batch[:, steps:].clone()
    for key in keys:
        rest[key][:, 0] = state[key]
    return rest


def _step_by_step(
    policy: Any, front: TensorDictBase, state: dict[Any, Tensor], valid: Tensor | None
) -> dict[Any, Tensor]:
    """The state behind sequences [B, T] of whatever writes it, from that in front of them."""
    with set_recurrent_mode(False):
        for t in range(front.shape[1]):
            out = policy.get_dist_params(front[:, t].update(state))
            found = {key: out[NEXT, key] for key in state}
            if valid is not None:
                here = {key: valid[:, t].view(-1, *(1,) * (x.ndim - 1)) for key, x in found.items()}
                found = {key: torch.where(here[key], x, state[key]) for key, x in found.items()}
            state = found
    return state
