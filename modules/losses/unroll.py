"""The sequence on which the network runs once per batch."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from offtrace.modules.keys import ACTION_MASK, IS_INIT, NEXT
from offtrace.modules.losses.offpolicy import cleared


class Unroll:
    """x_0, ..., x_{T-1} and the last successor, with the final observations of truncated steps behind their x_t.

    The successor of every step then stands one place behind it. (Behind a step that terminated stands the first
    observation of the next episode, which nobody may read; the observation of an invalid step is 0 where no valid step
    goes on to it; where the successor of the last step is terminal or unknown,
    x_{T-1} stands in its place, so that whatever was stored there reaches nothing.) Rows with fewer truncations than
    others are padded at their end with some observation of the batch. A recurrent state is reset by the ``is_init`` of
    the observation that follows a final one.

    Args:
        tensordict: rollout [B, T] in the layout of TorchRL's collectors.
        policy: its ``in_keys`` are copied; a key that it also writes under ``"next"`` is recurrent state, of which only
            the first step's is used.
        terminated, done: bool [B, T].
        valid: bool [B, T] or None; False where the successor is not known.

    Attributes:
        inputs: TensorDict [B, T + 1 + K], K the largest number of truncations inside a row; usually 0.
    """

    def __init__(
        self,
        tensordict: TensorDictBase,
        policy: TensorDictModuleBase,
        *,
        terminated: Tensor,
        done: Tensor,
        valid: Tensor | None,
    ) -> None:
        self._batch, self._time = tensordict.batch_size
        bootstraps = ~terminated if valid is None else ~terminated & valid
        self._last = bootstraps[:, -1:]
        inserted = (done & bootstraps)[:, :-1]
        # the number of places is a shape, so the host must know it: one small read, before any kernel of the network
        self._extra = int(inserted.sum(1).max())
        if self._extra:
            self._place(inserted)
        states = {key[1] for key in policy.out_keys if isinstance(key, tuple) and key[0] == NEXT}
        length = self._time + 1 + self._extra
        # an invalid step's observation is read as the successor of the step before it, if that goes on to it
        read = None if valid is None else valid | torch.nn.functional.pad((valid & ~done)[:, :-1], (1, 0))
        found: dict[Any, Tensor] = {}
        for key in policy.in_keys:
            root = tensordict.get(key, None)
            if key in states:
                if root is None:
                    raise KeyError(f"the rollout lacks the recurrent state {key!r} at its first step")
                found[key] = root[:, :1].expand(-1, length, *root.shape[2:])
                continue
            following = self._following(tensordict, key, root)
            found[key] = self._sequence(cleared(root, read), following)
        self.inputs = TensorDict(found, [self._batch, length])

    def at(self, x: Tensor) -> Tensor:
        """Of ``x`` [B, T + 1 + K, ...] the places of the steps, [B, T, ...]."""
        return x[self._rows, self._position] if self._extra else x[:, : self._time]

    def behind(self, x: Tensor) -> Tensor:
        """Of ``x`` [B, T + 1 + K, ...] the places of the steps' successors, [B, T, ...]."""
        return x[self._rows, self._position + 1] if self._extra else x[:, 1:]

    def _place(self, inserted: Tensor) -> None:
        before = torch.nn.functional.pad(inserted.long().cumsum(1), (1, 0))
        self._position = torch.arange(self._time, device=inserted.device) + before
        self._rows = torch.arange(self._batch, device=inserted.device).unsqueeze(1)
        row, step = self._final_row, self._final_step = inserted.nonzero(as_tuple=True)
        # which row of [x of every step, final observations, last successors] stands where; gathering whole rows is
        # about 25 times faster than scattering them. Padding is row 0.
        steps = self._batch * self._time
        source = self._position.new_zeros(self._batch, self._time + 1 + self._extra)
        source[self._rows, self._position] = torch.arange(steps, device=source.device).view(self._batch, -1)
        source[row, self._position[row, step] + 1] = steps + torch.arange(len(row), device=source.device)
        ends = steps + len(row) + torch.arange(self._batch, device=source.device)
        source[self._rows.squeeze(1), self._position[:, -1] + 1] = ends
        self._source = source.flatten()

    def _following(self, tensordict: TensorDictBase, key: Any, root: Tensor | None) -> Tensor:
        following = tensordict.get((NEXT, key), None)
        if root is None:
            raise KeyError(f"the policy reads {key!r}, which the rollout lacks")
        if following is None:
            if key == IS_INIT:
                return torch.zeros_like(root)
            if key == ACTION_MASK:  # only values are read behind a step, and they do not depend on the mask
                return root
            raise KeyError(f"the policy reads {key!r}, but the rollout lacks ('next', {key!r})")
        return following

    def _sequence(self, root: Tensor, following: Tensor) -> Tensor:
        event = (1,) * (root.ndim - 2)
        last = torch.where(self._last.view(-1, 1, *event), following[:, -1:], root[:, -1:])
        if not self._extra:
            return torch.cat([root, last], 1)
        final = following[self._final_row, self._final_step]
        source = torch.cat([root.flatten(0, 1), final, last.flatten(0, 1)])
        return source.index_select(0, self._source).unflatten(0, (self._batch, -1))
