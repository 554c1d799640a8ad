"""What this machine makes of the recipes, as Markdown: one command, whatever fails in it.

    python benchmarks/gpu_report.py                     eight minutes, on the GPU if there is one
    python benchmarks/gpu_report.py --minutes 1 --parts machine emulator learner

Parts: the machine; the emulator's ceiling; the learner's, on batches that lie on its device, over number and memory
formats, and the kernels that its time goes to; how fast actors start; the recipe IMPALA at its defaults and over the
ways of acting, with the GPU's utilisation; the paper's architectures; updates of SAC and MPO, eager, captured and
compiled; the returns against a copy of their bytes; the tests that need a GPU. Every part is a process of its own with
a time of its own. One that fails or takes too long is told in a line, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        PARTS[args.inside][1](args.minutes * 60)
        return
    total = sum(PARTS[name][0] for name in args.parts)
    for name in args.parts:
        seconds = args.minutes * 60 * PARTS[name][0] / total
        print(f"\n### {name}\n", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-W", "ignore", __file__, "--inside", name, "--minutes", str(seconds / 60)]
        done = run(command, seconds + 30)
        print(done.strip() or "nothing", flush=True)
        print(f"\n({time.monotonic() - start:.0f} s of {seconds:.0f})", flush=True)


def run(command: list[str], seconds: float) -> str:
    """What a command prints; its last line of error where it fails, or that it took too long."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"ended after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        errors.seek(0)
        told = [line for line in errors.read().splitlines() if line.strip()]
        reason = f"\n\n**failed** ({code}): {told[-1] if told else 'no word'}" if code else ""
        return out.read() + reason


def shell(*words: str, seconds: float) -> None:
    """Runs a script of this folder, or a module, in this part's process group, and prints what it prints."""
    try:
        subprocess.run([sys.executable, "-W", "ignore", *words], timeout=seconds, check=True, cwd=ROOT)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"**failed**: {error}", flush=True)


def device() -> str:
    """``"cuda"`` where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(seconds: float) -> None:
    """What it is."""
    import lightning
    import tensordict
    import torch
    import torchrl

    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{CORES} cores, {name}; GPU: {', '.join(gpus) or 'none'}; Python {platform.python_version()}, torch "
          f"{torch.__version__}, torchrl {torchrl.__version__}, tensordict {tensordict.__version__}, lightning "
          f"{lightning.__version__}; {time.strftime('%Y-%m-%d')}")  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(f"\ncommit {commit.stdout.strip() or 'not known'}")


def emulator(seconds: float) -> None:
    """Agent steps a second of Pong, frames stacked and scaled, random actions."""
    forms = [(1, CORES, 16 * CORES), (CORES, 1, 32), (1, 1, 16)]
    print("| processes | threads each | games each | agent steps/s |\n|---|---|---|---|")
    for processes, threads, games in forms:
        speed = _emulate(processes, threads, games, seconds / len(forms) - 2)
        print(f"| {processes} | {threads} | {games} | {speed:,.0f} |", flush=True)


_EMULATE = """
import sys, time
import numpy as np
from ale_py.vector_env import AtariVectorEnv
games, threads, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
env = AtariVectorEnv("pong", num_envs=games, num_threads=threads)
env.reset()
actions = np.random.default_rng(0).integers(6, size=(64, games))
for i in range(8):
    env.step(actions[i % 64])
start, number = time.perf_counter(), 0
while time.perf_counter() - start < seconds:
    env.step(actions[number % 64])
    number += 1
