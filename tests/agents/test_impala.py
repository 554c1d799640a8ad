"""IMPALA as an agent: without a replay, with one, and a run that is stopped and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.config import ConfigError
from offtrace.agents.config.resources import bytes_per_step
from offtrace.agents.data import MixedData, RolloutData
from offtrace.agents.impala import (
    ImpalaConfig,
    control_config,
    laser_config,
    laser_control_config,
    make_impala,
    paper_config,
    replay_config,
)
from offtrace.modules.envs import env_info
from offtrace.modules.estimators import GAE, VTrace
from tests.agents.renewal import NewEnvironments
from tests.agents.test_acer import StopAt

ENVS, UNROLL = 8, 6
ROLLOUT = ENVS * UNROLL


def small(rollouts: int) -> ImpalaConfig:
    """Two fresh rows and as many replayed ones in a batch, in one pass."""
    config = control_config()
    config.env.num_envs, config.collector.unroll, config.collector.num_workers = ENVS, UNROLL, 0
    config.network.hidden = [16]
    config.replay.share, config.replay.capacity, config.replay.min_size = 0.5, 1000, 2 * ROLLOUT
    config.train.minibatches, config.train.epochs = 4, 1
    config.train.total_frames, config.train.accelerator = rollouts * ROLLOUT, "cpu"
    return config


def fit(config: ImpalaConfig, folder: Path, *, stop: int, resume: Path | None = None, renew: int = 0) -> Any:
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    config.validate()
    agent, data = make_impala(config)
    assert isinstance(data, MixedData)
    data.folder = folder.parent / "replay"
    callbacks = [WeightSync(config.updates_per_push()), Checkpoints(folder, every=10**9), StopAt(stop * ROLLOUT)]
    if renew:
        callbacks.append(NewEnvironments(data, renew * ROLLOUT))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return agent, data


def assert_k_and_k_are_2k(config: ImpalaConfig, folder: Path) -> Any:
    """Bit for bit: weights, samples to come and counters. Both arms get new environments after k rollouts."""
    k = config.train.total_frames // ROLLOUT // 2
    half, _ = fit(config, folder / "one" / "a", stop=k)
    resumed, resumed_data = fit(config, folder / "one" / "b", stop=2 * k, resume=folder / "one" / "a" / "last.ckpt")
    whole, data = fit(config, folder / "other" / "c", stop=2 * k, renew=k)
    assert data.frames == resumed_data.frames == 2 * k * ROLLOUT
    assert data.replayed_frames == resumed_data.replayed_frames > 0
    assert resumed.updates == whole.updates > half.updates
    assert any(not torch.equal(half.state_dict()[name], value) for name, value in whole.state_dict().items())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (data.replay.sample() == resumed_data.replay.sample()).all()
    return whole, data


FORMS: dict[str, dict[str, Any]] = {
    "replay": {},
    "laser": {"loss__max_kl": 1e-4, "loss__entropy_on_replay": False},
    "recurrent": {"network__recurrent": 8},
    "burn_in": {"network__recurrent": 8, "replay__burn_in": 5},
    "whole_episodes": {"network__recurrent": 8, "replay__whole_episodes": True},
}


def changed(config: ImpalaConfig, **changes: Any) -> ImpalaConfig:
    for path, value in changes.items():
        group, name = path.split("__")
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize("form", FORMS)
def test_k_and_k_updates_are_2k(form: str, tmp_path: Path) -> None:
    config = changed(small(12), **FORMS[form])
    _, data = assert_k_and_k_are_2k(config, tmp_path)
    batches = 4 * (12 - 2)  # the replay fills with two rollouts
    assert data.replayed_frames == batches * 2 * UNROLL
    assert data.replay.bytes_per_slot == bytes_per_step(config, env_info(config.task, **config.env_options()))


def test_without_replay_the_agent_is_what_it_was() -> None:
    """The data are rollouts, and the number of learners may change."""
    config = small(4)
    assert not config.devices_may_change
    config.replay.share = 0.0
    config.replay.min_size = config.replay.capacity = 10**6
    config.validate()
    assert type(make_impala(config)[1]) is RolloutData
    assert config.devices_may_change
    assert paper_config().replay.form == {}


def test_how_the_state_is_renewed_is_seen_in_the_weights(tmp_path: Path) -> None:
    """Of three runs with the same rollouts until then; the sequences of the first two are the same."""
    found = []
    for form in ("recurrent", "burn_in", "whole_episodes"):
        config = changed(small(3), **FORMS[form])
        _, data = fit(config, tmp_path / form / "a", stop=3)
        found.append(data.replay)
        assert data.replay.length == UNROLL
        assert data.replay.burn_in == {"recurrent": 0, "burn_in": 5, "whole_episodes": UNROLL}[form]
    batches = [replay.sample(3)["index"][:, 0] for replay in found]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_batch_is_made_of_the_unrolls_of_several_actors(share: float, tmp_path: Path) -> None:
    """Counted once, and inserted as what each actor made."""
    config = small(12)
    config.collector.num_workers, config.train.unrolls, config.replay.share = 2, 2 * ENVS, share
    config.validate()
    agent, data = make_impala(config)
    seen: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            fresh = batch if batch.get("index", None) is None else batch[batch["index"][:, 0] < 0]
            seen.append((len(fresh), set() if share else set(fresh["worker"].unique().tolist())))

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if share:
                assert data.replay is not None
                workers = data.replay.sample(200)["index"][:, 0] % (2 * ENVS) // ENVS
                assert set(workers.tolist()) == {0, 1}
                assert data.replay.inserted == 12 * ROLLOUT

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[WeightSync(config.updates_per_push()), Watch()],
    )  # fmt: skip
    trainer.fit(agent, data)
    assert data.frames == 12 * ROLLOUT
    assert data.rollouts == 6
    assert agent.updates == 6 * 4
    assert all(number == 2 * ENVS // 4 for number, _ in seen)
    assert set().union(*(workers for _, workers in seen)) == (set() if share else {0, 1})


@pytest.mark.parametrize(
    ("unrolls", "minibatches", "words"),
    [
        (-8, 4, r"train\.unrolls is -8; it must be at least 0"),
        (12, 4, r"train\.unrolls is 12; .* it must be a multiple of env\.num_envs, 8"),
        (24, 4, r"train\.unrolls is 24; 2 actors \(collector\.num_workers\) of 8 environments .* can give 16"),
        (16, 3, r"train\.minibatches is 3; it must divide train\.unrolls, 16"),
    ],
)
def test_unrolls_that_actors_cannot_give_are_one_sentence(unrolls: int, minibatches: int, words: str) -> None:
    config = small(12)
    config.replay.share, config.collector.num_workers = 0.0, 2
    config.train.unrolls, config.train.minibatches = unrolls, minibatches
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_the_papers_form_of_replay() -> None:
    config = replay_config()
    config.validate()
    assert config.sequences_per_batch == config.env.num_envs == 16
    assert config.replay.capacity == 10_000 * 20


def test_the_papers_form_of_laser() -> None:
    for config in (laser_config(), laser_control_config()):
        config.validate()
        assert config.env.num_envs // config.train.minibatches == 4
        assert config.sequences_per_batch == 28
        assert config.loss.max_kl is not None
        assert not config.loss.entropy_on_replay
        assert config.train.epochs == 1


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("replay", "share", -0.1, r"replay\.share is -0\.1; it must be at least 0 and below 1"),
        ("replay", "share", 1.0, r"replay\.share is 1\.0; it must be at least 0 and below 1"),
        ("replay", "share", float("nan"), r"replay\.share is nan; it must be at least 0 and below 1"),
        (
            "replay", "share", 0.4,
            r"^replay\.share is 0\.4; a batch of 2 fresh rows would have 1\.33 replayed ones: the nearest share that "
            r"makes whole rows is 0\.333$",
        ),
        ("replay", "capacity", 10, r"replay\.capacity is 10; it must hold replay\.min_size, 96"),
        ("replay", "min_size", 10, r"replay\.min_size is 10; for batches of 2 sequences of 6 steps from 8 env"),
        ("train", "total_frames", 96, r"replay\.min_size is 96; train\.total_frames, 96, .* nothing would be replayed"),
        ("replay", "burn_in", -1, r"replay\.burn_in is -1; it must be at least 0"),
        (
            "replay", "burn_in", 3,
            r"^replay\.burn_in is 3; it renews a recurrent state, and the network has none: it must be 0, or "
            r"network\.recurrent above 0$",
        ),
        (
            "replay", "whole_episodes", True,
            r"^replay\.whole_episodes is true; it renews a recurrent state, and the network has none: it must be "
            r"false, or network\.recurrent above 0$",
        ),
        ("loss", "max_kl", 0.0, r"loss\.max_kl is 0\.0; it must be above 0, or null"),
        ("loss", "max_kl", float("nan"), r"loss\.max_kl is nan; it must be above 0, or null"),
        ("collector", "unroll", 1, r"collector\.unroll is 1; a replay holds sequences as long: it must be at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(group: str, name: str, value: Any, words: str) -> None:
    config = small(12)
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


@pytest.mark.parametrize(("name", "value"), [("burn_in", 5), ("whole_episodes", True)])
def test_with_nothing_to_replay_a_state_that_is_not_there_is_refused_too(name: str, value: Any) -> None:
    config = changed(small(12), replay__share=0.0, **{f"replay__{name}": value})
    with pytest.raises(ConfigError, match=rf"^replay\.{name} is .*; it renews a recurrent state, and the network has"):
        config.validate()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"replay__burn_in": 108},
            r"^replay\.burn_in is 108; a replay\.capacity of 1000 for 8 environments leaves room for 107 steps in "
            r"front of a sequence: it must be no more, or the capacity larger$",
        ),
        (
            {"replay__burn_in": 3, "replay__whole_episodes": True},
            r"^replay\.burn_in is 3; with replay\.whole_episodes the state comes from the episode's start: one of",
        ),
    ],
)
def test_what_a_recurrent_replay_cannot_be_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    config = changed(small(12), network__recurrent=8, **changes)
    with pytest.raises(ConfigError, match=words):
        config.validate()


@pytest.mark.parametrize(
    "estimator",
    [
        "gae",
        "n_step(n=3)",
        "one_step",
        "importance_sampling",
        "vtrace(rho_clip=inf)",
        "vtrace(leak=0.0)",
        f"{__name__}:Own",
    ],
)
def test_the_trust_region_needs_an_estimator_that_truncates(estimator: str) -> None:
    config = small(12)
    config.loss.max_kl, config.loss.estimator = 0.1, estimator
    words = r"^loss\.max_kl is 0\.1; loss\.estimator .* does not truncate ratios: it must be null, or the estimator one"
    with pytest.raises(ConfigError, match=words):
        config.validate()
    config.loss.estimator = f"{__name__}:Truncating"
    config.validate()


class Own(GAE):
    """An estimator of the user's without ratios."""


class Truncating(VTrace):
    """An estimator of the user's that has them."""


def test_the_trust_region_needs_discrete_actions() -> None:
    config = small(12)
    config.loss.max_kl, config.env.task = 0.1, "Pendulum-v1"
    words = (
        r"^loss\.max_kl is 0\.1, which needs discrete actions; those of Pendulum-v1 are continuous: it must be null$"
    )
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_a_replay_beyond_memory_is_refused() -> None:
    config = small(12)
    config.replay.capacity = 10**12
    with pytest.raises(ConfigError, match=r"replay\.capacity is 10{12}; steps of \d+ bytes take"):
        config.build()
