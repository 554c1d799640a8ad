"""Running normalisation of observations, and of rewards by their returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class ObservationNormalizer(nn.Module):
    """``clip((x - mean) / sqrt(variance + epsilon))`` with statistics that only :meth:`update` changes.

    The learner calls :meth:`update` with observations that arrive; acting and losses only read. The statistics are
    buffers: they are saved with the network, pushed to actors with its weights, and no optimiser touches them.
    Count, mean and sum of squares accumulate in float64 by the merge of Chan et al. (1979), so that a million updates
    lose nothing; before the first update the module leaves observations as they are, up to the clip.

    Args:
        shape: of one observation.
        clip: largest absolute value out, in standard deviations; None: no limit.
        epsilon: added to the variance.

    Shapes: ``[*B, *shape]`` to the same, in the dtype of the input.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(self, shape: Sequence[int], *, clip: float | None = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__()
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive or None, got {clip}")
        _check_epsilon(epsilon)
        self.shape = tuple(shape)
        self.clip = clip
        self.epsilon = epsilon
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(self.shape, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(self.shape, dtype=torch.float64))
        # what forward reads, in single precision
        self.register_buffer("shift", torch.zeros(self.shape))
        self.register_buffer("factor", torch.ones(self.shape))

    @property
    def variance(self) -> Tensor:
        """Of all observations so far, float64 ``[*shape]``; ones before the first."""
        return torch.where(self.count > 0, self.square / self.count.clamp(min=1), 1.0)

    @torch.no_grad()
    def update(self, observations: Tensor, valid: Tensor | None = None) -> None:
        """Merge ``observations`` [*B, *shape] into the statistics, in place.

        Args:
            observations: any floating dtype.
            valid: bool [*B] or [*B, 1]; False entries are left out, NaN included.

        Raises:
            ValueError: on another shape.
        """
        if observations.shape[observations.ndim - len(self.shape) :] != self.shape:
            raise ValueError(f"observations must be [*B, *{list(self.shape)}], got {list(observations.shape)}")
        x = observations.reshape(-1, *self.shape).to(self.mean.dtype)
        if valid is not None:
            x = x[valid.reshape(-1)]
        if not len(x):
            return
        mean = x.mean(0)
        square = (x - mean).square().sum(0)
        total = self.count + len(x)
        delta = mean - self.mean
        self.square += square + delta.square() * (self.count * len(x) / total)
        self.mean += delta * (len(x) / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.factor.copy_((self.variance + self.epsilon).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, *shape]``, normalised."""
        x = (x.to(torch.promote_types(x.dtype, self.shift.dtype)) - self.shift) * self.factor  # bool has no minus
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class DictNormalizer(nn.Module):
    """An :class:`ObservationNormalizer` for each vector of a dictionary observation; images pass as they are.

    Args:
        shapes: of one observation, by name; three sizes are an image.
        clip: as :class:`ObservationNormalizer`.

    Shapes: a mapping name -> ``[N, *shape]`` to a dict of the same.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, clip: float | None = 10.0) -> None:
        super().__init__()
        self.names = tuple(name for name, shape in shapes.items() if len(shape) != 3)
        # a name may have a dot, which a ModuleDict refuses
        self.parts = nn.ModuleList(ObservationNormalizer(shapes[name], clip=clip) for name in self.names)

    def update(self, observations: Mapping[str, Tensor], valid: Tensor | None = None) -> None:
        """Merge a mapping name -> [*B, *shape] into the statistics; arguments as :class:`ObservationNormalizer`."""
        for name, part in zip(self.names, self.parts, strict=True):
            part.update(observations[name], valid)  # type: ignore[operator]

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every entry, the vectors normalised."""
        return dict(x) | {name: part(x[name]) for name, part in zip(self.names, self.parts, strict=True)}


class RewardNormalizer(nn.Module):
    """``clip(reward / sqrt(variance + epsilon))``, by the running variance of the discounted return.

    That return is R_t = r_t + gamma R_{t-1}, begun anew at every episode; its variance is over all steps so far. The
    mean is not subtracted: the sign of a reward stays. This is the reward scaling of PPO in OpenAI baselines
    (``VecNormalize``) and CleanRL, which Engstrom et al. 2020, arXiv 2005.12729, describe. There each step is divided
    by the statistics of its time; here a whole rollout is taken in first, and one number divides all its rewards.

    Count, mean and sum of squares are float64 buffers, as of :class:`ObservationNormalizer`, saved with whatever holds
    the module. The returns of the episodes under way are not saved, since no episode outlives its process.

    Args:
        gamma: discount per step.
        clip: largest absolute reward out; None: no limit.
        epsilon: added to the variance.
    """

    running: Tensor

    def __init__(self, gamma: float, *, clip: float | None = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__()
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive or None, got {clip}")
        _check_epsilon(epsilon)
        self.gamma, self.clip, self.epsilon = gamma, clip, epsilon
        self.returns = ObservationNormalizer((), clip=None)
        self.register_buffer("running", torch.zeros(0, dtype=torch.float64), persistent=False)

    @property
    def variance(self) -> Tensor:
        """Of the discounted return, a float64 scalar; 1 before the first step."""
        return self.returns.variance

    @torch.no_grad()
    def update(
        self,
        reward: Tensor,
        done: Tensor,
        *,
        first: Tensor | None = None,
        valid: Tensor | None = None,
        environments: tuple[Tensor, int] | None = None,
    ) -> None:
        """Take in a rollout, whose rows go on where the last ones of the same environments ended.

        The statistics are of all ranks of ``torch.distributed``, every one of which must call it as often as the
        others with as many steps.

        Args:
            reward: ``[B, T]``, any floating dtype.
            done: bool ``[B, T]``; the return begins anew behind it.
            first: bool ``[B]``, True where a row begins an episode whatever the last one's end was: environments may be
                replaced.
            valid: bool ``[B, T]``; False steps are left out, NaN included.
            environments: int64 ``[B]``, which environment a row is of, and their number; None: row i is of the i-th.
        """
        rows, number = (slice(None), len(reward)) if environments is None else environments
        if len(self.running) != number:
            self.running = self.returns.mean.new_zeros(number)
        returns, running = [], self.running[rows]
        if first is not None:
            running = running.masked_fill(first, 0)
        steps = reward.to(running.dtype)
        if valid is not None:
            steps = steps.masked_fill(~valid, 0)
        for time in range(reward.shape[1]):
            running = steps[:, time] + self.gamma * running
            returns.append(running)
            running = running.masked_fill(done[:, time], 0)
        self.running[rows] = running
        found = of_all_ranks(torch.stack(returns, 1))
        self.returns.update(found, None if valid is None else of_all_ranks(valid))

    def forward(self, reward: Tensor) -> Tensor:
        """``[*B]``, divided, in the dtype of the input."""
        x = reward / (self.variance + self.epsilon).sqrt().to(reward.dtype)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:  # what never varies would be divided by 0
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")


def of_all_ranks(tensor: Tensor) -> Tensor:
    """``tensor`` of every rank of ``torch.distributed``, one behind the other; the same on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    everybody = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, tensor.contiguous())
    return torch.cat(everybody)


def share_normalizer(source: nn.Module, *others: nn.Module) -> None:
    """Let the networks ``others`` use the ``normalizer`` of ``source``, so that one update serves all.

    Raises:
        ValueError: if one of them has none.
    """
    for module in (source, *others):
        if getattr(module, "normalizer", None) is None:
            raise ValueError(f"{type(module).__name__} has no normalizer; build it with normalize=True")
    for module in others:
        module.normalizer = source.normalizer
