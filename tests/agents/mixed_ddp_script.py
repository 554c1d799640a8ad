"""Run by test_mixed.py: IMPALA on fresh and replayed rollouts, on two gloo ranks; writes what each rank ended with.

python mixed_ddp_script.py FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from offtrace.agents.agent import Agent
from offtrace.agents.callbacks import WeightSync
from offtrace.agents.data import Learner, MixedData
from offtrace.agents.optim import make_optimizer
from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.losses import ImpalaLoss, burn_in
from offtrace.modules.networks import build_policy
from offtrace.modules.replay import Replay

ENVS, STEPS = 4, 6


def fit(name: str, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    episodes = name == "episodes"
    policy = build_policy(
        network="mlp",
        observation_shape=[4],
        num_actions=2,
        action_dim=None,
        hidden=[16],
        recurrent=6 if episodes else None,
    )

    def collector(rank: int, frames: int) -> Any:
        env = partial(make_env, "CartPole-v1", ENVS, **({"last_step": True} if episodes else {}))
        return make_collector(env, policy, frames_per_batch=ENVS * STEPS, num_workers=0, start=frames, rank=rank)

    def replay(learner: Learner, path: Path | None) -> Replay:
        return Replay(
            500,
            num_envs=ENVS,
            batch_size=2,
            length=STEPS,
            pad=True,
            overlap=False,
            seed=learner.rank,
            whole_episodes=episodes,
        )

    total = 2 * 6 * ENVS * STEPS
    loss = ImpalaLoss(policy, gamma=0.99)
    agent = Agent(loss, policy, optimizer=make_optimizer("adam", lr=1e-3, eps=1e-5), total_frames=total)
    form: dict[str, Any] = {"ratio": 1.0} if name == "ratio" else {"share": 0.5}
    if episodes:
        form["on_replayed"] = partial(burn_in, policy, steps=STEPS)
    data = MixedData(collector, replay, total_frames=total, min_size=ENVS * STEPS, minibatches=2, **form)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2,
        strategy=pl.strategies.DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        max_epochs=1, logger=False, callbacks=[WeightSync(2)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(agent, data)
    assert data.replay is not None
    torch.save(
        {
            "weights": {key: value.clone() for key, value in agent.state_dict().items()},
            "frames": data.frames,
            "replayed_frames": data.replayed_frames,
            "updates": agent.updates,
            "observation": data.replay.sample()["observation"].clone(),
        },
        folder / f"{name}{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for form in ("share", "ratio", "episodes"):
        fit(form, Path(sys.argv[1]))
