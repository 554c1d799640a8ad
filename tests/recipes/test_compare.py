"""The comparison of agents: its statistics, which agents it trains how, its resuming, its refusals."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from offtrace.agents.config import ConfigError
from offtrace.agents.registry import AGENTS
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY
from offtrace.recipes import compare, compare_report, compare_run
from offtrace.recipes.compare_report import Scores, best_known, interquartile_mean, overall, stratified_interval, table
from offtrace.recipes.compare_run import PRESETS, Cell, configuration, make_cell
from offtrace.recipes.studies import append_row, read_rows

pytestmark = pytest.mark.usefixtures("own_folder")

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
cell, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
agent = cell["agent"]
with open("calls", "a") as file:
    file.write(f"{cell['task']} {agent} {cell['seed']} {cell['frames']}\\n")
print("grüße from", agent)
folder.mkdir(parents=True, exist_ok=True)
if agent == os.environ.get("FAILING"):
    print("error: training stopped: bad luck\\nthe whole error is elsewhere", file=sys.stderr)
    sys.exit(1)
if agent == os.environ.get("KILLED"):
    os.kill(os.getpid(), signal.SIGKILL)
if agent == os.environ.get("INTERRUPTING"):
    def save(*_):
        (folder / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
score = {"random": 20, "a2c": 259.5 + cell["seed"], "ppo": 500 + cell["seed"]}[agent]
summary = {"scores": [[cell["frames"], score]], "frames": cell["frames"] + 24, "seconds": 2.0}
(folder / "replay").mkdir()
(folder / "summary.json").write_text(json.dumps(summary | {"frames_per_second": 1234.0, "signal": 0}))
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of no time that note that they were called."""
    monkeypatch.setattr(
        compare, "command", lambda cell, folder: [sys.executable, "-c", FAKE, *real_command(cell, folder)[-2:]]
    )


real_command = compare.command
WORDS = ["--tasks", "CartPole-v1", "--agents", "a2c", "ppo", "--seeds", "2", "--frames", "3e3", "--folder", "out"]


def calls() -> list[str]:
    """What was trained since the last call."""
    path = Path("calls")
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def rows() -> list[dict[str, str]]:
    with open("out/compare.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 800]) == 4.5
    assert interquartile_mean([7.0]) == 7
    rng = np.random.default_rng(0)
    for size in range(1, 40):
        values = rng.normal(size=size)
        kept = sorted(values)[size // 4 : size - size // 4]
        assert interquartile_mean(values) == pytest.approx(sum(kept) / len(kept), abs=1e-12)


def test_the_interval_is_that_of_all_resamples_within_the_tasks() -> None:
    # what differs between tasks alone is no uncertainty
    assert stratified_interval([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]) == (0.5, 0.5)
    strata = [[0.1, 0.9, 0.4], [0.3, 0.35, 0.8]]
    draws = [list(itertools.product(values, repeat=3)) for values in strata]
    means = sorted(sum(sorted(a + b)[1:5]) / 4 for a, b in itertools.product(*draws))
    assert len(means) == 27**2
    low, high = stratified_interval(strata)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.01)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.01)
    assert (low, high) == stratified_interval(strata)


