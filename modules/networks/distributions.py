"""Action distributions, without argument checks: they are built twice per environment step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

MASKED_LOGIT = torch.finfo(torch.float32).min / 4
"""Logit of an illegal action. Its probability is exactly 0 and, unlike with -inf, 0 * log 0 is 0 and not NaN."""


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """``logits`` [*B, A] with :data:`MASKED_LOGIT` where ``mask`` (bool [*B, A], True = legal) is False."""
    return logits.masked_fill(~mask, MASKED_LOGIT)


def mix_uniform(logits: Tensor, epsilon: float, mask: Tensor | None = None) -> Tensor:
    """log((1 - epsilon) softmax(logits) + epsilon / n), [*B, A], with n the number of legal actions.

    Args:
        logits: [*B, A], those of illegal actions masked.
        epsilon: above 0 and below 1.
        mask: bool [*B, A], True = legal; None: all are.
    """
    log_probs = logits.log_softmax(-1) + math.log1p(-epsilon)
    if mask is None:
        return torch.logaddexp(log_probs, log_probs.new_full((), math.log(epsilon / logits.shape[-1])))
    # where nothing is legal there is no policy; it must not be NaN either
    share = (epsilon / mask.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype)).log()
    return mask_logits(torch.logaddexp(log_probs, share), mask)


_CONSTANT = 0.5 * math.log(2 * math.pi) + 2 * math.log(2)


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


class EpsilonGreedy(Categorical):
    """What :class:`GreedyHead` gives: sampled by its ``logits`` [*B, A], deterministically the action of largest value.

    Args:
        logits: of the epsilon-greedy policy; an action that is illegal has :data:`MASKED_LOGIT`.
        action_value: [*B, 1, A].
    """

    def __init__(self, logits: Tensor, action_value: Tensor) -> None:
        self._illegal = logits <= MASKED_LOGIT
        self._action_value = action_value
        super().__init__(logits)

    @property
    def deterministic_sample(self) -> Tensor:
        """The legal action of the largest value, the first of equal ones. The logits lose it where epsilon is 1."""
        return self._action_value.select(-2, 0).masked_fill(self._illegal, -math.inf).argmax(-1)

    @property
    def mode(self) -> Tensor:
        """As :attr:`deterministic_sample`."""
        return self.deterministic_sample


class DiagonalNormal(D.Independent):
    """Independent normal for each dimension of an action: ``loc`` and ``scale`` [*B, A]; log-probabilities [*B]."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def at_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard ``noise`` [*B, A] gives."""
        return torch.addcmul(self.loc, self.scale, noise)

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean."""
        return self.loc


@D.register_kl(Categorical, Categorical)
def _kl_categorical(p: Categorical, q: Categorical) -> Tensor:
    return (p.logits.exp() * (p.logits - q.logits)).sum(-1)


@D.register_kl(DiagonalNormal, DiagonalNormal)
def _kl_normal(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    return D.kl_divergence(p.base_dist, q.base_dist).sum(-1)


def product(matrix: Tensor, other: Tensor) -> Tensor:
    """The matrix product, in the precision of its arguments under autocast too."""
    with torch.autocast(matrix.device.type, enabled=False):
        return matrix @ other


class FullNormal(D.Distribution):
    """Normal with covariance L L': ``loc`` [*B, A], ``scale_tril`` L [*B, A, A]; log-probabilities [*B].

    Built at every environment step, so without the argument checks and the expansions of torch's class.
    """

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012 (the base class's convention)

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``[*sample_shape, *B, A]``, differentiable in the parameters."""
        return self.at_noise(torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device))

    def at_noise(self, noise: Tensor) -> Tensor:
        """The sample that standard ``noise`` [..., *B, A] gives."""
        return self.loc + product(self.scale_tril, noise.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``[*sample_shape, *B, A]``."""
        return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*S, *B]`` of ``value`` [*S, *B, A]."""
        offset = (value - self.loc).unsqueeze(-1)
        tril = self.scale_tril.expand(*offset.shape[:-1], offset.shape[-2])
        scaled = torch.linalg.solve_triangular(tril, offset, upper=False).squeeze(-1)
        constant = 0.5 * math.log(2 * math.pi) * self.loc.shape[-1]
        return -0.5 * scaled.square().sum(-1) - self._log_diagonal - constant

    def entropy(self) -> Tensor:
        """In nats, ``[*B]``."""
        return self._log_diagonal + 0.5 * (1 + math.log(2 * math.pi)) * self.loc.shape[-1]

    @property
    def mean(self) -> Tensor:
        """``loc``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """``loc``."""
        return self.loc

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean."""
        return self.loc

    @property
    def _log_diagonal(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@D.register_kl(FullNormal, FullNormal)
def _kl_full(p: FullNormal, q: FullNormal) -> Tensor:
    ratio = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    offset = torch.linalg.solve_triangular(q.scale_tril, (p.loc - q.loc).unsqueeze(-1), upper=False)
    spread = ratio.square().sum((-2, -1)) + offset.square().sum((-2, -1)) - p.loc.shape[-1]
    return 0.5 * spread + q._log_diagonal - p._log_diagonal


class Sample(NamedTuple):
    """``action`` [*B, A], its ``log_prob`` [*B], and the sample before the tanh, ``pre_tanh`` [*B, A]."""

    action: Tensor
    log_prob: Tensor
    pre_tanh: Tensor


def log_cosh(u: Tensor) -> Tensor:
    """log(2 cosh u) = u + softplus(-2 u). log(1 - tanh(u)^2) is 2 (ln 2 - this), exact where tanh(u) rounds to 1."""
    return u + F.softplus(u * -2)


class TanhNormal(D.Distribution):
    """a = tanh(u) with u normal, independent in each dimension; ``loc`` and ``scale`` [*B, A]; a in (-1, 1).

    log p(a) = sum of log N(u; loc, scale) - log(1 - tanh(u)^2). Where the tanh saturates u cannot be recovered from a:
    what needs the density of a stored action keeps u and calls :meth:`log_prob_pre_tanh`.

    Haarnoja et al. 2018, arXiv 1801.01290, appendix C.
    """

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012 (the base class's convention)

    def __init__(self, loc: Tensor, scale: Tensor, log_scale: Tensor | None = None) -> None:
        self.loc, self.scale = loc, scale
        self.log_scale = scale.log() if log_scale is None else log_scale
        shape = loc.shape  # what the base class would set after checks
        self._batch_shape, self._event_shape, self._validate_args = shape[:-1], shape[-1:], False

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Action ``[*sample_shape, *B, A]``, differentiable in the parameters."""
        return self._pre_tanh(sample_shape)[1].tanh()

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Action ``[*sample_shape, *B, A]``."""
        return self.rsample(sample_shape)

    @torch.no_grad()
    def sample_pre_tanh(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """u, ``[*sample_shape, *B, A]``."""
        return self._pre_tanh(sample_shape)[1]

    def at_noise(self, noise: Tensor) -> Tensor:
        """The sample before the tanh that standard ``noise`` [*B, A] gives."""
        return torch.addcmul(self.loc, self.scale, noise)

    def rsample_with_log_prob(self, sample_shape: Sequence[int] = ()) -> Sample:
        """A sample differentiable in the parameters, and its log-probability without the detour through the action."""
        noise, u = self._pre_tanh(sample_shape)
        # the normal density of u is that of the noise: (u - loc) / scale would only lose digits
        return Sample(u.tanh(), self._density(noise, u), u)

    def log_prob_pre_tanh(self, u: Tensor) -> Tensor:
        """Log-probability ``[*B]`` of the action tanh(u), ``u`` [*B, A]; exact where the tanh saturates."""
        return self._density((u - self.loc) / self.scale, u)

    def log_prob(self, value: Tensor) -> Tensor:
        """``[*B]`` of an action ``[*B, A]``. Wrong near +-1, where float32 has lost u: store u instead."""
        return self.log_prob_pre_tanh(safe_atanh(value))

    @property
    def deterministic_sample(self) -> Tensor:
        """tanh(loc), ``[*B, A]``: the median of each dimension."""
        return self.loc.tanh()

    @property
    def mode(self) -> Tensor:
        """What acts deterministically, as :attr:`deterministic_sample`; not the point of highest density."""
        return self.deterministic_sample

    def _density(self, noise: Tensor, u: Tensor) -> Tensor:
        """log p(tanh u) with u = loc + scale noise; the constants of all dimensions are taken off at the end."""
        half = torch.sub(log_cosh(u), torch.addcmul(self.log_scale, noise, noise, value=0.5), alpha=0.5)
        return torch.sub(half.sum(-1) * 2, _CONSTANT * u.shape[-1])

    def _pre_tanh(self, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        if sample_shape:
            shape = (*sample_shape, *self.loc.shape)
            noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        else:
            noise = torch.randn_like(self.loc)
        return noise, self.at_noise(noise)


def safe_atanh(action: Tensor) -> Tensor:
    """u with tanh(u) = ``action``, finite at +-1."""
    limit = 1 - torch.finfo(action.dtype).eps / 2
    return action.clamp(-limit, limit).atanh()


@D.register_kl(TanhNormal, TanhNormal)
def _kl_tanh_normal(p: TanhNormal, q: TanhNormal) -> Tensor:
    """The tanh is one to one, so the divergence is that of the normals."""
    return D.kl_divergence(D.Normal(p.loc, p.scale), D.Normal(q.loc, q.scale)).sum(-1)
