"""Run by test_returns_fused.py: the GPU kernels in Triton's interpreter, or compiled for an absent GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offtrace.modules.returns import fused, gae, q_return, vtrace


def both(function: Callable[..., Any], **arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results by the kernel and by the plain path."""
    usable, calls = fused.usable, []
    launch = fused._launch
    fused._launch = lambda *a, **k: (calls.append(a), launch(*a, **k))[1]
    out = function(**arguments)
    fused._launch, fused.usable = launch, lambda *tensors: False
    plain = function(**arguments)
    fused.usable = usable
    assert calls, "the kernel was not used"
    return ([out], [plain]) if isinstance(out, Tensor) else (list(out), list(plain))


def agree(function: Callable[..., Any], **arguments: Any) -> None:
    """The kernel's results are those of the plain path, to the precision of the inputs."""
    tolerance = 1e-12 if arguments["reward"].dtype is torch.float64 else 2e-5
    for got, want in zip(*both(function, **arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def numbers_of_one_element() -> None:
    """Triton's interpreter takes ``int`` of an array of one number for a loop's bound, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


def interpret() -> None:
    """Tiles of four rows and columns, so that nine rows and five columns leave rests in both directions."""
    numbers_of_one_element()
    fused.ROWS = fused.COLUMNS = 4
    torch.manual_seed(0)
    inf = math.inf
    for dtype in (torch.float64, torch.float32):
        for shape in ((1, 1), (9, 5), (5, 2, 3)):
            for with_valid in (False, True):
                r = [torch.randn(shape, dtype=dtype) for _ in range(4)]
                terminated = torch.rand(shape) < 0.1
                done = terminated | (torch.rand(shape) < 0.1)
                valid = torch.rand(shape) > 0.1 if with_valid else None
                common = {"terminated": terminated, "done": done, "gamma": 0.97, "valid": valid}
                reward, value, next_value, log_rho = r
                trace = log_rho.exp()
                next_value[terminated] = math.nan
                if valid is not None:
                    for x in (reward, next_value, log_rho, trace):
                        x[~valid] = math.nan
                rows = {"reward": reward, "value": value, "next_value": next_value, **common}
                for options in (
                    {}, {"lmbda": 0.9}, {"leak": 0.7}, {"rho_clip": 2.0, "c_clip": 1.5, "pg_rho_clip": 1.2},
                    {"rho_clip": inf, "c_clip": inf, "pg_rho_clip": inf},
                ):  # fmt: skip
                    agree(vtrace, **rows, log_rho=log_rho, **options)
                agree(gae, **rows, lmbda=0.9)
                rows = {"reward": reward, "q_value": value, "next_state_value": next_value, **common}
                for number in (0.9, trace, trace.clamp(max=1)):
                    agree(q_return, **rows, trace=number)
    # far beyond the range of exp and of products
    log_rho = torch.full((6, 2), 1e4)
    rows = {name: torch.ones(6, 2) for name in ("reward", "value", "next_value")}
    ends = {name: torch.zeros(6, 2, dtype=torch.bool) for name in ("terminated", "done")}
    for clip in (1.0, inf):
        (target, advantage), plain = both(
            vtrace, **rows, **ends, log_rho=log_rho, gamma=0.99, rho_clip=clip, c_clip=clip, pg_rho_clip=clip
        )
        assert bool(target.isfinite().all() and advantage.isfinite().all())
        torch.testing.assert_close(target, plain[0], rtol=1e-5, atol=0)


def compile_for_gpu() -> None:
    """To machine code of compute capability 9.0, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    ends = ("terminated_ptr", "done_ptr", "valid_ptr")
    clips = {"RHO_CLIP": 1.0, "C_CLIP": 1.0, "PG_RHO_CLIP": 1.0, "LEAK": 1.0}
    wild = {"RHO_CLIP": math.inf, "C_CLIP": 2.0, "PG_RHO_CLIP": math.inf, "LEAK": 0.5}
    for dtype, double in (("fp32", False), ("fp64", True), ("bf16", False)):
        limit = torch.finfo(torch.float64 if double else torch.float32).max
        common = {"GAMMA": 0.99, "LIMIT": limit, "R": fused.ROWS, "C": fused.COLUMNS, "DOUBLE": double}
        vtrace_of = {**common, "LMBDA": 0.9, "LOG_MAX": 88.0}
        for valid in (False, True):
            cases = [
                (fused.kernels.vtrace_kernel, {**vtrace_of, **clips, "BOUNDED": True, "SATURATE": False}),
                (fused.kernels.vtrace_kernel, {**vtrace_of, **wild, "BOUNDED": False, "SATURATE": True}),
                (fused.kernels.q_kernel, {**common, "TRACE": None, "BOUNDED": False}),
                (fused.kernels.q_kernel, {**common, "TRACE": 0.9, "BOUNDED": True}),
            ]
            for kernel, constants in cases:
                constants = {**constants, "HAS_VALID": valid}
                kinds = {
                    name: "constexpr" if name in constants else "*i1" if name in ends
                    else f"*{dtype}" if name.endswith("_ptr") else "i32"
                    for name in kernel.arg_names
                }  # fmt: skip
                places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
                source = ASTSource(fn=kernel, signature=kinds, constexprs=places)
                assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpu}[sys.argv[1]]()