def test_scores_are_normalised_by_random_actions_and_the_best_known() -> None:
    one = Scores("one", 500.0, {"random": [18.0, 22.0], "ppo": [500.0, 260.0], "a2c": [20.0]})
    two = Scores("two", -50.0, {"random": [-500.0], "ppo": [-275.0, -50.0]})
    unknown = Scores("three", None, {"random": [0.0], "ppo": [1.0]})
    assert one.random == 20
    assert one.normalised("ppo").tolist() == [1.0, 0.5]  # type: ignore[union-attr]
    assert unknown.normalised("ppo") is None
    assert Scores("four", 2.0, {"random": [2.0], "ppo": [3.0]}).normalised("ppo") is None
    assert Scores("five", 2.0, {"ppo": [3.0]}).normalised("ppo") is None
    # otherwise the worst agent would be the best
    six = Scores("six", 2.0, {"random": [3.0], "ppo": [1.0]}, speed={"ppo": 1.0})
    assert six.normalised("ppo") is None
    assert "**six**, best known 2, which is not above random actions, 3: not normalised" in table([six], ["ppo"])
    found = overall([one, two, unknown], ["a2c", "ppo"])
    assert list(found) == ["ppo", "a2c"]
    assert found["ppo"] == ([[1.0, 0.5], [0.5, 1.0]], 0.75)
    for scores in (one, two, unknown):
        scores.speed = dict.fromkeys(scores.by_agent, 1000.0)
    text = table([one, two, unknown], ["a2c", "ppo", "random"])
    assert "| ppo | 380 | 320 to 440 | 0.75 | 2 | 1,000 |" in text
    assert "| ppo | 0.75 | 0.5, 1 | 2 of 3 |" in text
    assert "| a2c | 0 | one seed, which proves nothing | 1 of 3 |" in text
    two.failed = {"ppo": 3}
    text = table([one, two], ["a2c", "ppo", "random"])
    assert "| ppo | -162 | -219 to -106 | 0.75 | 2 of 5 | 1,000 |" in text
    assert "| ppo | 0.75 | 0.5, 1 | 2 of 2; without 3 failed trainings |" in text


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (255, "its process ended with code 255"),
        (-9, "its process was ended by SIGKILL"),
        (143, "it was stopped by SIGTERM"),
        (-100, "its process ended with code -100"),
        (0, "it has no score: the simulator failed in every episode"),
    ],
)
def test_a_process_that_ends_in_any_way_is_told(code: int, told: str, tmp_path: Path) -> None:
    cell = make_cell("random", "", "CartPole-v1", 0, 1, 0)
    assert compare._result(cell, tmp_path, "", code, "").failed == told


@pytest.mark.parametrize(
    ("scores", "number", "ended"),
    [([[1000, 2.0]], 0, True), ([[1000, 2.0]], 15, True), ([[900, 2.0]], 15, False), ([], 0, False), ([], 15, False)],
)
def test_a_training_has_finished_where_it_has_its_last_score(
    scores: list[Any], number: int, ended: bool, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"signal": number, "scores": scores}))
    assert (compare_run.finished(tmp_path, 1000) is not None) == ended


def test_best_known_scores() -> None:
    expected = {"CartPole-v1": 500, "walker-walk": 1000, "pong": 14.6, "MountainCar-v0": None}
    assert {task: best_known(task) for task in expected} == expected
    assert all(best_known(task) is not None for task in compare.TASKS)


def test_the_best_score_of_taxi_is_that_of_value_iteration() -> None:
    taxi: Any = gymnasium.make("Taxi-v4").unwrapped
    outcomes = [[taxi.P[state][action] for action in range(6)] for state in range(500)]
    assert all(len(outcome) == 1 for actions in outcomes for outcome in actions)  # nothing is drawn
    following, reward, over = (np.array([[one[0][k] for one in each] for each in outcomes]) for k in (1, 2, 3))
    value = np.zeros(500)
    for _ in range(100):
        value = (reward + np.where(over, 0, value[following])).max(1)
    assert best_known("Taxi-v4") == pytest.approx(float(taxi.initial_state_distrib @ value), abs=1e-9)


def test_every_agent_has_presets_of_its_own() -> None:
    assert PRESETS.keys() == AGENTS.keys()
    for agent, presets in PRESETS.items():
        for preset in presets:
            recipe, _, name = preset.partition("/")
            assert (name or "default") in import_module(f"offtrace.recipes.{recipe}").main.keywords["presets"]
            assert configuration(preset, "CartPole-v1", 100_000, 20, 3).algorithm == agent
        config = configuration(presets.discrete, "CartPole-v1", 100_000, 20, 3)
        config.validate()
        assert (config.task, config.train.total_frames, config.train.seed) == ("CartPole-v1", 100_000, 3)
        assert (config.train.eval_every, config.train.eval_episodes, config.train.final_eval) == (100_000, 20, True)
    told = {line.split()[0]: line for line in compare._epilog().splitlines() if line}
    assert told["ppo"].split() == ["ppo", "ppo", "ppo/pendulum", "ppo/atari"]
    for name in PRESETS:
        assert ("cannot act" in told[name]) == (name in ("dqn", "q_actor_critic", "reactor"))


