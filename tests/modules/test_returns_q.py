"""The operator on action values, its traces and its distributional form, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offtrace.modules.returns import (
    categorical_projection,
    distributional,
    distributional_return,
    importance_trace,
    q_lambda_trace,
    q_return,
    retrace_trace,
    tree_backup_trace,
)
from tests.modules.reference import distributional_sums, project, q_return_sums
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

CASES = settings(max_examples=300)
GAMMAS = st.sampled_from([0.0, 0.5, 0.99, 1.0])
LAMBDAS = st.sampled_from([0.0, 0.3, 0.95, 1.0])

COEFFICIENTS = {  # name: the function, and c as the papers write it, from rho and pi
    "retrace": (lambda rho, pi, lmbda: retrace_trace(log_rho=rho, lmbda=lmbda), lambda rho, pi, la: la * min(1, rho)),
    "retrace, ACER's root": (
        lambda rho, pi, lmbda: retrace_trace(log_rho=rho, lmbda=lmbda, action_dim=6),
        lambda rho, pi, la: la * min(1, rho ** (1 / 6)),
    ),
    "importance sampling": (lambda rho, pi, la: importance_trace(log_rho=rho, lmbda=la), lambda rho, pi, la: la * rho),
    "Q(lambda)": (lambda rho, pi, lmbda: q_lambda_trace(log_rho=rho, lmbda=lmbda), lambda rho, pi, la: la),
    "tree backup": (lambda rho, pi, lmbda: tree_backup_trace(log_pi=pi, lmbda=lmbda), lambda rho, pi, la: la * pi),
}


def q_rollout(seed: int, length: int, *batch: int, spread: float = 1.0) -> dict[str, Tensor]:
    inputs = rollout(seed, length, *batch, spread=spread)
    inputs["q_value"] = inputs.pop("value")
    inputs["next_state_value"] = inputs.pop("next_value")
    inputs["log_pi"] = torch.tensor(np.log(np.random.default_rng(seed + 2).uniform(1e-6, 1, inputs["reward"].shape)))
    return inputs


def compare(inputs: dict[str, Any], trace: Tensor, exact: Any, tolerance: float, options: dict[str, float]) -> None:
    numbers = {**inputs, "trace": torch.as_tensor(exact)}
    expected, size = columns(q_return_sums, numbers, 2, **options)
    if size.max() < (1e30 if tolerance > 1e-6 else 1e290):
        out = q_return(**inputs, trace=trace, **options)
        assert out.dtype == inputs["q_value"].dtype
        assert_close(out, expected, size, tolerance)


@pytest.mark.parametrize("name", COEFFICIENTS)
@CASES
@given(
    seed=SEEDS, length=LENGTHS, batch=BATCHES, gamma=GAMMAS, lmbda=LAMBDAS, masked=st.booleans(),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
)  # fmt: skip
def test_every_estimator_is_its_sum(
    name: str, seed: int, length: int, batch: tuple[int, ...], gamma: float, lmbda: float, masked: bool, spread: float
) -> None:
    """Ends and invalid steps anywhere; ratios from 1e-6 to 1e6."""
    inputs = q_rollout(seed, length, *batch, spread=spread)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    trace, formula = COEFFICIENTS[name]
    for precision, tolerance in ((inputs, 1e-10), (single(inputs), 1e-4)):
        given_inputs = dict(precision)
        log_rho, log_pi = given_inputs.pop("log_rho"), given_inputs.pop("log_pi")
        rho, pi = log_rho.double().exp().numpy(), log_pi.double().exp().numpy()
        exact = np.vectorize(lambda r, p: float(formula(r, p, lmbda)), otypes=[float])(rho, pi)
        compare(given_inputs, trace(log_rho, log_pi, lmbda), exact, tolerance, {"gamma": gamma})


def test_a_number_is_a_constant_trace() -> None:
    inputs = q_rollout(0, 30, 4)
    log_rho, _ = inputs.pop("log_rho"), inputs.pop("log_pi")
    inputs["valid"] = validity(0, log_rho.shape)
    for number in (0.0, 0.7, 1.0, 1.3):
        out = q_return(**inputs, trace=number, gamma=0.9)
        same = q_return(**inputs, trace=q_lambda_trace(log_rho=log_rho, lmbda=number), gamma=0.9)
        torch.testing.assert_close(out, same, rtol=1e-13, atol=1e-13)


ENDS = {  # terminated, truncated, E_pi Q(x'_t, .)
    "open": ([0, 0, 0], [0, 0, 0], [0.44, 0.5, 0.75]),
    "terminal": ([0, 1, 0], [0, 0, 0], [0.44, 0.66, 0.75]),
    "truncated": ([0, 0, 0], [0, 1, 0], [0.44, 0.66, 0.75]),
}
RHO = torch.tensor([1.5, 0.6, 1.6], dtype=torch.float64)
PI = torch.tensor([0.6, 0.3, 0.8], dtype=torch.float64)
WORKED: list[tuple[str, Tensor | float, dict[str, list[float]]]] = [
    (
        "IS",
        importance_trace(log_rho=RHO.log()),
        {
            "open": [2.364760, 2.794000, 2.675000],
            "terminal": [0.586000, -0.500000, 2.675000],
            "truncated": [0.906760, 0.094000, 2.675000],
        },
    ),
    (
        "Q(1)",
        1.0,
        {
            "open": [2.050750, 1.727500, 2.675000],
            "terminal": [0.046000, -0.500000, 2.675000],
            "truncated": [0.580600, 0.094000, 2.675000],
        },
    ),
    (
        "Q(0.8)",
        0.8,
        {
            "open": [1.663840, 1.372000, 2.675000],
            "terminal": [0.316000, -0.500000, 2.675000],
            "truncated": [0.743680, 0.094000, 2.675000],
        },
    ),
    (
        "TB(1)",
        tree_backup_trace(log_pi=PI.log()),
        {
            "open": [1.496440, 1.372000, 2.675000],
            "terminal": [0.991000, -0.500000, 2.675000],
            "truncated": [1.151380, 0.094000, 2.675000],
        },
    ),
    (
        "TB(0.8)",
        tree_backup_trace(log_pi=PI.log(), lmbda=0.8),
        {
            "open": [1.4149216, 1.087600, 2.675000],
            "terminal": [1.072000, -0.500000, 2.675000],
            "truncated": [1.200304, 0.094000, 2.675000],
        },
    ),
    (
        "Retrace(1)",
        retrace_trace(log_rho=RHO.log()),
        {
            "open": [1.788850, 1.727500, 2.675000],
            "terminal": [0.586000, -0.500000, 2.675000],
            "truncated": [0.906760, 0.094000, 2.675000],
        },
    ),
    (
        "Retrace(0.8)",
        retrace_trace(log_rho=RHO.log(), lmbda=0.8),
        {
            "open": [1.556704, 1.372000, 2.675000],
            "terminal": [0.748000, -0.500000, 2.675000],
            "truncated": [1.004608, 0.094000, 2.675000],
        },
    ),
]


def worked(name: str) -> dict[str, Any]:
    terminated, truncated, following = ENDS[name]
    ended = torch.tensor(terminated).bool()
    return {
        "reward": torch.tensor([1.0, -0.5, 2.0]).double(),
        "q_value": torch.tensor([1.5, 1.0, 0.7], dtype=torch.float64),
        "next_state_value": torch.tensor(following, dtype=torch.float64), "terminated": ended,
        "done": ended | torch.tensor(truncated).bool(), "gamma": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(("estimator", "trace", "expected"), WORKED, ids=[row[0] for row in WORKED])
def test_worked_numbers(estimator: str, trace: Tensor | float, expected: dict[str, list[float]], name: str) -> None:
    out = q_return(**worked(name), trace=trace)
    np.testing.assert_allclose(out.numpy(), expected[name], atol=5.1e-7, err_msg=estimator)


def test_trace_zero_is_one_step_learning() -> None:
    inputs = q_rollout(1, 20, 3)
    del inputs["log_rho"], inputs["log_pi"]
    one = inputs["reward"] + 0.9 * inputs["next_state_value"] * ~inputs["terminated"]
    torch.testing.assert_close(q_return(**inputs, trace=0.0, gamma=0.9), one)


def test_nan_that_must_not_be_read_reaches_nothing() -> None:
    """Behind a termination, at invalid steps, and the trace of the first action of every episode."""
    inputs = q_rollout(3, 20, 3)
    del inputs["log_pi"]
    trace = retrace_trace(log_rho=inputs.pop("log_rho"))
    valid = torch.ones(20, 3, dtype=torch.bool)
    valid[11, 1] = valid[19, 0] = valid[0, 2] = False
    clean = q_return(**inputs, trace=trace, gamma=0.99, valid=valid)
    bad = {name: poisoned(inputs[name], ~valid) for name in ("reward", "next_state_value")}
    bad["next_state_value"] = poisoned(bad["next_state_value"], inputs["terminated"])
    first = torch.cat([torch.ones(1, 3, dtype=torch.bool), inputs["done"][:-1]])
    out = q_return(**{**inputs, **bad}, trace=poisoned(trace, ~valid | first), gamma=0.99, valid=valid)
    assert torch.equal(out, clean)
    assert torch.equal(out[~valid], inputs["q_value"][~valid])


def test_what_lies_behind_an_end_changes_nothing_before_it() -> None:
    inputs = q_rollout(2, 20, 3)
    del inputs["log_pi"]
    inputs["trace"] = retrace_trace(log_rho=inputs.pop("log_rho"))
    inputs["done"][9] = True
    whole = q_return(**inputs, gamma=0.99)
    parts = [q_return(**{k: v[rows] for k, v in inputs.items()}, gamma=0.99) for rows in (slice(0, 10), slice(10, 20))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-14, atol=1e-14)


def test_no_gradient_flows_out_of_any_argument() -> None:
    inputs = q_rollout(4, 6, 2)
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    log_rho, log_pi = inputs.pop("log_rho"), inputs.pop("log_pi")
    traces = [trace(log_rho, log_pi, 0.9) for trace, _ in COEFFICIENTS.values()]
    assert not any(trace.requires_grad for trace in traces)
    trace = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert not q_return(**inputs, trace=trace, gamma=0.9).requires_grad
    dist = torch.rand(6, 2, 5, dtype=torch.float64, requires_grad=True)
    del inputs["q_value"], inputs["next_state_value"]
    support = torch.linspace(-1, 1, 5, dtype=torch.float64)
    out = distributional_return(
        **inputs, q_dist=dist, next_state_dist=dist, trace=trace, gamma=0.9, support=support.requires_grad_()
    )
    assert not out.requires_grad
    assert not categorical_projection(atoms=dist, probs=dist, support=support).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_ratios(dtype: torch.dtype) -> None:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in q_rollout(5, 200, 3).items()}
    inputs["done"][::13] = False
    inputs["log_rho"] = torch.full_like(inputs["q_value"], 1e4)
    inputs["log_rho"][::7] *= -1
    log_rho, log_pi = inputs.pop("log_rho"), inputs.pop("log_pi")
    for name, (trace, _) in COEFFICIENTS.items():
        out = q_return(**inputs, trace=trace(log_rho, log_pi, 1.0), gamma=0.99)
        assert not out.isnan().any(), name
        if name != "importance sampling":
            assert torch.isfinite(out).all(), name
    one = q_return(**inputs, trace=retrace_trace(log_rho=log_rho), gamma=0.99)
    same = q_return(**inputs, trace=(log_rho > 0).to(dtype), gamma=0.99)
    torch.testing.assert_close(one, same)


def distributions(seed: int, length: int, atoms: int, *batch: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed + 3)
    inputs = q_rollout(seed, length, *batch)
    names = {k: inputs[k] for k in ("reward", "terminated", "done")}
    names["trace"] = retrace_trace(log_rho=inputs["log_rho"], lmbda=0.9)
    for name in ("q_dist", "next_state_dist"):
        names[name] = torch.tensor(rng.dirichlet(np.ones(atoms), (length, *batch)))
    return names


def direct_distribution(inputs: dict[str, Tensor], gamma: float, support: Tensor) -> np.ndarray:
    out = np.zeros(inputs["q_dist"].shape)
    arrays = {k: (v.double() if v.is_floating_point() else v).numpy() for k, v in inputs.items()}
    for index in np.ndindex(*inputs["reward"].shape[1:]):
        here = (slice(None), *index)
        part = {k: a[here] for k, a in arrays.items()}
        out[here] = distributional_sums(**part, gamma=gamma, support=support.double().numpy())
    return out


@CASES
@given(SEEDS, st.integers(1, 12), st.sampled_from([(), (2,)]), GAMMAS, st.integers(2, 7), st.booleans())
def test_the_distributional_return_is_the_mixture(
    seed: int, length: int, batch: tuple[int, ...], gamma: float, atoms: int, masked: bool
) -> None:
    inputs = distributions(seed, length, atoms, *batch)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    support = torch.linspace(-2, 3, atoms, dtype=torch.float64)
    out = distributional_return(**inputs, gamma=gamma, support=support)
    np.testing.assert_allclose(out.numpy(), direct_distribution(inputs, gamma, support), atol=1e-10)
    np.testing.assert_allclose(out.sum(-1).numpy(), 1, atol=1e-10)
    rough = distributional_return(**single(inputs), gamma=gamma, support=support.float())
    np.testing.assert_allclose(rough.numpy(), direct_distribution(single(inputs), gamma, support), atol=1e-4)


@settings(max_examples=100)
@given(SEEDS, st.integers(13, 64), GAMMAS, st.booleans(), st.booleans())
def test_the_distributional_return_over_long_rollouts(
    seed: int, length: int, gamma: float, masked: bool, ending: bool
) -> None:
    inputs = distributions(seed, length, 5)
    if masked:
        inputs["valid"] = validity(seed, inputs["reward"].shape)
    if not ending:
        inputs["done"] = inputs["terminated"] = torch.zeros_like(inputs["done"])
    support = torch.linspace(-2, 3, 5, dtype=torch.float64)
    out = distributional_return(**inputs, gamma=gamma, support=support)
    np.testing.assert_allclose(out.numpy(), direct_distribution(inputs, gamma, support), atol=1e-10)


@pytest.mark.parametrize("block", [1, 500, 2**15])
@pytest.mark.parametrize("grid", ["even", "uneven", "nearly even", "far from 0"])
def test_the_distributional_return_on_any_grid_in_blocks_of_any_size(
    grid: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An even grid is divided, any other one searched; blocks bound the memory and change nothing."""
    monkeypatch.setattr(distributional, "BLOCK", block)
    support = torch.linspace(-3, 3, 9, dtype=torch.float64)
    if grid == "uneven":
        support = torch.tensor([-3.0, -2.5, -0.1, 0.0, 0.02, 0.9, 1.0, 2.8, 3.0]).double()
    if grid == "nearly even":
        support[4] += 1e-6
    if grid == "far from 0":
        support = support + 1000
    assert (distributional._Grid(support)._even is None) == (grid in ("uneven", "nearly even"))
    for seed in range(5):
        inputs = distributions(seed, 14, 9, 3)
        inputs["valid"] = validity(seed, inputs["reward"].shape)
        if grid == "far from 0":
            inputs["reward"] += 50
        out = distributional_return(**inputs, gamma=0.95, support=support)
        np.testing.assert_allclose(out.numpy(), direct_distribution(inputs, 0.95, support), atol=1e-10)


