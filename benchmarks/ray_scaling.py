"""Ray actors against actor processes: steps, bytes and weights on their way. Prints tables in Markdown.

    python benchmarks/ray_scaling.py [--quick] [--only steps weights] [--actors 1 2 4]

``steps``: both kinds of actors are there all the time, and only those whose turn it is are asked for rollouts, of
which a turn's first ones, made before, do not count. New weights go out before each rollout, as in IMPALA; nothing is
learnt, so these are the most steps that can be delivered. ``weights``: from the call that puts weights into the object
store until every actor has them, with all actors on one node and with a node each; the nodes are all on this machine,
so that what goes from node to node goes over its loopback, without a network's limit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("processes", "ray")
ENVS, UNROLL = 8, 64
WEIGHTS = (1.7, 4.4, 20.0)  # MB; the shallow network has 2.7, the ResNet 4.4


class Turn(NamedTuple):
    """What a turn came to."""

    steps: float  # a second
    learner: float  # seconds of the learner's processor time a rollout


def turn(collector: Any, policy: Any, actors: int, seconds: float) -> Turn:
    for _ in range(2 * actors):
        collector.take()
    rollouts, start, used = 0, time.perf_counter(), time.process_time()
    while rollouts % actors or time.perf_counter() - start < seconds:
        collector.update_policy(policy)
        collector.take()
        rollouts += 1
    wall, used = time.perf_counter() - start, time.process_time() - used
    return Turn(rollouts * ENVS * UNROLL / wall, used / rollouts)


def steps(env: str, actors: int, turns: int, seconds: float) -> str:
    """A row of the table."""
    from offtrace.modules.collectors import make_collector
    from offtrace.modules.envs import env_info, make_env
    from offtrace.modules.networks import build_policy

    info = env_info(env)
    shape = list(info.observation_shape)
    policy = build_policy(
        network="shallow" if len(shape) == 3 else "mlp", observation_shape=shape, num_actions=info.num_actions
    )
    make: Callable[..., Any] = partial(
        make_collector, partial(make_env, env, ENVS), policy, frames_per_batch=ENVS * UNROLL, num_workers=actors,
        frame_stack=info.frame_stack,
    )  # fmt: skip
    found: list[list[Turn]] = []
    with contextlib.ExitStack() as stack:
        collectors = [stack.enter_context(make(backend=name)) for name in BACKENDS]
        for index in range(turns + 1):
            pair = [turn(x, policy, actors, seconds) for x in collectors[:: 1 if index % 2 else -1]]
            found.append(pair[:: 1 if index % 2 else -1])
        collectors[1].take()
        sent = wait_for(collectors[1].backend._seats[0])
    size = len(pickle.dumps(sent.entries, protocol=5)) / (ENVS * UNROLL)
    found = found[1:]  # the first is for what is made at the first calls
    speeds = [statistics.median(pair[place].steps for pair in found) for place in (0, 1)]
    ratios = sorted(pair[1].steps / pair[0].steps for pair in found)
    used = [1e3 * statistics.median(pair[place].learner for pair in found) for place in (0, 1)]
    return (
        f"| {env} | {actors} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {used[0]:.1f} | {used[1]:.1f} | {size:,.0f} |"
    )


def wait_for(seat: Any) -> Any:
    """What a seat's actor delivers next."""
    while seat.rollout is None:
        seat.awaited[0].result()
        seat.read()
    return seat.rollout


class Receiver:
    """An actor that is given weights."""

    def take(self, weights: Any) -> int:
        return len(weights)


def weights(number: int, apart: bool, times: int) -> str:
    """A row of the table."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0 if apart else number})
    try:
        for _ in range(number if apart else 0):
            cluster.add_node(num_cpus=1)
        ray.init(cluster.address, log_to_driver=False, configure_logging=False)
        cluster.wait_for_nodes()
        receivers = [ray.remote(num_cpus=1)(Receiver).remote() for _ in range(number)]
        cells = []
        for size in WEIGHTS:
            array = np.random.default_rng(0).standard_normal(int(size * 1e6 / 4), np.float32)
            seconds = []
            for _ in range(times):
                start = time.perf_counter()
                reference = ray.put(array)
                ray.get([x.take.remote(reference) for x in receivers])
                seconds.append(time.perf_counter() - start)
            cells.append(f"{1e3 * statistics.median(seconds[1:]):.0f}")
        return f"| {number} | {'a node each' if apart else 'one node'} | {' | '.join(cells)} |"
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer turns")
    parser.add_argument("--only", nargs="+", choices=["steps", "weights"], default=["steps", "weights"])
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1", "pong"])
    args = parser.parse_args()
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray listens on 127.0.0.1 alone, if this comes before it
    warnings.simplefilter("ignore")
    turns, seconds = (3, 2.0) if args.quick else (9, 5.0)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, load before {load}; {' '.join(sys.argv)}")
    if "steps" in args.only:
        from offtrace.modules.collectors import ray_connection

        print(
            "\n| task | actors | processes, steps/s | Ray, steps/s | ratio of a pair, median (range) "
            "| learner's ms a rollout, processes | Ray | bytes a step |\n|---|---|---|---|---|---|---|---|"
        )
        with ray_connection(cpus=max(args.actors)):
            for env in args.envs:
                for actors in args.actors:
                    print(steps(env, actors, turns, seconds), flush=True)
    if "weights" in args.only:
        print(f"\n| actors | where | {' | '.join(f'{x:g} MB, ms' for x in WEIGHTS)} |\n|---|---|---|---|")
        for number in args.actors:
            for apart in (False, True):
                print(weights(number, apart, 6 if args.quick else 21), flush=True)
    print(f"\nload after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


if __name__ == "__main__":
    main()
