"""SAC, MPO and V-MPO through the agent: resuming, ratios, ranks, compiled losses, configurations that cannot work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.testing import CompileCounterWithBackend

from offtrace.agents.acer import control_config as discrete_acer_config
from offtrace.agents.assemble import read_task
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.config import ConfigError, OffPolicyConfig
from offtrace.agents.config.resources import bytes_per_step
from offtrace.agents.data import Learner, ReplayData
from offtrace.agents.data.store import StoringData
from offtrace.agents.dqn import DQNConfig
from offtrace.agents.mpo import MPOConfig, dmpo_config, full_covariance_config
from offtrace.agents.mpo import discrete_config as discrete_mpo_config
from offtrace.agents.runs.checkpoint import load_policy
from offtrace.agents.sac import SACConfig
from offtrace.agents.sac import discrete_config as discrete_sac_config
from offtrace.agents.sac import pixel_config as pixel_sac_config
from offtrace.agents.sac import v1_config as sac_v1_config
from offtrace.agents.targets import hard_update
from offtrace.agents.vmpo import VMPOConfig
from offtrace.modules.replay import DamagedReplay, Replay, Uniform
from tests.agents.renewal import NewEnvironments

ROLLOUT = 8


def small(config: Any, task: str | None = "Pendulum-v1", rollouts: int = 8) -> Any:
    """Sixteen units, one update for every two steps."""
    if task is not None:
        config.env.task = task
    config.env.num_envs, config.collector.unroll = 1, ROLLOUT
    config.network.hidden = config.network.critic_hidden = [16, 16]
    config.replay.capacity, config.replay.batch_size, config.replay.min_size = 500, 8, 16
    config.replay.samples_per_insert, config.replay.length = 4.0, 4
    config.train.total_frames = rollouts * ROLLOUT
    config.train.updates_per_step = 3
    return config


class StopAfter(pl.Callback):
    """Ends the run where the next thing would be a rollout, or before, where updates are owed."""

    def __init__(self, rollouts: int, owing: bool = False) -> None:
        self.frames = rollouts * ROLLOUT
        self.owing = owing

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        data = trainer.datamodule
        if data.frames >= self.frames and data.limiter.may_sample(data.batch_size) is self.owing:
            trainer.should_stop = True


def fit(
    config: Any,
    folder: Path | None = None,
    *,
    stop: int = 10**9,
    owing: bool = False,
    resume: Path | None = None,
    renew: int = 0,
) -> tuple[Any, Any, pl.Trainer]:
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    agent, data = config.build()
    callbacks: list[pl.Callback] = [WeightSync(1)]
    if folder is not None:
        data.folder = folder / "replay"
        callbacks += [Checkpoints(folder, every=10**9), StopAfter(stop, owing)]
    if resume is not None:
        data.folder = resume.parent / "replay"
    if renew:
        callbacks.append(NewEnvironments(data, renew * ROLLOUT))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return agent, data, trainer


def configs() -> dict[str, Any]:
    retrace = small(SACConfig())
    retrace.loss.estimator = "retrace"
    n_step = small(SACConfig())
    n_step.loss.estimator = "n_step(n=3)"
    normalized = small(SACConfig())
    normalized.network.normalize = True
    mpo_retrace = small(MPOConfig())
    mpo_retrace.loss.estimator = "retrace"
    backup = small(discrete_sac_config(), None)
    backup.loss.estimator = "tree_backup"
    prioritized = small(SACConfig())
    prioritized.replay.sampler = "prioritized"
    by_priority = small(SACConfig())
    by_priority.replay.sampler, by_priority.loss.estimator = "prioritized", "retrace"
    smooth = small(SACConfig())
    smooth.network.smoothing = 0.5
    return {
        "sac": small(SACConfig()), "sac n-step": n_step,
        "sac retrace": retrace, "sac v1": small(sac_v1_config()),
        "sac normalized": normalized, "sac smooth": smooth, "sac discrete": small(discrete_sac_config(), None),
        "sac tree backup": backup, "sac prioritized": prioritized, "sac retrace prioritized": by_priority,
        "mpo": small(MPOConfig()), "mpo retrace": mpo_retrace, "dmpo": small(dmpo_config()),
        "mpo full": small(full_covariance_config()), "mpo discrete": small(discrete_mpo_config(), None),
    }  # fmt: skip


NAMES = list(configs())
PRIORITIZED = ["sac prioritized", "sac retrace prioritized"]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_learns_something_and_its_policy_loads(name: str, tmp_path: Path) -> None:
    """Every parameter group moved, the ratio held, the saved policy acts as the agent's."""
    config: OffPolicyConfig = configs()[name]
    config.validate()
    pl.seed_everything(0, verbose=False)
    agent, data = config.build()
    before = {group: [p.detach().clone() for p in params] for group, params in agent.loss.param_groups().items()}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[WeightSync(1), Checkpoints(tmp_path, every=10**9)],
    )  # fmt: skip
    trainer.fit(agent, data)
    after = agent.loss.param_groups()
    for group, params in before.items():
        assert any(not torch.equal(a, b) for a, b in zip(params, after[group], strict=True)), group
    steps = config.train.total_frames
    assert data.limiter.inserted == data.frames == steps
    assert data.limiter.sampled == 4 * (steps - 16)
    assert agent.updates == data.limiter.sampled // 8
    assert data.replay.bytes_per_slot == bytes_per_step(config, read_task(config))
    if name in PRIORITIZED:
        assert data.replay.sampler.beta > 0.9, "it grows to 1"
        assert len(set(data.replay.sampler._tree.leaves.tolist())) > 10, "the errors came back"
    policy = load_policy(tmp_path / "last.ckpt")
    observation = torch.randn(5, *config_shape(config))
    ours, theirs = (p.get_dist_params(_td(observation)) for p in (agent.policy, policy))
    for key in policy[-1].in_keys:
        torch.testing.assert_close(ours[key], theirs[key])


