"""The folder of a run: what it keeps across a stop, and what a refused start leaves."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offtrace.agents.impala import control_config
from offtrace.agents.runs import folders
from offtrace.agents.runs.curves import read_curves
from offtrace.agents.runs.folders import RunError, commit_of, discard, keep_metrics, new_run, write_config
from offtrace.recipes import cli
from tests.recipes.recipes import main_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = control_config()
    config.train.name = "one"
    return new_run(config)


def test_a_name_is_made_from_task_algorithm_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = control_config()
    config.env.task, config.train.seed = "ALE/Pong-v5", 7
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    assert [new_run(config).name for _ in range(3)] == [
        f"ALE-Pong-v5-impala-s7-20260101-000000{end}" for end in ("", "-2", "-3")
    ], "runs that begin in one second have folders of their own"


def test_an_interruption_right_behind_the_making_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_and_stop(make: Callable[[], str]) -> str:
        make()
        assert (tmp_path / "runs/s/versions.json").exists()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "from_first", make_and_stop)
    assert main_of("impala_control")(["--train.name", "s"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", [None, "one"])
def test_a_start_that_is_interrupted_leaves_no_folder(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "versions", interrupt)
    config = control_config()
    config.train.name = name
    with pytest.raises(KeyboardInterrupt):
        new_run(config)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "", "."])
def test_a_name_stays_inside_the_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = control_config()
    config.train.name = name
    with pytest.raises(RunError, match="it must be the name of a folder inside runs"):
        new_run(config)
    assert not list(tmp_path.iterdir())


def test_a_refused_start_frees_its_name(folder: Path) -> None:
    assert discard(folder)
    config = control_config()
    config.train.name = "one"
    assert new_run(config) == folder


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoints", "notes.txt"])
def test_a_run_that_began_is_never_removed(folder: Path, file: str) -> None:
    (folder / file).mkdir() if file == "checkpoints" else (folder / file).touch()
    assert not discard(folder)
    assert (folder / "config.yaml").exists()
    assert (folder / file).exists()


def test_resume_is_offered_only_where_there_is_a_checkpoint(folder: Path) -> None:
    config = control_config()
    config.train.name = "one"
    with pytest.raises(RunError, match=r"ended before its first checkpoint; give another --train\.name"):
        new_run(config)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(RunError, match="go on with it by --resume runs/one"):
        new_run(config)


def test_versions_of_every_part_are_kept(folder: Path) -> None:
    first = json.loads((folder / "versions.json").read_text())
    assert first["packages"]["torch"] != "not installed"
    assert "cores" in first["machine"]
    assert first["gpus"] == [] or isinstance(first["gpus"][0], str)
    for _ in range(2):
        write_config(control_config(), folder, resumed=True)
    kept = json.loads((folder / "versions.json").read_text())
    assert len(kept.pop("resumed")) == 2
    assert kept == first


def test_the_commit_is_that_of_the_code_not_of_a_folder_around_it(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "code.py").touch()
    assert commit_of(installed) is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert commit_of(installed) is None, "somebody's repository does not track it"
    subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], cwd=tmp_path, check=True)
    commit = commit_of(installed)
    assert commit is not None
    assert len(commit) == 40
    (installed / "code.py").write_text("changed")
    assert commit_of(installed) == commit + "+"


def write(path: Path, rows: list[tuple[int, str, str]]) -> None:
    lines = ["step,train/return,eval/return", *(f"{step},{training},{score}" for step, training, score in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_metrics_of_all_parts_make_one_curve(folder: Path) -> None:
    metrics = folder / "metrics.csv"
    keep_metrics(folder, 0)  # nothing yet: nothing to keep
    write(metrics, [(100, "1", ""), (200, "2", "20"), (300, "99", "")])
    with open(metrics, "a") as file:
        file.write("40")  # killed while it wrote
    # killed behind 300, resumed from the checkpoint at 200: what is trained again counts as of the second time
    keep_metrics(folder, 200)
    assert not metrics.exists()
    assert read_curves(metrics)[:2] == ([(100, 1.0), (200, 2.0)], [(200, 20.0)])
    write(metrics, [(250, "3", ""), (350, "4", "40")])
    keep_metrics(folder, 350)
    write(metrics, [(350, "", ""), (400, "5", "")])
    assert read_curves(metrics)[:2] == (
        [(100, 1.0), (200, 2.0), (250, 3.0), (350, 4.0), (400, 5.0)],
        [(200, 20.0), (350, 40.0)],
    )
    keep_metrics(folder, 220)  # and once more, from a checkpoint that is older than the last part
    assert read_curves(metrics)[:2] == ([(100, 1.0), (200, 2.0)], [(200, 20.0)])


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"metrics\.csv"):
        read_curves(tmp_path / "metrics.csv")
