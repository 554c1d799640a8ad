"""Learners that torchrun starts: who is who, how many must be there, and what they tell each other."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from offtrace.agents.callbacks import GracefulStop
from offtrace.agents.config import ConfigError, EnvConfig
from offtrace.agents.config.off_policy import check_budget
from offtrace.agents.config.train import TrainConfig
from offtrace.agents.runs import ranks, run
from offtrace.agents.runs.folders import RunError
from offtrace.agents.sac import SACConfig
from offtrace.modules.replay import DamagedReplay
from offtrace.recipes import cli


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """Of two learners on two nodes, of which this process is the second."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for name, value in {**torchrun, "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    found = HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: found)
    return found


def test_without_torchrun_several_nodes_are_refused_with_the_command_that_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks.check_launch(TrainConfig(devices=2))
    with pytest.raises(ConfigError) as told:
        ranks.check_launch(TrainConfig(devices=2, num_nodes=3))
    assert "train.num_nodes is 3, and this learner would wait" in str(told.value)
    assert "torchrun --nnodes 3 --node_rank N --nproc_per_node 2 --master_addr HOST" in str(told.value)


def test_budgets_count_the_learners_of_all_nodes() -> None:
    config = SACConfig()
    check_budget(config, frame_skip=1)
    config.train.num_nodes = config.train.total_frames
    with pytest.raises(ConfigError, match="a rollout of all environments and learners"):
        check_budget(config, frame_skip=1)


@pytest.mark.usefixtures("store")
def test_learners_that_torchrun_did_not_start_are_refused() -> None:
    ranks.check_launch(TrainConfig(num_nodes=2))
    for train, right in ((TrainConfig(), "--nnodes 1"), (TrainConfig(devices=2), "--nproc_per_node 2")):
        with pytest.raises(ConfigError) as told:
            ranks.check_launch(train)
        assert "started 2 learners, 1 on this node: it must be --train.devices 1 --train.num_nodes 2" in str(told.value)
        assert right in str(told.value)


def test_the_first_of_all_nodes_is_the_first(store: HashStore) -> None:
    assert ranks.rank() == 1
    store.set("offtrace/first", "runs/one")
    assert ranks.from_first(lambda: pytest.fail("the first one alone makes it")) == "runs/one"


def test_learners_meet_with_one_configuration(store: HashStore) -> None:
    store.set("offtrace/here0", "train:\n  seed: 3\n")
    with pytest.raises(RunError, match=r"^learner 0 has 'seed: 3' where this one has 'seed: 4': give all"):
        ranks.meet("train:\n  seed: 4\n")
    ranks.meet("train:\n  seed: 3\n")


def test_what_one_learner_refuses_another_tells(store: HashStore) -> None:
    ranks.tell_refusal("no such task")
    with pytest.raises(RunError, match=r"^learner 1 on .+ says: no such task$"):
        ranks.meet("")


def test_another_command_line_than_that_of_the_first_is_refused(store: HashStore) -> None:
    store.set("offtrace/first", json.dumps(["runs/a", ["--loss.gamma", "0.99"]]))
    with pytest.raises(RunError, match=r"started with '--loss.gamma 0.99', and this one with '--loss.gamma 0.9': give"):
        cli._folder(SACConfig(), ["--loss.gamma", "0.9"], [])


def test_a_signal_that_another_learner_got_is_the_signal_of_all() -> None:
    stop = GracefulStop()
    strategy = SimpleNamespace(
        reduce_boolean_decision=lambda decision, all: True, root_device=torch.device("cpu"),
        all_gather=lambda number: torch.stack([number, torch.tensor(15)]),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(strategy=strategy, should_stop=False)
    stop.on_train_batch_end(trainer, *[None] * 4)  # type: ignore[arg-type]
    assert trainer.should_stop
    assert stop.signal == 15


def test_a_learner_that_lightning_started_stops_with_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning kills the first one, which saves, where it does not."""
    assert cli._stopped_by(15) == 143
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli._stopped_by(15) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    assert cli._stopped_by(15) == 143


def test_a_learner_that_lightning_started_hears_no_signal_before_the_first_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it starts the first one waits for it in torch, where no handler runs: alone it would leave it there."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    signals = cli._Signals()
    try:
        signal.raise_signal(signal.SIGINT)
        with GracefulStop(held=ranks.by_lightning()) as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert not stop.signal
            trainer: Any = SimpleNamespace(_signal_connector=SimpleNamespace())
            stop.setup(trainer, None, "fit")  # type: ignore[arg-type]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
    finally:
        signals.restore()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not ranks.by_lightning()


def test_under_slurm_learners_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ranks.check_launch(TrainConfig())
    with pytest.raises(ConfigError, match=r"Slurm started 2 tasks; start one task a node, and in it .* torchrun"):
        ranks.check_launch(TrainConfig(devices=2))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    ranks.check_launch(TrainConfig(devices=2))


def test_each_learner_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "training stopped: mine\nthe whole error is in" in run._kept(RuntimeError("mine"), tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    told = run._kept(RuntimeError("[gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:5"), tmp_path)
    assert "training stopped: another learner has ended; what it said, and" in told
    assert "mine" in (tmp_path / "error.rank1.txt").read_text()
    assert "stopped: [Errno 104] Connection" in run._kept(OSError(104, "Connection reset by peer"), tmp_path / "no")
    assert "pair.cc" in (tmp_path / "error.txt").read_text()


def test_a_learners_replay_that_is_gone_is_found_before_any_starts(tmp_path: Path) -> None:
    config = SACConfig(env=EnvConfig("CartPole-v1", num_envs=2))
    config.loss.target_entropy = 0.2
    _, data = config.build()
    data.folder = tmp_path / "replay"
    batches = iter(data.train_dataloader())
    next(batches)
    name = data.save(0)
    data.shutdown()
    checkpoint = {"ReplayData": {"replay": name}}
    run.check_saved(checkpoint, data.folder, 1)
    with pytest.raises(DamagedReplay, match=f"there is no replay in .*rank1/{name}"):
        run.check_saved(checkpoint, data.folder, 2)