def config_shape(config: Any) -> tuple[int, ...]:
    return (4,) if config.env.task.startswith("CartPole") else (3,)


def _td(observation: torch.Tensor) -> Any:
    from tensordict import TensorDict

    return TensorDict({"observation": observation}, [len(observation)])


RESUMED = ["sac retrace", "sac normalized", "mpo", "sac discrete", *PRIORITIZED]


@pytest.mark.parametrize("name", ["sac", *(pytest.param(name, marks=pytest.mark.slow) for name in RESUMED)])
def test_k_and_k_updates_are_2k(name: str, tmp_path: Path) -> None:
    """Both arms get new environments after k rollouts. Bit for bit: weights, targets, moments, samples, counters."""
    k, config = 6, configs()[name]
    config.train.total_frames = 2 * k * ROLLOUT
    config.optim.target_every = 7
    half, half_data, _ = fit(config, tmp_path / "a", stop=k)
    assert half_data.frames == k * ROLLOUT
    resumed, resumed_data, resumed_trainer = fit(
        config, tmp_path / "b", stop=2 * k, resume=tmp_path / "a" / "last.ckpt"
    )
    whole, data, trainer = fit(config, tmp_path / "c", stop=2 * k, renew=k)
    assert resumed_data.frames == data.frames == 2 * k * ROLLOUT
    assert resumed.updates == whole.updates > half.updates > 0
    assert any(not torch.equal(half.state_dict()[name], value) for name, value in whole.state_dict().items())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ours, theirs = trainer.optimizers[0].state_dict(), resumed_trainer.optimizers[0].state_dict()
    for index, moments in ours["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key])), key
    next_ours, next_theirs = data.replay.sample(), resumed_data.replay.sample()
    assert (next_ours == next_theirs).all()


@pytest.mark.parametrize(("name", "shape"), [("sac", (8,)), ("sac n-step", (8, 3)), ("sac retrace", (2, 4))])
def test_every_target_learns_from_as_many_steps_in_as_many_updates(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    agent, data, _ = fit(configs()[name], tmp_path, stop=6)
    assert data.replay.sample().shape == shape
    assert agent.updates == (6 * ROLLOUT - 16) * 4 // 8


def test_a_batch_counted_otherwise_than_the_replay_gives_it_is_refused() -> None:
    _, data = configs()["sac retrace"].build()
    data.batch_size = 16
    with pytest.raises(ValueError, match="batch_size is 16; the replay gives 2 samples of 4 steps, so it must be 8"):
        data.train_dataloader()
    assert data.collector is None


def test_updates_that_are_owed_come_first_in_a_resumed_run(tmp_path: Path) -> None:
    config = configs()["sac"]
    agent, data, _ = fit(config, tmp_path / "a", stop=4, owing=True)
    assert data.limiter.owed >= data.batch_size
    resumed, resumed_data, _ = fit(config, tmp_path / "b", stop=6, resume=tmp_path / "a" / "last.ckpt")
    assert resumed.updates - agent.updates == (2 * ROLLOUT * 4 + data.limiter.owed) // 8
    assert resumed_data.frames == 6 * ROLLOUT


def test_a_replay_that_was_not_saved_is_filled_again(tmp_path: Path) -> None:
    config = configs()["sac"]
    agent, _, _ = fit(config, tmp_path / "a", stop=4)
    path = tmp_path / "a" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["ReplayData"]["replay"] = None
    torch.save(content, path)
    resumed, data, _ = fit(config, tmp_path / "b", stop=7, resume=path)
    assert data.limiter.inserted == len(data.replay) == 3 * ROLLOUT
    assert resumed.updates - agent.updates == (3 * ROLLOUT - 16) * 4 // 8


def test_target_networks_are_copied_when_it_is_said() -> None:
    config = configs()["mpo"]
    agent, _ = config.build()
    loss = agent.loss
    source, target = (
        next(iter(params.values(True, True))).data for params in (loss.critic_params, loss.target_critic_params)
    )
    update, copied = hard_update(loss, 3), []
    for updates in range(1, 13):
        source += 1
        update(updates)
        if torch.equal(source, target):
            copied.append(updates)
    assert copied == [3, 6, 9, 12]


def test_a_resumed_run_meets_other_start_states() -> None:
    config = configs()["sac"]
    _, data = config.build()
    firsts = []
    for frames in (0, 0, 64):
        with data.collector_fn(0, frames) as collector:
            firsts.append(next(iter(collector))["observation"][:, 0])
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


def test_a_damaged_replay_is_named(tmp_path: Path) -> None:
    config = configs()["sac"]
    config.train.total_frames = 12 * ROLLOUT
    fit(config, tmp_path / "a", stop=6)
    folder = max((tmp_path / "a" / "replay" / "rank0").iterdir())
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(DamagedReplay, match=str(folder)):
        fit(config, tmp_path / "c", stop=12, resume=tmp_path / "a" / "last.ckpt")


def test_a_run_broken_off_between_two_updates_has_counted_no_more(tmp_path: Path) -> None:
    """Of the three updates of the first step one is made, and one is under way."""
    agent, data = configs()["sac"].build()
    data.folder = tmp_path / "replay"
    update, sampled = agent._update, []

    def watched(batch: Any) -> None:
        sampled.append(batch)
        if agent.updates == 1:
            raise KeyboardInterrupt
        update(batch)

    agent._update = watched
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WeightSync(1), Checkpoints(tmp_path, 10**9)],
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.fit(agent, data)
    assert (agent.updates, len(sampled), data.limiter.sampled) == (1, 2, 2 * 8)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["ReplayData"]
    assert saved["limiter"]["sampled"] == 2 * 8


def replays(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rank0").iterdir())


def test_no_replay_is_deleted_before_a_checkpoint_names_its_successor(tmp_path: Path) -> None:
    _, data = configs()["sac"].build()
    data.folder = tmp_path
    batches = iter(data.train_dataloader())
    names = [f"{3 * ROLLOUT + rollout * ROLLOUT:012d}" for rollout in range(4)]
    for number in range(4):
        list(next(batches))
        list(next(batches))
        name = data.save(0)
        if number == 1:  # another rank could not save: this one is named by no checkpoint
            data.prune(0)
            assert replays(tmp_path) == names[:1]
            continue
        data.saved = name
        before = replays(tmp_path)
        data.prune(0)
        data.prune(0)  # the last checkpoint is written twice
        assert replays(tmp_path) == before[-2:]
    (tmp_path / "rank0" / f"{10**6:012d}.new").mkdir()
    data.prune(0)
    assert replays(tmp_path) == [*names[2:], f"{10**6:012d}.new"]
    data.load_state_dict(data.state_dict())
    assert replays(tmp_path) == names[2:], "the checkpoint before the last one may be needed"
    data.load_state_dict({**data.state_dict(), "replay": names[2]})
    assert replays(tmp_path) == names[2:3]
    data.shutdown()


def test_weights_are_kept_where_the_replay_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, *_: Any) -> None:
        file.write_bytes(b"as much as fits")
        raise OSError(28, "No space left on device")

    config = configs()["sac"]
    fit(config, tmp_path / "a", stop=3)
    saved = replays(tmp_path / "a" / "replay")
    with monkeypatch.context() as patch:
        patch.setattr("offtrace.modules.replay.files._write", full)
        with pytest.warns(RuntimeWarning, match="the replay was not saved: .* No space left on device"):
            agent, _, _ = fit(config, tmp_path / "b", stop=5, resume=tmp_path / "a" / "last.ckpt")
    content = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)
    assert content["offtrace"]["updates"] == agent.updates
    assert [content["ReplayData"]["replay"]] == saved == replays(tmp_path / "a" / "replay")


