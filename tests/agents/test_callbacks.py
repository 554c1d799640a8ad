"""Evaluation, checkpoints and stop, each by itself: when they act, and what they leave as it was."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offtrace.agents.agent import random_state
from offtrace.agents.callbacks import Checkpoints, Evaluation, GracefulStop
from offtrace.agents.callbacks import evaluation as module
from offtrace.agents.impala import control_config
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY
from offtrace.agents.runs.evaluation import EvaluationResult
from offtrace.agents.runs.training import evaluation_env


def trainer(**more: Any) -> Any:
    strategy = SimpleNamespace(
        reduce_boolean_decision=lambda decision, **_: decision, all_gather=lambda x: x, root_device=torch.device("cpu")
    )
    return SimpleNamespace(
        is_global_zero=True, callbacks=[], loggers=[], should_stop=False, strategy=strategy, world_size=1, **more
    )


def agent(frames: int = 0, updates: int = 0, total_frames: int = 1000) -> Any:
    return SimpleNamespace(
        frames=frames, updates=updates, total_frames=total_frames, policy=nn.Linear(1, 1), device=torch.device("cpu")
    )


def play(scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations' results, one after the other; each draws from every generator, as a task of one's own may."""

    def evaluate(*_: Any, **__: Any) -> EvaluationResult:
        torch.rand(3), np.random.rand(3), random.random()
        return EvaluationResult([scores.pop(0)], [1], "sample")

    monkeypatch.setattr(module, "evaluate", evaluate)


def test_one_evaluation_where_several_are_due_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 100 frames, in rollouts of 256 and two updates each."""
    play([1.0, 2.0, 3.0], monkeypatch)
    evaluation, ours, its = Evaluation(lambda: None, every=100, episodes=1), trainer(), agent()  # type: ignore[arg-type, return-value]
    evaluation.on_train_start(ours, its)
    for update in range(1, 7):
        its.frames, its.updates = (update + 1) // 2 * 256, update
        evaluation.on_train_batch_end(ours, its, None, None, 0)
    assert evaluation.scores == [(256, 1.0), (512, 2.0), (768, 3.0)]


def test_the_final_score_is_that_of_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends before its time may have learnt from replayed batches behind its last evaluation."""
    play([1.0, 2.0], monkeypatch)
    evaluation, ours, its = Evaluation(lambda: None, every=100, episodes=1), trainer(), agent()  # type: ignore[arg-type, return-value]
    evaluation.on_train_start(ours, its)
    its.frames, its.updates = 100, 8
    evaluation.on_train_batch_end(ours, its, None, None, 0)
    its.updates = 16
    evaluation.on_train_end(ours, its)
    evaluation.on_train_end(ours, its)  # of the same weights there is a score
    assert evaluation.scores == [(100, 1.0), (100, 2.0)]
    assert evaluation.best == 2.0
    again = Evaluation(lambda: None, every=100, episodes=1)  # type: ignore[arg-type, return-value]
    again.load_state_dict(evaluation.state_dict())
    again.on_train_end(ours, its)  # nor after a resume
    assert again.scores == evaluation.scores


