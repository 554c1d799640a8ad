"""Gradient updates/s of MPOLoss, sampling included, against the bare loop of bare_mpo.py, in turns in one process.

    python benchmarks/mpo_updates.py                      both eager
    python benchmarks/mpo_updates.py --compile            the shipped loss compiled, the bare loop eager
    python benchmarks/mpo_updates.py --compile --compile-bare

Both do the same work for each update: 256 windows of 5 steps out of a replay of 100,000 transitions with 17 numbers of
observation and 6 of action, 20 action samples for each state, one backward pass, clipping, Adam, a copy of the targets
every 100 updates. The shipped path samples from the shipped replay, with all that the acting policy stored, and masks
what reaches over the end of an episode; the bare loop indexes tensors, and has no masks and no diagnostics.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=7)
parser.add_argument("--updates", type=int, default=60, help="in a turn")
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
parser.add_argument("--compile", action="store_true")
parser.add_argument("--compile-bare", action="store_true")
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
from bare_mpo import GAMMA, N_STEP, SAMPLES, BareMPO  # noqa: E402
from transitions import ACT, OBS, as_rollout, transitions  # noqa: E402

from offtrace.agents.targets import hard_update  # noqa: E402
from offtrace.modules.losses import MPOLoss, compile_loss  # noqa: E402
from offtrace.modules.networks import build_actor, build_critic  # noqa: E402
from offtrace.modules.replay import Replay  # noqa: E402


def shipped(stored: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One update of the shipped loss on the shipped networks."""
    common = {"network": "layernorm_mlp", "observation_shape": (OBS,), "action_dim": ACT, "hidden": args.hidden}
    actor, critic = build_actor(kind="gaussian", **common), build_critic(critics=1, **common)
    loss = MPOLoss(actor, critic, action_dim=ACT, gamma=GAMMA, n_step=N_STEP, num_samples=SAMPLES)
    follow, updates = hard_update(loss, 100), itertools.count(1)
    groups = loss.param_groups()
    networks = groups["actor"] + groups["critic"]
    rates = [{"params": networks, "lr": 3e-4}, {"params": groups["duals"], "lr": 1e-2}]
    optimizer = torch.optim.Adam(rates, fused=True)
    replay = Replay(2 * len(stored["reward"]), num_envs=1, batch_size=args.batch, length=N_STEP, pad=True)
    replay.extend(as_rollout(stored, actor))
    call = compile_loss(loss) if args.compile else loss
    names = [name for name in loss.out_keys if name.startswith("loss_")]

    def update() -> None:
        out = call(replay.sample())
        optimizer.zero_grad()
        sum(out.get(name) for name in names).backward()
        torch.nn.utils.clip_grad_norm_(networks, 40.0)
        optimizer.step()
        follow(next(updates))

    return update


def speed(update: Callable[[], None]) -> float:
    """Updates per second of one turn."""
    start = time.perf_counter()
    for _ in range(args.updates):
        update()
    return args.updates / (time.perf_counter() - start)


def main() -> None:
    """Prints a line for each pair, and the medians."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stored = transitions()
    bare = BareMPO(stored, args.batch, tuple(args.hidden), args.compile_bare).update
    ours = shipped(stored)
    for update in (bare, ours):  # what is built at the first calls is no part of the figures
        for _ in range(10):
            update()
    pairs = []
    for index in range(args.pairs):
        pairs.append((speed(bare), speed(ours)))
        print(f"pair {index + 1}: bare {pairs[-1][0]:.1f}, shipped {pairs[-1][1]:.1f} updates/s", flush=True)
    loop, loss = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(y / x for x, y in pairs)
    print(f"median: bare {loop:.1f}, shipped {loss:.1f} updates/s, ratio {ratio:.3f}")
    print(f"{args.threads} threads, {platform.processor() or platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
