"""Diagnostics of off-policyness against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from offtrace.modules.returns import (
    clipped_fraction,
    contraction_coefficient,
    effective_sample_size,
    mean_trace_length,
    retrace_trace,
)
from tests.modules.rollouts import rollout, validity


def test_effective_sample_size() -> None:
    log_rho = rollout(0, 30, 4)["log_rho"]
    rho = log_rho.exp()
    torch.testing.assert_close(effective_sample_size(log_rho), rho.sum() ** 2 / (120 * (rho**2).sum()))
    valid = validity(0, log_rho.shape)
    kept = rho[valid]
    expected = kept.sum() ** 2 / (len(kept) * (kept**2).sum())
    torch.testing.assert_close(effective_sample_size(log_rho.masked_fill(~valid, math.nan), valid=valid), expected)
    assert float(effective_sample_size(torch.zeros(7))) == 1.0
    one = torch.full((10,), -1e4)
    one[3] = 1e4  # the batch is worth one step of ten
    assert float(effective_sample_size(one)) == pytest.approx(0.1)
    assert float(effective_sample_size(torch.zeros(3), valid=torch.zeros(3, dtype=torch.bool))) == 1.0


def test_clipped_fraction() -> None:
    log_rho = torch.tensor([-1.0, 0.0, 0.1, 2.0])
    assert float(clipped_fraction(log_rho, 1.0)) == 0.5
    assert float(clipped_fraction(log_rho, math.e)) == 0.25
    assert float(clipped_fraction(log_rho, math.inf)) == 0.0
    assert float(clipped_fraction(log_rho, 1.0, valid=torch.tensor([True, True, True, False]))) == pytest.approx(1 / 3)


def carried(
    trace: np.ndarray, done: np.ndarray, known: np.ndarray, gamma: float, from_first: bool
) -> tuple[float, int]:
    """Sum over the valid starts of c_{s+1} + c_{s+1} c_{s+2} + ..., product by product."""
    total, count = 0.0, 0
    for s in range(len(trace)):
        if not known[s]:
            continue
        count += 1
        weight = 1.0
        for t in range(s, len(trace) - 1):
            if done[t] or not known[t]:
                break
            if not from_first and not known[t + 1]:
                break
            weight *= gamma * trace[t if from_first else t + 1]
            total += weight
    return total, count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("from_first", [False, True])
def test_mean_trace_length_and_contraction(from_first: bool, masked: bool) -> None:
    inputs = rollout(1, 25, 3)
    trace, done = retrace_trace(log_rho=inputs["log_rho"], lmbda=0.9), inputs["done"]
    valid = validity(1, done.shape) if masked else None
    known = (torch.ones_like(done) if valid is None else valid).numpy()

    def mean(gamma: float, first: bool) -> float:
        parts = [carried(trace[:, i].numpy(), done[:, i].numpy(), known[:, i], gamma, first) for i in range(3)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    bad = trace if valid is None else trace.masked_fill(~valid, math.nan)
    length = mean_trace_length(trace=bad, done=done, valid=valid, from_first=from_first)
    assert float(length) == pytest.approx(mean(1.0, from_first), rel=1e-12)
    eta = contraction_coefficient(trace=bad, done=done, gamma=0.95, valid=valid)
    assert float(eta) == pytest.approx(0.95 - 0.05 * mean(0.95, False), rel=1e-12)


def test_a_constant_trace_carries_lambda_over_one_minus_lambda_steps() -> None:
    trace, done = torch.full((4000, 1), 0.9).double(), torch.zeros(4000, 1, dtype=torch.bool)
    assert float(mean_trace_length(trace=trace, done=done)) == pytest.approx(9.0, abs=0.03)


def test_eta_is_gamma_without_traces_and_small_with_full_ones() -> None:
    done = torch.zeros(5000, 2, dtype=torch.bool)

    def eta(c: float) -> float:
        return float(contraction_coefficient(trace=torch.full((5000, 2), c).double(), done=done, gamma=0.9))

    assert eta(0.0) == pytest.approx(0.9)
    assert eta(1.0) == pytest.approx(0.0, abs=2e-3)  # what remains is cut by the end of the rollout
    # eta = gamma - (1 - gamma) gamma c / (1 - gamma c)
    assert eta(0.5) == pytest.approx(0.9 - 0.1 * 0.45 / 0.55, abs=1e-3)


def test_bad_input_is_named() -> None:
    trace = torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"^done must have the shape of trace, \[4, 2\], got \[4\]"):
        mean_trace_length(trace=trace, done=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^done must be a bool tensor, got torch.float32"):
        contraction_coefficient(trace=trace, done=trace, gamma=0.9)


def test_no_gradient() -> None:
    trace: Tensor = torch.rand(4, 2, requires_grad=True)
    done = torch.zeros(4, 2, dtype=torch.bool)
    assert not effective_sample_size(trace).requires_grad
    assert not clipped_fraction(trace, 1.0).requires_grad
    assert not mean_trace_length(trace=trace, done=done).requires_grad
    assert not contraction_coefficient(trace=trace, done=done, gamma=0.9).requires_grad
