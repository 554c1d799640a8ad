"""One step call of dm_control environments against the raw simulators, alternating, in one process.

    python benchmarks/envs.py                                  cartpole-swingup, cheetah-run and walker-walk, N = 8
    python benchmarks/envs.py --tasks humanoid-run --envs 16

The raw side is dm_control's own ``Environment.step`` of the same N environments in a loop: no batch, no tensors.
``step`` is TorchRL's ``EnvBase.step``, ``and reset`` is ``step_and_maybe_reset``, which a collector calls, and
``TorchRL`` is its ``DMControlEnv`` in a ``SerialEnv``. Each figure is the median of the calls, in microseconds of
processor time of the one thread that all of them run in, which does not count what other processes take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torchrl.envs import DMControlEnv, SerialEnv

from offtrace.modules.envs import make_env
from offtrace.modules.envs.suite import control_suite


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median microseconds of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + rounds // 10):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if index >= rounds // 10:
                times[name].append(time.thread_time() - start)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def task_calls(task: str, envs: int, wrapper: bool) -> dict[str, Callable[[], Any]]:
    """The calls to compare, each with environments of its own, all with the same actions."""
    raw = [control_suite().load(*task.split("-"), task_kwargs={"random": index}) for index in range(envs)]
    for env in raw:
        env.reset()
    ours = make_env(task, envs)
    first = ours.reset()
    action = torch.rand(ours.action_spec.shape) * 2 - 1
    first["action"] = action
    numbers = action.double().numpy()
    calls: dict[str, Callable[[], Any]] = {
        "raw": lambda: [env.step(number) for env, number in zip(raw, numbers, strict=True)],
        "step": lambda: ours.step(first.copy()),
        "and reset": lambda: ours.step_and_maybe_reset(first.copy()),
    }
    if wrapper:
        theirs = SerialEnv(envs, lambda: DMControlEnv(*task.split("-")))
        state = theirs.reset()
        state["action"] = action.double()
        calls["TorchRL"] = lambda: theirs.step(state.copy())
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cartpole-swingup", "cheetah-run", "walker-walk"])
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=900)
    parser.add_argument("--no-wrapper", dest="wrapper", action="store_false", help="leave TorchRL's wrapper out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks:
        found = measure(task_calls(task, args.envs, args.wrapper), args.rounds)
        figures = ", ".join(f"{name} {value:.0f} us ({value / found['raw']:.2f})" for name, value in found.items())
        print(f"{task}, {args.envs} environments: {figures}")


if __name__ == "__main__":
    main()
