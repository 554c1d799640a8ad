"""The study of stale actors: its tasks, the age of the weights that act, its files, its resuming, its refusals."""

from __future__ import annotations

import csv
import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
import torch

from offtrace import modules
from offtrace.modules.networks import build_policy
from offtrace.recipes import offpolicy_study as study
from offtrace.recipes.studies import number, read_rows
from offtrace.recipes.study_report import Cell, Result, interval
from offtrace.recipes.study_tasks import CartPole, Catch, play, rollout

TINY = {name: replace(task, num_envs=4, unroll=6, hidden=8) for name, task in study.TASKS.items()}


def test_cartpole_is_gymnasiums() -> None:
    env = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (200, 4)) * [2.5, 3, 0.22, 3]
    actions = rng.integers(2, size=200)
    moved, reward, over = CartPole(1, 0)._advance(states, actions)
    assert 0 < over.sum() < 200
    for index, action in enumerate(actions):
        env.reset(seed=0)
        env.state = states[index]  # type: ignore[attr-defined]
        observation, gain, terminated, _, _ = env.step(action)
        np.testing.assert_allclose(moved[index], observation, rtol=1e-5, atol=1e-6)
        assert (reward[index], over[index]) == (gain, terminated)


def test_a_perfect_player_catches_every_ball() -> None:
    env = Catch(50, 0)
    for step in range(9):
        board = env.observation().view(50, 10, 7)
        assert torch.equal(board.sum((1, 2)), torch.full((50,), 2.0))
        ball, paddle = board[:, step].argmax(1), board[:, -1].argmax(1)
        found = env.step((ball - paddle).sign() + 1)
        assert found["terminated"].all() == (step == 8)
        assert (found["reward"] == (1 if step == 8 else 0)).all()
    assert (env.first_return == 1).all()


def test_rollouts_hold_true_successors_and_cut_by_the_limit() -> None:
    torch.manual_seed(0)
    env = CartPole(8, 0)
    env.limit = 12
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    td = rollout(env, policy, 30)
    done, terminated = td["next", "done"].squeeze(-1), td["next", "terminated"].squeeze(-1)
    assert (done & ~terminated).any()
    assert (done & terminated).any()
    torch.testing.assert_close(
        td["next", "observation"][:, :-1][~done[:, :-1]], td["observation"][:, 1:][~done[:, :-1]]
    )
    assert (td["observation"][:, 1:][done[:, :-1]].abs() <= 0.05).all()
    assert (td["next", "observation"][terminated][:, [0, 2]].abs() > torch.tensor([2.4, 0.209])).any(1).all()
    dist = policy.build_dist_from_params(policy.get_dist_params(td.select("observation")))
    torch.testing.assert_close(td["action_log_prob"], dist.log_prob(td["action"]))
    assert 8 <= play(CartPole, policy, 16, seed=0) <= 200


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_the_acting_weights_are_exactly_as_old_as_the_lag(lag: int, replay: float) -> None:
    history: list[Any] = []
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2, hidden=8)

    def fits(weights: Any, batch: Any) -> bool:
        policy.load_state_dict(weights)
        dist = policy.build_dist_from_params(policy.get_dist_params(batch.select("observation")))
        return torch.allclose(dist.log_prob(batch["action"]), batch["action_log_prob"], atol=1e-6)

    def observe(update: int, batch: Any, learner: Any) -> None:
        history.append({name: value.clone() for name, value in learner.state_dict().items()})
        assert len(history) == update + 1
        acting = [age for age in range(update + 1) if fits(history[update - age], batch)]
        assert acting == [min(lag, update)]

    study.train(Cell("CartPole", replay, "vtrace", lag, 0, 10, ""), TINY["CartPole"], observe)
    assert len(history) == 10


@pytest.mark.slow
def test_half_of_the_batch_is_replayed_and_everything_is_deterministic() -> None:
    cell = Cell("Catch", 0.5, "retrace", 2, 3, 10, "")
    first, second = (study.train(cell, TINY["Catch"]) for _ in range(2))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    fresh = study.train(replace(cell, replay=0.0), TINY["Catch"])
    assert fresh.trace_length != first.trace_length
    assert first.frames == fresh.frames == 10 * 4 * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["acer", "laser", "reactor"])
