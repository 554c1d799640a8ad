"""Critics: K value functions evaluated as one batched network, and the value of a state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from offtrace.modules.keys import ACTION, ACTION_VALUE, OBSERVATION, STATE_ACTION_VALUE, VALUE, VALUE_LOGITS
from offtrace.modules.networks.ensembles import EnsembleMLP
from offtrace.modules.networks.normalise import DictNormalizer, ObservationNormalizer
from offtrace.modules.networks.observations import ObservationNetwork, States, flat, for_heads


class ActionCritic(ObservationNetwork):
    """K networks of the observation's features and an action; :class:`Critic` and :class:`CategoricalCritic`."""

    out_key: str
    """What :meth:`forward` writes."""

    def __init__(
        self,
        ensemble: EnsembleMLP,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, normalizer, observation_key=observation_key, observation_names=observation_names)
        self.ensemble = ensemble
        self.in_keys.append(ACTION)
        self.out_keys = [self.out_key]

    def values(self, states: States, action: Tensor) -> Tensor:
        """[N, K, outputs] of ``action`` [N, A] at ``states`` whose entries are [N, ...], or [S, N, K, outputs] of
        [S, N, A].

        The features are computed once, however many actions there are.
        """
        features, exact = for_heads(self.encode(self.observation(states)), self.ensemble)
        features = features.to(self.ensemble.last.weight.dtype)
        if action.ndim > 2:
            features = features.expand(*action.shape[:-1], features.shape[-1])
        with exact:
            found = self.ensemble(torch.cat([features, action.to(features.dtype)], -1).flatten(0, -2)).transpose(0, 1)
        return found if action.ndim == 2 else found.unflatten(0, action.shape[:-1])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the values to ``tensordict`` [*B] and return it."""
        states = {key: flat(tensordict[key], tensordict.ndim) for key in self.in_keys}
        values = self.values(states, states[ACTION])
        return tensordict.set(self.out_keys[0], values.reshape(*tensordict.batch_size, *values.shape[1:]))


class Critic(ActionCritic):
    """Q(x, a) of K critics. Reads ``"observation"`` and ``"action"`` [*B, A], writes ``"state_action_value"`` [*B, K].

    Args:
        ensemble: [N, features + A] to [K, N, 1].
        encoder: observation [N, *shape] to features, shared by the K critics; None: the flattened observation.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
        observation_names: names of the entries of a dictionary observation; None: it is one tensor.
    """

    out_key = STATE_ACTION_VALUE

    def values(self, states: States, action: Tensor) -> Tensor:
        """Q [N, K] of ``action`` [N, A] at ``states`` whose entries are [N, ...], or [S, N, K] of [S, N, A]."""
        return super().values(states, action).squeeze(-1)


class CategoricalCritic(ActionCritic):
    """Distributions of the return over fixed atoms, of K critics evaluated as one batched network.

    Reads ``"observation"`` and ``"action"`` [*B, A], writes ``"value_logits"`` [*B, K, atoms]. The buffer ``support``
    [atoms] holds the returns that the atoms stand for; Q(x, a) is ``value_logits.softmax(-1) @ support``.

    Bellemare et al. 2017, arXiv 1707.06887; with continuous actions Barth-Maron et al. 2018, arXiv 1804.08617.

    Args:
        ensemble: [N, features + A] to [K, N, atoms].
        encoder, normalizer, observation_key, observation_names: as :class:`Critic`.
        low, high: least and greatest return that can be told apart; Acme takes 150 either way for dm_control, whose
            discounted returns are at most 100 at gamma 0.99.
        atoms: how many.

    Raises:
        ValueError: on a support without length.
    """

    out_key = VALUE_LOGITS
    support: Tensor

    def __init__(
        self,
        ensemble: EnsembleMLP,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        low: float = -150.0,
        high: float = 150.0,
        atoms: int = 51,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            ensemble, encoder, normalizer, observation_key=observation_key, observation_names=observation_names
        )
        if not -math.inf < low < high < math.inf or atoms < 2:
            raise ValueError(
                f"a support needs finite low < high and atoms >= 2, got low={low}, high={high}, atoms={atoms}"
            )
        self.register_buffer("support", torch.linspace(low, high, atoms))


class DiscreteCritic(ObservationNetwork):
    """Q(x, .) of K critics. Reads ``"observation"`` [*B, *shape], writes ``"action_value"`` [*B, K, A].

    It reads no mask: the values of illegal actions are finite and mean nothing.

    Args:
        ensemble: [N, features] to [K, N, A].
        encoder, normalizer, observation_key, observation_names: as :class:`Critic`.
    """

    def __init__(
        self,
        ensemble: EnsembleMLP,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, normalizer, observation_key=observation_key, observation_names=observation_names)
        self.ensemble = ensemble
        self.out_keys = [ACTION_VALUE]

    def values(self, states: States, action: Tensor | None = None) -> Tensor:
        """Q [N, K, A] of every action at ``states`` whose entries are [N, ...]; ``action`` is not read."""
        features, exact = for_heads(self.encode(self.observation(states)), self.ensemble)
        features = features.to(self.ensemble.last.weight.dtype)
        with exact:
            return self.ensemble(features).transpose(0, 1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the values to ``tensordict`` [*B] and return it."""
        values = self.values({key: flat(tensordict[key], tensordict.ndim) for key in self.in_keys})
        return tensordict.set(ACTION_VALUE, values.reshape(*tensordict.batch_size, *values.shape[1:]))


class StateValue(ObservationNetwork):
    """V(x). Reads ``"observation"`` [*B, *shape], writes ``"state_value"`` [*B, 1].

    Args:
        encoder: [N, *shape] to [N, F].
        head: [N, F] to [N, 1].
        normalizer, observation_key, observation_names: as :class:`Critic`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, normalizer, observation_key=observation_key, observation_names=observation_names)
        self.head = head
        self.out_keys = [VALUE]

    def values(self, states: States, action: Tensor | None = None) -> Tensor:
        """V [N, 1] at ``states`` whose entries are [N, ...]; ``action`` is not read."""
        features, exact = for_heads(self.encode(self.observation(states)), self.head)
        with exact:
            return self.head(features)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the value to ``tensordict`` [*B] and return it."""
        values = self.values({key: flat(tensordict[key], tensordict.ndim) for key in self.in_keys})
        return tensordict.set(VALUE, values.view(*tensordict.batch_size, 1))