def small_pixels() -> SACConfig:
    config: SACConfig = small(pixel_sac_config(), "cartpole-swingup", rollouts=4)
    config.env.action_repeat, config.loss.fixed_alpha = 1, 0.1
    return config


def test_of_stacked_images_each_frame_is_stored_once() -> None:
    config = small_pixels()
    config.validate()
    agent, data, _ = fit(config)
    assert agent.updates == 4 * (4 * ROLLOUT - 16) // 8
    assert data.replay.frame_stack == 3
    assert data.replay._storage.leaves["observation",].shape[1:] == (3, 84, 84)
    assert data.replay.sample()["observation"].shape == (8, 9, 84, 84)
    _, data, _ = fit(configs()["sac"])
    assert data.replay.frame_stack == 1


def test_a_replay_in_files_works_inside_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    config = configs()["sac"]
    config.replay.storage = "memmap"
    _, data = config.build()
    data.folder = tmp_path / "replay"
    next(iter(data.train_dataloader()))
    files = list((tmp_path / "replay.live0").rglob("*.memmap"))
    assert files
    assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in files)  # no holes
    data.shutdown()
    assert not list(tmp_path.iterdir())


class FullOnOneRank(ReplayData):
    """Its disk takes a replay only where ``room`` says so."""

    room = True

    def __init__(self) -> None:
        self.saved = "before"

    def save(self, rank: int) -> str | None:
        if not self.room:
            raise OSError(28, "No space left on device")
        return "now"


