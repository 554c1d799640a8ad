"""Run by test_replayed.py: SAC, MPO and Reactor in turn on two gloo ranks; writes how each rank ended into a folder.

python replayed_ddp_script.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from offtrace.agents.callbacks import WeightSync
from offtrace.agents.mpo import MPOConfig
from offtrace.agents.reactor import memory_config
from offtrace.agents.sac import SACConfig


def fit(name: str, folder: Path) -> None:
    config: Any = {"sac": SACConfig, "mpo": MPOConfig, "reactor": memory_config}[name]()
    config.env.num_envs, config.collector.unroll = 1, 8
    config.network.hidden = [16, 16]
    if name == "reactor":
        config.network.recurrent, config.replay.length = 8, 4
    else:
        config.env.task, config.network.critic_hidden = "Pendulum-v1", [16, 16]
    config.network.normalize = True
    config.replay.capacity, config.replay.batch_size, config.replay.min_size = 500, 8, 16
    config.replay.samples_per_insert = 4.0
    config.train.total_frames = 2 * 4 * 8
    pl.seed_everything(0, verbose=False)
    agent, data = config.build()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2,
        strategy=pl.strategies.DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        max_epochs=1, logger=False, callbacks=[WeightSync(1)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(agent, data)
    torch.save(
        {
            "weights": {key: value.clone() for key, value in agent.state_dict().items()},
            "frames": data.frames,
            "observation": data.replay.sample()["observation"].clone(),
            "noise": torch.randn(3),
        },
        folder / f"{name}{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    for algorithm in ("sac", "mpo", "reactor"):
        fit(algorithm, Path(sys.argv[1]))
