"""MPO's gradient updates a second: the recipe's own against the bare loop of bare_mpo.py, in turns in one process.

    python benchmarks/mpo_updates.py                      both eager
    python benchmarks/mpo_updates.py --compile            the shipped loss compiled, the bare loop eager
    python benchmarks/mpo_updates.py --device cuda        everything on the GPU
    python benchmarks/mpo_updates.py --device cuda --capture   and the shipped update as one CUDA graph

Both do the same work for each update: 256 windows of 5 steps out of a replay of 100,000 transitions with 17 numbers of
observation and 6 of action, 256x256 networks, 20 action samples for each state, one backward pass, clipping, Adam, a
copy of the targets every 100 updates. The shipped path samples from the shipped replay, with all that the acting policy
stored, masks what reaches over the end of an episode, and computes its diagnostics; the bare loop indexes tensors and
has neither. The ratio is the median over pairs of turns, of wall time and of processor time.
"""

from __future__ import annotations

from typing import Any

from turns import arguments, compare

args = arguments(__doc__)

import torch  # noqa: E402
from bare_mpo import GAMMA, N_STEP, SAMPLES, BareMPO  # noqa: E402
from transitions import ACT, OBS, as_rollout, transitions  # noqa: E402

from offtrace.agents import Agent  # noqa: E402
from offtrace.agents.assemble import group_optimizer  # noqa: E402
from offtrace.agents.targets import hard_update  # noqa: E402
from offtrace.modules.losses import MPOLoss  # noqa: E402
from offtrace.modules.networks import build_critic, build_policy  # noqa: E402
from offtrace.modules.replay import Replay  # noqa: E402

BATCH, HIDDEN = 256, (256, 256)


def main() -> None:
    """Prints both speeds and their ratio."""
    torch.manual_seed(0)
    stored = transitions()
    common: dict[str, Any] = {
        "network": "layernorm_mlp",
        "observation_shape": (OBS,),
        "action_dim": ACT,
        "hidden": HIDDEN,
    }
    actor = build_policy(head="gaussian", critic=None, **common)
    critic = build_critic(critics=1, **common)
    loss = MPOLoss(actor, critic, estimator=f"n_step(n={N_STEP})", gamma=GAMMA, num_samples=SAMPLES)
    agent = Agent(
        loss,
        loss.policy,
        optimizer=group_optimizer(loss, {"actor": 3e-4, "critic": 3e-4, "duals": 1e-2}),
        total_frames=1,
        schedule="constant",
        clip_grad_norm=40.0,
        after_update=hard_update(loss, 100),
        compile=args.compile,
        capture="update" if args.capture else "none",
    )
    replay = Replay(
        2 * len(stored["reward"]), num_envs=1, batch_size=BATCH, length=N_STEP, pad=True, device=args.device
    )
    replay.extend(as_rollout(stored, actor))
    stored = {name: x.to(args.device) for name, x in stored.items()}
    with torch.device(args.device):
        bare = BareMPO(stored, BATCH, HIDDEN)
    compare(args, agent, replay.sample, bare.update)


if __name__ == "__main__":
    main()
