"""Running normalisation of observations."""

from __future__ import annotations

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
        x = (x - self.shift) * self.factor
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
