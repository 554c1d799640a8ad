"""Recurrent cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer

from offtrace.modules import host
from offtrace.modules.keys import RECURRENT_C, RECURRENT_H


class LSTMCore(nn.Module):
    """LSTM over encoded observations and, as in the paper, the last action and the last reward.

    Espeholt et al. 2018, arXiv 1802.01561. The state is set to zero *before* the first observation of an episode, and
    there the last action and reward count as zero (no action, not action 0). It always computes in float32: the cell
    adds up over time. Weights orthogonal, biases zero except the forget gate's, which is 1.

    Args:
        in_features: size of the encoded observation.
        hidden_size: of the state, and features out.
        num_actions: last action comes as int64 [*B] and enters one-hot.
        action_dim: last action comes as float [*B, action_dim]. With neither, no last action or reward is read.
    """

    def __init__(
        self, in_features: int, hidden_size: int, *, num_actions: int | None = None, action_dim: int | None = None
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size of the recurrent core is {hidden_size}; it must be at least 1")
        if num_actions is not None and action_dim is not None:
            raise ValueError("give the core num_actions or action_dim, not both")
        self.num_actions = num_actions
        self.last_step = num_actions is not None or action_dim is not None
        extra = (num_actions or action_dim or 0) + 1 if self.last_step else 0
        self.out_features = self.hidden_size = hidden_size
        self.cell = _cell(in_features + extra, hidden_size)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform by which an environment carries the state; TorchRL's collectors look for this method."""
        spec = {key: Unbounded(shape=(self.hidden_size,)) for key in (RECURRENT_H, RECURRENT_C)}
        return TensorDictPrimer(spec, expand_specs=True)

    def inputs(self, x: Tensor, is_init: Tensor, last_action: Tensor | None, last_reward: Tensor | None) -> Tensor:
        """What the cell reads, [*B, in_features + ...]; reward clipped to [-1, 1], zeros where an episode starts."""
        x = x.to(self.cell.weight_ih.dtype)
        if not self.last_step:
            return x
        assert last_action is not None
        assert last_reward is not None
        if self.num_actions is not None:
            # F.one_hot reads the largest action
            none = last_action.new_zeros(*last_action.shape, self.num_actions, dtype=x.dtype)
            last_action = none.scatter_(-1, last_action.long().unsqueeze(-1), 1)
        extra = torch.cat([last_action.to(x.dtype), last_reward.to(x.dtype).clamp(-1, 1)], -1)
        return torch.cat([x, extra.masked_fill(is_init, 0)], -1)

    def step(self, x: Tensor, is_init: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """State after one step. ``x`` [N, F] from :meth:`inputs`, ``is_init`` bool [N, 1], ``h`` and ``c`` [N, H]."""
        return self.cell(x, (h.masked_fill(is_init, 0), c.masked_fill(is_init, 0)))

    def unroll(self, x: Tensor, is_init: Tensor, h: Tensor, c: Tensor, *, critic_alone: bool = False) -> Tensor:
        """Features [B, T, H] of a sequence ``x`` [B, T, F], ``is_init`` [B, T, 1], from the state [B, H] before it.

        ``critic_alone`` leaves out a core of the policy's own: features are then those of the critic.
        On the CPU sequences in which no episode starts behind their first step go through torch's fused LSTM.
        """
        run = _fused if host.readable(is_init) and not bool(is_init[:, 1:].any()) else _looped
        parts = self._parts(x, h, c)[-1:] if critic_alone else self._parts(x, h, c)
        found = [run(cell, part, is_init, *state) for cell, part, *state in parts]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _parts(self, x: Tensor, h: Tensor, c: Tensor) -> list[tuple[nn.LSTMCell, Tensor, Tensor, Tensor]]:
        """Each cell with its input and its part of the state, the critic's last."""
        return [(self.cell, x, h, c)]


class SeparateCores(LSTMCore):
    """Two LSTMs over the same input, one of the policy and one of the critic, as in Reactor.

    The state, and the features of :meth:`unroll`, are those of the policy and behind them those of the critic, ``2
    hidden_size`` numbers together; each head reads its own half, of ``out_features``.

    Gruslys et al. 2018, arXiv 1704.04651, section 3.4.

    Args:
        in_features, num_actions, action_dim: as of :class:`LSTMCore`.
        hidden_size: of each.
        detach_policy: no gradient of the policy reaches what is before the cores.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        num_actions: int | None = None,
        action_dim: int | None = None,
        detach_policy: bool = False,
    ) -> None:
        super().__init__(in_features, hidden_size, num_actions=num_actions, action_dim=action_dim)
        self.policy_cell = _cell(self.cell.input_size, hidden_size)
        self.detach_policy = detach_policy
        self.hidden_size = 2 * hidden_size

    def step(self, x: Tensor, is_init: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`LSTMCore.step`, ``h`` and ``c`` [N, 2 H]."""
        h, c = h.masked_fill(is_init, 0), c.masked_fill(is_init, 0)
        policy, critic = (cell(part, tuple(state)) for cell, part, *state in self._parts(x, h, c))
        return torch.cat([policy[0], critic[0]], -1), torch.cat([policy[1], critic[1]], -1)

    def _parts(self, x: Tensor, h: Tensor, c: Tensor) -> list[tuple[nn.LSTMCell, Tensor, Tensor, Tensor]]:
        (policy_h, critic_h), (policy_c, critic_c) = h.chunk(2, -1), c.chunk(2, -1)
        policy_x = x.detach() if self.detach_policy else x
        return [(self.policy_cell, policy_x, policy_h, policy_c), (self.cell, x, critic_h, critic_c)]


def _looped(cell: nn.LSTMCell, x: Tensor, is_init: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """The cell step by step, with a reset before every step at which an episode starts."""
    outputs = []
    for now, first in zip(x.unbind(1), is_init.unbind(1), strict=True):
        h, c = cell(now, (h.masked_fill(first, 0), c.masked_fill(first, 0)))
        outputs.append(h)
    return torch.stack(outputs, 1)


def _fused(cell: nn.LSTMCell, x: Tensor, is_init: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """The same up to rounding, in one call, with a reset before the first step alone."""
    state = [part.masked_fill(is_init[:, 0], 0).unsqueeze(0) for part in (h, c)]
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    out, _, _ = torch.lstm(
        x, state, weights, has_biases=True, num_layers=1, dropout=0.0, train=cell.training, bidirectional=False,
        batch_first=True,
    )  # fmt: skip
    return out


def _cell(in_features: int, hidden_size: int) -> nn.LSTMCell:
    cell = nn.LSTMCell(in_features, hidden_size)
    for name, parameter in cell.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.data.chunk(4):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
    # the cell adds two biases; the gates are input, forget, cell, output
    cell.bias_ih.data[hidden_size : 2 * hidden_size] = 1.0
    return cell
