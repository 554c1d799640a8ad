"""V-trace and its on-policy relatives against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offtrace.modules.returns import gae, lambda_return, n_step_return, vtrace
from tests.modules.reference import n_step_sums, vtrace_sums
from tests.modules.rollouts import (
    BATCHES,
    LENGTHS,
    SEEDS,
    assert_close,
    columns,
    poisoned,
    rollout,
    single,
    validity,
)

INF = math.inf
CASES = settings(max_examples=300)
GAMMAS = st.sampled_from([0.0, 0.5, 0.99, 1.0])
LAMBDAS = st.sampled_from([0.0, 0.3, 0.95, 1.0])
SPREADS = st.sampled_from([0.5, 3.0, 12.0])

CLIPS = st.fixed_dictionaries(
    {
        "gamma": GAMMAS, "lmbda": LAMBDAS, "rho_clip": st.sampled_from([1.0, 2.0, INF]),
        "c_clip": st.sampled_from([0.5, 1.0]), "pg_rho_clip": st.sampled_from([0.7, 1.0, INF]),
    }
)  # fmt: skip
UNCLIPPED = st.fixed_dictionaries(
    {
        "gamma": GAMMAS, "lmbda": LAMBDAS, "rho_clip": st.sampled_from([1.0, INF]), "c_clip": st.just(INF),
        "leak": st.sampled_from([1.0, 0.5, 0.0]),
    }
)  # fmt: skip


def compare_vtrace(inputs: dict[str, Any], options: dict[str, Any]) -> None:
    """In float64, and in float32 from inputs rounded to it, wherever float32 can hold the terms."""
    names = {**inputs, "rho": inputs["log_rho"].exp()}
    del names["log_rho"]
    target, advantage, size = columns(vtrace_sums, names, 3, **options)
    out = vtrace(**inputs, **options)
    assert out.target.dtype == torch.float64
    assert_close(out.target, target, size, 1e-10)
    assert_close(out.advantage, advantage, advantage_size(inputs, size, options), 1e-10)

    rough = single(inputs)
    names = {**rough, "rho": rough["log_rho"].double().exp()}
    del names["log_rho"]
    target, advantage, size = columns(vtrace_sums, names, 3, **options)
    largest = advantage_size(rough, size, options)
    if max(size.max(), largest.max()) < 1e30:
        out = vtrace(**rough, **options)
        assert out.target.dtype == torch.float32
        assert_close(out.target, target, size, 1e-4)
        assert_close(out.advantage, advantage, largest, 1e-4)


def advantage_size(inputs: dict[str, Any], size: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The sum of the absolute terms of rho'' (r + g B - V), B a mixture of the target and the value behind."""
    rho = inputs["log_rho"].double().exp().numpy()
    leak = options.get("leak", 1.0)
    weight = leak * np.minimum(options.get("pg_rho_clip", 1.0), rho) + (1 - leak) * rho
    reward, value, following = (np.abs(inputs[name].double().numpy()) for name in ("reward", "value", "next_value"))
    behind = np.concatenate([size[1:], np.zeros_like(size[:1])])
    return weight * (reward + value + options["gamma"] * (following + behind))


@CASES
@given(SEEDS, LENGTHS, BATCHES, CLIPS, st.booleans(), SPREADS)
def test_vtrace_is_the_sum_of_the_paper(
    seed: int, length: int, batch: tuple[int, ...], options: dict[str, float], masked: bool, spread: float
) -> None:
    """Ends and invalid steps anywhere, ratios on both sides of every clip."""
    inputs = rollout(seed, length, *batch, spread=spread)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    compare_vtrace(inputs, options)


@CASES
@given(SEEDS, LENGTHS, BATCHES, UNCLIPPED, st.booleans(), st.sampled_from([0.5, 3.0]))
def test_importance_sampling_and_leaky_vtrace_are_the_same_sum(
    seed: int, length: int, batch: tuple[int, ...], options: dict[str, float], masked: bool, spread: float
) -> None:
    inputs = rollout(seed, length, *batch, spread=spread)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    compare_vtrace(inputs, options)


@CASES
@given(SEEDS, st.integers(1, 6), BATCHES, UNCLIPPED, st.booleans())
def test_ratios_from_1e_minus_6_to_1e6_without_a_clip(
    seed: int, length: int, batch: tuple[int, ...], options: dict[str, float], masked: bool
) -> None:
    """Short enough that float64 holds the products."""
    inputs = rollout(seed, length, *batch, spread=12.0)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    compare_vtrace(inputs, options)


