"""The shipped IMPALA recipe against a bare loop, alternating, each in a process of its own.

    python benchmarks/impala_throughput.py                    the ratio on Pong at the defaults
    python benchmarks/impala_throughput.py --preset paper     the same at the published sizes
    python benchmarks/impala_throughput.py --scaling          agent steps/s against environments and actor processes

Both do the same learning work per frame (benchmarks/bare_impala.py says what is left out). The recipe's figure is the
median of its own meter's entries after the first, which is frames over wall time with everything running: actors,
learner, weight pushes, logs. Peak memory is the sum over the recipe's process tree, sampled twice a second, each page
shared between processes counted in proportion (PSS).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """Processor, cores, memory."""
    model = platform.processor() or "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def tree_memory(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def bare(frames: int, precision: str, sizes: dict[str, int], threads: int) -> float:
    """Agent steps per second of the bare loop."""
    command = [
        sys.executable, str(ROOT / "benchmarks" / "bare_impala.py"), "--frames", str(frames), "--precision", precision,
        "--threads", str(threads),
    ]  # fmt: skip
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def recipe(frames: int, flags: list[str]) -> dict[str, float]:
    """Agent steps per second, peak memory in GB and seconds to the first update of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "recipes" / "impala_atari.py"), "--train.name", "bench",
            "--train.total_frames", str(frames), "--train.eval_every", "1000000000", "--train.log_every", "3",
            "--train.eval_episodes", "1", "--train.checkpoint_every", "1000000000", "--train.final_eval", "false",
            *flags,
        ]  # fmt: skip
        start = time.perf_counter()
        with open(Path(folder) / "out.txt", "w") as out:
            process = psutil.Popen(command, cwd=folder, stdout=out, stderr=out)
            peak = 0
            while process.poll() is None:
                peak = max(peak, tree_memory(process))
                time.sleep(0.5)
        run = Path(folder) / "runs" / "bench"
        if process.returncode or not (run / "summary.json").exists():
            raise SystemExit((Path(folder) / "out.txt").read_text())
        summary = json.loads((run / "summary.json").read_text())
        with open(run / "metrics.csv") as file:
            rows = [
                row["train/frames_per_second"] for row in csv.DictReader(file) if row.get("train/frames_per_second")
            ]
        speeds = [float(value) / 4 for value in rows]
        return {
            "steps": statistics.median(speeds[1:] or speeds),
            "memory": peak / 1e9,
            "first": summary["first_update_at"] - (time.time() - (time.perf_counter() - start)),
        }


def compare(args: argparse.Namespace, flags: list[str]) -> None:
    """Alternates the two and prints medians and the ratio pair by pair."""
    from offtrace.agents.impala import atari_config, paper_config
    from offtrace.agents.runs.training import precision

    config = paper_config() if args.preset == "paper" else atari_config()
    sizes = {
        "envs": config.env.num_envs,
        "unroll": config.collector.unroll,
        "minibatches": config.train.minibatches,
        "epochs": config.train.epochs,
    }
    # on a larger machine the recipe would take others
    flags = [
        "--env.num_envs", str(config.env.num_envs), "--collector.num_workers", "1", "--collector.acting", "copies",
        "--collector.device", "cpu", "--train.unrolls", "0", *flags,
    ]  # fmt: skip
    bf16 = precision(config) == "bf16-mixed"
    pairs = []
    for index in range(args.pairs):
        loop = bare(args.frames, "bf16" if bf16 else "float32", sizes, args.bare_threads)
        shipped = recipe(args.frames, flags)
        pairs.append((loop, shipped))
        print(
            f"pair {index + 1}: bare {loop:.0f}, recipe {shipped['steps']:.0f} agent steps/s, "
            f"ratio {shipped['steps'] / loop:.2f}, peak {shipped['memory']:.2f} GB, "
            f"first update after {shipped['first']:.1f} s",
            flush=True,
        )
    print(
        f"median: bare {statistics.median(x for x, _ in pairs):.0f}, "
        f"recipe {statistics.median(y['steps'] for _, y in pairs):.0f} agent steps/s, "
        f"ratio {statistics.median(y['steps'] / x for x, y in pairs):.2f}, "
        f"peak {max(y['memory'] for _, y in pairs):.2f} GB, "
        f"first update after {statistics.median(y['first'] for _, y in pairs):.1f} s"
    )


def scaling(args: argparse.Namespace, flags: list[str]) -> None:
    """One short run for every number of environments and of actor processes."""
    print("actor processes x environments each: agent steps/s, peak GB")
    for workers in args.workers:
        for envs in args.envs:
            figures = recipe(
                args.frames, [*flags, "--collector.num_workers", str(workers), "--env.num_envs", str(envs)]
            )
            print(f"{workers} x {envs}: {figures['steps']:.0f}, {figures['memory']:.2f}", flush=True)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["default", "paper"], default="default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--frames", type=int, default=400_000)
    parser.add_argument("--bare-threads", type=int, default=os.cpu_count())
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--envs", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--quick", action="store_true", help="one pair of 100,000 frames")
    args, flags = parser.parse_known_args()
    if args.quick:
        args.pairs, args.frames = 1, 100_000
    print(f"{machine()}; Python {platform.python_version()}; {' '.join(sys.argv)}", flush=True)
    (scaling if args.scaling else compare)(args, [*flags, "--preset", args.preset])


if __name__ == "__main__":
    main()
