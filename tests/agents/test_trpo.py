"""TRPO's agent: one update a rollout, what the log says of it, and a gradient that is not finite."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from offtrace.agents.agent import TrainingDivergedError
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.trpo import TRPOConfig, atari_config, control_config, make_trpo

ROLLOUTS, CRITIC_STEPS = 4, 3


def tiny() -> TRPOConfig:
    config = control_config()
    config.env.num_envs, config.collector.unroll = 4, 8
    config.optim.critic_steps, config.train.total_frames = CRITIC_STEPS, 32 * ROLLOUTS
    return config


def fit(config: TRPOConfig, *callbacks: pl.Callback) -> Any:
    torch.manual_seed(0)
    agent, data = make_trpo(config)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WeightSync(1), *callbacks],
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent, data, trainer


def weights(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Spy(pl.Callback):
    """The weights before and after every update, what is told of it, and who had acted."""

    def __init__(self) -> None:
        self.policies: list[dict[str, Tensor]] = []
        self.values: list[dict[str, Tensor]] = []
        self.told: list[dict[str, float]] = []
        self.batches: list[Any] = []
        self.alone: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: Any, batch_idx: int) -> None:
        self.policies.append(weights(agent.loss.policy))
        self.values.append(weights(agent.loss.value))
        self.batches.append(batch)
        alone = copy.deepcopy(agent.loss)
        alone.improve(batch.clone())
        self.alone.append(weights(alone.policy))

    def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
        self.told.append(agent.pop_metrics())


def test_an_update_is_a_step_of_the_policy_and_several_of_the_value() -> None:
    spy = Spy()
    agent, data, trainer = fit(tiny(), spy)
    assert agent.updates == ROLLOUTS
    assert data.frames == 32 * ROLLOUTS
    steps = {int(state["step"]) for state in trainer.optimizers[0].state_dict()["state"].values()}
    assert steps == {ROLLOUTS * CRITIC_STEPS}
    optimised = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {*agent.loss.value.parameters()}
    for moved in (spy.policies, spy.values):
        for before, after in pairwise(moved):
            assert all(not torch.equal(before[name], after[name]) for name in before)
    for batch, alone, after in zip(
        spy.batches, spy.alone, [*spy.policies[1:], weights(agent.loss.policy)], strict=True
    ):
        assert batch.shape == (4, 8)
        assert all(torch.equal(alone[name], after[name]) for name in alone), "the step is that of the whole rollout"
    for told in spy.told:
        assert told["kl_new"] <= 0.01
        assert told["surrogate_new"] > told["surrogate"]
        assert 0 < told["step_fraction"] <= 1
        assert told["line_search_failed"] == 0
        assert told["policy_grad_norm"] > 0
        assert told["grad_norm"] > 0
        assert told["ratio_mean"] == pytest.approx(1, abs=1e-5), "the policy that acted is the one that learns"
        assert {"entropy", "explained_variance", "loss_value", "kl", "valid_count"} <= told.keys()


class Poison(pl.Callback):
    """Makes what the policy learns from infinite, or what the value does."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.before = weights(agent)
            batch[self.key][0, 0] = torch.inf


@pytest.mark.parametrize("key", ["advantage", "value_target"])
def test_a_diverging_update_is_refused(key: str, tmp_path: Path) -> None:
    poison = Poison(key)
    with pytest.raises(TrainingDivergedError, match=r"the gradient's norm is (nan|inf) at update 2"):
        fit(tiny(), Checkpoints(tmp_path, 10**9), poison)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    kept = [name for name in saved if key == "advantage" or ".value." in name]
    assert kept
    assert all(torch.equal(poison.before[name], saved[name]) for name in kept)
    assert all(value.isfinite().all() for value in saved.values())


def test_images_are_not_normalised() -> None:
    config = atari_config()
    config.network.normalize = True
    config.validate()
    agent, data = make_trpo(config)
    data.shutdown()
    assert not [name for name, _ in agent.loss.named_modules() if name.endswith("normalizer")]
