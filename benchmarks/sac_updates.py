"""SAC's gradient updates a second: the shipped loss against a bare torch loop of the same mathematics, alternating.

    python benchmarks/sac_updates.py                 the eager ratio
    python benchmarks/sac_updates.py --compile       torch.compile of the shipped loss against the bare eager loop

17 numbers in an observation, 6 in an action, 256x256 networks, batches of 256 out of 100,000 transitions, twin critics,
learnt temperature. One update is sampling, loss, backward, fused Adam, the targets' step. Blocks of updates of the two
alternate; the ratio is the median over pairs of blocks, of wall time and of the processor time of the process, which
what else runs on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--blocks", type=int, default=60)
parser.add_argument("--updates", type=int, default=20, help="in a block")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
from bare_sac import BareSAC  # noqa: E402
from torch import Tensor  # noqa: E402
from transitions import ACT, OBS, as_rollout, transitions  # noqa: E402

from offtrace.modules.losses import FastSoftUpdate, SACLoss, compile_loss  # noqa: E402
from offtrace.modules.networks import build_actor, build_critic  # noqa: E402
from offtrace.modules.replay import Replay  # noqa: E402

BATCH = 256


def make_shipped(stored: dict[str, Tensor], compiled: bool) -> Callable[[], None]:
    """One update of the shipped path."""
    actor = build_actor(kind="tanh", network="mlp", observation_shape=[OBS], action_dim=ACT)
    critic = build_critic(network="mlp", observation_shape=[OBS], action_dim=ACT)
    loss = SACLoss(actor, critic)
    targets = FastSoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-4, fused=True)
    function = compile_loss(loss) if compiled else loss
    replay = Replay(2 * len(stored["reward"]), num_envs=1, batch_size=BATCH)
    replay.extend(as_rollout(stored, actor))

    def update() -> None:
        out = function(replay.sample())
        optimizer.zero_grad()
        (out["loss_critic"] + out["loss_actor"] + out["loss_alpha"]).backward()
        optimizer.step()
        targets.step()

    return update


def timed(update: Callable[[], None], number: int) -> tuple[float, float]:
    """Seconds an update takes: of wall time, of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(number):
        update()
    return (time.perf_counter() - wall) / number, (time.process_time() - processor) / number


def main() -> None:
    """Prints both speeds and their ratio."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}; {' '.join(sys.argv)}"
    )
    stored, bare_loop = transitions(), BareSAC()
    updates = (lambda: bare_loop.update(stored, BATCH)), make_shipped(stored, args.compile)
    for update in updates:
        timed(update, 30)
    pairs = [[timed(update, args.updates) for update in updates] for _ in range(args.blocks)]
    for index, name in enumerate(("bare", "shipped")):
        wall, processor = (statistics.median(pair[index][kind] for pair in pairs) for kind in (0, 1))
        print(f"{name}: {1 / wall:.0f} updates/s, {1e3 * wall:.2f} ms, {1e3 * processor:.2f} ms of processor time")
    ratios = [statistics.median(bare[kind] / shipped[kind] for bare, shipped in pairs) for kind in (0, 1)]
    print(f"ratio {ratios[0]:.3f} (wall), {ratios[1]:.3f} (processor), {args.threads} threads")


if __name__ == "__main__":
    main()
