"""A run that was stopped and continued is the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from offtrace.agents import ppo, trpo
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.config import RolloutConfig
from offtrace.agents.impala import ImpalaConfig, control_config
from tests.agents.renewal import NewEnvironments

ENVS, UNROLL, MINIBATCHES, EPOCHS = 4, 8, 2, 2
ROLLOUT = ENVS * UNROLL


def config_for(rollouts: int, recurrent: int = 0) -> ImpalaConfig:
    config = control_config()
    config.collector.num_workers = 0
    config.env.num_envs, config.collector.unroll = ENVS, UNROLL
    config.train.minibatches, config.train.epochs = MINIBATCHES, EPOCHS
    config.train.total_frames = rollouts * ROLLOUT
    config.optim.schedule = "linear"
    config.network.recurrent = recurrent
    return config


def trpo_config(rollouts: int) -> trpo.TRPOConfig:
    config = trpo.control_config()
    config.env.num_envs, config.collector.unroll = ENVS, UNROLL
    config.optim.critic_steps, config.optim.schedule = 3, "linear"
    config.train.total_frames = rollouts * ROLLOUT
    return config


def ppo_config(rollouts: int) -> ppo.PPOConfig:
    config = ppo.pendulum_config()
    config.loss.normalize_reward = True
    config.env.num_envs, config.collector.unroll = ENVS, UNROLL
    config.train.minibatches, config.train.epochs = MINIBATCHES, EPOCHS
    config.train.total_frames = rollouts * ROLLOUT
    return config


class StopAfter(pl.Callback):
    """Ends the run after some updates, as a machine that goes down would."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
        if agent.updates >= self.updates:
            trainer.should_stop = True


def run(
    config: RolloutConfig,
    folder: Path,
    *,
    stop: float,
    resume: Path | None = None,
    renew: int = 0,
    more: list[pl.Callback] | None = None,
) -> Any:
    """``stop`` in rollouts, which need not be whole ones."""
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    agent, data = config.build()
    per_rollout = config.updates_per_push()
    callbacks = [WeightSync(per_rollout), Checkpoints(folder, every=10**9)]
    callbacks += [StopAfter(round(stop * per_rollout)), *(more or [])]
    if renew:
        callbacks.append(NewEnvironments(data, renew * ROLLOUT))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return agent, data, trainer


@pytest.mark.parametrize("kind", ["feed-forward", "recurrent", "trpo", "ppo"])
def test_k_and_k_updates_are_2k(tmp_path: Path, kind: str) -> None:
    """Both arms get new environments after k rollouts, because an emulator's state is not in a checkpoint.

    Bit for bit the same weights, moments, frames, updates and learning rate.
    """
    k = 3
    config: RolloutConfig = config_for(6, 8 if kind == "recurrent" else 0)
    config = {"trpo": trpo_config, "ppo": ppo_config}[kind](6) if kind in ("trpo", "ppo") else config
    half, half_data, _ = run(config, tmp_path / "a", stop=k)
    assert half_data.frames == k * ROLLOUT
    resumed, resumed_data, resumed_trainer = run(
        config, tmp_path / "b", stop=2 * k, resume=tmp_path / "a" / "last.ckpt"
    )
    whole, data, trainer = run(config, tmp_path / "c", stop=2 * k, renew=k)

    assert resumed_data.frames == data.frames == 2 * k * ROLLOUT
    assert resumed.updates == whole.updates == 2 * k * config.updates_per_push()
    assert any(not torch.equal(half.state_dict()[name], value) for name, value in whole.state_dict().items())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    if kind == "ppo":  # the statistics of rewards are among them
        assert whole.state_dict()["loss.reward_normalizer.returns.count"] == 2 * k * ROLLOUT
    ours, theirs = trainer.optimizers[0].state_dict(), resumed_trainer.optimizers[0].state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, moments in ours["state"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][name])), name


class Lags(pl.Callback):
    """The lag told for every update."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.told.append(next(c.lag_mean for c in trainer.callbacks if isinstance(c, WeightSync)))


def test_a_run_stopped_inside_a_rollout_goes_on_in_step(tmp_path: Path) -> None:
    """Weights are pushed at the end of a rollout again, wherever in one the run was stopped."""
    config = config_for(4, 0)
    lags = Lags()
    run(config, tmp_path / "a", stop=1.25)
    agent, data, _ = run(config, tmp_path / "b", stop=10**6, resume=tmp_path / "a" / "last.ckpt", more=[lags])
    per_rollout = MINIBATCHES * EPOCHS
    assert agent.updates % per_rollout, "the run was stopped at the end of a rollout"
    assert lags.told == [*range(per_rollout)] * (len(lags.told) // per_rollout)
    assert data.episodes.count > 0


def test_resuming_is_not_starting_again(tmp_path: Path) -> None:
    """The test above could pass if nothing were restored but the weights: without the random state it must fail."""
    config = config_for(4)
    run(config, tmp_path / "a", stop=2)
    path = tmp_path / "a" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    resumed, *_ = run(config, tmp_path / "b", stop=4, resume=path)
    checkpoint["offtrace"]["random"]["torch"] = torch.Generator().manual_seed(5).get_state()
    other = tmp_path / "other.ckpt"
    torch.save(checkpoint, other)
    different, *_ = run(config, tmp_path / "c", stop=4, resume=other)
    assert any(not torch.equal(v, different.state_dict()[n]) for n, v in resumed.state_dict().items())