def test_the_key_holds_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_cell("a2c", "a2c", "CartPole-v1", 1000, 20, 0)
    assert before == make_cell("a2c", "a2c", "CartPole-v1", 1000, 20, 0)
    assert before.settings == make_cell("a2c", "a2c", "CartPole-v1", 1000, 20, 1).settings
    others = [
        make_cell("a2c", "a2c", "CartPole-v1", 1001, 20, 0), make_cell("a2c", "a2c", "CartPole-v1", 1000, 21, 0),
        make_cell("a2c", "a2c", "Acrobot-v1", 1000, 20, 0), make_cell("a2c", "a2c/atari", "CartPole-v1", 1000, 20, 0),
    ]  # fmt: skip

    def changed(*arguments: Any) -> Any:
        config = configuration(*arguments)
        config.loss.gamma = 0.98
        return config

    with monkeypatch.context() as patched:
        patched.setattr(compare_run, "configuration", lambda *words, seed, recurrent: changed(*words, seed, recurrent))
        others.append(make_cell("a2c", "a2c", "CartPole-v1", 1000, 20, 0))
    assert len({cell.settings for cell in (before, *others)}) == 6
    assert len({cell.name for cell in (before, *others)}) == 6


def test_with_a_memory_for_all_the_others_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    task = "offtrace.modules.envs.memory:cartpole_positions"
    args = compare.parse(["--tasks", task, "--recurrent", "16", "--seeds", "1"])
    cells = list(compare.choose(args))
    assert [cell.agent for cell in cells] == ["random", "a2c", "impala", "ppo", "q_actor_critic", "reactor", "vmpo"]
    assert [cell.recurrent for cell in cells] == [0, 16, 16, 16, 16, 16, 16]
    told = capsys.readouterr().out
    for agent in ("acer", "dqn", "mpo", "sac", "trpo"):
        assert f"{agent} is left out of {task}: {agent} has no recurrent network" in told
    for cell in cells[1:]:
        config = configuration(cell.preset, task, 100_000, 20, 0, 16)
        config.validate()
        assert config.network.recurrent == 16
        plain = make_cell(cell.agent, cell.preset, task, 100_000, 20, 0)
        assert plain.settings != cell.settings
    with pytest.raises(ConfigError, match="--recurrent is -1; it must be at least 0"):
        compare.parse(["--recurrent", "-1"])


def test_who_cannot_act_is_left_out_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    task = "tests.conformance.tasks:ContinuousImages"
    args = compare.parse(["--tasks", "Pendulum-v1", task, "--agents", "dqn", "sac", "reactor", "ppo", "--seeds", "1"])
    found = [(cell.task, cell.agent, cell.preset) for cell in compare.choose(args)]
    assert found == [
        (task, agent, preset)
        for task in ("Pendulum-v1", task)
        for agent, preset in (("random", ""), ("sac", "sac_control"), ("ppo", "ppo/pendulum"))
    ]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4
    assert told[0] == (
        "dqn is left out of Pendulum-v1: env.task is Pendulum-v1, whose actions are continuous; dqn needs discrete ones"
    )
    args = compare.parse(["--tasks", "CartPole-v1", "--agents", "acer", "a2c", "--frames", "5000"])
    assert {cell.agent for cell in compare.choose(args)} == {"random", "a2c"}
    assert "acer is left out of CartPole-v1: replay.min_size is 8000; " in capsys.readouterr().out
    images = compare.parse(["--tasks", "tests.conformance.tasks:Images", "--agents", "ppo", "--seeds", "1"])
    assert [cell.preset for cell in compare.choose(images)] == ["", "ppo/atari"]
    with pytest.raises(ConfigError, match="none of dqn can act in Pendulum-v1: there is nothing to do"):
        list(compare.choose(compare.parse(["--tasks", "Pendulum-v1", "--agents", "dqn"])))


