"""What stands in steps that must not be read, and numbers at the ends of their ranges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from offtrace.modules.estimators import NStepReturn
from offtrace.modules.returns import (
    distributional_return,
    effective_sample_size,
    gae,
    importance_trace,
    n_step_return,
    q_return,
    recurrence,
    retrace_trace,
    trace_reach,
    vtrace,
)


def rollout(length: int = 6) -> dict[str, torch.Tensor]:
    """Step 2 ends an episode, step 3 is padding behind it, full of NaN."""
    torch.manual_seed(0)
    x = {name: torch.randn(length, 1) for name in ("reward", "value", "next_value", "log_rho")}
    done = torch.zeros(length, 1, dtype=torch.bool)
    valid = torch.ones(length, 1, dtype=torch.bool)
    done[2], valid[3] = True, False
    for tensor in x.values():
        tensor[3] = math.nan
    return {**x, "terminated": torch.zeros_like(done), "done": done, "valid": valid}


def test_padding_of_nan_behind_an_episode_reaches_nothing() -> None:
    x = rollout()
    known = x["valid"]
    for function in (vtrace, gae):
        arguments = {k: v for k, v in x.items() if function is vtrace or k != "log_rho"}
        options = {} if function is vtrace else {"lmbda": 0.9}
        out = function(**arguments, **options, gamma=0.9)  # type: ignore[operator]
        clean = {k: v.nan_to_num(7.0) if v.is_floating_point() else v for k, v in arguments.items()}
        want = function(**clean, **options, gamma=0.9)  # type: ignore[operator]
        for got, right in zip(out, want, strict=True):
            torch.testing.assert_close(got[known], right[known])


def test_padding_of_nan_in_distributions_reaches_nothing() -> None:
    x = rollout()
    dists = {name: torch.softmax(torch.randn(6, 1, 5), -1) for name in ("q_dist", "next_state_dist")}
    arguments = {k: x[k] for k in ("reward", "terminated", "done", "valid")}
    arguments |= {"trace": torch.full((6, 1), 0.8), "support": torch.linspace(-9, 9, 5), **dists}
    want = distributional_return(**arguments, gamma=0.9)  # type: ignore[arg-type]
    for name, dist in dists.items():
        arguments[name] = dist.masked_fill(~x["valid"].unsqueeze(-1), math.nan)
    got = distributional_return(**arguments, gamma=0.9)  # type: ignore[arg-type]
    known = x["valid"].squeeze(-1)
    torch.testing.assert_close(got[known], want[known])


@pytest.mark.parametrize("log_rho", [30.0, 1e4, -1e4])
def test_importance_sampling_of_distributions_saturates(log_rho: float) -> None:
    torch.manual_seed(0)
    length = 20
    flags = torch.zeros(length, 1, dtype=torch.bool)
    q_dist, next_dist = torch.softmax(torch.randn(2, length, 1, 5), -1)
    out = distributional_return(
        reward=torch.randn(length, 1), q_dist=q_dist, next_state_dist=next_dist, terminated=flags, done=flags,
        gamma=0.99, trace=importance_trace(log_rho=torch.full((length, 1), log_rho)), support=torch.linspace(-9, 9, 5),
    )  # fmt: skip
    assert out.isfinite().all()


def test_a_discount_is_not_rounded_to_half_precision() -> None:
    ones, flags = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, 1, dtype=torch.bool)
    common = {"reward": ones, "terminated": flags, "done": flags}
    zeros = {"q_value": 0 * ones, "next_state_value": 0 * ones, "trace": 1.0}
    plain = q_return(**common, **zeros, gamma=0.999)  # type: ignore[arg-type]
    tensor = q_return(**common, **zeros, gamma=torch.tensor(0.999))  # type: ignore[arg-type]
    torch.testing.assert_close(tensor, plain)


def test_ratios_that_are_no_numbers_are_not_called_on_policy() -> None:
    log_rho = torch.zeros(5)
    assert effective_sample_size(log_rho) == 1
    assert effective_sample_size(log_rho, valid=torch.zeros(5, dtype=torch.bool)) == 1
    log_rho[2] = math.nan
    assert effective_sample_size(log_rho).isnan()


@pytest.mark.parametrize("rows", [None, 2, 3])
def test_a_value_that_is_not_known_reaches_no_step_before_it(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace goes on to an invalid step, whose own value is NaN; in blocks of rows too."""
    if rows is not None:
        monkeypatch.setattr(recurrence, "BLOCK", rows)
    torch.manual_seed(0)
    x = {name: torch.randn(7, 1) for name in ("reward", "value", "next_value", "log_rho")}
    flags = torch.zeros(7, 1, dtype=torch.bool)
    valid = ~flags
    valid[2] = valid[5] = False
    clean = vtrace(**x, terminated=flags, done=flags, gamma=0.9, lmbda=0.8, valid=valid)
    for tensor in x.values():
        tensor[~valid] = math.nan
    found = vtrace(**x, terminated=flags, done=flags, gamma=0.9, lmbda=0.8, valid=valid)
    assert (found.advantage[~valid] == 0).all()
    torch.testing.assert_close(found.advantage, clean.advantage)
    torch.testing.assert_close(found.target[valid], clean.target[valid])
    # before an unknown step the advantage bootstraps from the step's own successor
    for t in (1, 4):
        rho = min(1.0, float(x["log_rho"][t].exp()))
        want = rho * (x["reward"][t] + 0.9 * x["next_value"][t] - x["value"][t])
        torch.testing.assert_close(found.advantage[t], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_half_precision_saturate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = {name: torch.randn(20, 2).to(dtype) for name in ("reward", "value", "next_value")}
    flags = torch.zeros(20, 2, dtype=torch.bool)
    ends = {"terminated": flags, "done": flags, "gamma": 0.99}
    log_rho = torch.full((20, 2), 1e4).to(dtype)
    found = [
        *vtrace(**x, **ends, log_rho=log_rho, rho_clip=math.inf, c_clip=math.inf, pg_rho_clip=math.inf),  # type: ignore[arg-type]
        q_return(
            reward=x["reward"], q_value=x["value"], next_state_value=x["next_value"],
            trace=importance_trace(log_rho=log_rho), **ends,  # type: ignore[arg-type]
        ),
    ]  # fmt: skip
    for tensor in found:
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()
        assert tensor.abs().max() > 0.99 * torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diagnostics_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    log_rho = (0.5 * torch.randn(300, 10)).to(dtype)
    exact = effective_sample_size(log_rho.double())
    assert float(effective_sample_size(log_rho)) == pytest.approx(float(exact), rel=1e-5)
    assert float(effective_sample_size(torch.zeros(3000, dtype=dtype))) == 1
    trace, done = retrace_trace(log_rho=log_rho), torch.zeros(300, 10, dtype=torch.bool)
    rough, fine = (trace_reach(trace=x, done=done, gamma=0.99) for x in (trace, trace.double()))
    assert float(rough.length) == pytest.approx(float(fine.length), rel=1e-5)


def test_no_weight_at_all_is_no_sample() -> None:
    assert float(effective_sample_size(torch.full((5,), -math.inf))) == 0


@pytest.mark.parametrize("value", [0.9, np.float32(0.9), np.float64(0.9), torch.tensor(0.9)])
def test_the_discount_is_any_number(value: object) -> None:
    x = {name: torch.randn(5, 2) for name in ("reward", "value", "next_value", "log_rho")}
    flags = torch.zeros(5, 2, dtype=torch.bool)
    found = vtrace(**x, terminated=flags, done=flags, gamma=value)  # type: ignore[arg-type]
    torch.testing.assert_close(found, vtrace(**x, terminated=flags, done=flags, gamma=0.9))


def test_a_discount_without_dimensions_goes_where_the_values_are() -> None:
    x = {name: torch.randn(5, 2, device="meta") for name in ("reward", "value", "next_value", "log_rho")}
    flags = torch.zeros(5, 2, dtype=torch.bool, device="meta")
    assert vtrace(**x, terminated=flags, done=flags, gamma=torch.tensor(0.9)).target.device.type == "meta"
    with pytest.raises(ValueError, match="gamma must be on meta, got cpu"):
        vtrace(**x, terminated=flags, done=flags, gamma=torch.full((5, 2), 0.9))


@pytest.mark.parametrize("name", ["terminated", "done", "gamma", "lmbda", "rho_clip", "c_clip", "pg_rho_clip", "leak"])
def test_none_is_named(name: str) -> None:
    x: dict[str, Any] = {key: torch.randn(5, 2) for key in ("reward", "value", "next_value", "log_rho")}
    flags = torch.zeros(5, 2, dtype=torch.bool)
    arguments = {**x, "terminated": flags, "done": flags, "gamma": 0.9}
    with pytest.raises(TypeError, match=rf"^{name} must be a (tensor|number), got NoneType"):
        vtrace(**{**arguments, name: None})


def test_what_is_no_number_is_named() -> None:
    x: dict[str, Any] = {key: torch.randn(5, 2) for key in ("reward", "next_value")}
    flags = torch.zeros(5, 2, dtype=torch.bool)
    ends: dict[str, Any] = {"terminated": flags, "done": flags, "gamma": 0.9}
    for n in (None, 2.5, 0):
        with pytest.raises(ValueError, match="n must be at least 1, and whole, got"):
            n_step_return(**x, **ends, n=n)  # type: ignore[arg-type]
    values: dict[str, Any] = {"reward": x["reward"], "q_value": x["reward"], "next_state_value": x["next_value"]}
    with pytest.raises(TypeError, match="trace must be a number, got NoneType"):
        q_return(**values, **ends, trace=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.7"):
        trace_reach(trace=x["reward"], done=flags, gamma=1.7)
    with pytest.raises(TypeError, match="gamma must be a number, got Tensor"):
        trace_reach(trace=x["reward"], done=flags, gamma=torch.ones(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_rho must have at least one element, got \[0\]"):
        effective_sample_size(torch.zeros(0))
    with pytest.raises(ValueError, match="valid must be on the device of log_rho, cpu, got meta"):
        effective_sample_size(x["reward"], valid=flags.to("meta"))
    for function in (importance_trace, retrace_trace):
        with pytest.raises(TypeError, match=r"log_rho must be a floating-point tensor, got torch.int64"):
            function(log_rho=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError, match="lmbda must be a number, got NoneType"):
            function(log_rho=x["reward"], lmbda=None)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_whole_too() -> None:
    x = {"reward": torch.arange(4.0), "next_value": torch.ones(4)}
    ends = {"terminated": torch.zeros(4, dtype=torch.bool), "done": torch.zeros(4, dtype=torch.bool)}
    expected = n_step_return(**x, **ends, gamma=0.9, n=2)
    assert torch.equal(n_step_return(**x, **ends, gamma=0.9, n=np.int64(2)), expected)  # type: ignore[arg-type]
    assert NStepReturn(gamma=0.9, n=np.int64(2)).n == 2  # type: ignore[arg-type]
