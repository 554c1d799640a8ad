"""Reactor as an agent: what its settings mean, what they refuse, and a run that is stopped and goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from offtrace.agents.assemble import read_task
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.config import ConfigError
from offtrace.agents.config.resources import bytes_per_step
from offtrace.agents.data import ReplayData
from offtrace.agents.reactor import ReactorConfig, atari_config, make_reactor, memory_config, paper_config
from offtrace.modules.networks import SeparateCores
from tests.agents.renewal import NewEnvironments

ENVS, UNROLL = 4, 6
ROLLOUT = ENVS * UNROLL


def small(rollouts: int) -> ReactorConfig:
    """With two LSTMs, distributions and priorities."""
    config = memory_config()
    config.env.num_envs, config.collector.unroll = ENVS, UNROLL
    config.network.hidden, config.network.recurrent, config.network.atoms = [16], 8, 11
    config.replay.capacity, config.replay.min_size = 500, 2 * ROLLOUT
    config.replay.length, config.replay.batch_size, config.replay.samples_per_insert = 5, 20, 5.0
    config.optim.target_every, config.train.total_frames, config.train.accelerator = 5, rollouts * ROLLOUT, "cpu"
    return config


class StopAt(pl.Callback):
    """Ends the run when so many frames are done and nothing is owed, as a machine that goes down would."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        data = trainer.datamodule
        if data.frames >= self.frames and not data.limiter.may_sample(data.batch_size):
            trainer.should_stop = True


def fit(config: ReactorConfig, folder: Path, *, stop: int, resume: Path | None = None, renew: int = 0) -> Any:
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    agent, data = make_reactor(config)
    assert isinstance(data, ReplayData)
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


SLOW_FORMS: list[dict[str, Any]] = [
    {"sampler": "prioritized"},
    {"sampler": "uniform"},
    {"sampler": "uniform", "whole_episodes": True},
]


@pytest.mark.parametrize(
    "form", [{"sampler": "lazy", "burn_in": 3}, *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW_FORMS)]
)
def test_k_and_k_updates_are_2k(tmp_path: Path, form: dict[str, Any]) -> None:
    """Bit for bit: weights, targets, replay with its recurrent states and priorities, and counters."""
    k, config = 6, small(12)
    for name, value in form.items():
        setattr(config.replay, name, value)
    half, _ = fit(config, tmp_path / "one" / "a", stop=k)
    resumed, resumed_data = fit(config, tmp_path / "one" / "b", stop=2 * k, resume=tmp_path / "one" / "a" / "last.ckpt")
    whole, data = fit(config, tmp_path / "other" / "c", stop=2 * k, renew=k)
    assert data.frames == resumed_data.frames == 2 * k * ROLLOUT
    assert resumed.updates == whole.updates > half.updates > 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        if value.is_floating_point() and not name.endswith("support"):
            assert not torch.equal(value, half.state_dict()[name]), name
    starts = data.replay._rings.starts
    assert (starts == resumed_data.replay._rings.starts).all()
    one, other = (found.replay._batches.sequences(starts, {}) for found in (data, resumed_data))
    assert {"recurrent_h", "recurrent_c"} <= set(one.keys())
    for key, value in one.items(True, True):
        assert torch.equal(value, other[key]), key
    named = data.replay._rings.sampled(starts)
    assert (named == resumed_data.replay._rings.sampled(starts)).all()
    arrays, numbers = data.replay.sampler.save(named)
    others, other_numbers = resumed_data.replay.sampler.save(named)
    assert numbers == other_numbers
    assert all((array == others[name]).all() for name, array in arrays.items())


def test_the_replay_gives_back_the_state_in_which_the_actor_was(tmp_path: Path) -> None:
    """The recurrent state before a sequence's first step, and under ``next``, with what the cores read beside."""
    config = small(12)
    _, data = fit(config, tmp_path / "a", stop=8)
    batch = data.replay.sample(200)
    assert batch["recurrent_h"].shape == (200, 5, 16)
    moving = ~batch["is_init"][:, 0, 0]
    assert batch["recurrent_h"][moving, 0].any(-1).all()
    assert not batch["recurrent_h"][~moving, 0].any()
    assert (~moving).any()
    valid = batch["valid"].squeeze(-1)
    inside = valid[:, 1:] & valid[:, :-1]
    for key in ("recurrent_h", "recurrent_c", "last_reward"):
        assert torch.equal(batch["next", key][:, :-1][inside], batch[key][:, 1:][inside])
    assert torch.equal(batch["last_action"][:, 1:][inside], batch["action"][:, :-1][inside])


def test_the_target_network_is_copied_every_so_many_updates() -> None:
    agent, _ = make_reactor(small(4))
    loss = agent.loss
    with torch.no_grad():
        for parameter in loss.policy_params.parameters():
            parameter.add_(1.0)
    for update in range(1, 6):
        agent._after_update(update)
        pairs = zip(loss.target_policy_params.values(True, True), loss.policy_params.values(True, True), strict=True)
        same = [torch.equal(a, b) for a, b in pairs if b.dim() != 0]
        assert all(same) == (update == 5)


