"""Random rollouts, and the comparison of a fast function with its direct sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.one_of(st.integers(1, 8), st.integers(1, 64))
BATCHES = st.sampled_from([(), (1,), (3,), (2, 2)])


def rollout(seed: int, length: int, *batch: int, spread: float = 1.0, ends: float = 0.15) -> dict[str, Tensor]:
    """Rewards, values, log-ratios and masks in float64; successors differ from the next value only where one ends."""
    rng = np.random.default_rng(seed)
    shape = (length, *batch)
    value = rng.normal(size=shape)
    terminated = rng.random(shape) < ends
    done = terminated | (rng.random(shape) < ends)
    next_value = rng.normal(size=shape)
    next_value[:-1] = np.where(done[:-1], next_value[:-1], value[1:])
    arrays = {
        "reward": rng.normal(size=shape), "value": value, "next_value": next_value,
        "log_rho": (spread * rng.normal(size=shape)).clip(-np.log(1e6), np.log(1e6)),
        "terminated": terminated, "done": done,
    }  # fmt: skip
    return {name: torch.tensor(array) for name, array in arrays.items()}


def validity(seed: int, shape: torch.Size) -> Tensor:
    """Invalid steps anywhere, first and last included."""
    return torch.tensor(np.random.default_rng(seed + 1).random(tuple(shape)) > 0.2)


def poisoned(tensor: Tensor, where: Tensor) -> Tensor:
    """NaN in entries that must not be read."""
    return tensor.masked_fill(where, float("nan"))


def single(inputs: dict[str, Any]) -> dict[str, Any]:
    """float32 in place of float64."""
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def columns(reference: Callable[..., Any], inputs: dict[str, Any], outputs: int, **options: Any) -> list[np.ndarray]:
    """Apply a reference for one sequence to every column of ``[T, *B]`` (and ``[T, *B, K]``)."""
    arrays = {
        k: (v.double() if v.is_floating_point() else v).numpy() for k, v in inputs.items() if isinstance(v, Tensor)
    }
    options = {**{k: v for k, v in inputs.items() if not isinstance(v, Tensor)}, **options}
    shape = arrays["reward"].shape
    out = [np.zeros(shape) for _ in range(outputs)]
    for index in np.ndindex(*shape[1:]):
        here = (slice(None), *index)
        for whole, part in zip(out, reference(**{k: a[here] for k, a in arrays.items()}, **options), strict=True):
            whole[here] = part
    return out


def assert_close(got: Tensor, expected: np.ndarray, size: np.ndarray, tolerance: float) -> None:
    """|got - expected| against the sum of the absolute terms."""
    error = np.abs(got.double().numpy() - expected) / (size + 1e-30)
    assert error.max(initial=0) <= tolerance, f"relative error {error.max()}"
