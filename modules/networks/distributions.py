"""Action distributions, without argument checks: they are built twice per environment step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributions as D

MASKED_LOGIT = torch.finfo(torch.float32).min / 4
"""Logit of an illegal action. Its probability is exactly 0 and, unlike with -inf, 0 * log 0 is 0 and not NaN."""


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """``logits`` [*B, A] with :data:`MASKED_LOGIT` where ``mask`` (bool [*B, A], True = legal) is False."""
    return logits.masked_fill(~mask, MASKED_LOGIT)


class Categorical(D.Categorical):
    """Categorical over the last dimension of ``logits`` [*B, A]; samples are int64 [*B]."""

    def __init__(self, logits: Tensor) -> None:
        # what the base class computes, in one kernel instead of two
        self._param = self.logits = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        D.Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """int64 ``[*sample_shape, *B]``."""
        if sample_shape:
            return super().sample(torch.Size(sample_shape))
        with torch.no_grad():
            flat = torch.multinomial(self.logits.exp().view(-1, self._num_events), 1)
            return flat.view(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*B]``; ``value`` int64 of the same shape."""
        if value.shape != self.batch_shape:
            return super().log_prob(value)
        return self.logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """In nats, ``[*B]``."""
        return -(self.logits.exp() * self.logits).sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest action."""
        return self.logits.argmax(-1)


class DiagonalNormal(D.Independent):
    """Independent normal for each dimension of an action: ``loc`` and ``scale`` [*B, A]; log-probabilities [*B]."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean."""
        return self.base_dist.loc


@D.register_kl(Categorical, Categorical)
def _kl_categorical(p: Categorical, q: Categorical) -> Tensor:
    return (p.logits.exp() * (p.logits - q.logits)).sum(-1)


@D.register_kl(DiagonalNormal, DiagonalNormal)
def _kl_normal(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    return D.kl_divergence(p.base_dist, q.base_dist).sum(-1)
