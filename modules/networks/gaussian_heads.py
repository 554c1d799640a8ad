"""A policy head for normals with full covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from offtrace.modules.keys import LOC, SCALE_TRIL
from offtrace.modules.networks.initialise import POLICY_GAIN, orthogonal


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
        noise = torch.randn(*sample_shape, *self.loc.shape, 1, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.scale_tril @ noise).squeeze(-1)

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


class CholeskyHead(nn.Module):
    """Mean and Cholesky factor of a normal with full covariance; actions are unbounded and the environment clips them.

    The factor's diagonal is ``min_scale + softplus(w x + b) init_scale / softplus(0)``, what stands below it is linear
    and starts near zero, so the policy starts diagonal with standard deviation ``init_scale``. Weights orthogonal with
    gain 0.01, biases zero. Abdolmaleki et al. 2018, arXiv 1806.06920, appendix D.

    Args:
        init_scale: standard deviation at the start, in units of the action.
        min_scale: lower bound of the diagonal.
    """

    out_keys = (LOC, SCALE_TRIL)
    distribution = FullNormal
    masked = False
    rows: Tensor
    columns: Tensor

    def __init__(self, in_features: int, action_dim: int, *, init_scale: float = 0.7, min_scale: float = 1e-4) -> None:
        super().__init__()
        if action_dim < 1 or init_scale <= 0 or min_scale < 0:
            raise ValueError(
                f"need action_dim > 0, init_scale > 0, min_scale >= 0; got {action_dim}, {init_scale}, {min_scale}"
            )
        self.action_dim = action_dim
        self.min_scale = min_scale
        self.factor = init_scale / math.log(2)
        self.linear = nn.Linear(in_features, 2 * action_dim + action_dim * (action_dim - 1) // 2)
        orthogonal(self, POLICY_GAIN)
        rows, columns = torch.tril_indices(action_dim, action_dim, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(loc, scale_tril)``, [*B, A] and [*B, A, A]."""
        size = self.action_dim
        loc, diagonal, below = self.linear(x).split([size, size, self.rows.numel()], -1)
        tril = torch.diag_embed(F.softplus(diagonal) * self.factor + self.min_scale)
        tril[..., self.rows, self.columns] = below * self.factor
        return loc, tril
