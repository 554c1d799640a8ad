"""The network behind a policy: encoder, optional recurrent core, policy head, optional value head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules.tensordict_module.rnn import recurrent_mode

from offtrace.modules.keys import (
    ACTION_MASK,
    IS_INIT,
    LAST_ACTION,
    LAST_REWARD,
    NEXT,
    OBSERVATION,
    RECURRENT_C,
    RECURRENT_H,
)
from offtrace.modules.networks.core import LSTMCore, SeparateCores
from offtrace.modules.networks.heads import PolicyHead
from offtrace.modules.networks.normalise import DictNormalizer, ObservationNormalizer
from offtrace.modules.networks.observations import ObservationNetwork, States, for_heads
from offtrace.modules.networks.value_heads import ActionValueHead, CategoricalValueHead, ValueHead

Tensors = tuple[Tensor, ...]


class _Encoded(NamedTuple):
    """Features [N, F] in the precision of the weights, the mask [*B, A] where one is read, and in what heads run."""

    features: Tensor
    mask: Tensor | None
    exact: AbstractContextManager[Any]


class PolicyNetwork(ObservationNetwork):
    """One call gives the parameters of the action distribution and, with a value head, values.

    Reads ``"observation"`` [*B, *shape] (or the leaves ``("observation", name)`` of a dictionary) and, where they
    apply, ``"action_mask"`` bool [*B, A], ``"is_init"``, ``"last_action"``, ``"last_reward"``, ``"recurrent_h"`` and
    ``"recurrent_c"`` [*B, H]. Writes the head's parameters (``"logits"``; ``"loc"`` and ``"scale"``; ...) and what the
    value head gives: ``"state_value"`` [*B, 1], or ``"action_value"`` [*B, 1, A] and, where it is distributional,
    ``"value_logits"`` [*B, 1, A, atoms]. All in the dtype of the weights, under autocast too.

    A recurrent net takes one step on [*B] and writes the state into ``"next"``. Under TorchRL's
    ``set_recurrent_mode(True)``, which losses set, the last batch dimension is time: it unrolls from the state stored
    at the first step, sets it to zero where ``"is_init"``, and writes no state.

    Args:
        encoder: observation [N, *shape] to features [N, F].
        head: features to the parameters of the action distribution; :class:`GreedyHead` reads action values instead.
        value_head: features to the value of the state, or of every discrete action.
        core: recurrent core between encoder and heads; of :class:`SeparateCores` each head reads its own half.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
        observation_names: names of the entries of a dictionary observation; None: it is one tensor.
        detach_policy: no gradient of the policy passes its head: encoder and core learn from the values alone. Separate
            cores have a setting of their own, which stops it behind the policy's core.

    Raises:
        ValueError: if the head reads action values and no value head gives them.
    """

    encoder: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        head: PolicyHead,
        value_head: ValueHead | ActionValueHead | CategoricalValueHead | None = None,
        core: LSTMCore | None = None,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
        detach_policy: bool = False,
    ) -> None:
        super().__init__(encoder, normalizer, observation_key=observation_key, observation_names=observation_names)
        if head.reads_values and not isinstance(value_head, ActionValueHead | CategoricalValueHead):
            raise ValueError(f"{type(head).__name__} reads action values, which value_head={value_head} does not give")
        self.core = core
        self.detach_policy = detach_policy
        self.head = head
        self.value_head = value_head
        self._masked = head.masked or (value_head is not None and value_head.masked)
        self.out_keys: list[Any] = list(head.out_keys)
        if value_head is not None:
            self.out_keys += [key for key in value_head.out_keys if key not in self.out_keys]
        if self._masked:
            self.in_keys.append(ACTION_MASK)
        if core is not None:
            self.in_keys += [IS_INIT, RECURRENT_H, RECURRENT_C]
            self.out_keys += [(NEXT, RECURRENT_H), (NEXT, RECURRENT_C)]
            if core.last_step:
                self.in_keys += [LAST_ACTION, LAST_REWARD]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add parameters, values and next state to ``tensordict`` [*B] and return it.

        Raises:
            KeyError: when an entry is missing, by its name.
            TypeError, ValueError: when the mask of legal actions is not bool, or one of another number of actions.
        """
        params, values, state = self.compute(tensordict)
        self.write(tensordict, params, values, state)
        return tensordict

    def compute(self, tensordict: TensorDictBase) -> tuple[Tensors, Tensors, Tensors]:
        """What :meth:`forward` writes, [*B, ...], without writing it: parameters, values, next recurrent state."""
        batch = tensordict.batch_size
        features, mask, exact = self._features(tensordict, len(batch))
        with exact:
            features = features.view(*batch, -1)
            state: Tensors = ()
            if self.core is not None:
                features, state = self._recurrent(self.core, tensordict, features)
            return *self._heads(features, mask), state

    def write(self, tensordict: TensorDictBase, params: Tensors, values: Tensors, state: Tensors) -> None:
        """Add what :meth:`compute` gave to ``tensordict``."""
        for key, value in zip(self.head.out_keys, params, strict=True):
            tensordict.set(key, value)
        if self.value_head is not None:
            for key, value in zip(self.value_head.out_keys, values, strict=True):
                tensordict.set(key, value)
        for name, value in zip((RECURRENT_H, RECURRENT_C), state, strict=False):
            tensordict.set((NEXT, name), value)

    def critic(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add to ``tensordict`` [*B] what the value head gives, and return it: :meth:`forward` without the policy.

        A recurrent network takes sequences, as under ``set_recurrent_mode(True)``; of separate cores the critic's runs.

        Raises:
            ValueError: without a value head.
        """
        if self.value_head is None:
            raise ValueError("the policy network has no value head; build it with critic='v' or critic='q'")
        features, mask, exact = self._features(tensordict, len(tensordict.batch_size))
        with exact:
            features = features.view(*tensordict.batch_size, -1)
            if self.core is not None:
                x, is_init = self._core_inputs(self.core, tensordict, features)
                features = self._unrolled(self.core, tensordict, x, is_init, critic_alone=True)
            values = self.value_head.outputs(features, mask if self.value_head.masked else None)
        for key, value in zip(self.value_head.out_keys, values, strict=True):
            tensordict.set(key, value)
        return tensordict

    def state_behind(self, sequences: TensorDictBase, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrent state h and c [B, H] behind ``sequences`` [B, T], from that stored at their first step.

        The encoder sees all steps at once, and the heads none. An invalid step, ``valid`` [B, T] False, leaves the
        state as it is.

        Raises:
            ValueError: without a recurrent core.
        """
        core = self.core
        if core is None:
            raise ValueError("the policy network has no recurrent core, and so no state")
        features, _, exact = self._features(sequences, 2)
        with exact:
            x, is_init = self._core_inputs(core, sequences, features.view(*sequences.batch_size, -1))
            state = sequences[RECURRENT_H][:, 0], sequences[RECURRENT_C][:, 0]
            for t in range(x.shape[1]):
                h, c = core.step(x[:, t], is_init[:, t], *state)
                if valid is not None:
                    here = valid[:, t].unsqueeze(1)
                    h, c = torch.where(here, h, state[0]), torch.where(here, c, state[1])
                state = h, c
        return state

    def parameters_at(self, states: States) -> Tensors:
        """The parameters of the distribution, each [M, ...], at ``states`` whose entries are [M, ...].

        For feed-forward networks, as all methods that end in ``_at``: without a TensorDict, which costs as much as a
        small layer.
        """
        features, mask, exact = self._states(states)
        head = self.head
        with exact:
            return head(self._read_by_head(head, features, mask), mask if head.masked else None)

    def distribution_at(self, states: States) -> D.Distribution:
        """The distribution over actions at ``states`` whose entries are [M, ...]."""
        features, mask, exact = self._states(states)
        head = self.head
        with exact:
            return head.distribution_of(self._read_by_head(head, features, mask), mask if head.masked else None)

    def values(self, states: States, action: Tensor | None = None) -> Tensor:
        """The value head's own output at ``states`` whose entries are [M, ...]; ``action`` is not read.

        V [M, 1]; or Q [M, 1, A] of every action; or logits [M, 1, A, atoms], of which Q is
        ``logits.softmax(-1) @ value_head.support``.

        Raises:
            ValueError: without a value head.
        """
        if self.value_head is None:
            raise ValueError("the policy network has no value head; build it with critic='v' or critic='q'")
        features, mask, exact = self._states(states)
        with exact:
            return self.value_head(features, mask if self.value_head.masked else None)

    def _states(self, states: States) -> _Encoded:
        if self.core is not None:
            raise ValueError("a recurrent network reads sequences: call it on a TensorDict instead of single states")
        return self._features(states, 1)

    def _features(self, states: States | TensorDictBase, dims: int) -> _Encoded:
        features = self.encode(self.observation(states, dims))
        mask = _checked_mask(states[ACTION_MASK], self.head.num_actions) if self._masked else None
        features, exact = for_heads(features, *(head for head in (self.head, self.value_head) if head is not None))
        return _Encoded(features, mask, exact)

    def _heads(self, features: Tensor, mask: Tensor | None) -> tuple[Tensors, Tensors]:
        """Parameters and values of features [*B, F]."""
        head, value_head = self.head, self.value_head
        if head.reads_values:
            assert value_head is not None
            values = value_head.outputs(features, mask if value_head.masked else None)
            return head(values[-1], mask if head.masked else None), values
        policy, critic = self._parts(features)
        params = head(policy, mask if head.masked else None)
        return params, () if value_head is None else value_head.outputs(critic, mask if value_head.masked else None)

    def _parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What policy head and value head read of features [*B, F]."""
        if isinstance(self.core, SeparateCores):
            policy, critic = features.chunk(2, -1)
            return policy, critic
        return features.detach() if self.detach_policy else features, features

    def _read_by_head(self, head: PolicyHead, features: Tensor, mask: Tensor | None) -> Tensor:
        """What the policy head reads: the features, or the action values."""
        if not head.reads_values:
            return self._parts(features)[0]
        assert self.value_head is not None
        return self.value_head.outputs(features, mask if self.value_head.masked else None)[-1]

    def _recurrent(self, core: LSTMCore, tensordict: TensorDictBase, features: Tensor) -> tuple[Tensor, Tensors]:
        """Features behind the core, [*B, H], and the next state, h and c [*B, H]; none of an unrolled sequence."""
        x, is_init = self._core_inputs(core, tensordict, features)
        if recurrent_mode():
            return self._unrolled(core, tensordict, x, is_init), ()
        h, c = self._state(core, tensordict, x, is_init)
        h, c = core.step(x.reshape(-1, x.shape[-1]), is_init.reshape(-1, 1), h, c)
        h, c = (state.view(*tensordict.batch_size, -1) for state in (h, c))
        return h, (h, c)

    def _unrolled(
        self, core: LSTMCore, tensordict: TensorDictBase, x: Tensor, is_init: Tensor, *, critic_alone: bool = False
    ) -> Tensor:
        """Features behind the core, [*B, H], of sequences whose last batch dimension is time."""
        state = self._state(core, tensordict, x, is_init)
        h, c = (part.unflatten(0, (-1, x.shape[-2]))[:, 0] for part in state)
        x, is_init = x.reshape(len(h), -1, x.shape[-1]), is_init.reshape(len(h), -1, 1)
        return core.unroll(x, is_init, h, c, critic_alone=critic_alone).view(*tensordict.batch_size, -1)

    @staticmethod
    def _core_inputs(core: LSTMCore, tensordict: TensorDictBase, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the cells read [*B, ...], and where an episode starts [*B, 1]."""
        is_init = tensordict[IS_INIT]
        last = [tensordict[key] if core.last_step else None for key in (LAST_ACTION, LAST_REWARD)]
        return core.inputs(features, is_init, *last), is_init

    @staticmethod
    def _state(core: LSTMCore, tensordict: TensorDictBase, features: Tensor, is_init: Tensor) -> tuple[Tensor, Tensor]:
        """State before the step, flattened to [N, H]."""
        h, c = tensordict.get(RECURRENT_H, None), tensordict.get(RECURRENT_C, None)
        if h is None or c is None:
            if not bool(is_init.all()):
                raise KeyError(
                    f"{RECURRENT_H!r} and {RECURRENT_C!r} are missing in mid-episode: the environment does not carry "
                    "the recurrent state; build the collector with auto_register_policy_transforms=True, or append "
                    "torchrl.modules.utils.get_env_transforms_from_module(policy) to the environment"
                )
            h = c = features.new_zeros(*tensordict.batch_size, core.hidden_size)
        return h.reshape(-1, h.shape[-1]), c.reshape(-1, c.shape[-1])


def _checked_mask(mask: Tensor, num_actions: int | None) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"{ACTION_MASK!r} must be a bool tensor, True where an action is legal, got {mask.dtype}")
    if num_actions is not None and mask.shape[-1] != num_actions:
        raise ValueError(f"{ACTION_MASK!r} is {list(mask.shape)}; its last size must be the {num_actions} actions")
    return mask
