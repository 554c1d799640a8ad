"""How every network reads its observation: one entry, or the entries of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from offtrace.modules.keys import OBSERVATION
from offtrace.modules.networks.normalise import DictNormalizer, ObservationNormalizer

States = Mapping[Any, Tensor]
"""Entries of a TensorDict by their keys, each ``[M, ...]``: ``"observation"`` or its leaves, ``"action_mask"``, ..."""
Observation = Tensor | dict[str, Tensor]
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


class ObservationNetwork(TensorDictModuleBase):
    """What policies and critics share: where the observation is, its normaliser, and its encoder.

    Args:
        encoder: observation [N, *shape] to features [N, F]; a dictionary comes as a dict name -> [N, *shape].
            None: the flattened observation.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
        observation_names: names of the entries of a dictionary observation; None: it is one tensor.
    """

    encoder: nn.Module | None

    def __init__(
        self,
        encoder: nn.Module | None,
        normalizer: ObservationNormalizer | DictNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
        observation_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.encoder = encoder
        self._names = None if observation_names is None else tuple(observation_names)
        prefix = observation_key if isinstance(observation_key, tuple) else (observation_key,)
        self.in_keys: list[Any] = [observation_key] if self._names is None else [(*prefix, n) for n in self._names]
        self._observation_keys = tuple(self.in_keys)

    def observation(self, states: States | TensorDictBase, dims: int = 1) -> Observation:
        """The observation of ``states``, whose entries have ``dims`` batch dimensions, as [N, *shape].

        Raises:
            KeyError: when an entry is missing, by its name.
        """
        if self._names is None:
            return flat(states[self._observation_keys[0]], dims)
        keys = zip(self._names, self._observation_keys, strict=True)
        return {name: flat(states[key], dims) for name, key in keys}

    def encode(self, observation: Observation) -> Tensor:
        """Features [N, F] of an ``observation``."""
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        if self.encoder is not None:
            return self.encoder(observation)
        assert isinstance(observation, Tensor)
        return observation if observation.ndim == 2 else observation.flatten(1)


def for_heads(features: Tensor, *heads: nn.Module) -> tuple[Tensor, AbstractContextManager[Any]]:
    """``features``, and a context to call heads in, which under autocast keep the precision of their weights.

    Heads are small, and what they give is subtracted from its like or feeds exponentials.
    """
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return features, _AS_IT_IS
    # the weights of a target network are buffers
    weights = (x for head in heads for x in (*head.parameters(), *head.buffers()) if x.is_floating_point())
    return features.to(next(weights).dtype), torch.autocast(device, enabled=False)


def flat(x: Tensor, dims: int) -> Tensor:
    """``x`` [*B, ...] of ``dims`` batch dimensions as [N, ...]."""
    return x if dims == 1 else x.reshape(-1, *x.shape[dims:])
