"""Run by test_ddp.py: Lightning's fit on two gloo ranks. Writes what each rank saw into a folder.

python ddp_script.py train FOLDER        each with its own CartPole environments
python ddp_script.py rewards FOLDER        likewise PPO, which normalises rewards, in Pendulum
python ddp_script.py gradients FOLDER        one update on fixed batches with unequal masks, by SGD, with each loss
python ddp_script.py ray FOLDER        by SGD, each with its own actors on one Ray cluster
"""

from __future__ import annotations

import contextlib
import os
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
from offtrace.agents.impala import ImpalaConfig, control_config, make_impala
from offtrace.agents.ppo import pendulum_config
from offtrace.agents.trpo import trust_region_update
from offtrace.modules.keys import FINALS
from offtrace.modules.losses import ACERLoss, ImpalaLoss, TRPOLoss
from offtrace.modules.networks import build_policy, build_value

ENVS, STEPS, UPDATES = 3, 5, 6
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


class Stream:
    """Of these batches."""

    def __init__(self, *batches: TensorDictBase) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TensorDictBase]:
        return iter(self.batches)


class FixedData(pl.LightningDataModule):
    """Batches of all ranks, in turn; those of this rank, or joined for one."""

    frames = 0

    def __init__(self, ranks: int, of_ranks: list[list[TensorDict]]) -> None:
        super().__init__()
        self.ranks, self.of_ranks = ranks, of_ranks

    def train_dataloader(self) -> Stream:
        if self.ranks > 1:
            return Stream(*self.of_ranks[self.trainer.global_rank])
        return Stream(*(torch.cat(together) for together in zip(*self.of_ranks, strict=True)))

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
        trainer = fit(agent, FixedData(ranks, [[batch] for batch in batches()]), ranks)
        moved = {key: before[key] - value.detach() for key, value in parameters}
        if name == "trpo":  # what it says of the step is of all ranks
            told = agent.pop_metrics()
            moved |= {key: torch.tensor(told[key]) for key in ("surrogate_new", "kl_new", "step_fraction")}
        torch.save(moved, folder / f"{name}{trainer.global_rank}.pt")


class Recorder(pl.Callback):
    """Keeps every batch, as it came."""

    def __init__(self) -> None:
        self.batches: list[TensorDict] = []

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: TensorDict, batch_idx: int) -> None:
        self.batches.append(batch.exclude(FINALS).clone())  # which is made anew for the joined one


def ray_config(address: str) -> ImpalaConfig:
    """Of two learners, each with one actor."""
    config = control_config()
    config.collector.backend, config.collector.address, config.collector.placement = "ray", address, "near"
    config.collector.num_workers, config.env.num_envs, config.collector.unroll = 1, 4, 8
    config.train.minibatches = config.train.epochs = 1
    config.train.devices = 2
    config.train.total_frames = 4 * 8 * 2 * UPDATES
    return config


def sgd_agent(config: ImpalaConfig) -> tuple[Agent, Any]:
    """Its updates are linear in the gradients, so that rounding stays what it is."""
    pl.seed_everything(config.train.seed, verbose=False)
    agent, data = make_impala(config)
    optimizer = partial(torch.optim.SGD, lr=0.05)
    return Agent(agent.loss, agent.policy, optimizer=optimizer, total_frames=1, schedule="constant"), data


def on_ray(folder: Path) -> None:
    """On a cluster of two nodes, each with room for one actor."""
    from ray.cluster_utils import Cluster

    with contextlib.ExitStack() as ending:
        if "LOCAL_RANK" not in os.environ:  # else this is the second learner
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            ending.callback(cluster.shutdown)
            cluster.add_node(num_cpus=1)
            os.environ["CLUSTER"] = cluster.address
        agent, data = sgd_agent(ray_config(os.environ["CLUSTER"]))
        recorder = Recorder()
        trainer = fit(agent, data, 2, [WeightSync(1), recorder])
        kept = {"weights": dict(agent.state_dict()), "batches": recorder.batches}
        torch.save(kept, folder / f"rank{trainer.global_rank}.pt")
        trainer.strategy.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    if sys.argv[1] == "ray":
        on_ray(out)
    elif sys.argv[1] == "gradients":
        gradients(out, ranks=2)
    else:
        train(out, sys.argv[1])