@pytest.mark.filterwarnings("ignore:the replay was not saved")
@pytest.mark.parametrize(("room", "elsewhere"), [(True, True), (True, False), (False, True)])
def test_a_checkpoint_names_a_replay_that_every_rank_has(room: bool, elsewhere: bool, tmp_path: Path) -> None:
    data = FullOnOneRank()
    data.room = room
    asked = []

    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            asked.append((decision, all))
            return decision and elsewhere

    trainer: Any = SimpleNamespace(global_rank=0, strategy=Strategy())
    assert Checkpoints(tmp_path, 1)._save_data(trainer, data) == (room and elsewhere)
    assert asked == [(room, True)]
    assert data.saved == ("now" if room and elsewhere else "before")


def test_priorities_that_come_to_nothing_do_not_keep_the_checkpoint_from_being_written(tmp_path: Path) -> None:
    def settle() -> None:
        raise DamagedReplay("an insertion was broken off")

    written: list[str] = []

    class Written(Checkpoints):
        def _write(self, trainer: Any, name: str, frames: int, **_: Any) -> None:
            written.append(name)

    agent: Any = SimpleNamespace(parameters=list, settle=settle, data=SimpleNamespace(saves=False), frames=1)
    trainer: Any = SimpleNamespace(is_global_zero=True)
    with pytest.warns(RuntimeWarning, match="the last priorities did not get into the replay: an insertion"):
        Written(tmp_path, 1).save(trainer, agent, "last.ckpt")
    assert written == ["last.ckpt"]