@pytest.mark.usefixtures("fake")
def test_rows_table_and_figure_agree_and_what_has_finished_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*WORDS, "--jobs", "3"]) == 0
    agents = ("random", "a2c", "ppo")
    expected = [f"CartPole-v1 {name} {seed} {3000 if name != 'random' else 0}" for seed in (0, 1) for name in agents]
    assert sorted(calls()) == sorted(expected)
    found = {(row["agent"], row["seed"]): row for row in rows()}
    assert len(found) == 6
    assert (found["ppo", "1"]["score"], found["ppo", "1"]["trained"], found["ppo", "1"]["seconds"]) == (
        "501",
        "3024",
        "2.0",
    )
    assert found["ppo", "1"]["version"]
    out = capsys.readouterr().out
    assert "6 trainings, 0 of them finished before" in out
    name = make_cell("ppo", "ppo", "CartPole-v1", 3000, 20, 0).name
    assert f"CartPole-v1 ppo seed 0 begins: out/logs/{name}.txt" in out
    assert "CartPole-v1 ppo seed 0: score 500, 1,234 steps/s, 2 s, about " in out
    assert Path(f"out/logs/{name}.txt").read_text() == "grüße from ppo\n"
    assert not list(Path("out/runs").glob("*/replay"))
    text = Path("out/compare.md").read_text()
    assert text in out
    assert "**CartPole-v1**, best known 500" in text
    assert "| a2c | 260 | 260 to 260 | 0.5 | 2 | 1,234 |" in text
    assert Path("out/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert compare.main([*WORDS, "--best", "CartPole-v1=980"]) == 0
    assert calls() == []
    assert len(rows()) == 6
    assert "| a2c | 260 | 260 to 260 | 0.25 | 2 | 1,234 |" in Path("out/compare.md").read_text()
    assert compare.main([*WORDS, "--frames", "4000"]) == 0  # random actions need none
    assert calls() == [f"CartPole-v1 {name} {seed} 4000" for seed in (0, 1) for name in ("a2c", "ppo")]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("kind", "why"),
    [("FAILING", "training stopped: bad luck"), ("KILLED", "its process was ended by SIGKILL")],
)
def test_a_training_that_fails_does_not_end_the_others(
    kind: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(kind, "a2c")
    assert compare.main(WORDS) == 1
    assert len(calls()) == 6
    out, error = capsys.readouterr()
    assert out.count(f"a2c seed 0 failed: {why}, about ") == 1
    name = make_cell("a2c", "a2c", "CartPole-v1", 3000, 20, 0).name
    assert error.splitlines()[0] == (
        f"error: CartPole-v1 a2c seed 0 failed: {why}; the whole output: out/logs/{name}.txt"
    )
    assert [row["failed"] for row in rows() if row["agent"] == "a2c"] == [why] * 2
    assert "a2c" not in Path("out/compare.md").read_text()
    monkeypatch.delenv(kind)
    assert compare.main(WORDS) == 0  # tried again, and they alone
    assert calls() == [f"CartPole-v1 a2c {seed} 3000" for seed in (0, 1)]
    assert "| a2c | 260 |" in Path("out/compare.md").read_text()
    assert compare.main(WORDS) == 0
    assert calls() == []


@pytest.mark.usefixtures("fake")
def test_an_interrupted_comparison_lets_its_trainings_save_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERRUPTING", "ppo")
    assert compare.main(WORDS) == 130
    assert len(calls()) == 3
    assert [row["agent"] for row in rows()] == ["random", "a2c"]
    ppo = make_cell("ppo", "ppo", "CartPole-v1", 3000, 20, 0)
    assert Path(f"out/runs/{ppo.name}/saved").exists()
    assert "interrupted; what has finished is kept, and the same command goes on" in capsys.readouterr().err
    monkeypatch.delenv("INTERRUPTING")
    assert compare.main(WORDS) == 0
    assert calls()[0] == "CartPole-v1 ppo 0 3000"
    assert len(rows()) == 6


@pytest.mark.usefixtures("fake")
def test_a_row_that_was_not_written_is_read_of_the_run() -> None:
    assert compare.main(WORDS) == 0
    calls()
    lines = Path("out/compare.csv").read_text().splitlines(keepends=True)
    Path("out/compare.csv").write_text("".join(lines[:-1]))
    assert compare.main(WORDS) == 0
    assert calls() == []
    assert Path("out/compare.csv").read_text() == "".join(lines)


def test_a_training_that_is_refused_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as for a disk that is full when it would go on. One that failed begins anew, and one at its end."""
    resumed: list[Path | None] = []
    monkeypatch.setattr(compare_run, "run_in", lambda folder, config, resume: resumed.append(resume) or 2)
    cell, folder = make_cell("ppo", "ppo", "CartPole-v1", 3000, 20, 0), Path("out")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    for content in (b"damaged", {CHECKPOINT_KEY: {"frames": 2000}, "state_dict": {}}):
        torch.save(content, checkpoint) if isinstance(content, dict) else checkpoint.write_bytes(content)
        assert compare_run.train(cell, folder) == 2
        assert checkpoint.exists()
        assert resumed == [checkpoint]
        resumed.clear()
    found = compare._result(cell, folder, "1", 2, "error: no room\n")
    assert found.failed == "no room; to begin it again, remove out"
    torch.save({CHECKPOINT_KEY: {"frames": 3000}, "state_dict": {}}, checkpoint)
    compare_run.train(cell, folder)
    assert resumed == [checkpoint, None]
    assert not checkpoint.exists()
    checkpoint.parent.mkdir()
    checkpoint.touch()
    (folder / "error.txt").touch()
    compare_run.train(cell, folder)
    assert resumed == [checkpoint, None, None]
    assert not checkpoint.exists()


@pytest.mark.usefixtures("fake")
def test_one_comparison_at_a_time_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with compare._alone(Path("out")):
        assert compare.main(WORDS) == 2
    assert "--folder is out, in which a comparison, or a training" in capsys.readouterr().err
    assert calls() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--agents", "ppoo"], "--agents has ppoo; they must be of a2c, .*did you mean ppo?"),
        (["--agents", "random"], "--agents has random; they must be of a2c, "),
        (["--tasks", "CartPole-v2"], "--tasks: unknown environment 'CartPole-v2'; did you mean CartPole-v1?"),
        (["--tasks", "nowhere:make"], "--tasks: the environment 'nowhere:make' cannot be imported: there is no module"),
        (["--tasks", "tests.conformance.tasks:Vectr"], "has no 'Vectr'; did you mean Vector?"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--frames", "many"], "--frames: 'many' is no whole number"),
        (["--jobs", "1.5"], "--jobs: '1.5' is no whole number"),
        (["--episodes", "-1"], "--episodes is -1; it must be at least 1"),
        (["--seed", "3"], "there is no flag --seed; did you mean --seeds?"),
        (["--best", "CartPole-v1"], "--best has CartPole-v1; it must be TASK=SCORE, of a task among CartPole-v1, "),
        (["--best", "CartPole=500"], "did you mean CartPole-v1?"),
        (["--best", "CartPole-v1=much"], "--best has CartPole-v1=much; the score must be a number"),
        (["--best", "CartPole-v1=inf"], "--best has CartPole-v1=inf; the score must be a number"),
        (["--folder", "/proc/none"], "--folder is /proc/none, which cannot be written: "),
        (
            ["--tasks", "tests.recipes.test_compare:broken"],
            "--tasks has tests.recipes.test_compare:broken, which cannot be made: no such level: cave",
        ),
    ],
)
def test_bad_command_lines_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.split(".*")[0] in error
    assert message.split(".*")[-1] in error


def broken() -> Any:
    """A task that cannot be made."""
    raise FileNotFoundError("no such level: cave")


def test_a_file_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/compare.csv").write_text("a,b\n1,2\n")
    assert compare.main(WORDS) == 2
    assert "has columns ['a', 'b']; those of this study are" in capsys.readouterr().err


def test_random_actions_are_legal_and_scored_as_an_agents(tmp_path: Path) -> None:
    for task in ("Masked", "Continuous", "MultiDiscrete"):
        cell = make_cell("random", "", f"tests.conformance.tasks:{task}", 1000, 6, 0)
        assert compare_run.play_at_random(cell, tmp_path / task) == 0
        summary = compare_run.finished(tmp_path / task, 0)
        assert summary is not None
        ((frames, score),) = summary["scores"]
        assert frames == 0
        assert math.isfinite(score)


class Squared(gymnasium.Env[Any, Any]):
    """Episodes of 200 steps, whose reward is the square of an action from -3 to 1."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 1, (1,), np.float32)
    steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(2, np.float32), float(action[0] ** 2), self.steps % 200 == 0, False, {}


def test_random_numbers_are_uniform_within_the_bounds(tmp_path: Path) -> None:
    cell = make_cell("random", "", f"{__name__}:Squared", 1000, 4, 0)
    assert compare_run.play_at_random(cell, tmp_path / "random") == 0
    summary = compare_run.finished(tmp_path / "random", 0)
    assert summary is not None
    ((_, score),) = summary["scores"]
    assert score / 200 == pytest.approx(28 / 12, rel=0.1), "the mean of x^2 over [-3, 1]"


@pytest.mark.slow
def test_real_trainings_in_a_task_of_ones_own_that_stops_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task ends its process at step 60, as a cluster does; the second time the run goes on behind it."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}")
    task = "tests.recipes.own_tasks:Stopped"
    words = ["--tasks", task, "--agents", "trpo", "--seeds", "1", "--frames", "4096", "--episodes", "2"]
    words += ["--folder", "out", "--best", f"{task}=6"]
    assert compare.main(words) == 1
    assert "trpo seed 0 failed: it was stopped by SIGTERM" in capsys.readouterr().out
    assert compare.main(words) == 0
    assert "going on from " in next(Path("out/logs").glob("*trpo*.txt")).read_text()
    found = read_rows(Path("out/compare.csv"), Cell, compare.Result)
    assert [(cell.agent, result.score, result.trained, result.failed) for cell, result in found.items()] == [
        ("random", 3.0, 0, ""), ("trpo", 3.0, 4096, ""),
    ]  # fmt: skip