@CASES
@given(SEEDS, LENGTHS, BATCHES, GAMMAS, LAMBDAS, st.booleans())
def test_lambda_returns_are_vtrace_sums_with_every_ratio_one(
    seed: int, length: int, batch: tuple[int, ...], gamma: float, lmbda: float, masked: bool
) -> None:
    inputs = rollout(seed, length, *batch)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    del inputs["log_rho"]
    ones = torch.ones_like(inputs["reward"])
    target, _, size = columns(vtrace_sums, {**inputs, "rho": ones}, 3, gamma=gamma, lmbda=lmbda)
    out = gae(**inputs, gamma=gamma, lmbda=lmbda)
    assert_close(out.target, target, size, 1e-10)
    assert_close(out.advantage, target - inputs["value"].numpy(), size, 1e-10)
    assert torch.equal(lambda_return(**inputs, gamma=gamma, lmbda=lmbda), out.target)
    rough = single(inputs)
    target, _, size = columns(vtrace_sums, {**rough, "rho": ones}, 3, gamma=gamma, lmbda=lmbda)
    found = gae(**rough, gamma=gamma, lmbda=lmbda)
    assert_close(found.target, target, size, 1e-4)
    assert_close(found.advantage, target - rough["value"].double().numpy(), size, 1e-4)


@CASES
@given(SEEDS, LENGTHS, BATCHES, GAMMAS, st.integers(1, 70), st.booleans())
def test_n_step_returns_are_their_sums(
    seed: int, length: int, batch: tuple[int, ...], gamma: float, n: int, masked: bool
) -> None:
    inputs = rollout(seed, length, *batch)
    del inputs["log_rho"], inputs["value"]
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    expected, size = columns(n_step_sums, inputs, 2, gamma=gamma, n=n)
    assert_close(n_step_return(**inputs, gamma=gamma, n=n), expected, size, 1e-10)
    rough = single(inputs)
    expected, size = columns(n_step_sums, rough, 2, gamma=gamma, n=n)
    assert_close(n_step_return(**rough, gamma=gamma, n=n), expected, size, 1e-4)


WORKED = {  # algorithm notes, T = 3, two actions, gamma 0.9: terminated, truncated, V(x'), then target and advantage
    "open": ([0, 0, 0], [0, 0, 0], [0.44, 0.5, 0.75]),
    "terminal": ([0, 1, 0], [0, 0, 0], [0.44, 0.66, 0.75]),
    "truncated": ([0, 0, 0], [0, 1, 0], [0.44, 0.66, 0.75]),
}
NONE: dict[str, float] = {"rho_clip": INF, "c_clip": INF, "pg_rho_clip": INF}
TWO: dict[str, float] = {"rho_clip": 2.0, "pg_rho_clip": 2.0}
TARGETS: list[tuple[str, dict[str, float], list[float]]] = [
    ("open", {}, [2.188450, 1.320500, 2.675000]),
    ("terminal", {}, [0.888400, -0.124000, 2.675000]),
    ("truncated", {}, [1.209160, 0.232400, 2.675000]),
    ("open", {"lmbda": 0.8}, [1.860832, 1.085600, 2.675000]),
    ("terminal", {"lmbda": 0.8}, [0.989920, -0.124000, 2.675000]),
    ("truncated", {"lmbda": 0.8}, [1.246528, 0.232400, 2.675000]),
    ("open", TWO, [2.970680, 2.025200, 3.980000]),
    ("terminal", TWO, [1.036400, -0.124000, 3.980000]),
    ("truncated", TWO, [1.357160, 0.232400, 3.980000]),
    ("open", {"c_clip": 0.5}, [1.7041375, 1.124750, 2.675000]),
    ("terminal", {"c_clip": 0.5}, [1.142200, -0.124000, 2.675000]),
    ("truncated", {"c_clip": 0.5}, [1.302580, 0.232400, 2.675000]),
    ("open", {"leak": 0.5}, [2.85695625, 1.672850, 3.327500]),
    ("terminal", {"leak": 0.5}, [0.835500, -0.124000, 3.327500]),
    ("truncated", {"leak": 0.5}, [1.236450, 0.232400, 3.327500]),
    ("open", NONE, [3.684020, 2.025200, 3.980000]),
    ("terminal", NONE, [0.782600, -0.124000, 3.980000]),
    ("truncated", NONE, [1.263740, 0.232400, 3.980000]),
]
ADVANTAGES: list[tuple[str, dict[str, float], list[float]]] = [
    ("open", {}, [1.088450, 0.880500, 2.175000]),
    ("terminal", {}, [-0.211600, -0.564000, 2.175000]),
    ("truncated", {}, [0.109160, -0.207600, 2.175000]),
    ("open", {"lmbda": 0.8}, [0.760832, 0.645600, 2.175000]),
    ("terminal", {"lmbda": 0.8}, [-0.110080, -0.564000, 2.175000]),
    ("truncated", {"lmbda": 0.8}, [0.146528, -0.207600, 2.175000]),
    ("open", {"leak": 0.5}, [1.756956, 1.232850, 2.827500]),
    ("terminal", {"leak": 0.5}, [-0.264500, -0.564000, 2.827500]),
    ("truncated", {"leak": 0.5}, [0.136450, -0.207600, 2.827500]),
    ("open", NONE, [2.584020, 1.585200, 3.480000]),
    ("terminal", NONE, [-0.317400, -0.564000, 3.480000]),
    ("truncated", NONE, [0.163740, -0.207600, 3.480000]),
]