def test_a_run_whose_replay_was_removed_fills_it_again(tmp_path: Path) -> None:
    config = configs()["sac"]
    fit(config, tmp_path / "a", stop=4)
    shutil.rmtree(tmp_path / "a" / "replay")
    with pytest.warns(RuntimeWarning, match="replay is gone: the run goes on with an empty replay"):
        _, data, _ = fit(config, tmp_path / "b", stop=7, resume=tmp_path / "a" / "last.ckpt")
    assert len(data.replay) == 3 * ROLLOUT


def test_a_capacity_that_stacked_images_do_not_fit_is_refused() -> None:
    config = small_pixels()
    config.replay.capacity = 10**13
    with pytest.raises(ConfigError, match=r"steps of 212\d\d bytes take 212\d{6}\.0 GB, and this machine has"):
        config.build()
    config.replay.capacity = 32
    config.validate()
    with pytest.raises(
        ConfigError, match=r"for 1 environment with stacks of 3 frames and .* of 8 it must be at least 33"
    ):
        config.build()


@pytest.mark.slow
def test_actors_in_processes_hold_the_ratio() -> None:
    config = configs()["sac"]
    config.collector.num_workers = 2
    agent, data, _ = fit(config)
    assert data.limiter.inserted == 8 * ROLLOUT
    assert data.limiter.sampled == 4 * (8 * ROLLOUT - 16)
    assert agent.updates == data.limiter.sampled // 8
    assert (data.replay._rings.written > 0).all()  # each actor's rollouts lie in rings of their own


@pytest.mark.parametrize("popart", [False, True])
def test_vmpo_learns_something(popart: bool, tmp_path: Path) -> None:
    config = VMPOConfig()
    config.network.popart = popart
    config.env.task, config.env.num_envs = "CartPole-v1", 4
    config.collector.unroll, config.collector.num_workers = 8, 0
    config.train.total_frames = 4 * 8 * 4
    config.validate()
    agent, data, trainer = fit(config)
    assert data.frames == 128
    assert agent.updates == 4 * config.train.minibatches * config.train.epochs
    if popart:
        head = agent.policy.network.value_head
        assert head.count == agent.updates
        Checkpoints(tmp_path, every=1).save(trainer, agent, "best.ckpt")
        saved = load_policy(tmp_path / "best.ckpt").network.value_head
        assert (saved.mean, saved.scale) == (head.mean, head.scale)


@pytest.mark.slow
def test_a_compiled_loss_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same updates from the same samples; traced, without a C++ compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("offtrace.agents.agent.compile_loss", partial(torch.compile, backend=counter))
    finals = []
    for compile_ in (False, True):
        config = configs()["sac"]
        config.loss.estimator = "one_step"
        config.loss.fixed_alpha = 0.1
        config.train.compile = compile_
        pl.seed_everything(1, verbose=False)
        agent, data = config.build()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[WeightSync(1)],
        )  # fmt: skip
        trainer.fit(agent, data)
        finals.append({k: v.clone() for k, v in agent.state_dict().items()})
    assert counter.frame_count == 1
    assert finals[0].keys() == finals[1].keys()
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"loss.version": 1, "loss.estimator": "retrace"},
            "loss.estimator is retrace; version 1 has no target critics",
        ),
        (
            {"loss.version": 1, "loss.estimator": "q_lambda"},
            "loss.estimator is q_lambda; version 1 has no target critics",
        ),
        (
            {"loss.estimator": "q_lambda", "replay.length": 1},
            "replay.length is 1; loss.estimator q_lambda needs sequences",
        ),
        (
            {"loss.estimator": "retrace", "replay.length": 3},
            "replay.batch_size is 8; loss.estimator retrace learns from .* 3, steps: it must be a multiple of that",
        ),
        ({"replay.capacity": 5}, "replay.capacity is 5; it must hold replay.batch_size, 8"),
        ({"replay.min_size": 3}, "replay.min_size is 3; .* from 1 environment it must be at least 8"),
        ({"replay.samples_per_insert": 0.0}, "replay.samples_per_insert is 0.0; it must be above 0 and finite"),
        (
            {"loss.estimator": "retrace", "replay.length": 1},
            "replay.length is 1; loss.estimator retrace needs sequences of 2",
        ),
        (
            {"replay.device": "cuda", "replay.storage": "memmap"},
            "replay.device is cuda, and replay.storage is memmap; files lie on no GPU: it must be cpu",
        ),
        ({"loss.estimator": "retrase"}, "loss.estimator: there is no estimator 'retrase' .*; did you mean retrace"),
        ({"optim.tau": 0.0}, "optim.tau is 0.0; it must be above 0 and at most 1"),
        ({"network.smoothing": 1.0}, "network.smoothing is 1.0; it must be at least 0 and below 1"),
        (
            {"network.noise_correlation": -0.1},
            "network.noise_correlation is -0.1; it must be at least 0, below 1, or null",
        ),
    ],
)
def test_configurations_that_cannot_work_are_refused(change: dict[str, Any], words: str) -> None:
    config = small(SACConfig())
    for path, value in change.items():
        group, name = path.split(".")
        setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        config.validate()


