"""Policy heads: features ``[*B, F]`` in, the parameters of the action distribution out."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from offtrace.modules.keys import ACTION_VALUE, LOC, LOGITS, SCALE, SCALE_TRIL
from offtrace.modules.networks.distributions import (
    MASKED_LOGIT,
    Categorical,
    DiagonalNormal,
    EpsilonGreedy,
    FullNormal,
    TanhNormal,
    mask_logits,
    mix_uniform,
)
from offtrace.modules.networks.initialise import POLICY_GAIN, orthogonal

_LOG_SCALE_RANGE = (-5.0, 2.0)
LOG_SCALE_RANGES = {"clip": (-20.0, 2.0), "tanh": (-5.0, 2.0)}


class PolicyHead(nn.Module):
    """What :class:`PolicyNetwork` and :class:`Policy` ask of a head; a head of your own inherits from it.

    ``forward(x, mask)`` gives the parameters as a tuple, in the order of ``out_keys`` and of the arguments of
    ``distribution``.
    """

    out_keys: ClassVar[tuple[str, ...]]
    distribution: ClassVar[Any]
    """Class of the distribution. Its ``deterministic_sample`` is what acts deterministically."""
    reads_values: ClassVar[bool] = False
    """Whether ``x`` are the network's own action values instead of features."""
    masked: bool = False
    """Whether ``mask`` is given."""
    num_actions: int | None = None
    action_dim: int | None = None

    def distribution_of(self, x: Tensor, mask: Tensor | None = None) -> D.Distribution:
        """The distribution over actions at features ``x`` [*B, F]; ``mask`` bool [*B, A], True = legal."""
        return self.distribution(*self(x, mask))


class CategoricalHead(PolicyHead):
    """Logits of ``num_actions`` actions. Weights orthogonal with gain 0.01, biases zero.

    Args:
        epsilon: in [0, 1). The policy is (1 - epsilon) softmax + epsilon / n over n legal actions, and the logits are
            the logarithm of that: what is sampled, stored and learnt is the mixture. 0 leaves them as they are.
        masked: read a mask of legal actions; illegal ones get probability exactly 0.
    """

    out_keys = (LOGITS,)
    distribution = Categorical

    def __init__(self, in_features: int, num_actions: int, *, epsilon: float = 0.0, masked: bool = False) -> None:
        super().__init__()
        if num_actions < 1:
            raise ValueError(f"num_actions is {num_actions}; it must be at least 1")
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon must be at least 0 and below 1, got {epsilon}")
        self.masked = masked
        self.num_actions = num_actions
        self.epsilon = epsilon
        self.linear = nn.Linear(in_features, num_actions)
        orthogonal(self, POLICY_GAIN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(logits,)`` [*B, A]; ``mask`` bool [*B, A], True = legal."""
        logits = self.linear(x)
        logits = logits if mask is None else mask_logits(logits, mask)
        return (mix_uniform(logits, self.epsilon, mask) if self.epsilon else logits,)


class GreedyHead(PolicyHead):
    """The epsilon-greedy policy of the network's own action values, as DQN acts; it has no weights.

    With n legal actions, m of which share the largest value::

        pi(a|x) = epsilon / n + (1 - epsilon) / m  of each of these m,    epsilon / n  of the other legal ones

    and exactly 0 of illegal ones. Deterministically it takes the first of the m, whatever epsilon is. No gradient flows
    through the logits. Mnih et al. 2015, doi 10.1038/nature14236.

    Args:
        num_actions: A.
        epsilon: share of the actions that are drawn from all legal ones, in [0, 1]. A buffer: it is saved with the
            weights and reaches the actors with them.
        masked: read a mask of legal actions.
    """

    out_keys = (LOGITS, ACTION_VALUE)
    distribution = EpsilonGreedy
    reads_values = True
    epsilon: Tensor

    def __init__(self, num_actions: int, *, epsilon: float = 0.05, masked: bool = False) -> None:
        super().__init__()
        if num_actions < 1:
            raise ValueError(f"num_actions is {num_actions}; it must be at least 1")
        self.masked = masked
        self.num_actions = num_actions
        self.register_buffer("epsilon", torch.zeros(()))
        self.set_epsilon(epsilon)

    def set_epsilon(self, epsilon: float) -> None:
        """Change ``epsilon`` in place.

        Raises:
            ValueError: outside [0, 1].
        """
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
        self.epsilon.fill_(epsilon)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(logits, action_value)``, [*B, A] and [*B, 1, A], of the values ``x`` [*B, 1, A]."""
        with torch.no_grad():
            value = x.select(-2, 0)
            legal = torch.ones_like(value) if mask is None else mask.to(value.dtype)
            seen = value if mask is None else value.masked_fill(~mask, -math.inf)
            best = (seen == seen.amax(-1, keepdim=True)) * legal
            # where nothing is legal there is no policy; it must not be NaN either
            uniform, greedy = (kind / kind.sum(-1, keepdim=True).clamp(min=1) for kind in (legal, best))
            probability = torch.lerp(greedy, uniform, self.epsilon.to(value.dtype))
            logits = probability.log().clamp(min=MASKED_LOGIT)
        return logits, x


class NormalHead(PolicyHead):
    """Mean and standard deviation of ``action_dim`` independent normals. Mean orthogonal with gain 0.01, biases zero.

    Args:
        init_scale: standard deviation at the start, in units of the action.
        state_dependent: compute the scale from the features; otherwise it is a parameter of its own.

    The log of the scale is kept in [-5, 2].
    """

    out_keys = (LOC, SCALE)
    distribution = DiagonalNormal

    def __init__(
        self,
        in_features: int,
        action_dim: int,
        *,
        init_scale: float = 1.0,
        state_dependent: bool = False,
    ) -> None:
        super().__init__()
        low, high = (math.exp(limit) for limit in _LOG_SCALE_RANGE)
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}; it must be at least 1")
        if not low <= init_scale <= high:
            raise ValueError(
                f"init_scale is {init_scale}; it must be from {low:.4g} to {high:.4g}, where the head keeps the scale"
            )
        self.action_dim = action_dim
        self.loc = nn.Linear(in_features, action_dim)
        self.scale = nn.Linear(in_features, action_dim) if state_dependent else None
        orthogonal(self, POLICY_GAIN)
        self.log_scale = nn.Parameter(torch.full((action_dim,), init_scale).log())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc = self.loc(x)
        if self.scale is not None:
            return loc, (self.log_scale + self.scale(x)).clamp(*_LOG_SCALE_RANGE).exp()
        # a projection: clamped on the way alone, a parameter that has left the range would get no gradient ever again;
        # through data: a graph that holds the parameter stays usable
        self.log_scale.data.clamp_(*_LOG_SCALE_RANGE)
        return loc, self.log_scale.exp().expand_as(loc)


