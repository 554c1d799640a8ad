"""Seconds until actor processes are up and have given a rollout each, and the bytes of a step on its way.

    python benchmarks/actor_start.py [--actors 1 2 4 8] [--env pong] [--repeat 3]

Every number comes from a process of its own, which imports, makes the policy and then starts the actors, each with four
environments: as a run does, without the learner. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def once(actors: int, env: str) -> dict[str, float]:
    """One start, in this process."""
    from functools import partial

    from offtrace.modules.collectors import make_collector
    from offtrace.modules.envs import env_info, make_env
    from offtrace.modules.networks import build_policy

    info = env_info(env)
    shape = list(info.observation_shape)
    policy = build_policy(
        network="shallow" if len(shape) == 3 else "mlp", observation_shape=shape, num_actions=info.num_actions,
        action_dim=info.action_dim,
    )  # fmt: skip
    start = time.perf_counter()
    with make_collector(
        partial(make_env, env, 4), policy, frames_per_batch=4 * 64, num_workers=actors, frame_stack=info.frame_stack
    ) as collector:
        up = time.perf_counter()
        for _ in range(actors):
            packed = collector.take()
        first = time.perf_counter()
        size = sum(x.numel() * x.element_size() for x in packed.entries.values()) / packed.shape.numel()
    return {"up": up - start, "first": first - start, "down": time.perf_counter() - first, "bytes": size}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--env", default="pong")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.actors[0], args.env)))
        return
    print("| actors | all up, s | a rollout of each, s | ended, s | bytes a step |\n|---|---|---|---|---|")
    for actors in args.actors:
        found = []
        for _ in range(args.repeat):
            command = [sys.executable, "-W", "ignore", __file__, "--once", "--actors", str(actors), "--env", args.env]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(out.strip().splitlines()[-1]))
        median = {name: statistics.median(x[name] for x in found) for name in found[0]}
        print(
            f"| {actors} | {median['up']:.1f} | {median['first']:.1f} | {median['down']:.1f} | {median['bytes']:,.0f} |"
        )


if __name__ == "__main__":
    main()