@pytest.mark.parametrize(
    ("device", "storage", "memory", "expected"),
    [
        ("cpu", "tensor", None, False),
        ("cpu", "tensor", 9.0, False),
        ("cpu", "memmap", 9.0, False),
        ("cuda", "tensor", 1.26, True),
    ],
)
def test_a_replay_lies_where_it_is_told_to(
    device: Any, storage: Any, memory: float | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``memory`` in parts of the replay's own."""
    mixed = discrete_acer_config()
    mixed.replay.min_size = 100
    for config in (small(SACConfig()), mixed):
        config.replay.capacity = 5000
        config.replay.device, config.replay.storage = device, storage
        info = read_task(config)
        gpu = memory and int(memory * config.replay.capacity * bytes_per_step(config, info))
        monkeypatch.setattr("offtrace.agents.assemble._gpu_memory", lambda config, gpu=gpu: gpu)
        _, data = config.build()
        made = data._replay_fn(Learner(0, 1, torch.device("meta")), None)
        assert made.device.type == ("meta" if expected else "cpu")


def test_a_replay_that_no_gpu_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(SACConfig())
    config.replay.device = "cuda"
    monkeypatch.setattr("offtrace.agents.assemble._gpu_memory", lambda config: None)
    with pytest.raises(ConfigError, match=r"replay\.device is cuda, and the learner has no GPU that torch can use"):
        config.build()
    config.replay.capacity = 10**9
    monkeypatch.setattr("offtrace.agents.assemble._gpu_memory", lambda config: 10**10)
    with pytest.raises(
        ConfigError,
        match=r"53 bytes take 53.0 GB, and four fifths of the GPU's memory are 8.0: it must be at most 150943396, or",
    ):
        config.build()


@pytest.mark.parametrize("task", ["Acrobot-v1", "offtrace.modules.envs.catch:Catch"])
@pytest.mark.parametrize("make", [discrete_sac_config, discrete_mpo_config, VMPOConfig])
def test_vectors_are_normalised_and_images_are_not(task: str, make: Any) -> None:
    config = make()
    config.env.task, config.network.normalize, config.network.hidden = task, True, [16, 16]
    agent, _ = config.build()
    policy: Any = agent.policy
    assert (policy.network.normalizer is None) == (task != "Acrobot-v1")


def test_tasks_that_do_not_fit_are_refused() -> None:
    backup = small(SACConfig())
    backup.loss.estimator = "tree_backup"
    for config, words in (
        (backup, "loss.estimator is tree_backup, which needs probabilities of discrete actions; those of Pend"),
        (
            small(sac_v1_config(), "CartPole-v1"),
            "loss.version is 1, which has no form for the discrete actions of CartPole-v1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            config.build()
    config = small(SACConfig())
    config.replay.capacity = 10**13
    for storage, devices, words in (
        ("tensor", 1, r"steps of 53 bytes take 530000\.0 GB, and this machine has .*, or replay.storage memmap"),
        ("tensor", 2, r"steps of 53 bytes for each of 2 learners take 1060000\.0 GB"),
        (
            "memmap",
            1,
            r"steps of 212 bytes, those saved included, take 2120000\.0 GB, and the disk has .* free: .* below \d+$",
        ),
    ):
        config.replay.storage, config.train.devices = storage, devices
        with pytest.raises(ValueError, match=words):
            config.build()
    config = small(dmpo_config(), "cartpole-swingup")
    config.env.action_repeat = 2
    with pytest.raises(ConfigError, match=r"network.v_max is 150; .* returns of dm_control reach 200: it must be that"):
        config.validate()
    config = small(SACConfig())
    config.replay.samples_per_insert = 0.001
    with pytest.raises(ConfigError, match=r"total_frames is 64, .* the first update comes after 8016, by replay\.min_"):
        config.build()


@pytest.mark.slow
def test_two_ranks_stay_bit_identical(tmp_path: Path) -> None:
    """Two gloo ranks, each with its own environments and replay: the same weights, targets, duals and temperature."""
    script = Path(__file__).with_name("replayed_ddp_script.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=180)
    for name in ("sac", "mpo", "reactor"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        assert first["frames"] == second["frames"] == 2 * 4 * ROLLOUT
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), key
        assert not torch.equal(first["observation"], second["observation"]), "each rank collects for itself"
        assert not torch.equal(first["noise"], second["noise"]), "and draws for itself"


@pytest.mark.parametrize("atoms", [0, 51])
def test_what_a_critic_said_while_acting_is_not_stored(atoms: int) -> None:
    config = small(DQNConfig(), "CartPole-v1", rollouts=4)
    config.network.atoms = atoms
    config.validate()
    _, data, _ = fit(config)
    assert data.replay.bytes_per_slot == bytes_per_step(config, read_task(config))


class _ByHand(Uniform):
    """A sampler of the user's that wants the errors back, and has no exponent to anneal."""

    prioritized = True

    def __init__(self) -> None:
        super().__init__()
        self.given, self.progress = 0, 0.0

    def anneal(self, progress: float) -> None:
        self.progress = progress

    def update(self, slots: Any, priority: Any) -> None:
        self.given += len(slots)


def test_a_sampler_of_the_users_gets_its_priorities_back() -> None:
    sampler = _ByHand()
    replay = Replay(100, num_envs=2, batch_size=4, sampler=sampler)
    data = StoringData(None, lambda learner, folder: replay, total_frames=4, frame_skip=1)  # type: ignore[arg-type]
    data.open_replay(Learner(0, 1, torch.device("cpu")))
    data.frames = 1
    steps = (2, 10)
    flags = {name: torch.zeros(*steps, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    seen = {"observation": torch.randn(*steps, 3), "reward": torch.randn(*steps, 1), **flags}
    rollout = TensorDict(
        {"observation": torch.randn(*steps, 3), "action": torch.zeros(steps, dtype=torch.long), "next": seen}, steps
    )
    data.insert(rollout)
    batch = data.sample()
    assert sampler.progress == 0.25
    with pytest.raises(ValueError, match="priorities=True"):
        data.feedback(batch)
    batch["td_error"] = torch.ones(4)
    data.feedback(batch)
    assert sampler.given == 4


@pytest.mark.parametrize(
    ("change", "noise"),
    [
        ({}, 0.8),
        ({"loss.estimator": "n_step(n=3)"}, 0.8),
        ({"loss.estimator": "retrace(lmbda=0.95)"}, 0.0),
        ({"network.smoothing": 0.5}, 0.0),
        ({"env.action_repeat": 4}, 0.8**4),
        ({"network.noise_correlation": 0.0}, 0.0),
        ({"network.noise_correlation": 0.5, "loss.estimator": "retrace"}, 0.5),
    ],
)
def test_sac_explores_with_noise_that_lasts_where_no_ratio_is_read(change: dict[str, Any], noise: float) -> None:
    config = small(SACConfig())
    info = read_task(config)
    for name, value in change.items():
        group, field = name.split(".")
        setattr(getattr(config, group), field, value)
    assert config.policy_spec(info)["arguments"]["noise_correlation"] == noise


@pytest.mark.parametrize("config", [MPOConfig(), discrete_sac_config()], ids=["mpo", "discrete sac"])
def test_others_explore_with_independent_noise(config: Any) -> None:
    assert not config.policy_spec(read_task(config))["arguments"].get("noise_correlation")