def test_the_published_updates_learn_from_fresh_and_replayed_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh rows are told from replayed ones, and what must follow the networks does."""
    given: list[Any] = []
    kind = getattr(modules, study.ARMS[name].loss)
    forward = kind.forward

    def spy(self: Any, batch: Any) -> Any:
        averages = self._modules.get("target_policy_params")
        moved = None if averages is None else [x.clone() for x in averages.values(True, True)]
        given.append((batch["index"].clone(), moved))
        return forward(self, batch)

    monkeypatch.setattr(kind, "forward", spy)
    study.train(Cell("Catch", 0.5, name, 2, 3, 12, ""), TINY["Catch"])
    assert len(given) == 12
    assert all(index.tolist() == [[-1] * 6] * 4 + [[0] * 6] * 4 for index, _ in given)
    changes = [
        any(not torch.equal(x, y) for x, y in zip(one[1], other[1], strict=True))
        for one, other in itertools.pairwise(given)
        if one[1] is not None
    ]
    expected = {"acer": [True] * 11, "laser": [], "reactor": [False] * 9 + [True, False]}
    assert changes == expected[name]


def arguments(folder: Path, *more: str) -> Any:
    words = ["--folder", str(folder), "--tasks", "CartPole", "--lags", "0", "2", "--replay", "0", "--updates", "10"]
    return study.parse([*words, "--arms", "vtrace", "none", "--seeds", "0", *more])


@pytest.mark.slow
def test_files_agree_and_what_has_finished_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Cell] = []

    def in_order(cells: Any, *, processes: int, done: Any, tasks: Any) -> None:
        for cell in cells:
            ran.append(cell)
            done(cell, study.train(cell, tasks[cell.task]))

    monkeypatch.setattr(study, "run_cells", in_order)
    assert study.study(arguments(tmp_path), TINY) == 0
    assert len(ran) == 4
    with open(tmp_path / "study.csv") as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["lag"]) for row in table] == [(cell.arm, str(cell.lag)) for cell in ran]
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "study.md").read_text()
    for row in table:
        assert f"{float(row['score']):.3g}" in text
        assert f"{float(row['trace_length']):.3g}" in text
    # on-policy the two are one, and stale data shortens the trace of the one that corrects
    rows = {(cell.arm, cell.lag): result for cell, result in read_rows(tmp_path / "study.csv", Cell, Result).items()}
    assert rows["vtrace", 0].score == rows["none", 0].score
    assert rows["vtrace", 0].ess == pytest.approx(1)
    assert rows["vtrace", 2].trace_length < rows["none", 2].trace_length
    assert study.study(arguments(tmp_path, "--seeds", "0", "1"), TINY) == 0
    assert [cell.seed for cell in ran[4:]] == [1] * 4
    assert "8 trainings, 4 of them finished before" in capsys.readouterr().out
    # other settings are other trainings
    assert study.study(arguments(tmp_path, "--lr", "0.004"), TINY) == 0
    assert len(ran) == 12
    faster = replace(TINY["CartPole"], lr=0.004)
    expected = [(TINY["CartPole"] if place < 8 else faster).digest(study.ARMS[ran[place].arm]) for place in range(12)]
    assert [cell.settings for cell in ran] == expected
    assert study.study(arguments(tmp_path, "--seeds", "0", "1"), TINY) == 0
    assert len(ran) == 12
    text = (tmp_path / "study.md").read_text()
    for estimator, lag in (("vtrace", 2), ("none", 0)):
        both = [
            result.score
            for cell, result in read_rows(tmp_path / "study.csv", Cell, Result).items()
            if (cell.arm, cell.lag, cell.settings) == (estimator, lag, TINY["CartPole"].digest(study.ARMS[estimator]))
        ]
        low, high = interval(both)
        assert f"{np.mean(both):.3g} [{low:.3g}, {high:.3g}]" in text


@pytest.mark.slow
def test_without_its_region_acer_on_policy_is_the_q_actor_critic() -> None:
    """Every ratio is 1: nothing is truncated, and no bias is left to correct."""
    bare, retrace = (
        study.train(Cell("Catch", 0.0, name, 0, 3, 12, ""), TINY["Catch"]) for name in ("acer_no_region", "retrace")
    )
    assert (bare.score, bare.final, bare.trace_length) == (retrace.score, retrace.final, retrace.trace_length)


def test_ablations_are_asked_for_by_name() -> None:
    assert not {*study.ABLATIONS} & {*study.parse([]).arms}
    assert study.parse(["--arms", *study.ABLATIONS]).arms == [*study.ABLATIONS]


def test_another_arm_of_the_same_name_is_another_training() -> None:
    task = study.TASKS["Catch"]
    arms = [study.ARMS["laser"], study.ARMS["laser"]._replace(options={"max_kl": 0.1}), study.ARMS["acer"]]
    arms += [study.ARMS["acer"]._replace(tau=0.1), study.ARMS["reactor"], study.ARMS["reactor"]._replace(every=20)]
    assert len({task.digest(arm) for arm in arms}) == len(arms)


def test_the_published_trainings_have_the_settings_of_today() -> None:
    rows = read_rows(Path(__file__).parents[2] / "docs" / "offpolicy_study.csv", Cell, Result)
    assert len(rows) == 1000
    assert all(cell.settings == study.TASKS[cell.task].digest(study.ARMS[cell.arm]) for cell in rows)


@pytest.mark.slow
def test_processes_train_as_this_one_does(tmp_path: Path) -> None:
    cells = [Cell("CartPole", 0.0, "vtrace", lag, 0, 10, "") for lag in (0, 1)]
    found = {}
    study.run_cells(cells, processes=2, done=found.__setitem__, tasks=TINY)
    for cell in cells:
        assert replace(found[cell], seconds=0) == replace(study.train(cell, TINY["CartPole"]), seconds=0)
    with pytest.raises(RuntimeError, match=r"a training failed: AttributeError: .*Chess"):
        study.run_cells(
            [replace(cells[0], task="Chess")], processes=1, done=found.__setitem__, tasks={"Chess": TINY["Catch"]}
        )


@pytest.mark.slow
def test_an_interrupted_study_ends_its_processes_and_keeps_what_has_finished(tmp_path: Path) -> None:
    command = [
        sys.executable,
        study.__file__,
        "--folder",
        str(tmp_path),
        "--lags",
        "0",
        "--replay",
        "0",
        "--seeds",
        "0",
    ]
    words = [*command, "--tasks", "CartPole", "--updates", "10", "--arms", "vtrace"]
    assert subprocess.run(words, timeout=300, capture_output=True).returncode == 0
    words[words.index("10")] = "1000000"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        root = psutil.Process(process.pid)
        while len(root.children()) < 2:  # the worker, and multiprocessing's own
            assert process.poll() is None
            time.sleep(0.1)
        family = root.children(recursive=True)
        process.terminate()
        _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error.startswith("interrupted; what has finished is kept")
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert [cell.updates for cell in read_rows(tmp_path / "study.csv", Cell, Result)] == [10]


def test_an_interrupt_while_the_processes_start_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    ended: list[Any] = []
    submit, terminate = study.ProcessPoolExecutor.submit, BaseProcess.terminate

    def noted(process: BaseProcess) -> None:
        ended.append(process)
        terminate(process)

    def interrupted(pool: Any, *arguments: Any) -> None:
        submit(pool, *arguments)
        started.extend(pool._processes.values())
        raise KeyboardInterrupt

    monkeypatch.setattr(study.ProcessPoolExecutor, "submit", interrupted)
    monkeypatch.setattr(BaseProcess, "terminate", noted)
    cells = [Cell("CartPole", 0.0, "vtrace", 0, 0, 10, "")]
    with pytest.raises(KeyboardInterrupt):
        study.run_cells(cells, processes=1, done=lambda cell, result: None, tasks=TINY)
    assert ended == started != []


def test_intervals() -> None:
    assert interval([3.0]) == interval([3.0, 3.0]) == (3.0, 3.0)
    assert number(-1e-9) == number(0.0) == "0"
    low, high = interval([1.0, 2.0, 6.0])
    assert 1 <= low < 3 < high <= 6
    values = np.random.default_rng(0).normal(5, 2, 200).tolist()
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 2 / math.sqrt(200), rel=0.15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arms", "vtrace", "retraec"],
            "--arms has retraec; they must be of vtrace, .*did you mean retrace?",
        ),
        (["--tasks", "Pong"], "--tasks has Pong; they must be of CartPole, Catch"),
        (["--lags", "-1"], "--lags has -1; it must be at least 0"),
        (["--lags", "many"], "--lags: invalid int value: 'many'"),
        (["--replay", "1"], "--replay has 1.0; it must be at least 0 and below 1"),
        (["--replay", "0.01"], "--replay has 0.01; beside 32 fresh unrolls whole ones give 0.000 or 0.030"),
        (["--lr", "0"], "--lr is 0.0; it must be positive"),
        (["--updates", "3"], "--updates has 3; it must be at least 10"),
        (["--lag", "3"], "there is no flag --lag; did you mean --lags?"),
        (["--folder", "/proc/none"], "--folder is /proc/none, which cannot be written: "),
    ],
)
def test_bad_command_lines_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.split(".*")[0] in error
    assert message.split(".*")[-1] in error


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.csv").write_text("a,b\n1,2\n")
    assert study.main(["--folder", str(tmp_path)]) == 2
    assert "has columns ['a', 'b']; those of this study are" in capsys.readouterr().err
