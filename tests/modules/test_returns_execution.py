"""The same answers however they are computed: loop, scan, blocks, compiled, under vmap, in half precision, on CUDA."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offtrace.modules import returns
from offtrace.modules.returns import recurrence
from tests.modules.rollouts import rollout, validity

INF = float("inf")
Outputs = tuple[Tensor, ...]


def as_tuple(out: Any) -> Outputs:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def vtrace(x: dict[str, Tensor]) -> Outputs:
    return as_tuple(returns.vtrace(**x, gamma=0.99, lmbda=0.9))


def plain(x: dict[str, Tensor]) -> Outputs:
    return as_tuple(returns.vtrace(**x, gamma=0.99, rho_clip=INF, c_clip=INF, pg_rho_clip=INF))


def retrace(x: dict[str, Tensor]) -> Outputs:
    x = dict(x)
    trace = returns.retrace_trace(log_rho=x.pop("log_rho"), lmbda=0.95)
    q_value, following = x.pop("value"), x.pop("next_value")
    return as_tuple(returns.q_return(**x, q_value=q_value, next_state_value=following, trace=trace, gamma=0.99))


def gae(x: dict[str, Tensor]) -> Outputs:
    return as_tuple(returns.gae(**{k: v for k, v in x.items() if k != "log_rho"}, gamma=0.99, lmbda=0.95))


def n_step(x: dict[str, Tensor]) -> Outputs:
    return as_tuple(
        returns.n_step_return(**{k: v for k, v in x.items() if k not in ("log_rho", "value")}, gamma=0.99, n=3)
    )


def distributional(x: dict[str, Tensor]) -> Outputs:
    support = torch.linspace(-3, 3, 7, dtype=x["value"].dtype, device=x["value"].device)
    dist = (-(x["value"].unsqueeze(-1) - support).square()).softmax(-1)
    trace = returns.retrace_trace(log_rho=x["log_rho"])
    ends = {k: x[k] for k in ("reward", "terminated", "done", "valid")}
    return as_tuple(
        returns.distributional_return(
            **ends, q_dist=dist, next_state_dist=dist, trace=trace, gamma=0.99, support=support
        )
    )


FUNCTIONS: list[Callable[[dict[str, Tensor]], Outputs]] = [vtrace, plain, retrace, gae, n_step, distributional]
each = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def inputs(length: int, *batch: int, seed: int = 0) -> dict[str, Tensor]:
    x = rollout(seed, length, *batch)
    return {**x, "valid": validity(seed, x["reward"].shape)}


@each
@pytest.mark.parametrize("rows", [1, 2, 7, 19, 20])
def test_blocks_change_nothing(function: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is carried from a block of rows to the one before it: targets, traces, values."""
    x = inputs(20, 3)
    whole = function(x)
    monkeypatch.setattr(recurrence, "BLOCK", 3 * rows)
    for a, b in zip(function(x), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (pointer := x.untyped_storage().data_ptr()) not in old | self._seen:
                size = x.untyped_storage().nbytes()
                self._seen.add(pointer)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self._free, pointer, size)
        return out

    def _free(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.now -= size


@each
def test_memory_is_a_constant_number_of_input_sized_buffers(function: Any) -> None:
    """Whatever T: in blocks hardly more than the results themselves."""

    def buffers(length: int, width: int) -> float:
        x = {k: v.float() if v.is_floating_point() else v for k, v in inputs(length, width).items()}
        with Peak() as peak:
            function(x)
        return peak.most / x["reward"].nbytes

    sizes = ((64, 16), (256, 16)) if function is distributional else ((2048, 256), (8192, 256))
    few, many = (buffers(*size) for size in sizes)
    assert many <= 1.1 * few
    # blocks of 2^17 elements are a sixteenth of the larger size; of a distribution one buffer is 7 atoms wide
    limit = {distributional: 20 * 7, n_step: 7}.get(function, 4)
    assert 1 <= many <= limit


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 64, 100])
def test_scan_and_loop_agree(length: int, bounded: bool) -> None:
    b, a = torch.randn(2, length, 6, dtype=torch.float64).unbind()
    last = torch.randn(1, 6, dtype=torch.float64)
    for y in (None, last):
        loop, scan = recurrence._loop(b, a, y, bounded), recurrence._scan(b, a, y, bounded)
        torch.testing.assert_close(loop, scan, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "function",
    [vtrace, *(pytest.param(f, marks=pytest.mark.slow) for f in FUNCTIONS if f is not vtrace)],
    ids=lambda f: f.__name__,
)
def test_compiled_equals_eager(function: Any) -> None:
    """One graph, no break; the traced program itself, without a compiler of C++."""
    x = inputs(20, 3)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), function(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each
def test_vmap_equals_a_batch_dimension(function: Any) -> None:
    x = inputs(20, 3)
    out = torch.vmap(function, in_dims=1, out_dims=1)(x)
    for a, b in zip(out, function(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each
def test_half_precision_is_computed_in_float32(function: Any) -> None:
    """bf16 keeps 8 bits: the result is the float32 one on the same rounded inputs, rounded once (relative 2^-8)."""
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(20, 3).items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    if function is retrace:  # the trace itself is rounded to bf16 before it enters
        trace = returns.retrace_trace(log_rho=x["log_rho"], lmbda=0.95)
        q = {"q_value": wide["value"], "next_state_value": wide["next_value"], "trace": trace.float()}
        rest = {k: wide[k] for k in ("reward", "terminated", "done", "valid")}
        expected: Outputs = (returns.q_return(**q, **rest, gamma=0.99),)
    else:
        expected = function(wide)
    for a, b in zip(function(x), expected, strict=True):
        assert a.dtype == torch.bfloat16
        # the trace of distributional is rounded to bf16 before it enters
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=5e-3 if function is distributional else 1e-3)


@each
def test_strided_inputs(function: Any) -> None:
    """[B, T] in memory, seen as [T, B]: what the losses pass."""
    x = inputs(20, 3)
    turned = {k: v.t().contiguous().t() for k, v in x.items()}
    for a, b in zip(function(turned), function(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.cuda
@each
@pytest.mark.parametrize("shape", [(20, 32), (100, 2048)])
def test_cuda_equals_cpu(function: Any, shape: tuple[int, int]) -> None:
    if function is distributional:
        shape = (8, 4)
    x = inputs(*shape)
    out = function({k: v.cuda() for k, v in x.items()})
    for a, b in zip(out, function(x), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
