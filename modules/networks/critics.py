"""Critics: K value functions evaluated as one batched network, and the state value of the first SAC."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from offtrace.modules.keys import ACTION, ACTION_VALUE, OBSERVATION, STATE_ACTION_VALUE, VALUE
from offtrace.modules.networks.normalise import ObservationNormalizer
from offtrace.modules.networks.torsos import EnsembleMLP


class ActionCritic(TensorDictModuleBase):
    """K networks of the observation's features and an action; :class:`Critic` and :class:`CategoricalCritic`.

    Args:
        ensemble: [N, features + A] to [K, N, outputs].
        encoder: observation [N, *shape] to features, shared by the K critics; None: the flattened observation.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
    """

    out_key: str
    """What :meth:`forward` writes."""

    def __init__(
        self,
        ensemble: EnsembleMLP,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.encoder = encoder
        self.ensemble = ensemble
        self.in_keys = [observation_key, ACTION]
        self.out_keys = [self.out_key]

    def values(self, observation: Tensor, action: Tensor) -> Tensor:
        """[N, K, outputs] of ``action`` [N, A] at ``observation`` [N, *shape], or [S, N, K, outputs] of [S, N, A].

        The features are computed once, however many actions there are.
        """
        features = _features(observation, self.normalizer, self.encoder)
        if action.ndim > 2:
            features = features.expand(*action.shape[:-1], features.shape[-1])
        found = self.ensemble(torch.cat([features, action.to(features.dtype)], -1).flatten(0, -2)).transpose(0, 1)
        return found if action.ndim == 2 else found.unflatten(0, action.shape[:-1])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the values to ``tensordict`` [*B] and return it."""
        observation, action = (_flat(tensordict, key) for key in self.in_keys)
        values = self.values(observation, action)
        return tensordict.set(self.out_keys[0], values.reshape(*tensordict.batch_size, *values.shape[1:]))


class Critic(ActionCritic):
    """Q(x, a) of K critics. Reads ``"observation"`` and ``"action"`` [*B, A], writes ``"state_action_value"`` [*B, K].

    Args:
        ensemble: [N, features + A] to [K, N, 1].
        encoder: observation [N, *shape] to features, shared by the K critics; None: the flattened observation.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
    """

    out_key = STATE_ACTION_VALUE

    def values(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q [N, K] of ``action`` [N, A] at ``observation`` [N, *shape], or [S, N, K] of [S, N, A]."""
        return super().values(observation, action).squeeze(-1)


class DiscreteCritic(TensorDictModuleBase):
    """Q(x, .) of K critics. Reads ``"observation"`` [*B, *shape], writes ``"action_value"`` [*B, K, A].

    Args:
        ensemble: [N, features] to [K, N, A].
        encoder, normalizer, observation_key: as :class:`Critic`.
    """

    def __init__(
        self,
        ensemble: EnsembleMLP,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.encoder = encoder
        self.ensemble = ensemble
        self.in_keys = [observation_key]
        self.out_keys = [ACTION_VALUE]

    def values(self, observation: Tensor) -> Tensor:
        """Q [N, K, A] of every action at ``observation`` [N, *shape]."""
        return self.ensemble(_features(observation, self.normalizer, self.encoder)).transpose(0, 1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the values to ``tensordict`` [*B] and return it."""
        values = self.values(_flat(tensordict, self.in_keys[0]))
        return tensordict.set(ACTION_VALUE, values.reshape(*tensordict.batch_size, *values.shape[1:]))


class StateValue(TensorDictModuleBase):
    """V(x). Reads ``"observation"`` [*B, *shape], writes ``"state_value"`` [*B, 1].

    Args:
        torso: [N, *shape] to [N, F].
        head: [N, F] to [N, 1].
        normalizer, observation_key: as :class:`Critic`.
    """

    def __init__(
        self,
        torso: nn.Module,
        head: nn.Module,
        normalizer: ObservationNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.torso = torso
        self.head = head
        self.in_keys = [observation_key]
        self.out_keys = [VALUE]

    def values(self, observation: Tensor) -> Tensor:
        """V [N, 1] at ``observation`` [N, *shape]."""
        return self.head(_features(observation, self.normalizer, self.torso))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the value to ``tensordict`` [*B] and return it."""
        values = self.values(_flat(tensordict, self.in_keys[0]))
        return tensordict.set(VALUE, values.view(*tensordict.batch_size, 1))


def _flat(tensordict: TensorDictBase, key: Any) -> Tensor:
    """The entry [*B, ...] as [N, ...]."""
    x, batch = tensordict.get(key), tensordict.batch_size
    return x if len(batch) == 1 else x.reshape(-1, *x.shape[len(batch) :])


def _features(x: Tensor, normalizer: ObservationNormalizer | None, encoder: nn.Module | None) -> Tensor:
    """Features [N, F] of observations [N, *shape]."""
    if normalizer is not None:
        x = normalizer(x)
    if encoder is not None:
        return encoder(x)
    return x if x.ndim == 2 else x.flatten(1)
