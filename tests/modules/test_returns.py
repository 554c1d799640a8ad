"""V-trace against its definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrace.modules import returns
from offtrace.modules.returns import lambda_return, vtrace
from tests.modules.reference import vtrace_sums

INF = math.inf


def case(seed: int, length: int, *batch: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Random rollouts whose successors differ from the next value only where an episode ends."""
    rng = np.random.default_rng(seed)
    shape = (length, *batch)
    value = rng.normal(size=shape)
    terminated = rng.random(shape) < 0.15
    done = terminated | (rng.random(shape) < 0.15)
    next_value = rng.normal(size=shape)
    next_value[:-1] = np.where(done[:-1], next_value[:-1], value[1:])
    arrays = {
        "reward": rng.normal(size=shape), "value": value, "next_value": next_value,
        "log_rho": spread * rng.normal(size=shape), "terminated": terminated, "done": done,
    }  # fmt: skip
    return {name: torch.tensor(array) for name, array in arrays.items()}


def direct(inputs: dict[str, torch.Tensor], **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = {
        name: tensor.double().numpy() if tensor.dtype != torch.bool else tensor.numpy()
        for name, tensor in inputs.items()
    }
    arrays["rho"] = np.exp(arrays.pop("log_rho"))
    length, *batch = arrays["value"].shape
    out = np.zeros((3, length, *batch))
    for index in np.ndindex(*batch):
        out[(slice(None), slice(None), *index)] = vtrace_sums(
            **{name: array[(slice(None), *index)] for name, array in arrays.items()}, **options
        )
    return out[0], out[1], out[2]


OPTIONS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        "lmbda": st.sampled_from([0.0, 0.3, 0.95, 1.0]),
        "rho_clip": st.sampled_from([1.0, 2.0, INF]),
        "c_clip": st.sampled_from([0.5, 1.0]),
        "pg_rho_clip": st.sampled_from([0.7, 1.0, INF]),
        "leak": st.sampled_from([1.0, 0.5, 0.0]),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 24), OPTIONS, st.booleans(), st.sampled_from([0.5, 3.0]))
def test_vtrace_is_the_sum_of_the_paper(
    seed: int, length: int, options: dict[str, float], masked: bool, spread: float
) -> None:
    """Six sequences a case, with ends anywhere, invalid steps anywhere, ratios on both sides of every clip."""
    inputs = case(seed, length, 2, 3, spread=spread)
    if masked:
        inputs["valid"] = torch.tensor(np.random.default_rng(seed + 1).random((length, 2, 3)) > 0.2)
    target, advantage, size = direct(inputs, **options)
    out = vtrace(**inputs, **options)
    assert out.target.dtype == torch.float64
    np.testing.assert_array_less(np.abs(out.target.numpy() - target) / (size + 1e-300), 1e-10)
    np.testing.assert_allclose(out.advantage.numpy(), advantage, rtol=1e-9, atol=1e-10 * (1 + size.max()))
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    rough = vtrace(**single, **options)
    assert rough.target.dtype == torch.float32
    np.testing.assert_array_less(np.abs(rough.target.numpy() - target) / (size + 1e-30), 1e-4)


WORKED = {  # algorithm notes, T = 3, two actions, gamma 0.9: terminated, truncated, V(x'), then target and advantage
    "open": ([0, 0, 0], [0, 0, 0], [0.44, 0.5, 0.75]),
    "terminal": ([0, 1, 0], [0, 0, 0], [0.44, 0.66, 0.75]),
    "truncated": ([0, 0, 0], [0, 1, 0], [0.44, 0.66, 0.75]),
}
NONE: dict[str, float] = {"rho_clip": INF, "c_clip": INF, "pg_rho_clip": INF}
EXPECTED: list[tuple[str, dict[str, float], list[float], list[float]]] = [
    ("open", {}, [2.188450, 1.320500, 2.675000], [1.088450, 0.880500, 2.175000]),
    ("terminal", {}, [0.888400, -0.124000, 2.675000], [-0.211600, -0.564000, 2.175000]),
    ("truncated", {}, [1.209160, 0.232400, 2.675000], [0.109160, -0.207600, 2.175000]),
    ("open", {"lmbda": 0.8}, [1.860832, 1.085600, 2.675000], [0.760832, 0.645600, 2.175000]),
    ("truncated", {"lmbda": 0.8}, [1.246528, 0.232400, 2.675000], [0.146528, -0.207600, 2.175000]),
    ("open", {"leak": 0.5}, [2.85695625, 1.672850, 3.327500], [1.756956, 1.232850, 2.827500]),
    ("terminal", NONE, [0.782600, -0.124000, 3.980000], [-0.317400, -0.564000, 3.480000]),
    ("truncated", NONE, [1.263740, 0.232400, 3.980000], [0.163740, -0.207600, 3.480000]),
]


