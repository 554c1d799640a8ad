"""Policy heads for continuous control: a tanh-Gaussian for SAC and a Gaussian with a softplus scale for MPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from offtrace.modules.keys import LOC, SCALE
from offtrace.modules.networks.distributions import DiagonalNormal
from offtrace.modules.networks.initialise import POLICY_GAIN, orthogonal

LOG_SCALE_RANGES = {"clip": (-20.0, 2.0), "tanh": (-5.0, 2.0)}
_CONSTANT = 0.5 * math.log(2 * math.pi) + 2 * math.log(2)


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
        return noise, torch.addcmul(self.loc, self.scale, noise)


def safe_atanh(action: Tensor) -> Tensor:
    """u with tanh(u) = ``action``, finite at +-1."""
    limit = 1 - torch.finfo(action.dtype).eps / 2
    return action.clamp(-limit, limit).atanh()


@D.register_kl(TanhNormal, TanhNormal)
def _kl_tanh_normal(p: TanhNormal, q: TanhNormal) -> Tensor:
    """The tanh is one to one, so the divergence is that of the normals."""
    return D.kl_divergence(D.Normal(p.loc, p.scale), D.Normal(q.loc, q.scale)).sum(-1)


class TanhNormalHead(nn.Module):
    """Mean and standard deviation of u in a = tanh(u). Weights orthogonal with gain 0.01, biases zero.

    Args:
        log_scale: ``"clip"``: the output is the log of the scale, clipped to [-20, 2] (Haarnoja et al. 2018; starts at
            scale 1); ``"tanh"``: the output is squashed into [-5, 2] (pytorch_sac; starts at scale 0.22).
    """

    out_keys = (LOC, SCALE)
    distribution = TanhNormal

    def __init__(self, in_features: int, action_dim: int, *, log_scale: str = "clip") -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}; it must be at least 1")
        if log_scale not in LOG_SCALE_RANGES:
            raise ValueError(f"log_scale must be one of {sorted(LOG_SCALE_RANGES)}, got {log_scale!r}")
        self.action_dim = action_dim
        self.squashed = log_scale == "tanh"
        self.range = LOG_SCALE_RANGES[log_scale]
        self.linear = nn.Linear(in_features, 2 * action_dim)
        orthogonal(self, POLICY_GAIN)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc, log_scale = self._logs(x)
        return loc, log_scale.exp()

    def distribution_of(self, x: Tensor) -> TanhNormal:
        """The distribution, which then need not take the logarithm of its scale."""
        loc, log_scale = self._logs(x)
        return TanhNormal(loc, log_scale.exp(), log_scale)

    def _logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.linear(x).chunk(2, -1)
        low, high = self.range
        if self.squashed:
            return loc, low + 0.5 * (high - low) * (raw.tanh() + 1)
        return loc, raw.clamp(low, high)


class GaussianHead(nn.Module):
    """Mean and standard deviation of a normal; actions are unbounded and the environment clips them.

    scale = min_scale + softplus(w x + b) init_scale / softplus(0), as Acme's ``MultivariateNormalDiagHead``: it starts
    at ``init_scale``. Weights orthogonal with gain 0.01, biases zero.

    Args:
        init_scale: standard deviation at the start, in units of the action.
        min_scale: lower bound of it.
    """

    out_keys = (LOC, SCALE)
    distribution = DiagonalNormal

    def __init__(self, in_features: int, action_dim: int, *, init_scale: float = 0.7, min_scale: float = 1e-6) -> None:
        super().__init__()
        if action_dim < 1 or init_scale <= 0 or min_scale < 0:
            raise ValueError(
                f"need action_dim, init_scale > 0 and min_scale >= 0, got {action_dim}, {init_scale}, {min_scale}"
            )
        self.action_dim = action_dim
        self.min_scale = min_scale
        self.factor = init_scale / math.log(2)
        self.linear = nn.Linear(in_features, 2 * action_dim)
        orthogonal(self, POLICY_GAIN)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc, raw = self.linear(x).chunk(2, -1)
        return loc, F.softplus(raw) * self.factor + self.min_scale