def test_the_distributional_return_of_several_grids_by_vmap() -> None:
    inputs, grids = distributions(1, 6, 5), torch.linspace(-2, 2, 5).double() * torch.tensor([[0.5], [1.0]])
    found = torch.vmap(lambda grid: distributional_return(**inputs, gamma=0.9, support=grid))(grids)
    for one, grid in zip(found, grids, strict=True):
        torch.testing.assert_close(one, distributional_return(**inputs, gamma=0.9, support=grid))


def test_a_reward_that_is_no_number_stays_in_its_own_episode() -> None:
    """On an even grid too, where a place that is no number has no atom below it."""
    inputs = distributions(9, 12, 5, 2)
    inputs["terminated"][5] = inputs["done"][5] = True
    support = torch.linspace(-2, 2, 5, dtype=torch.float64)
    clean = distributional_return(**inputs, gamma=0.9, support=support)
    inputs["reward"][3, 0] = math.nan
    out = distributional_return(**inputs, gamma=0.9, support=support)
    assert out[3, 0].isnan().any()
    assert torch.equal(out[:, 1], clean[:, 1])
    assert torch.equal(out[4:, 0], clean[4:, 0])


@pytest.mark.parametrize("trace", ["tensor", "number"])
def test_its_mean_is_the_scalar_return_where_the_support_is_wide(trace: str) -> None:
    inputs = distributions(8, 12, 201, 3)
    if trace == "number":
        inputs["trace"] = 0.7  # type: ignore[assignment]
    support = torch.linspace(-60, 60, 201, dtype=torch.float64)
    narrow = (support.abs() < 3).double()
    for name in ("q_dist", "next_state_dist"):
        mass = inputs[name] * narrow
        inputs[name] = mass / mass.sum(-1, keepdim=True)
    out = distributional_return(**inputs, gamma=0.95, support=support)
    q_dist, following = inputs.pop("q_dist"), inputs.pop("next_state_dist")
    means = {"q_value": q_dist @ support, "next_state_value": following @ support}
    torch.testing.assert_close(out @ support, q_return(**inputs, **means, gamma=0.95))