def worked(name: str) -> dict[str, Any]:
    terminated, truncated, next_value = WORKED[name]
    ended = torch.tensor(terminated).bool()
    return {
        "reward": torch.tensor([1.0, -0.5, 2.0]).double(), "value": torch.tensor([1.1, 0.44, 0.5], dtype=torch.float64),
        "next_value": torch.tensor(next_value, dtype=torch.float64), "terminated": ended,
        "done": ended | torch.tensor(truncated).bool(), "gamma": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "options", "target", "advantage"), EXPECTED)
def test_worked_numbers(name: str, options: dict[str, float], target: list[float], advantage: list[float]) -> None:
    log_rho = torch.tensor([1.5, 0.6, 1.6], dtype=torch.float64).log()
    out = vtrace(**worked(name), log_rho=log_rho, **options)
    np.testing.assert_allclose(out.target.numpy(), target, atol=5.1e-7)
    np.testing.assert_allclose(out.advantage.numpy(), advantage, atol=5.1e-7)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("open", [2.170720, 1.516000, 2.675000]),
        ("terminal", [0.719200, -0.500000, 2.675000]),
        ("truncated", [1.146880, 0.094000, 2.675000]),
    ],
)
def test_worked_lambda_returns(name: str, target: list[float]) -> None:
    np.testing.assert_allclose(lambda_return(**worked(name), lmbda=0.8).numpy(), target, atol=1e-12)


def test_on_policy_vtrace_is_td_lambda() -> None:
    inputs = case(0, 30, 4)
    del inputs["log_rho"]
    out = vtrace(**inputs, log_rho=torch.zeros(30, 4).double(), gamma=0.97, lmbda=0.8)
    torch.testing.assert_close(out.target, lambda_return(**inputs, gamma=0.97, lmbda=0.8))
    torch.testing.assert_close(out.advantage, out.target - inputs["value"])


def test_target_is_value_plus_ratio_times_td_of_the_mixture() -> None:
    """v = V + rho (q - V) where both clips are 1, for every lambda."""
    inputs = case(1, 30, 4)
    out = vtrace(**inputs, gamma=0.97, lmbda=0.6)
    torch.testing.assert_close(out.target, inputs["value"] + out.advantage)


def test_what_lies_behind_an_end_changes_nothing_before_it() -> None:
    inputs = case(2, 20, 3)
    inputs["done"][9] = True
    whole = vtrace(**inputs, gamma=0.99)
    first = vtrace(**{name: tensor[:10] for name, tensor in inputs.items()}, gamma=0.99)
    second = vtrace(**{name: tensor[10:] for name, tensor in inputs.items()}, gamma=0.99)
    torch.testing.assert_close(whole.target, torch.cat([first.target, second.target]), rtol=0, atol=0)
    torch.testing.assert_close(whole.advantage, torch.cat([first.advantage, second.advantage]), rtol=0, atol=0)


def test_nan_that_must_not_be_read_reaches_nothing() -> None:
    inputs = case(3, 20, 3)
    inputs["terminated"][4] = inputs["done"][4] = True
    valid = torch.ones(20, 3, dtype=torch.bool)
    valid[11, 1] = valid[19, 0] = False
    clean = vtrace(**inputs, gamma=0.99, valid=valid)
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("reward", "next_value", "log_rho"):
        poisoned[name][~valid] = math.nan
    out = vtrace(**poisoned, gamma=0.99, valid=valid)
    assert torch.equal(out.target, clean.target)
    assert torch.equal(out.advantage, clean.advantage)
    assert torch.equal(out.target[~valid], inputs["value"][~valid])
    assert (out.advantage[~valid] == 0).all()
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    poisoned["next_value"][inputs["terminated"]] = math.nan
    out = vtrace(**poisoned, gamma=0.99)
    assert torch.isfinite(out.target).all()
    assert torch.isfinite(out.advantage).all()


