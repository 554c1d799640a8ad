"""Diagnostics of off-policyness against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from offtrace.modules.returns import (
    clipped_fraction,
    effective_sample_size,
    retrace_trace,
    trace_reach,
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


def sums(
    trace: np.ndarray, done: np.ndarray, known: np.ndarray, gamma: float, rho: np.ndarray | None
) -> tuple[float, float, int]:
    """Over the valid starts: sums of the products of traces, of their discounted form, and the number of starts."""
    length, total, count = 0.0, 0.0, 0
    for s in range(len(trace)):
        if not known[s]:
            continue
        count += 1
        weight, factor = 1.0, 1.0
        total += 1.0 if rho is None else rho[s]
        for t in range(s, len(trace) - 1):
            following = t if rho is not None else t + 1
            if done[t] or not known[t] or not known[t + 1]:  # what is left out teaches nothing
                break
            weight *= trace[following]
            factor *= gamma
            length += weight
            if rho is None:
                total += factor * weight
            else:
                total += factor * weight * rho[t + 1]
    return length, total, count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["action values", "vtrace"])
@pytest.mark.parametrize("bounded", [False, True])
def test_trace_reach_is_the_sum_of_products(first: bool, masked: bool, bounded: bool) -> None:
    inputs = rollout(1, 25, 3)
    trace, done = retrace_trace(log_rho=inputs["log_rho"], lmbda=0.9), inputs["done"]
    rho = inputs["log_rho"].exp().clamp(max=1.3) if first else None
    valid = validity(1, done.shape) if masked else None
    known = (torch.ones_like(done) if valid is None else valid).numpy()
    parts = [
        sums(trace[:, i].numpy(), done[:, i].numpy(), known[:, i], 0.95, None if rho is None else rho[:, i].numpy())
        for i in range(3)
    ]
    length, total, count = (sum(column) for column in zip(*parts, strict=True))
    if valid is not None:
        trace, rho = trace.masked_fill(~valid, math.nan), None if rho is None else rho.masked_fill(~valid, math.nan)
    found = trace_reach(trace=trace, done=done, gamma=0.95, rho=rho, valid=valid, bounded=bounded)
    assert float(found.length) == pytest.approx(length / count, rel=1e-12)
    assert float(found.contraction) == pytest.approx(1 - 0.05 * total / count, rel=1e-12)


def test_a_constant_trace_carries_lambda_over_one_minus_lambda_steps() -> None:
    trace, done = torch.full((4000, 1), 0.9).double(), torch.zeros(4000, 1, dtype=torch.bool)
    assert float(trace_reach(trace=trace, done=done, gamma=0.9).length) == pytest.approx(9.0, abs=0.03)


@pytest.mark.parametrize("first", [False, True], ids=["action values", "vtrace"])
def test_contraction_is_gamma_without_traces_and_small_with_full_ones(first: bool) -> None:
    done = torch.zeros(5000, 2, dtype=torch.bool)

    def eta(c: float) -> float:
        trace = torch.full((5000, 2), c).double()
        rho = torch.ones_like(trace) if first else None
        return float(trace_reach(trace=trace, done=done, gamma=0.9, rho=rho).contraction)

    assert eta(0.0) == pytest.approx(0.9)
    assert eta(1.0) == pytest.approx(0.0, abs=2e-3)  # what remains is cut by the end of the rollout
    # eta = gamma - (1 - gamma) gamma c / (1 - gamma c)
    assert eta(0.5) == pytest.approx(0.9 - 0.1 * 0.45 / 0.55, abs=1e-3)


def test_small_ratios_slow_vtrace_down() -> None:
    """An operator that moves by rho' of the one-step error contracts with 1 - (1 - gamma) rho'."""
    nothing, done = torch.zeros(9, 2).double(), torch.zeros(9, 2, dtype=torch.bool)
    found = trace_reach(trace=nothing, done=done, gamma=0.9, rho=nothing + 0.25)
    assert float(found.contraction) == pytest.approx(1 - 0.1 * 0.25)
    assert float(found.length) == 0


def test_products_that_overflow_saturate() -> None:
    trace, done = torch.full((200, 2), 1e30), torch.zeros(200, 2, dtype=torch.bool)
    assert all(not x.isnan() for x in trace_reach(trace=trace, done=done, gamma=0.9, rho=trace))


def test_bad_input_is_named() -> None:
    trace = torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"^done must have the shape of trace, \[4, 2\], got \[4\]"):
        trace_reach(trace=trace, done=torch.zeros(4, dtype=torch.bool), gamma=0.9)
    with pytest.raises(TypeError, match=r"^done must be a bool tensor, got torch.float32"):
        trace_reach(trace=trace, done=trace, gamma=0.9)


def test_no_gradient() -> None:
    trace: Tensor = torch.rand(4, 2, requires_grad=True)
    done = torch.zeros(4, 2, dtype=torch.bool)
    assert not effective_sample_size(trace).requires_grad
    assert not clipped_fraction(trace, 1.0).requires_grad
    assert not any(x.requires_grad for x in trace_reach(trace=trace, done=done, gamma=0.9, rho=trace))