def worked(name: str) -> dict[str, Any]:
    terminated, truncated, next_value = WORKED[name]
    ended = torch.tensor(terminated).bool()
    return {
        "reward": torch.tensor([1.0, -0.5, 2.0]).double(), "value": torch.tensor([1.1, 0.44, 0.5], dtype=torch.float64),
        "next_value": torch.tensor(next_value, dtype=torch.float64), "terminated": ended,
        "done": ended | torch.tensor(truncated).bool(), "gamma": 0.9,
    }  # fmt: skip


LOG_RHO = torch.tensor([1.5, 0.6, 1.6], dtype=torch.float64).log()


@pytest.mark.parametrize(("name", "options", "target"), TARGETS)
def test_worked_targets(name: str, options: dict[str, float], target: list[float]) -> None:
    out = vtrace(**worked(name), log_rho=LOG_RHO, **options)
    np.testing.assert_allclose(out.target.numpy(), target, atol=5.1e-7)


@pytest.mark.parametrize(("name", "options", "advantage"), ADVANTAGES)
def test_worked_advantages(name: str, options: dict[str, float], advantage: list[float]) -> None:
    out = vtrace(**worked(name), log_rho=LOG_RHO, **options)
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
    inputs = rollout(0, 30, 4)
    del inputs["log_rho"]
    out = vtrace(**inputs, log_rho=torch.zeros(30, 4).double(), gamma=0.97, lmbda=0.8)
    torch.testing.assert_close(out.target, lambda_return(**inputs, gamma=0.97, lmbda=0.8))
    torch.testing.assert_close(out.advantage, out.target - inputs["value"])


def test_target_is_value_plus_ratio_times_td_of_the_mixture() -> None:
    """v = V + rho (q - V) where both clips are 1, for every lambda."""
    inputs = rollout(1, 30, 4)
    out = vtrace(**inputs, gamma=0.97, lmbda=0.6)
    torch.testing.assert_close(out.target, inputs["value"] + out.advantage)