def test_no_gradient_flows_out_of_any_argument() -> None:
    inputs = case(4, 5, 2)
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    out = vtrace(**inputs, gamma=0.99)
    assert not out.target.requires_grad
    assert not out.advantage.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_ratios(dtype: torch.dtype, sign: int) -> None:
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case(5, 12, 2).items()}
    inputs["log_rho"] = torch.full_like(inputs["value"], sign * 1e4)
    out = vtrace(**inputs, gamma=0.99)
    limit = torch.zeros_like(inputs["value"]) if sign > 0 else torch.full_like(inputs["value"], -math.inf)
    expected = vtrace(**{**inputs, "log_rho": limit}, gamma=0.99)
    torch.testing.assert_close(out.target, expected.target)
    assert torch.isfinite(out.advantage).all()


def test_a_tensor_of_discounts() -> None:
    inputs = case(6, 8, 3)
    gamma = torch.full((8, 3), 0.9, dtype=torch.float64)
    torch.testing.assert_close(vtrace(**inputs, gamma=gamma).target, vtrace(**inputs, gamma=0.9).target)


@pytest.mark.parametrize("name", ["reward", "next_value", "log_rho", "terminated", "done", "valid"])
def test_wrong_shapes_are_named(name: str) -> None:
    inputs = case(7, 6, 2)
    inputs["valid"] = torch.ones(6, 2, dtype=torch.bool)
    inputs[name] = inputs[name][:, :1]
    with pytest.raises(ValueError, match=rf"^{name} must have the shape of value, \[6, 2\], got \[6, 1\]"):
        vtrace(**inputs, gamma=0.9)


def test_wrong_dtypes_are_named() -> None:
    inputs = case(8, 6, 2)
    with pytest.raises(TypeError, match=r"^reward must be a floating-point tensor, got torch.int64"):
        vtrace(**{**inputs, "reward": torch.ones(6, 2, dtype=torch.int64)}, gamma=0.9)
    with pytest.raises(TypeError, match=r"^done must be a bool tensor, got torch.float64"):
        vtrace(**{**inputs, "done": inputs["reward"]}, gamma=0.9)
    with pytest.raises(TypeError, match=r"^log_rho must have the dtype of value, torch.float64, got torch.float32"):
        vtrace(**{**inputs, "log_rho": inputs["log_rho"].float()}, gamma=0.9)
    with pytest.raises(ValueError, match=r"^reward must be on the device of value, cpu, got meta"):
        vtrace(**{**inputs, "reward": inputs["reward"].to("meta")}, gamma=0.9)


MUTATIONS = {
    "pi and mu swapped": ("rho = log_rho.clamp", "rho = (-log_rho).clamp"),
    "no termination": (
        "next_value = next_value.masked_fill(terminated, 0)",
        "terminated = torch.zeros_like(terminated); next_value = next_value",
    ),
    "done stops the bootstrap": ("bootstrap = (~terminated)", "bootstrap = (~done)"),
    "terminated cuts the trace": ("going = ~done", "going = ~terminated"),
    "trace over the end of the rollout's mask": ("* lmbda * clipped(c_clip)", "* lmbda * clipped(rho_clip)"),
    "shifted successor": ("lmbda * correction[1:], next_value[:-1]", "lmbda * correction[:-1], next_value[:-1]"),
    "next target at a truncation": ("torch.where(going[:-1],", "torch.where(going[:-1] | done[:-1],"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    """The comparison above is worth something: each wrong version of the source differs from the definition."""
    import inspect

    old, new = MUTATIONS[mutation]
    source = inspect.getsource(returns)
    assert source.count(old) == 1, mutation
    module: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), "mutant", "exec", dont_inherit=True), module)
    inputs, options = case(11, 20, 4), {"gamma": 0.9, "lmbda": 0.8, "rho_clip": 2.0, "c_clip": 0.7}
    target, advantage, _ = direct(inputs, **options)
    out = module["vtrace"](**inputs, **options)
    worst = max(np.abs(out.target.numpy() - target).max(), np.abs(out.advantage.numpy() - advantage).max())
    assert worst > 1e-3