def test_behind_the_last_frame_there_is_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed batches are learnt from behind it."""
    play([1.0, 2.0], monkeypatch)
    evaluation, ours, its = Evaluation(lambda: None, every=100, episodes=1), trainer(), agent(total_frames=200)  # type: ignore[arg-type, return-value]
    evaluation.on_train_start(ours, its)
    for its.frames, its.updates in ((100, 8), (200, 16), (200, 24)):
        evaluation.on_train_batch_end(ours, its, None, None, 0)
    assert evaluation.scores == [(100, 1.0)]
    evaluation.on_train_end(ours, its)
    assert evaluation.scores == [(100, 1.0), (200, 2.0)]
    alone = Evaluation(lambda: None, every=100, episodes=1, final=False)  # type: ignore[arg-type, return-value]
    alone.on_train_start(ours, agent())
    play([3.0], monkeypatch)
    alone.on_train_batch_end(ours, its, None, None, 0)
    assert alone.scores == [(200, 3.0)]


def test_an_evaluation_leaves_every_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    play([1.0], monkeypatch)

    def make() -> Any:
        torch.rand(3), np.random.rand(3), random.random()

    evaluation, its = Evaluation(make, every=1, episodes=1), agent(frames=1, updates=1)
    before = random_state()
    evaluation.on_train_batch_end(trainer(), its, None, None, 0)
    after = random_state()
    assert evaluation.scores
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][0], after["numpy"][0])
    assert before["numpy"][1:] == after["numpy"][1:]


@pytest.mark.parametrize("task", ["pong", "CartPole-v1"])
def test_any_seed_makes_an_evaluation(task: str) -> None:
    config = control_config()
    config.env.task, config.train.seed = task, 2**32 - 1
    env = evaluation_env(config, 2)
    env.reset()
    env.close()


def test_better_weights_from_before_a_resume_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on from an older checkpoint, which knows nothing of them."""
    saved: list[str] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, trainer, agent, name, **_: saved.append(name))
    state = {"scores": [[256, 10.0], [768, 400.0]]}
    torch.save({"state_dict": {}, CHECKPOINT_KEY: {}, "callbacks": {"Evaluation": state}}, tmp_path / "best.ckpt")
    for resumed, expected in ((tmp_path / "last.ckpt", ["best.ckpt"]), (None, ["best.ckpt"] * 2)):
        checkpoints, its = Checkpoints(tmp_path, 512, resumed), agent(frames=512)
        checkpoints.on_train_start(trainer(), its)
        for score in (35.0, 500.0):
            checkpoints.on_score(trainer(), its, score, best=score)
        assert saved == expected
        saved.clear()
    (tmp_path / "best.ckpt").write_bytes(b"no checkpoint")
    checkpoints = Checkpoints(tmp_path, 512, tmp_path / "last.ckpt")
    checkpoints.on_train_start(trainer(), agent())
    checkpoints.on_score(trainer(), agent(), 35.0, best=35.0)
    assert saved == ["best.ckpt"]


@pytest.fixture
def stop() -> Iterator[GracefulStop]:
    found = GracefulStop()
    with found:
        found.on_train_start(trainer(), agent())
        yield found


def test_the_alarm_ends_with_the_update_that_came(stop: GracefulStop) -> None:
    """What is left to do, such as the replay's files, has the time that it takes."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    ours = trainer()
    stop.on_train_batch_end(ours, agent(), None, None, 0)
    assert ours.should_stop
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_signal_behind_the_last_update_starts_none(stop: GracefulStop) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)  # that of a test's time limit
    stop.on_train_epoch_end(trainer(), agent())
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_in_another_fit_updates_are_to_come_again(stop: GracefulStop) -> None:
    stop.on_train_epoch_end(trainer(), agent())
    stop.on_train_epoch_start(trainer(), agent())
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


@pytest.mark.parametrize(("saves", "expected"), [(False, (250, 200)), (True, (250, 100))])
def test_a_checkpoint_without_its_replay_takes_the_place_of_the_last(
    saves: bool, expected: tuple[int, int], tmp_path: Path
) -> None:
    """It names the last one's replay; the one before has another, to go on from where that is damaged."""
    data = SimpleNamespace(saves=saves, save=lambda rank: "replay", prune=lambda rank: None, saved=None)
    its = SimpleNamespace(
        frames=0, updates=1, data=data, parameters=lambda: iter(()), settle=lambda: None, check_guard=lambda: None
    )
    ours = trainer(global_rank=0, _checkpoint_connector=SimpleNamespace(dump_checkpoint=lambda **_: its.frames))
    checkpoints = Checkpoints(tmp_path, 100)
    checkpoints.on_train_start(ours, its)
    for its.frames in (100, 200):
        checkpoints.save(ours, its, "last.ckpt")
    its.frames, ours.world_size = 250, 2
    checkpoints.on_exception(ours, its, RuntimeError())
    found = tuple(torch.load(tmp_path / f"{name}.ckpt") for name in ("last", "previous"))
    assert found == expected


@pytest.mark.parametrize(
    ("epochs", "stops", "expected"), [(1, False, [True, False]), (-1, True, [True, False]), (-1, False, [True])]
)
def test_a_replay_is_saved_once_at_the_end(
    epochs: int, stops: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ahead of the last evaluation, or behind it where a trainer of one's own ends by the number of its steps."""
    with_data: list[bool] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, *_, data=True: with_data.append(data))
    ours, its = trainer(max_epochs=epochs, current_epoch=0), agent(frames=100, updates=1)
    ours.should_stop = stops
    checkpoints = Checkpoints(tmp_path, 1000)
    checkpoints.on_train_start(ours, its)
    checkpoints.on_train_epoch_end(ours, its)
    checkpoints.on_train_end(ours, its)
    assert with_data == expected


def test_an_alarm_of_somebody_else_goes_on(stop: GracefulStop) -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    stop.on_train_epoch_end(trainer(), agent())
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
