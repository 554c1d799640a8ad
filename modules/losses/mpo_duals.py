"""The mathematics of MPO as pure functions, and the multipliers that they are dual to.

Abdolmaleki et al. 2018, arXiv 1806.06920; the decoupled form, arXiv 1812.02256.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offtrace.modules.networks.distributions import product

MIN_RAW = -18.0
"""Raw multipliers are kept at or above this, where softplus is 1.5e-8 and still has a gradient."""
_MIN_MULTIPLIER = 1e-8
_SMALLEST = 2e-8
"""The least that a multiplier may start at; softplus(MIN_RAW) is a little below."""


class EStep(NamedTuple):
    """``weights`` w (constant) like the values; ``dual`` g(eta) and ``kl`` of w to the prior (constant), [*B]."""

    weights: Tensor
    dual: Tensor
    kl: Tensor


def e_step(
    *, value: Tensor, temperature: Tensor, epsilon: float, log_prior: Tensor | None = None, dim: int = 0
) -> EStep:
    """Reweighting of actions by their values, no further than KL ``epsilon`` from a prior, with the temperature's dual.

    With prior p over the entries of ``dim`` (uniform over samples by default)::

        w_j = p_j exp(Q_j / eta) / sum_k p_k exp(Q_k / eta)
        g(eta) = eta (epsilon + log sum_j p_j exp(Q_j / eta)),    dg/deta = epsilon - KL(w || p)

    Args:
        value: Q, constant; ``dim`` runs over actions, the other dimensions are states [*B].
        temperature: eta > 0, a scalar; the only input of ``dual`` that gets a gradient.
        epsilon: the bound, in nats.
        log_prior: like ``value``; ``-inf`` leaves an entry out.
        dim: of the actions.

    Source: Abdolmaleki et al. 2018, arXiv 1806.06920; action penalties as a second objective with its own temperature
    are those of arXiv 2005.07513.
    """
    value = value.detach()
    top = value if log_prior is None else value.masked_fill(log_prior == -math.inf, -math.inf)
    top = top.amax(dim, keepdim=True)
    # differences to the best: exact for small temperatures, where value / temperature has no digits left
    scaled = (value - top) / temperature
    if log_prior is None:
        log_sum = scaled.logsumexp(dim, keepdim=True) - math.log(value.shape[dim])
        weights = scaled.detach().softmax(dim)
    else:
        logits = scaled + log_prior.detach()
        log_sum = logits.logsumexp(dim, keepdim=True)
        weights = logits.detach().softmax(dim)
    dual = temperature * (epsilon + log_sum) + top
    kl = (weights * scaled.detach()).sum(dim) - log_sum.detach().squeeze(dim)
    return EStep(weights, dual.squeeze(dim), kl)


class DecoupledKL(NamedTuple):
    """KL of target to online policy, the part of the ``mean`` and that of the ``covariance``: [*B, D] each."""

    mean: Tensor
    covariance: Tensor


def diagonal_kl(loc: Tensor, scale: Tensor, target_loc: Tensor, target_scale: Tensor) -> DecoupledKL:
    """Parts of KL(target || online) for each dimension of diagonal normals, all [*B, A]::

        mean_d = (mu - mu_t)^2 / (2 sigma_t^2)
        covariance_d = 1/2 (sigma_t^2 / sigma^2 - 1 + log(sigma^2 / sigma_t^2))

    Each part is the KL between the target and a normal that differs from it in that part only, as in Acme: the mean
    part is measured by the *target's* variance.
    """
    shift, log_ratio = _diagonal_move(loc, scale, target_loc, target_scale)
    return DecoupledKL(0.5 * shift.square(), 0.5 * ((-2 * log_ratio).exp() - 1) + log_ratio)


def full_kl(loc: Tensor, scale_tril: Tensor, target_loc: Tensor, target_scale_tril: Tensor) -> DecoupledKL:
    """Parts [*B, 1] of KL(target || online) of normals with full covariance, ``loc`` [*B, A], factors [*B, A, A]::

        mean = 1/2 (mu - mu_t)' Sigma_t^-1 (mu - mu_t)
        covariance = 1/2 (tr(Sigma^-1 Sigma_t) - A + log(det Sigma / det Sigma_t))

    The mean part is measured by the target's covariance, Acme's decoupled form; the paper of 2018 takes the online one.
    """
    shift, ratio, log_det = _full_move(loc, scale_tril, target_loc, target_scale_tril)
    covariance = 0.5 * (ratio.square().sum((-2, -1)) - loc.shape[-1]) + log_det
    return DecoupledKL(0.5 * shift.square().sum(-1, keepdim=True), covariance.unsqueeze(-1))


class MStep(NamedTuple):
    """``fit`` [*B]: weighted log-likelihood of the samples; ``kl``: how far the policy has moved from the target."""

    fit: Tensor
    kl: DecoupledKL


def diagonal_m_step(
    noise: Tensor, weights: Tensor, loc: Tensor, scale: Tensor, target_loc: Tensor, target_scale: Tensor
) -> MStep:
    """``fit`` = sum_j w_j (log N(a_j; mu, sigma_t) + log N(a_j; mu_t, sigma)) for a_j = mu_t + sigma_t z_j, and the KL.

    The sum over samples depends on them through three moments, so no gradient passes through anything of their size.

    Args:
        noise: z, ``[S, *B, A]``; constant, as the ``weights`` [S, *B].
        loc, scale, target_loc, target_scale: [*B, A].
    """
    target_scale = target_scale.detach()
    shift, log_ratio = _diagonal_move(loc, scale, target_loc, target_scale)
    spread = (-2 * log_ratio).exp()
    mass = weights.sum(0)
    first, second = (weights.unsqueeze(-1) * noise).sum(0), (weights.unsqueeze(-1) * noise.square()).sum(0)
    square = second * (1 + spread) + shift * (mass.unsqueeze(-1) * shift - 2 * first)
    constant = 2 * target_scale.log().sum(-1) + log_ratio.sum(-1) + math.log(2 * math.pi) * loc.shape[-1]
    kl = DecoupledKL(0.5 * shift.square(), 0.5 * (spread - 1) + log_ratio)
    return MStep(-0.5 * square.sum(-1) - mass * constant, kl)


def full_m_step(
    noise: Tensor, weights: Tensor, loc: Tensor, scale_tril: Tensor, target_loc: Tensor, target_scale_tril: Tensor
) -> MStep:
    """As :func:`diagonal_m_step` for full covariances, factors [*B, A, A]: a_j = mu_t + L_t z_j."""
    shift, ratio, log_det = _full_move(loc, scale_tril, target_loc, target_scale_tril)
    mass, first = weights.sum(0), (weights.unsqueeze(-1) * noise).sum(0)
    samples = noise.movedim(0, -1)
    second = product(samples * weights.movedim(0, -1).unsqueeze(-2), samples.mT)
    moved = second.diagonal(dim1=-2, dim2=-1) + shift * (mass.unsqueeze(-1) * shift - 2 * first)
    square = moved.sum(-1) + (ratio * product(ratio, second)).sum((-2, -1))
    constant = 2 * _log_diagonal(target_scale_tril.detach()) + log_det + math.log(2 * math.pi) * loc.shape[-1]
    covariance = 0.5 * (ratio.square().sum((-2, -1)) - loc.shape[-1]) + log_det
    kl = DecoupledKL(0.5 * shift.square().sum(-1, keepdim=True), covariance.unsqueeze(-1))
    return MStep(-0.5 * square - mass * constant, kl)


def diagonal_log_prob(action: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(a; mu, diag sigma^2) [S, *B] of ``action`` [S, *B, A] under ``loc`` and ``scale`` [*B, A]."""
    constant = scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    return -0.5 * ((action - loc) / scale).square().sum(-1) - constant