def test_worked_distributional_numbers() -> None:
    """Nine atoms on [-4, 4]: the means of Retrace(1), and a target with a negative probability."""
    support = torch.linspace(-4, 4, 9, dtype=torch.float64)

    def at(*places: float) -> Tensor:
        return torch.stack([torch.tensor(project(p, 1.0, support.numpy())) for p in places])

    for name, mean in (("open", 1.788850), ("terminal", 0.586000), ("truncated", 0.906760)):
        inputs = worked(name)
        # each Q(x, a) sits on its two neighbouring atoms, and mixtures by pi at the successors
        q = [[0.5, 1.5], [1.0, 0.2], [-0.3, 0.7], [0.4, 1.1]]
        pi = [[0.4, 0.6], [0.3, 0.7], [0.2, 0.8], [0.5, 0.5]]
        behind = [(q[1], pi[1]), (q[2], pi[2]) if name == "open" else ([0.9, 0.3], [0.6, 0.4]), (q[3], pi[3])]
        following = torch.stack([sum(p * at(value)[0] for value, p in zip(*pair, strict=True)) for pair in behind])
        chosen = at(*inputs.pop("q_value").tolist())
        del inputs["next_state_value"]
        out = distributional_return(
            **inputs, q_dist=chosen, next_state_dist=following, trace=retrace_trace(log_rho=RHO.log()), support=support
        )
        assert float(out[0] @ support) == pytest.approx(mean, abs=5e-7)
        if name == "terminal":
            expected = [0, 0, 0, 0, 0.27, 0.874, -0.144, 0, 0]
            np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-12)