print(number * games / (time.perf_counter() - start))
"""


def _emulate(processes: int, threads: int, games: int, seconds: float) -> float:
    command = [sys.executable, "-W", "ignore", "-c", _EMULATE, str(games), str(threads), str(max(0.5, seconds))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def learner(seconds: float) -> None:
    """``ImpalaLoss`` and Adam on steps that lie on the device, what the time goes to, and acting on a core."""
    where = device()
    forms = [(bf16, channels_last) for bf16 in (False, True) for channels_last in (False, True)]
    each = seconds / (16 if where == "cuda" else 10)  # half of cuda's is for what is compiled
    head = (
        "| network | numbers | channels | samples/s | ms an update | Tflop/s | peak memory, GB |" + "\n|" + 7 * "---|"
    )
    print(head)
    for network in ("shallow", "resnet"):
        for bf16, channels_last in forms:
            _row(network, each, bf16=bf16, channels_last=channels_last)
    _where_time_goes(_learner("resnet", bf16=True, channels_last=True)[0], where)
    _acting()
    if where == "cuda":
        print(f"\nThe loss compiled:\n\n{head}")
        for network in ("shallow", "resnet"):
            _row(network, each, bf16=True, channels_last=True, compiled=True)


def _row(network: str, seconds: float, *, bf16: bool, channels_last: bool, compiled: bool = False) -> None:
    import torch

    update, samples, flops = _learner(network, bf16=bf16, channels_last=channels_last, compiled=compiled)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = list(_timed(update, max(0.5, seconds - 2)))
    median = statistics.median(times[1:] or times)
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if torch.cuda.is_available() else ""
    names = ("bf16" if bf16 else "float32", "last" if channels_last else "first")
    print(f"| {network} | {names[0]} | {names[1]} | {samples / median:,.0f} | {1e3 * median:.1f} "
          f"| {flops / median / 1e12:.2f} | {memory} |", flush=True)  # fmt: skip


def _learner(
    network: str, *, bf16: bool, channels_last: bool, compiled: bool = False
) -> tuple[Callable[[], None], int, float]:
    """An update, its samples, and the floating-point operations that its products and convolutions need."""
    import torch
    from tensordict import TensorDict
    from torch.utils.flop_counter import FlopCounterMode

    from offtrace.modules.losses import ImpalaLoss, compile_loss
    from offtrace.modules.networks import build_policy

    where = device()
    rows, steps = (64, 64) if where == "cuda" else (16, 16)
    policy = build_policy(network=network, observation_shape=[4, 84, 84], num_actions=6, channels_last=channels_last)
    loss = ImpalaLoss(policy, reduction="mean").to(where)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4, fused=True)
    no = torch.zeros(rows, steps, 1, dtype=torch.bool, device=where)
    images = torch.randint(256, (rows, steps, 4, 84, 84), dtype=torch.uint8, device=where)
    entries = {
        "observation": images, "action": torch.randint(6, (rows, steps), device=where),
        "action_log_prob": torch.full((rows, steps), -1.79, device=where),
        "logits": torch.zeros(rows, steps, 6, device=where),
        "next": {
            "observation": images, "reward": torch.randn(rows, steps, 1, device=where), "done": no,
            "terminated": no.clone(),
        },
        "finals": torch.empty(rows, steps, int(compiled), 0, device=where),  # as the recipe, the host says the room
    }  # fmt: skip
    batch = TensorDict(entries, [rows, steps], device=where)
    called = compile_loss(loss) if compiled else loss

    def backward(called: Callable[..., Any]) -> None:
        with torch.autocast(where, dtype=torch.bfloat16, enabled=bf16):
            out = called(batch)
        optimizer.zero_grad()
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()

    def update() -> None:
        backward(called)
        optimizer.step()
        if where == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        backward(loss)
    return update, rows * steps, counter.get_total_flops()


def _acting() -> None:
    """What an actor with a copy on a core makes of 16 observations: float32, one thread."""
    import torch
    from tensordict import TensorDict

    from offtrace.modules.networks import build_policy

    torch.set_num_threads(1)
    observations = TensorDict({"observation": torch.randint(256, (16, 4, 84, 84), dtype=torch.uint8)}, [16])
    print("\n| acting on a core | samples/s | channels last |\n|---|---|---|")
    for network in ("shallow", "resnet"):
        speeds = []
        for channels_last in (False, True):
            policy = build_policy(
                network=network, observation_shape=[4, 84, 84], num_actions=6, channels_last=channels_last
            )
            with torch.no_grad():
                times = list(_timed(lambda policy=policy: policy(observations.copy()), 1))  # type: ignore[misc]
            speeds.append(16 / statistics.median(times))
        print(f"| {network} | {speeds[0]:,.0f} | {speeds[1]:,.0f} |", flush=True)


def _where_time_goes(update: Callable[[], None], where: str) -> None:
    """The operators that take most of the device's time, and its share of the wall time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where == "cuda" else [])]
    kind = f"self_{'device' if where == 'cuda' else 'cpu'}_time_total"
    update()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(3):
            update()
        wall = time.perf_counter() - start
    events = [event for event in profiler.key_averages() if getattr(event, kind) > 0]
    if where == "cuda":  # an operator's time is that of its kernels, which are in the list too
        cuda = torch.autograd.DeviceType.CUDA
        events = [event for event in events if event.device_type == cuda and not event.is_user_annotation]
    total = sum(getattr(event, kind) for event in events)
    print(f"\nResNet, bf16, channels last: on the device {total / 1e6 / wall:.0%} of the wall time, most of it in\n")
    print("| kernel | share | calls an update |\n|---|---|---|")
    for event in sorted(events, key=lambda event: -getattr(event, kind))[:8]:
        print(f"| `{event.key[:90]}` | {getattr(event, kind) / total:.0%} | {event.count / 3:.0f} |")


def _timed(call: Callable[[], None], seconds: float) -> Iterator[float]:
    call()
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        yield time.perf_counter() - start
        if time.perf_counter() > end:
            return


def starts(seconds: float) -> None:
    """Actors up."""
    shell("benchmarks/actor_start.py", "--actors", "1", "4", str(max(8, CORES)), "--repeat", "1", seconds=seconds + 20)


