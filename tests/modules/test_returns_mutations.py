"""The comparisons with the direct sums are worth something: wrong versions of the source differ from them."""

from __future__ import annotations

import inspect
import types
from typing import Any

import numpy as np
import pytest
import torch

from offtrace.modules.returns import action_values, distributional, recurrence, state_values
from tests.modules.reference import distributional_sums, n_step_sums, q_return_sums, vtrace_sums
from tests.modules.rollouts import columns, rollout

GAMMA = 0.9


def mutant(module: types.ModuleType, old: str, new: str) -> dict[str, Any]:
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    out: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), "mutant", "exec", dont_inherit=True), out)
    return out


def vtrace_error(module: dict[str, Any]) -> float:
    inputs, options = rollout(11, 20, 4), {"gamma": GAMMA, "lmbda": 0.8, "rho_clip": 2.0, "c_clip": 0.7}
    inputs["valid"] = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) > 0.1
    out = module["vtrace"](**inputs, **options)
    names = {**inputs, "rho": inputs["log_rho"].exp()}
    del names["log_rho"]
    target, advantage, _ = columns(vtrace_sums, names, 3, **options)
    return max(np.abs(out.target.numpy() - target).max(), np.abs(out.advantage.numpy() - advantage).max())


def n_step_error(module: dict[str, Any]) -> float:
    inputs = rollout(12, 20, 4)
    del inputs["log_rho"], inputs["value"]
    inputs["valid"] = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) > 0.1
    expected, _ = columns(n_step_sums, inputs, 2, gamma=GAMMA, n=4)
    return np.abs(module["n_step_return"](**inputs, gamma=GAMMA, n=4).numpy() - expected).max()


def q_error(module: dict[str, Any]) -> float:
    inputs = rollout(13, 20, 4)
    inputs["q_value"], inputs["next_state_value"] = inputs.pop("value"), inputs.pop("next_value")
    inputs["trace"] = module["retrace_trace"](log_rho=inputs["log_rho"], lmbda=0.9)
    out = module["q_return"](**{k: v for k, v in inputs.items() if k != "log_rho"}, gamma=GAMMA)
    inputs["trace"] = 0.9 * inputs.pop("log_rho").exp().clamp(max=1)
    expected, _ = columns(q_return_sums, inputs, 2, gamma=GAMMA)
    return np.abs(out.numpy() - expected).max()


def distributional_error(module: dict[str, Any]) -> float:
    inputs = rollout(15, 12, ends=0.3)
    names = {k: inputs[k] for k in ("reward", "terminated", "done")}
    assert names["terminated"][:-1].any()
    names["trace"] = inputs["log_rho"].exp().clamp(max=1)
    dists = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(5), (2, 12)))
    names["q_dist"], names["next_state_dist"] = dists[0], dists[1]
    support = torch.linspace(-2, 3, 5, dtype=torch.float64)
    out = module["distributional_return"](**names, gamma=GAMMA, support=support)
    arrays = {k: v.numpy() for k, v in names.items()}
    return np.abs(out.numpy() - distributional_sums(**arrays, gamma=GAMMA, support=support.numpy())).max()


def recurrence_error(module: dict[str, Any]) -> float:
    """Both ways, and blocks of rows, against one multiplication after another."""
    worst = 0.0
    for width, last in ((1, False), (5000, True)):
        b, a = torch.rand(2, 100, width, dtype=torch.float64).unbind()
        y = torch.rand(1, width, dtype=torch.float64) if last else torch.zeros(1, width, dtype=torch.float64)
        got = module["linear_recurrence"](b, a, y if last else None)
        for t in range(99, -1, -1):
            y = b[t : t + 1] + a[t : t + 1] * y
            worst = max(worst, float((got[t : t + 1] - y).abs().max()))
    return worst


