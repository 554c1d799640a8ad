"""What stands in steps that must not be read, and numbers at the ends of their ranges."""

from __future__ import annotations

import math

import pytest
import torch

from offtrace.modules.returns import (
    distributional_return,
    effective_sample_size,
    gae,
    importance_trace,
    q_return,
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