class TanhNormalHead(PolicyHead):
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc, log_scale = self._logs(x)
        return loc, log_scale.exp()

    def distribution_of(self, x: Tensor, mask: Tensor | None = None) -> TanhNormal:
        """The distribution, which then need not take the logarithm of its scale."""
        loc, log_scale = self._logs(x)
        return TanhNormal(loc, log_scale.exp(), log_scale)

    def _logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.linear(x).chunk(2, -1)
        low, high = self.range
        if self.squashed:
            return loc, low + 0.5 * (high - low) * (raw.tanh() + 1)
        return loc, raw.clamp(low, high)


class GaussianHead(PolicyHead):
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
        if action_dim < 1 or not 0 < init_scale < math.inf or not 0 <= min_scale < math.inf:
            raise ValueError(
                f"need action_dim, init_scale > 0 and min_scale >= 0, got {action_dim}, {init_scale}, {min_scale}"
            )
        self.action_dim = action_dim
        self.min_scale = min_scale
        self.factor = init_scale / math.log(2)
        self.linear = nn.Linear(in_features, 2 * action_dim)
        orthogonal(self, POLICY_GAIN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """``(loc, scale)``, both [*B, A]."""
        loc, raw = self.linear(x).chunk(2, -1)
        return loc, F.softplus(raw) * self.factor + self.min_scale


class CholeskyHead(PolicyHead):
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
    rows: Tensor
    columns: Tensor

    def __init__(self, in_features: int, action_dim: int, *, init_scale: float = 0.7, min_scale: float = 1e-4) -> None:
        super().__init__()
        if action_dim < 1 or not 0 < init_scale < math.inf or not 0 <= min_scale < math.inf:
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
