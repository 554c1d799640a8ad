"""The returns against TorchRL's V-trace and a copy of the bytes: python benchmarks/returns.py [--quick]

In one process, alternating, medians. The bound is what it takes to read every input and write every output once, as
copies of tensors of the same sizes. Input checks are part of every call.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.objectives.value.functional import vtrace_advantage_estimate

from offtrace.modules.returns import gae, q_return, retrace_trace, vtrace

LENGTHS = (20, 80, 1000, 10_000)
WIDTHS = (1, 32, 1024, 16_384)


def inputs(length: int, width: int, device: str) -> dict[str, Tensor]:
    """float32 ``[T, B]``; an end in a hundred steps."""
    torch.manual_seed(0)
    floats = {k: torch.randn(length, width, device=device) for k in ("reward", "value", "next_value")}
    terminated, truncated = (torch.rand(length, width, device=device) < 0.005 for _ in range(2))
    return {
        **floats,
        "log_rho": 0.3 * torch.randn(length, width, device=device),
        "terminated": terminated,
        "done": terminated | truncated,
    }


def calls(x: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    reward, value, following, log_rho = x["reward"], x["value"], x["next_value"], x["log_rho"]
    ends = {"terminated": x["terminated"], "done": x["done"]}
    # TorchRL's layout is [B, T, 1]; it is given in its own, contiguous
    theirs = {k: v.t().contiguous().unsqueeze(-1) for k, v in x.items()}
    zeros = torch.zeros_like(theirs["log_rho"])
    outs = [torch.empty_like(value), torch.empty_like(value)]
    sinks = [torch.empty_like(v) for v in x.values()]

    def torchrl() -> object:
        return vtrace_advantage_estimate(
            0.99, theirs["log_rho"], zeros, theirs["value"], theirs["next_value"], theirs["reward"], theirs["done"],
            theirs["terminated"],
        )  # fmt: skip

    def copy() -> None:
        # a copy reads and writes: half of the bytes of a tensor count for each direction
        for source, sink in zip(x.values(), sinks, strict=True):
            sink[: len(sink) // 2].copy_(source[: len(sink) // 2])
        for out in outs:
            out[: len(out) // 2].copy_(value[: len(out) // 2])

    return {
        "vtrace": lambda: vtrace(**x, gamma=0.99),
        "torchrl": torchrl,
        "copy": copy,
        "retrace": lambda: q_return(
            reward=reward, q_value=value, next_state_value=following, trace=retrace_trace(log_rho=log_rho), gamma=0.99,
            **ends,
        ),
        "gae": lambda: gae(reward=reward, value=value, next_value=following, gamma=0.99, lmbda=0.95, **ends),
    }  # fmt: skip


def measure(functions: dict[str, Callable[[], object]], budget: float, device: str) -> dict[str, float]:
    """Median seconds of each, called in turn until the budget in seconds is spent, at least three times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times["vtrace"]) < 3:
        for name, function in functions.items():
            if device != "cpu":
                torch.cuda.synchronize()
            before = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the small sizes")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--largest", type=int, default=200_000_000, help="leave out sizes of more elements")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU"
    print(f"{where}, {args.threads} threads, torch {torch.__version__}, float32; milliseconds, medians\n")
    print("| T | B | V-trace | TorchRL's | times faster | copy of the bytes | V-trace / copy | Retrace | GAE |")
    print("|---|---|---|---|---|---|---|---|---|")
    sizes = [(t, b) for t in LENGTHS for b in WIDTHS if t * b <= args.largest] + [(1000, 8)]
    for length, width in sorted(sizes):
        if args.quick and length * width > 100_000:
            continue
        functions = calls(inputs(length, width, args.device))
        ms = {name: 1e3 * seconds for name, seconds in measure(functions, args.budget, args.device).items()}
        print(
            f"| {length} | {width} | {ms['vtrace']:.3f} | {ms['torchrl']:.3f} | {ms['torchrl'] / ms['vtrace']:.1f} "
            f"| {ms['copy']:.3f} | {ms['vtrace'] / ms['copy']:.1f} | {ms['retrace']:.3f} | {ms['gae']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
