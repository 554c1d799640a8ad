"""SAC's gradient updates a second: the recipe's own against a bare torch loop of the same mathematics, in turns.

    python benchmarks/sac_updates.py                 the eager ratio
    python benchmarks/sac_updates.py --compile       torch.compile of the shipped loss against the bare eager loop
    python benchmarks/sac_updates.py --device cuda   everything on the GPU
    python benchmarks/sac_updates.py --device cuda --capture   and the shipped update as one CUDA graph

17 numbers in an observation, 6 in an action, 256x256 networks, batches of 256 out of 100,000 transitions, twin critics,
learnt temperature. The ratio is the median over pairs of turns, of wall time and of the processor time of the process,
which what else runs on the machine disturbs less.
"""

from __future__ import annotations

from typing import Any

from turns import arguments, compare

args = arguments(__doc__)

import torch  # noqa: E402
from bare_sac import BareSAC  # noqa: E402
from transitions import ACT, OBS, as_rollout, transitions  # noqa: E402

from offtrace.agents import Agent  # noqa: E402
from offtrace.agents.assemble import group_optimizer  # noqa: E402
from offtrace.agents.targets import soft_update  # noqa: E402
from offtrace.modules.losses import SACLoss  # noqa: E402
from offtrace.modules.networks import build_critic, build_policy  # noqa: E402
from offtrace.modules.replay import Replay  # noqa: E402

BATCH, HIDDEN = 256, (256, 256)


def main() -> None:
    """Prints both speeds and their ratio."""
    torch.manual_seed(0)
    stored = transitions()
    common: dict[str, Any] = {"observation_shape": [OBS], "action_dim": ACT, "hidden": HIDDEN, "activation": "relu"}
    actor = build_policy(head="tanh", critic=None, **common)
    critic = build_critic(**common)
    loss = SACLoss(actor, critic)
    agent = Agent(
        loss,
        loss.actor,
        optimizer=group_optimizer(loss, dict.fromkeys(("actor", "critic", "alpha"), 3e-4)),
        total_frames=1,
        schedule="constant",
        after_update=soft_update(loss, 0.005),
        compile=args.compile,
        capture="update" if args.capture else "none",
    )
    replay = Replay(2 * len(stored["reward"]), num_envs=1, batch_size=BATCH, device=args.device)
    replay.extend(as_rollout(stored, actor))
    with torch.device(args.device):
        bare = BareSAC()
    stored = {name: x.to(args.device) for name, x in stored.items()}
    compare(args, agent, replay.sample, lambda: bare.update(stored, BATCH))


if __name__ == "__main__":
    main()