MUTATIONS = {
    "pi and mu swapped": (vtrace_error, state_values, "rho = ratio(log_rho)", "rho = ratio(-log_rho)"),
    "no termination": (vtrace_error, state_values, "unknown = terminated | invalid", "unknown = invalid"),
    "done used for terminated": (vtrace_error, state_values, "unknown = terminated | invalid", "unknown = done"),
    "terminated used for done": (vtrace_error, state_values, "    done = done | terminated", "    done = terminated"),
    "trace with the clip of rho": (vtrace_error, state_values, "clipped[c_clip] * going", "clipped[rho_clip] * going"),
    "no ratio in the TD error": (
        vtrace_error, state_values, "clipped[rho_clip] * error", "torch.ones_like(rho) * error",
    ),
    "shifted successor": (vtrace_error, state_values, "torch.cat([mixed[1:],", "torch.cat([mixed[:-1],"),
    "the next episode's target": (
        vtrace_error, state_values, "    if valid is not None:  # an unknown step's",
        "    going = 0 * going + 0.9\n    if valid is None:  # an unknown step's",
    ),
    "mixture without lambda": (
        vtrace_error, state_values, "target if lmbda == 1 else", "target if lmbda else",
    ),
    "invalid steps count": (vtrace_error, state_values, "done = done | invalid", "pass"),
    "n steps over an end": (n_step_error, state_values, "stops = done | ", "stops = terminated | "),
    "one step too many": (n_step_error, state_values, "range(min(n, len(reward)) - 1)", "range(min(n, len(reward)))"),
    "over unknown steps": (
        n_step_error, state_values, "done | torch.cat([~valid[1:]", "done | torch.cat([~valid[1:] & False",
    ),
    "first action re-weighted": (q_error, action_values, "following * (", "traces * ("),
    "bootstrap behind the end": (q_error, action_values, "torch.where(terminated, 0, next_value)", "next_value"),
    "done used for terminated, Q": (
        q_error, action_values, "torch.where(terminated, 0, next_value)", "torch.where(done, 0, next_value)",
    ),
    "trace over a truncation": (q_error, action_values, "    done = done | terminated", "    done = terminated"),
    "Retrace with pi and mu swapped": (q_error, action_values, "log_rho.clamp(max=0)", "(-log_rho).clamp(max=0)"),
    "Retrace unclipped": (q_error, action_values, "log_rho.clamp(max=0)", "log_rho"),
    "reward at the wrong step": (distributional_error, distributional, "factor * reward[n:]", "factor * reward[:rest]"),
    "no discount of the atoms": (distributional_error, distributional, "factor = factor * per_step[n:]", "pass"),
    "taken action not removed": (
        distributional_error, distributional, "mixture = mixture - taken", "mixture = mixture - 0 * taken",
    ),
    "atoms behind a termination": (
        distributional_error, distributional, "factor * ~terminated[n:], mix", "factor, mix",
    ),
    "mixture of the first action": (
        distributional_error, distributional, "mixture[n:], first", "mixture[:rest], first",
    ),
    "into the row behind": (distributional_error, distributional, "first[:rest]))", "first[n:]))"),
    "the share of the other atom": (
        distributional_error, distributional, "upper = mass * share", "upper = mass * (1 - share)",
    ),
    "a gap too few": (distributional_error, distributional, "((last + 1) / (high - low))", "(last / (high - low))"),
    "shifted coefficient": (distributional_error, distributional, "torch.cat([c[1:], c[-1:]])", "c.clone()"),
    "scan with a wrong shift": (recurrence_error, recurrence, "shift *= 2", "shift *= 3"),
    "scan without products": (recurrence_error, recurrence, "* a[shift:rest]", "* 1"),
    "loop forgets": (recurrence_error, recurrence, "(b_t, a_t, y, out=out_t)", "(b_t, a_t, y * 0, out=out_t)"),
    "carry lost": (recurrence_error, recurrence, "if last is None else last[0]", "if True else last[0]"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    error, module, old, new = MUTATIONS[mutation]
    assert error(mutant(module, old, new)) > 1e-3


def test_the_unchanged_source_passes_the_same_comparisons() -> None:
    for error, module in {(error, module) for error, module, *_ in MUTATIONS.values()}:
        assert error(vars(module)) < 1e-10, error.__name__
