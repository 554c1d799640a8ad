"""ACER as an agent: what its settings mean, what they refuse, and a run that is stopped and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from offtrace.agents.acer import ACERConfig, control_config, make_acer, pendulum_config
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.config import ConfigError, NetworkConfig
from offtrace.agents.config.base import NORMAL_SCALES
from offtrace.agents.data import MixedData, RolloutData
from offtrace.modules.networks import NormalHead
from tests.agents.renewal import NewEnvironments

ENVS, UNROLL = 4, 6
ROLLOUT = ENVS * UNROLL


def small(rollouts: int) -> ACERConfig:
    config = control_config()
    config.env.num_envs, config.collector.unroll, config.collector.num_workers = ENVS, UNROLL, 0
    config.network.hidden = [16]
    config.replay.capacity, config.replay.min_size, config.replay.ratio = 500, 2 * ROLLOUT, 1.5
    config.train.total_frames, config.train.accelerator = rollouts * ROLLOUT, "cpu"
    return config


class StopAt(pl.Callback):
    """Ends the run when so many frames are done and nothing is owed, as a machine that goes down would."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.datamodule.frames >= self.frames and not trainer.datamodule.owed:
            trainer.should_stop = True


def fit(config: ACERConfig, folder: Path, *, stop: int, resume: Path | None = None, renew: int = 0) -> Any:
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    agent, data = make_acer(config)
    assert isinstance(data, MixedData)
    data.folder = folder.parent / "replay"
    callbacks = [WeightSync(1), Checkpoints(folder, every=10**9), StopAt(stop * ROLLOUT)]
    if renew:
        callbacks.append(NewEnvironments(data, renew * ROLLOUT))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return agent, data


def test_k_and_k_updates_are_2k(tmp_path: Path) -> None:
    """Bit for bit: weights, the average policy, replay and counters."""
    k, config = 6, small(12)
    half, _ = fit(config, tmp_path / "one" / "a", stop=k)
    resumed, resumed_data = fit(config, tmp_path / "one" / "b", stop=2 * k, resume=tmp_path / "one" / "a" / "last.ckpt")
    whole, data = fit(config, tmp_path / "other" / "c", stop=2 * k, renew=k)
    assert data.frames == resumed_data.frames == 2 * k * ROLLOUT
    assert data.replayed_frames == resumed_data.replayed_frames > 0
    assert resumed.updates == whole.updates > half.updates
    names = [name for name in whole.state_dict() if "target" in name]
    assert names
    assert any(not torch.equal(half.state_dict()[name], whole.state_dict()[name]) for name in names)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_average_policy_moves_by_its_share_after_every_update() -> None:
    config = small(4)
    config.optim.average_decay = 0.75
    agent, _ = make_acer(config)
    before = [x.clone() for x in agent.loss.target_policy_params.values(True, True)]
    with torch.no_grad():
        for parameter in agent.loss.policy_params.parameters():
            parameter.add_(1.0)
    agent._after_update(1)
    for old, average in zip(before, agent.loss.target_policy_params.values(True, True), strict=True):
        torch.testing.assert_close(average, old + 0.25)


def test_without_a_trust_region_there_is_no_average_policy(tmp_path: Path) -> None:
    config = small(4)
    config.loss.delta = None
    agent, _ = fit(config, tmp_path / "a", stop=4)
    assert agent.updates > 4
    assert not [name for name in agent.state_dict() if "target" in name]
    config = pendulum_config()
    config.loss.delta = None
    agent, _ = make_acer(config)
    follows = {name.split(".")[1] for name in agent.state_dict() if "target" in name}
    assert follows == {"target_value_params", "target_advantage_params"}
    config.loss.average_critic = False
    agent, _ = make_acer(config)
    assert agent._after_update is None