def test_what_lies_behind_an_end_changes_nothing_before_it() -> None:
    inputs = rollout(2, 20, 3)
    inputs["done"][9] = True
    whole = vtrace(**inputs, gamma=0.99)
    first = vtrace(**{name: tensor[:10] for name, tensor in inputs.items()}, gamma=0.99)
    second = vtrace(**{name: tensor[10:] for name, tensor in inputs.items()}, gamma=0.99)
    torch.testing.assert_close(whole.target, torch.cat([first.target, second.target]), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(whole.advantage, torch.cat([first.advantage, second.advantage]), rtol=1e-14, atol=1e-14)


def test_a_step_that_terminated_is_done_whatever_done_says() -> None:
    inputs = rollout(2, 20, 3)
    said = vtrace(**inputs, gamma=0.9)
    out = vtrace(**{**inputs, "done": inputs["done"] & ~inputs["terminated"]}, gamma=0.9)
    assert torch.equal(out.target, said.target)
    assert torch.equal(out.advantage, said.advantage)


def test_nan_that_must_not_be_read_reaches_nothing() -> None:
    inputs = rollout(3, 20, 3)
    inputs["terminated"][4] = inputs["done"][4] = True
    valid = torch.ones(20, 3, dtype=torch.bool)
    valid[11, 1] = valid[19, 0] = valid[0, 2] = False
    clean = vtrace(**inputs, gamma=0.99, valid=valid)
    bad = {name: poisoned(inputs[name], ~valid) for name in ("reward", "next_value", "log_rho")}
    bad["next_value"] = poisoned(bad["next_value"], inputs["terminated"])
    out = vtrace(**{**inputs, **bad}, gamma=0.99, valid=valid)
    assert torch.equal(out.target, clean.target)
    assert torch.equal(out.advantage, clean.advantage)
    assert torch.equal(out.target[~valid], inputs["value"][~valid])
    assert (out.advantage[~valid] == 0).all()
    del bad["log_rho"]
    for function, options in ((lambda_return, {"lmbda": 0.9}), (n_step_return, {"n": 3})):
        names = {k: v for k, v in inputs.items() if k != "log_rho" and (function is lambda_return or k != "value")}
        clean_target = function(**names, gamma=0.99, valid=valid, **options)
        got = function(**{**names, **bad}, gamma=0.99, valid=valid, **options)
        assert torch.equal(got, clean_target), function


def test_no_gradient_flows_out_of_any_argument() -> None:
    inputs = rollout(4, 5, 2)
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    outputs = [*vtrace(**inputs, gamma=gamma)]
    del inputs["log_rho"]
    outputs += [*gae(**inputs, gamma=gamma, lmbda=0.9)]
    del inputs["value"]
    outputs.append(n_step_return(**inputs, gamma=gamma, n=3))
    assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_ratios(dtype: torch.dtype, sign: int) -> None:
    """Clipped estimators do not notice; the others saturate, and are never NaN."""
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in rollout(5, 200, 3, ends=0.05).items()}
    inputs["log_rho"] = torch.full_like(inputs["value"], sign * 1e4)
    out = vtrace(**inputs, gamma=0.99)
    limit = torch.zeros_like(inputs["value"]) if sign > 0 else torch.full_like(inputs["value"], -math.inf)
    expected = vtrace(**{**inputs, "log_rho": limit}, gamma=0.99)
    torch.testing.assert_close(out.target, expected.target)
    assert torch.isfinite(out.advantage).all()
    inputs["log_rho"][::7] *= -1
    for options in (NONE, {"leak": 0.5}, {"rho_clip": INF}, {"c_clip": INF, "rho_clip": INF}):
        for part in vtrace(**inputs, gamma=0.99, **options):
            assert not part.isnan().any(), options


def test_a_tensor_of_discounts() -> None:
    inputs = rollout(6, 8, 3)
    gamma = torch.full((8, 3), 0.9, dtype=torch.float64)
    torch.testing.assert_close(vtrace(**inputs, gamma=gamma).target, vtrace(**inputs, gamma=0.9).target)
    with pytest.raises(ValueError, match=r"^gamma must broadcast to \[8, 3\], got \[2\]"):
        vtrace(**inputs, gamma=torch.ones(2))


@pytest.mark.parametrize("name", ["reward", "next_value", "log_rho", "terminated", "done", "valid"])
def test_wrong_shapes_are_named(name: str) -> None:
    inputs = rollout(7, 6, 2)
    inputs["valid"] = torch.ones(6, 2, dtype=torch.bool)
    inputs[name] = inputs[name][:, :1]
    with pytest.raises(ValueError, match=rf"^{name} must have the shape of value, \[6, 2\], got \[6, 1\]"):
        vtrace(**inputs, gamma=0.9)


def test_wrong_dtypes_are_named() -> None:
    inputs = rollout(8, 6, 2)
    with pytest.raises(TypeError, match=r"^reward must be a floating-point tensor, got torch.int64"):
        vtrace(**{**inputs, "reward": torch.ones(6, 2, dtype=torch.int64)}, gamma=0.9)
    with pytest.raises(TypeError, match=r"^done must be a bool tensor, got torch.float64"):
        vtrace(**{**inputs, "done": inputs["reward"]}, gamma=0.9)
    with pytest.raises(TypeError, match=r"^log_rho must have the dtype of value, torch.float64, got torch.float32"):
        vtrace(**{**inputs, "log_rho": inputs["log_rho"].float()}, gamma=0.9)
    with pytest.raises(ValueError, match=r"^reward must be on the device of value, cpu, got meta"):
        vtrace(**{**inputs, "reward": inputs["reward"].to("meta")}, gamma=0.9)
    with pytest.raises(TypeError, match=r"^value must be a tensor, got list"):
        vtrace(**{**inputs, "value": [1.0]}, gamma=0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^value must be \[T, \*B\] with T at least 1, got \[0\]"):
        vtrace(**{**inputs, "value": torch.zeros(0)}, gamma=0.9)
    del inputs["log_rho"], inputs["value"]
    with pytest.raises(ValueError, match=r"^n must be at least 1, and whole, got 0"):
        n_step_return(**inputs, gamma=0.9, n=0)