def full_log_prob(action: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """log N(a; mu, L L') [S, *B] of ``action`` [S, *B, A] under ``loc`` [*B, A] and ``scale_tril`` [*B, A, A]."""
    constant = _log_diagonal(scale_tril) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    # the samples of a state are the columns of one triangular solve
    offset = _solve(scale_tril, (action - loc).movedim(0, -1))
    return -0.5 * offset.square().sum(-2).movedim(-1, 0) - constant


def action_cost(action: Tensor, inside: Tensor) -> Tensor:
    """-||a - clip(a)||_2 over the last dimension, ``inside`` the clipped action: the norm, not its square."""
    # torch 2.11 compiled keeps a dimension of size 1 where it is asked to drop it
    return -(action - inside).norm(dim=-1, keepdim=True).squeeze(-1)


def categorical_kl(log_prob: Tensor, target_log_prob: Tensor) -> Tensor:
    """KL(target || online) [*B, 1] of normalised log-probabilities [*B, A]."""
    target = target_log_prob.detach()
    return (target.exp() * (target - log_prob)).sum(-1, keepdim=True)


class Multiplier(nn.Module):
    """A positive multiplier, or one for each dimension: ``softplus(raw) + 1e-8`` with raw >= -18.

    The bound is a projection: the parameter itself is put back whenever the multiplier is read, so that it never drifts
    to where the gradient vanishes.

    Args:
        raw: initial value of the parameter, before the softplus.
        size: number of multipliers.
    """

    def __init__(self, raw: float, size: int = 1) -> None:
        super().__init__()
        if not math.isfinite(raw) or raw < MIN_RAW:
            raise ValueError(f"the raw initial value of a multiplier must be {MIN_RAW} or more, got {raw}")
        self.raw = nn.Parameter(torch.full((size,), float(raw)))

    def forward(self) -> Tensor:
        """The multipliers, [size]."""
        self.raw.data.clamp_(min=MIN_RAW)  # through data: a graph that holds the parameter stays usable
        return F.softplus(self.raw) + _MIN_MULTIPLIER

    @classmethod
    def at(cls, value: float, *, name: str = "a multiplier") -> Multiplier:
        """The multiplier that starts at ``value`` itself, to 1e-8.

        Raises:
            ValueError: ``value``, which ``name`` names, is too small or not finite.
        """
        if not _SMALLEST <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be at least {_SMALLEST} and finite")
        return cls(value + math.log(-math.expm1(-value)))


class KLPenalty(NamedTuple):
    """``penalty`` sg(alpha) KL, for the policy; ``dual`` alpha (epsilon - sg KL), for the multiplier; [*B]."""

    penalty: Tensor
    dual: Tensor


def kl_penalty(*, kl: Tensor, alpha: Tensor, epsilon: float) -> KLPenalty:
    """The Lagrangian of KL <= epsilon, split by who may learn from it: ``kl`` [*B, D], ``alpha`` [D]; summed over D."""
    return KLPenalty((alpha.detach() * kl).sum(-1), (alpha * (epsilon - kl.detach())).sum(-1))


def _diagonal_move(loc: Tensor, scale: Tensor, target_loc: Tensor, target_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(mu - mu_t) / sigma_t and log(sigma / sigma_t)."""
    target_scale = target_scale.detach()
    return (loc - target_loc.detach()) / target_scale, (scale / target_scale).log()


def _full_move(loc: Tensor, tril: Tensor, target_loc: Tensor, target_tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_t^-1 (mu - mu_t), L^-1 L_t, and log(det L / det L_t)."""
    target_tril = target_tril.detach()
    shift = _solve(target_tril, (loc - target_loc.detach()).unsqueeze(-1)).squeeze(-1)
    return shift, _solve(tril, target_tril), _log_diagonal(tril) - _log_diagonal(target_tril)


def _solve(tril: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(tril, right, upper=False)


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