def test_the_optimiser_is_adam_without_momentum() -> None:
    agent, _ = make_reactor(small(4))
    (group,) = agent.configure_optimizers().param_groups
    assert group["betas"] == (0.0, 0.999)
    config = small(4)
    config.optim.beta1 = 0.9
    (group,) = make_reactor(config)[0].configure_optimizers().param_groups
    assert group["betas"] == (0.9, 0.999)
    assert (paper_config().optim.lr, paper_config().optim.target_every) == (5e-5, 1000)


def test_the_network_is_the_papers_where_it_is_known() -> None:
    agent, _ = make_reactor(small(4))
    net = agent.policy.network
    assert isinstance(net.core, SeparateCores)
    assert net.core.detach_policy
    assert net.value_head.state is not None, "dueling"
    assert net.head.epsilon == 0.01
    config = small(4)
    config.network.recurrent, config.network.atoms = 0, 0
    net = make_reactor(config)[0].policy.network
    assert net.core is None
    assert net.detach_policy


def test_the_papers_numbers() -> None:
    for config in (atari_config(), paper_config()):
        config.validate()
        assert (config.replay.length, config.sequences_per_batch) == (32, 4)
        assert (config.replay.alpha, config.replay.beta) == (1.0, 1.0)
    assert config.replay.batch_size / config.replay.samples_per_insert == 4
    assert config.collector.num_workers == 10


def test_any_estimator_of_every_step_learns_from_sequences() -> None:
    config = small(4)
    config.loss.estimator = "one_step"
    config.validate()
    assert config.samples == (5, True)
    assert config.sequences_per_batch == 4
    config.replay.batch_size = 21
    with pytest.raises(ConfigError, match=r"replay\.batch_size is 21; .* sequences of replay\.length, 5, steps"):
        config.validate()


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("env", "task", "Pendulum-v1", r"whose actions are continuous; reactor needs discrete ones"),
        ("replay", "capacity", 60, r"replay\.capacity is 60; for 4 environments and a collector\.unroll of 6"),
        ("replay", "length", 1, r"replay\.length is 1; Reactor's samples are sequences: at least 2"),
        ("replay", "length", 6, r"replay\.batch_size is 20; .* sequences of replay\.length, 6, steps"),
        ("replay", "burn_in", -1, r"replay\.burn_in is -1; it must be at least 0"),
        ("replay", "whole_episodes", True, r"replay\.sampler is lazy; with replay\.whole_episodes .* must be uniform"),
        ("replay", "epsilon", 1.1, r"replay\.epsilon is 1\.1; it must be between 0 and 1"),
        ("replay", "min_size", 10, r"replay\.min_size is 10; for batches of 4 sequences of 5 steps"),
        ("loss", "clip", 0.0, r"loss\.clip is 0\.0; it must be above 0; inf never truncates"),
        ("loss", "estimator", "n_step(n=3)", r"n_step\(n=3\), which learns from the first step of a sequence alone"),
        ("loss", "estimator", "gae", r"loss\.estimator: estimator 'gae' is of state values"),
        ("network", "epsilon", 1.0, r"network\.epsilon is 1\.0; it must be at least 0 and below 1"),
        ("network", "atoms", 1, r"network\.atoms is 1; it must be 0, or at least 2"),
        ("network", "recurrent", -1, r"network\.recurrent is -1; it must be at least 0"),
        ("optim", "beta1", 1.0, r"optim\.beta1 is 1\.0; it must be at least 0 and below 1"),
        ("optim", "target_every", 0, r"optim\.target_every is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_sentence(group: str, name: str, value: Any, words: str) -> None:
    config = small(12)
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_whole_episodes_need_room_for_the_sequence_before() -> None:
    config = small(12)
    config.env.num_envs, config.collector.unroll = 4, 2
    config.replay.sampler, config.replay.whole_episodes = "uniform", True
    config.replay.length, config.replay.batch_size, config.replay.min_size = 20, 40, 80
    config.replay.capacity = 4 * (2 * 2 + 20)
    words = (
        r"^replay\.capacity is 96; for 4 environments and replay\.whole_episodes, where the 20 steps before a sequence "
        r"are in front of it, it must be at least 176$"
    )
    with pytest.raises(ConfigError, match=words):
        config.validate()
    config.replay.capacity = 176
    config.validate()


def test_a_variation_needs_distributions() -> None:
    config = small(12)
    config.loss.priority, config.network.atoms = "total_variation", 0
    with pytest.raises(ConfigError, match=r"loss\.priority is total_variation, and network\.atoms 0"):
        config.validate()


def test_a_priority_that_is_no_number_is_one_sentence(tmp_path: Path) -> None:
    _, data = fit(small(12), tmp_path / "a", stop=4)
    batch = data.sample()
    batch["td_error"] = torch.full(batch.shape, math.nan)
    with pytest.raises(ValueError, match=r"priority\[0\] is nan; it must be at least 0 and finite"):
        data.feedback(batch)


@pytest.mark.parametrize("recurrent", [0, 8])
def test_what_a_step_takes_in_the_replay_is_known_before(recurrent: int, tmp_path: Path) -> None:
    config = small(12)
    config.network.recurrent = recurrent
    _, data = fit(config, tmp_path / "a", stop=3)
    assert data.replay.bytes_per_slot == bytes_per_step(config, read_task(config))
    config.replay.capacity = 10**12
    with pytest.raises(ConfigError, match=r"replay\.capacity is 10{12}; steps of \d+ bytes take"):
        config.build()
