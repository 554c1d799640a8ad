"""A critic that gives a distribution over returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offtrace.modules.keys import OBSERVATION, VALUE_LOGITS
from offtrace.modules.networks.critics import ActionCritic
from offtrace.modules.networks.normalise import ObservationNormalizer
from offtrace.modules.networks.torsos import EnsembleMLP


class CategoricalCritic(ActionCritic):
    """Distributions of the return over fixed atoms, of K critics evaluated as one batched network.

    Reads ``"observation"`` and ``"action"`` [*B, A], writes ``"value_logits"`` [*B, K, atoms]. The buffer ``support``
    [atoms] holds the returns that the atoms stand for; Q(x, a) is ``value_logits.softmax(-1) @ support``.

    Bellemare et al. 2017, arXiv 1707.06887; with continuous actions Barth-Maron et al. 2018, arXiv 1804.08617.

    Args:
        ensemble: [N, features + A] to [K, N, atoms].
        low, high: least and greatest return that can be told apart; Acme takes 150 either way for dm_control, whose
            discounted returns are at most 100 at gamma 0.99.
        atoms: how many.
        encoder: observation [N, *shape] to features, shared by the K critics; None: the flattened observation.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
    """

    out_key = VALUE_LOGITS
    support: Tensor

    def __init__(
        self,
        ensemble: EnsembleMLP,
        *,
        low: float = -150.0,
        high: float = 150.0,
        atoms: int = 51,
        encoder: nn.Module | None = None,
        normalizer: ObservationNormalizer | None = None,
        observation_key: Any = OBSERVATION,
    ) -> None:
        super().__init__(ensemble, encoder, normalizer, observation_key=observation_key)
        if not low < high or atoms < 2:
            raise ValueError(f"a support needs low < high and atoms >= 2, got low={low}, high={high}, atoms={atoms}")
        self.register_buffer("support", torch.linspace(low, high, atoms))
