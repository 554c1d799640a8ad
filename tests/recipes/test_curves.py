"""Curves of runs, and the command that draws several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offtrace.agents.runs.curves import plot_curves, read_curves
from offtrace.recipes import curves

HEADER = "step,train/return,eval/return,train/frames_per_second\n"


def write(folder: Path, rows: str, part: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"metrics{part}.csv"
    path.write_text(HEADER + rows)
    return path


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def test_seconds_are_of_training_alone(tmp_path: Path) -> None:
    """1,000 frames at 500 a second, 1,000 at 250, then nothing but an evaluation; between them a straight line."""
    path = write(tmp_path, "1000,1,,500\n2000,2,,250\n2000,,7,\n2000,3,,0\n")
    found = read_curves(path)
    assert found.seconds == [(1000, 2.0), (2000, 6.0)]
    assert found.seconds_at([0, 500, 1500, 2000]).tolist() == [0.0, 1.0, 4.0, 6.0]


def test_seconds_of_a_resumed_run(tmp_path: Path) -> None:
    """It was stopped at 3,000 frames and went on from 2,000: the later time counts."""
    write(tmp_path, "1000,1,,100\n2000,2,,100\n3000,2,,1\n", ".part0")
    path = write(tmp_path, "2500,3,,50\n3000,3,,50\n")
    assert read_curves(path).seconds == [(1000, 10.0), (2000, 20.0), (2500, 30.0), (3000, 40.0)]


def test_runs_of_one_label_have_one_colour(tmp_path: Path) -> None:
    rows = "1000000,-20,-19,500\n2000000,5,,500\n3000000,18,20,500\n"
    paths = [write(tmp_path / str(seed), rows.replace("18", str(seed))) for seed in range(3)]
    blue, orange = (31, 119, 180), (255, 127, 14)
    plot_curves({"both": paths}, tmp_path / "one.png", title="pong", goal=18)
    plot_curves({"a": paths[:1], "b": paths[1:]}, tmp_path / "two.png", against_time=True)
    assert blue in colours(tmp_path / "one.png")
    assert orange not in colours(tmp_path / "one.png")
    assert {blue, orange} < colours(tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width > Image.open(tmp_path / "one.png").width > 600


@pytest.mark.parametrize("rows", ["", "1000,5,,\n"])
def test_a_curve_without_evaluations(tmp_path: Path, rows: str) -> None:
    plot_curves({"seed 0": [write(tmp_path, rows)]}, tmp_path / "curve.png", against_time=True)
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_curve_needs_no_display(tmp_path: Path) -> None:
    write(tmp_path, "1000,5,6,\n")
    code = (
        "from pathlib import Path\nfrom offtrace.agents.runs.curves import plot_curves\n"
        "plot_curves({'a': [Path('metrics.csv')]}, Path('c.png'))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")} | {"MPLBACKEND": "TkAgg"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", "3600000,1,,1000\n3600000,,20.5,\n7200000,2,,1000\n7200000,,19.5,\n")
    write(tmp_path / "b", "1800000,-3,,1000\n")
    assert curves.main(["IMPALA=a", "b", "--goal", "18"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "IMPALA: a: score 19.5 at 7,200,000 frames, best 20.5; 2.00 hours of training",
        "b: b: return of training -3.0 at 1,800,000 frames; 0.50 hours of training",
        "written: curves.png",
    ]
    assert Image.open("curves.png").width > 900


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: [LABEL=]RUN"),
        (["nothing"], "nothing has no metrics.csv; give the folder of a run, such as runs/NAME"),
        (["A=empty"], "empty has logged no return yet; wait for its first episodes, or leave it out"),
        (["a", "--figure", "a.pdf"], "--figure is a.pdf; it must be the name of a file that ends in .png"),
        (["a", "--figure", "no/a.png"], "--figure is no/a.png; there is no folder "),
        (["a", "--gaol", "3"], "there is no flag --gaol; did you mean --goal?"),
    ],
)
def test_bad_input(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", "1000,1,,1000\n")
    write(tmp_path / "empty", "")
    assert curves.main(argv) == 2
    assert words in capsys.readouterr().err
    assert not Path("curves.png").exists()