def test_without_replay_the_data_are_rollouts() -> None:
    config = small(4)
    config.replay.ratio = 0.0
    config.replay.min_size = 10**6
    config.replay.capacity = 10**6
    config.validate()
    assert isinstance(make_acer(config)[1], RolloutData)


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("replay", "ratio", -1.0, r"replay\.ratio is -1\.0; it must be at least 0"),
        ("replay", "ratio", float("inf"), r"replay\.ratio is inf; it must be finite"),
        ("replay", "capacity", 10, r"replay\.capacity is 10; it must hold replay\.min_size, 48"),
        (
            "replay",
            "min_size",
            10,
            r"replay\.min_size is 10; for batches of 4 sequences of 6 steps from 4 environments",
        ),
        ("replay", "capacity", 50, r"replay\.capacity is 50; for 4 environments and a collector\.unroll of 6"),
        ("train", "total_frames", 48, r"replay\.min_size is 48; train\.total_frames, 48, .* nothing would be replayed"),
        ("collector", "unroll", 1, r"collector\.unroll is 1; a replay holds sequences as long: it must be at least 2"),
        ("loss", "clip", 0.0, r"loss\.clip is 0\.0; it must be above 0"),
        ("loss", "delta", -1.0, r"loss\.delta is -1\.0; it must be above 0, or null"),
        ("loss", "estimator", "gae", r"loss\.estimator: estimator 'gae' is of state values"),
        ("optim", "average_decay", 1.0, r"optim\.average_decay is 1\.0; it must be at least 0 and below 1"),
        ("loss", "estimator", "n_step(n=3)", r"n_step\(n=3\), which learns from the first step of a sequence alone"),
    ],
)
def test_what_cannot_be_is_one_sentence(group: str, name: str, value: Any, words: str) -> None:
    config = small(12)
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_what_only_continuous_actions_have_is_refused() -> None:
    config = small(12)
    config.loss.learn_scale = True
    with pytest.raises(ConfigError, match=r"loss\.learn_scale is True; ACERLoss has no such argument"):
        config.build()
    config = small(12)
    config.network.init_scale = 0.5
    with pytest.raises(ConfigError, match=r"network\.init_scale is 0\.5; the actions of CartPole-v1 are discrete"):
        config.build()
    config = small(12)
    config.env.task, config.loss.estimator = "Pendulum-v1", "tree_backup"
    with pytest.raises(ConfigError, match=r"loss\.estimator is tree_backup, which needs probabilities of discrete"):
        config.validate()


@pytest.mark.parametrize(
    ("task", "group", "name", "value", "words"),
    [
        (
            "CartPole-v1",
            "network",
            "critic_hidden",
            [3],
            r"network\.critic_hidden is \[3\]; the actions of CartPole-v1",
        ),
        (
            "CartPole-v1",
            "loss",
            "estimator",
            "retrace(root=3)",
            r"retrace\(root=3\), whose root is for continuous actions",
        ),
        (
            "Pendulum-v1",
            "loss",
            "entropy_coef",
            0.1,
            r"loss\.entropy_coef is 0\.1; it must be 0, since .* loss\.learn_scale false",
        ),
        (
            "Pendulum-v1",
            "network",
            "init_scale",
            1e-4,
            r"network\.init_scale is 0\.0001; it must be from 0\.006738 to 7\.389",
        ),
        ("Pendulum-v1", "network", "init_scale", 10.0, r"network\.init_scale is 10\.0; it must be from .* or null"),
    ],
)
def test_what_would_be_ignored_is_refused(task: str, group: str, name: str, value: Any, words: str) -> None:
    config = small(12)
    config.env.task = task
    config.validate()
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_a_scale_at_the_start_is_one_that_the_head_keeps() -> None:
    with pytest.raises(ConfigError, match=r"network\.init_scale is 8\.0; it must be from 0\.006738 to 7\.389, where"):
        NetworkConfig(init_scale=8.0).check("network")
    for scale in NORMAL_SCALES:
        NetworkConfig(init_scale=scale).check("network")
        found = NormalHead(3, 1, init_scale=scale)(torch.zeros(1, 3))[1]
        assert float(found.detach()) == pytest.approx(scale)


def test_what_the_other_actions_have_a_use_for_is_taken() -> None:
    config = small(12)
    config.loss.estimator, config.loss.entropy_coef = "retrace(root=1)", 0.1
    config.validate()
    config.env.task, config.loss.estimator, config.loss.learn_scale = "Pendulum-v1", "retrace(root=3)", True
    config.network.critic_hidden, config.network.init_scale = [3], 0.01
    config.validate()


def test_a_replay_beyond_memory_is_refused() -> None:
    config = small(12)
    config.replay.capacity = 10**12
    with pytest.raises(ConfigError, match=r"replay\.capacity is 10{12}; steps of \d+ bytes take"):
        config.build()