def test_a_file_that_was_broken_off_goes_on_behind_its_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "compare.csv"
    cells = [Cell("CartPole-v1", "ppo", "ppo", seed, 100, 2, 0, "x") for seed in range(3)]
    result = compare.Result(1.0, 100, 1.0, 1.0, "v", "why, so")
    path.write_bytes(b"")  # a disk that was full
    assert read_rows(path, Cell, compare.Result) == {}
    for cell in cells[:2]:
        append_row(path, cell, result)
    path.write_bytes(path.read_bytes()[:-9])  # the machine stopped while the second was written
    assert read_rows(path, Cell, compare.Result) == {cells[0]: result}
    append_row(path, cells[2], result)
    assert read_rows(path, Cell, compare.Result) == {cells[0]: result, cells[2]: result}
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="is no text"):
        read_rows(path, Cell, compare.Result)


@pytest.mark.slow
def test_a_module_of_ones_own_does_not_take_the_place_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("statistics.py").write_text("raise RuntimeError('mine')")
    Path("mytask.py").write_text("import gymnasium\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    words = ["--tasks", "mytask:make", "--agents", "a2c", "--seeds", "1", "--frames", "100", "--episodes", "1"]
    assert compare.main([*words, "--folder", "out"]) == 0


def test_two_tasks_of_one_name_have_their_whole_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **kwargs: titles.append(title))
    tasks = [Scores(task, None, {"ppo": [1.0]}) for task in ("a:make", "b:make", "c:Other$x$")]
    compare_report.draw(tmp_path / "c.png", tasks, ["ppo"])
    assert titles == ["a:make", "b:make", "Other$x$"]