def impala(seconds: float) -> None:
    """The recipe over the ways of acting."""
    actors, cuda = max(1, CORES - 2), device() == "cuda"
    unrolls = str(32 * max(1, actors // 2))
    sizes = ["--collector.num_workers", str(actors), "--env.num_envs", "32", "--train.unrolls", unrolls]
    copies, server = ["--collector.acting", "copies"], ["--collector.acting", "server"]
    forms: dict[str, list[str]] = {
        "defaults": [],
        f"{actors} actors with copies": [*sizes, *copies, "--collector.device", "cpu"],
        f"{actors} actors, one server": [*sizes, *server, "--collector.device", "cuda" if cuda else "cpu"],
    }
    if cuda:
        forms["2 actors with copies on the GPU, many emulator threads"] = [*copies, "--collector.device", "cuda"]
        forms["defaults, updates captured"] = ["--train.capture", "try"]
    runs = [("shallow", *form) for form in forms.items()]
    runs += [("resnet", *form) for form in forms.items() if "captured" not in form[0] and "2 actors" not in form[0]]
    print("| network | acting | agent steps/s | updates/s | lag, mean and most | first line after, s | GPU busy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for network, name, flags in runs:
        print(f"| {network} | {name} | {_train(network, flags, seconds / len(runs))} |", flush=True)


def _train(network: str, flags: list[str], seconds: float) -> str:
    command = [
        sys.executable, "-W", "ignore", str(ROOT / "recipes" / "impala_atari.py"), "--network.encoder", network,
        "--train.total_frames", "1000000000", "--train.final_eval", "false", "--train.record", "false",
        "--train.eval_every", "1000000000", "--train.log_every", "2", "--train.name", "run", *flags,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, _gpu_busy() as busy:
        start, first = time.monotonic(), None
        log = Path(folder) / "runs" / "run" / "metrics.csv"
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while time.monotonic() - start < seconds and process.poll() is None:
            if first is None and log.exists():
                first = time.monotonic() - start
                busy.clear()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            return "did not end within 30 s of SIGTERM | | | |"
        with contextlib.suppress(OSError), open(log, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/frames_per_second")]
            if rows:
                rows = rows[len(rows) // 2 :]
                speed, updates, lag = (
                    statistics.median(float(row[f"train/{key}"] or 0) for row in rows)
                    for key in ("frames_per_second", "updates_per_second", "lag")
                )
                most = max(float(row["train/lag_max"] or 0) for row in rows)
                share = f"{statistics.mean(busy):.0f} %" if busy else ""
                return f"{speed / 4:,.0f} | {updates:.0f} | {lag:.0f}, {most:.0f} | {first or 0:.0f} | {share}"
    return f"no update within {seconds:.0f} s: {(errors or '').strip().splitlines()[-1:]} | | | |"


@contextlib.contextmanager
def _gpu_busy() -> Iterator[list[float]]:
    """Utilisation in per cent, twice a second, where nvidia-smi tells it."""
    found: list[float] = []
    over = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not over.wait(0.5):
            told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            found.extend(float(word) for word in told[:1])

    thread = threading.Thread(target=watch, daemon=True)
    if shutil.which("nvidia-smi"):
        thread.start()
    try:
        yield found
    finally:
        over.set()


def architectures(seconds: float) -> None:
    """Who waits for whom; what is not done in time is left out."""
    each = str(max(1.0, seconds / 10 - 12))  # ten figures, and what a start takes
    shell("benchmarks/architectures.py", "--rounds", "1", "--seconds", each, seconds=seconds + 20)


def updates(seconds: float) -> None:
    """SAC and MPO against their bare loops: eager, captured, and compiled and captured."""
    cuda = {"": 1, "--capture": 1, "--compile --capture": 2}  # and how long each may take
    forms = cuda if device() == "cuda" else {"": 1, "--compile": 2}
    each = seconds / 2 / sum(forms.values())
    for flags, share in forms.items():
        for script in ("sac_updates.py", "mpo_updates.py"):
            print(f"\n`{script} {flags}`\n", flush=True)
            words = [f"benchmarks/{script}", "--device", device(), "--pairs", "10", *flags.split()]
            shell(*words, seconds=share * each + 10)


def returns(seconds: float) -> None:
    """V-trace and Retrace against a copy of the bytes."""
    budget = str(max(0.05, seconds / 60))
    quick = [] if device() == "cuda" else ["--quick"]
    shell("benchmarks/returns.py", "--device", device(), "--budget", budget, *quick, seconds=seconds + 20)


def tests(seconds: float) -> None:
    """Those that need a GPU."""
    words = ["-m", "pytest", "-v", "--tb=line", "-m", "cuda", "-p", "no:cacheprovider", "tests/modules", "tests/agents"]
    shell(*words, seconds=seconds + 20)


PARTS: dict[str, tuple[float, Callable[[float], None]]] = {
    "machine": (1, machine),
    "emulator": (5, emulator),
    "learner": (18, learner),
    "starts": (6, starts),
    "impala": (45, impala),
    "architectures": (15, architectures),
    "updates": (45, updates),
    "returns": (7, returns),
    "tests": (25, tests),
}
"""Each with its share of the time."""


if __name__ == "__main__":
    main()