def test_unreadable_distributions_reach_nothing() -> None:
    inputs = distributions(9, 12, 5, 2)
    inputs["valid"] = validity(9, inputs["reward"].shape)
    inputs["terminated"][3] = inputs["done"][3] = True
    support = torch.linspace(-2, 2, 5, dtype=torch.float64)
    clean = distributional_return(**inputs, gamma=0.9, support=support)
    unread = inputs["terminated"] | ~inputs["valid"]
    inputs["next_state_dist"] = poisoned(inputs["next_state_dist"], unread.unsqueeze(-1))
    inputs["reward"] = poisoned(inputs["reward"], ~inputs["valid"])
    first = torch.cat([torch.ones(1, 2, dtype=torch.bool), inputs["done"][:-1]])
    inputs["trace"] = poisoned(inputs["trace"], first | ~inputs["valid"])
    assert torch.equal(distributional_return(**inputs, gamma=0.9, support=support), clean)


@settings(max_examples=200)
@given(SEEDS, st.integers(2, 8), st.booleans())
def test_the_projection_keeps_mass_and_mean(seed: int, count: int, uneven: bool) -> None:
    rng = np.random.default_rng(seed)
    support = np.sort(rng.normal(size=count)) if uneven else np.linspace(-1, 2, count)
    places, mass = rng.uniform(support[0], support[-1], (3, 6)), rng.normal(size=(3, 6))
    places[0, 0], places[0, 1] = support[0] - 5, support[-1] + 5
    out = categorical_projection(
        atoms=torch.tensor(places), probs=torch.tensor(mass), support=torch.tensor(support)
    ).numpy()
    expected = np.stack(
        [sum(project(p, m, support) for p, m in zip(*row, strict=True)) for row in zip(places, mass, strict=True)]
    )
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(out.sum(-1), mass.sum(-1), atol=1e-12)
    np.testing.assert_allclose(out[1:] @ support, (mass * places).sum(-1)[1:], atol=1e-10)


