"""Run by test_ddp.py: Lightning's fit on two gloo ranks. Writes what each rank saw into a folder.

python ddp_script.py train FOLDER        each with its own CartPole environments
python ddp_script.py rewards FOLDER        likewise PPO, which normalises rewards, in Pendulum
python ddp_script.py gradients FOLDER        one update on fixed batches with unequal masks, by SGD, with each loss
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tensordict import TensorDict, TensorDictBase

from offtrace.agents.agent import Agent
from offtrace.agents.callbacks import WeightSync
from offtrace.agents.impala import control_config
from offtrace.agents.ppo import pendulum_config
from offtrace.agents.trpo import trust_region_update
from offtrace.modules.losses import ACERLoss, ImpalaLoss, TRPOLoss
from offtrace.modules.networks import build_policy, build_value

ENVS, STEPS = 3, 5
LOSSES = ("sum", "mean", "acer", "trpo")


def fit(agent: Agent, data: Any, ranks: int, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", broadcast_buffers=False) if ranks > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=1, logger=False, callbacks=callbacks or [],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(agent, data)
    return trainer


class Spy(pl.Callback):
    """Keeps the first observation of every batch."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: TensorDictBase, batch_idx: int) -> None:
        self.first.append(batch["observation"].flatten(0, -2)[0].clone())


def train(folder: Path, kind: str) -> None:
    config: Any = control_config() if kind == "train" else pendulum_config()
    if kind == "rewards":
        config.loss.normalize_reward = True
    config.collector.num_workers = 0
    config.env.num_envs, config.collector.unroll, config.train.minibatches = 4, 8, 2
    config.train.epochs = 1
    config.train.total_frames = 4 * 8 * 2 * 6
    pl.seed_everything(config.train.seed, verbose=False)
    agent, data = config.build()
    spy = Spy()
    trainer = fit(agent, data, 2, [WeightSync(2), spy])
    torch.save(
        {
            "weights": {name: value.clone() for name, value in agent.state_dict().items()},
            "optimizer": agent.optimizers().optimizer.state_dict(),  # type: ignore[union-attr]
            "frames": data.frames,
            "updates": agent.updates,
            "first": torch.stack(spy.first),
            "configured": config.train.total_frames,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


def batches() -> list[TensorDict]:
    """One batch per rank; the second has fewer valid steps."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    out = []
    for masked in (1, 9):
        shape = (ENVS, STEPS)
        valid = torch.ones(ENVS * STEPS, 1, dtype=torch.bool)
        valid[:masked] = False
        done = torch.zeros(*shape, 1, dtype=torch.bool)
        out.append(
            TensorDict(
                {
                    "observation": random(*shape, 4),
                    "action": torch.randint(2, shape, generator=generator),
                    "action_log_prob": random(*shape) * 0.1 - 0.7,
                    "logits": random(*shape, 2),
                    "is_init": done.clone(),
                    "valid": valid.view(*shape, 1),
                    "next": {
                        "observation": random(*shape, 4),
                        "reward": random(*shape, 1),
                        "done": done.clone(),
                        "terminated": done.clone(),
                    },
                },
                batch_size=shape,
            )
        )
    return out


class Once:
    """A stream of one batch."""

    def __init__(self, batch: TensorDictBase) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDictBase]:
        yield self.batch


class FixedData(pl.LightningDataModule):
    """One batch: the rank's own, or the joined one."""

    frames = 0

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def train_dataloader(self) -> Once:
        own = batches()
        return Once(own[self.trainer.global_rank] if self.ranks > 1 else torch.cat(own))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


def sgd(params: Iterator[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def make_loss(name: str) -> Any:
    """IMPALA's of either reduction; ACER's, whose average policy is far enough for its trust region; or TRPO's."""
    sizes: dict[str, Any] = {"network": "mlp", "observation_shape": [4], "num_actions": 2, "hidden": [8]}
    if name == "trpo":
        value = build_value(observation_shape=[4], hidden=[8])
        return TRPOLoss(build_policy(**sizes, critic=None), value, delta=0.1, cg_iterations=5)
    if name != "acer":
        return ImpalaLoss(build_policy(**sizes), reduction=name, normalize_advantage=name == "mean")
    loss = ACERLoss(build_policy(**sizes, critic="q"), delta=0.01, normalize_advantage=True)
    for average in loss.target_policy_params.values(True, True):
        average.data += 0.3 * torch.randn(average.shape)
    return loss


def gradients(folder: Path, ranks: int) -> None:
    for name in LOSSES:
        torch.manual_seed(0)
        loss = make_loss(name)
        parameters = [(key, value) for key, value in loss.named_parameters() if not key.startswith("target_")]
        before = {key: value.detach().clone() for key, value in parameters}
        update = trust_region_update(loss, critic_steps=2) if name == "trpo" else None
        agent = Agent(loss, loss.policy, optimizer=partial(sgd), total_frames=1, schedule="constant", update=update)
        trainer = fit(agent, FixedData(ranks), ranks)
        moved = {key: before[key] - value.detach() for key, value in parameters}
        if name == "trpo":  # what it says of the step is of all ranks
            told = agent.pop_metrics()
            moved |= {key: torch.tensor(told[key]) for key in ("surrogate_new", "kl_new", "step_fraction")}
        torch.save(moved, folder / f"{name}{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    if sys.argv[1] == "gradients":
        gradients(out, ranks=2)
    else:
        train(out, sys.argv[1])