def test_bad_input_is_named() -> None:
    inputs = q_rollout(7, 6, 2)
    del inputs["log_pi"]
    trace = retrace_trace(log_rho=inputs.pop("log_rho"))
    with pytest.raises(ValueError, match=r"^trace must have the shape of q_value, \[6, 2\], got \[6\]"):
        q_return(**inputs, trace=trace[:, 0], gamma=0.9)
    with pytest.raises(TypeError, match=r"^reward must be a floating-point tensor, got torch.int32"):
        q_return(**{**inputs, "reward": inputs["reward"].int()}, trace=trace, gamma=0.9)
    with pytest.raises(TypeError, match=r"^terminated must be a bool tensor, got torch.float64"):
        q_return(**{**inputs, "terminated": inputs["reward"]}, trace=trace, gamma=0.9)
    with pytest.raises(ValueError, match=r"^trace must be on the device of q_value, cpu, got meta"):
        q_return(**inputs, trace=trace.to("meta"), gamma=0.9)
    with pytest.raises(ValueError, match=r"^action_dim must be at least 1, got 0"):
        retrace_trace(log_rho=trace, action_dim=0)
    support, dist = torch.linspace(0, 1, 5).double(), torch.rand(6, 2, 4).double()
    del inputs["q_value"], inputs["next_state_value"]
    with pytest.raises(ValueError, match=r"^q_dist must be \[T, \*B, K\], \[6, 2, 5\], got \[6, 2, 4\]"):
        distributional_return(**inputs, q_dist=dist, next_state_dist=dist, trace=trace, gamma=0.9, support=support)
    with pytest.raises(ValueError, match=r"^support must be \[K\] with K at least 2, got \[1\]"):
        categorical_projection(atoms=dist, probs=dist, support=support[:1])
    with pytest.raises(ValueError, match=r"^probs must have the shape of atoms, \[6, 2, 4\], got \[6, 2, 3\]"):
        categorical_projection(atoms=dist, probs=dist[..., :3], support=support)
    assert math.isfinite(float(trace.sum()))
