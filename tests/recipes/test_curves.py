"""Curves of runs, and the command that draws several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offtrace.agents.runs.curves import Curves, plot_curves, read_curves
from offtrace.recipes import curves

HEADER = "step,train/return,eval/return,train/seconds\n"


def write(folder: Path, rows: str, part: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"metrics{part}.csv"
    path.write_text(HEADER + rows)
    return path


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def test_between_what_was_logged_time_is_a_straight_line(tmp_path: Path) -> None:
    path = write(tmp_path, "1000,1,,2\n2000,2,,5\n2000,,7,\n2000,3,,6\n")
    found = read_curves(path)
    assert found.seconds == [(1000, 2.0), (2000, 5.0), (2000, 6.0)]
    assert found.seconds_at([0, 500, 1000]).tolist() == [0.0, 1.0, 2.0]
    assert found.seconds_at([1500])[0] == pytest.approx(3.5)


def test_a_run_of_which_a_part_tells_no_seconds(tmp_path: Path) -> None:
    """It was begun by a version that did not, and the clock of the later part began with it."""
    write(tmp_path, "1000,1,,\n2000,2,,\n3000,3,,\n", ".part0")
    found = read_curves(write(tmp_path, "2500,9,,5\n3000,9,,8\n"))
    assert found.seconds == []
    assert found.training == [(1000, 1.0), (2000, 2.0), (2500, 9.0), (3000, 9.0)]


def test_runs_of_one_label_have_one_colour(tmp_path: Path) -> None:
    rows = "1000000,-20,-19,500\n2000000,5,,1000\n3000000,18,20,1500\n"
    runs = [read_curves(write(tmp_path / str(seed), rows.replace("18", str(seed)))) for seed in range(3)]
    blue, orange = (31, 119, 180), (255, 127, 14)
    plot_curves({"both": runs}, tmp_path / "one.png", title="pong", goal=18)
    plot_curves({"a": runs[:1], "b": runs[1:]}, tmp_path / "two.png", against_time=True)
    assert blue in colours(tmp_path / "one.png")
    assert orange not in colours(tmp_path / "one.png")
    assert {blue, orange} < colours(tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width > Image.open(tmp_path / "one.png").width > 600


def test_many_labels_and_long_ones(tmp_path: Path) -> None:
    """More than ten have colours of their own; a legend of long names has fewer columns, so none is cut off."""
    run = Curves([(1000, 1.0)], [(1000, 2.0)], [])
    plot_curves({f"run {n}": [run] for n in range(12)}, tmp_path / "many.png")
    assert (31, 119, 180) not in colours(tmp_path / "many.png"), "of which two would have the first colour"
    for name, label in (("short", "a"), ("long", "CartPole-v1-impala-s0-20261129-003935")):
        plot_curves({f"{label}{n}": [run] for n in range(6)}, tmp_path / f"{name}.png")
    pixels = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("short", "long")]
    assert all((image[:, [0, -1]] == 255).all() for image in pixels)


@pytest.mark.parametrize("rows", ["", "1000,5,,\n"])
def test_a_curve_without_evaluations(tmp_path: Path, rows: str) -> None:
    plot_curves({"seed 0": [read_curves(write(tmp_path, rows))]}, tmp_path / "curve.png", against_time=True)
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_curve_needs_no_display(tmp_path: Path) -> None:
    write(tmp_path, "1000,5,6,\n")
    code = (
        "from pathlib import Path\nfrom offtrace.agents.runs.curves import plot_curves, read_curves\n"
        "plot_curves({'a': [read_curves(Path('metrics.csv'))]}, Path('c.png'))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")} | {"MPLBACKEND": "TkAgg"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", "3600000,1,,3600\n3600000,,20.5,\n", ".part0")
    write(tmp_path / "a", "7200000,2,,7200\n7200000,,19.5,\n")
    write(tmp_path / "lr=0.1", "1800000,-3,,\n")
    write(tmp_path / "short", "1000,20,,90\n")
    assert curves.main(["IMPALA=a", "lr=0.1", "PPO=lr=0.1", "short", "--goal", "18"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "IMPALA: a: score 19.5 at 7,200,000 frames, best 20.5; 2.00 hours of training",
        "lr=0.1: lr=0.1: return of training -3.0 at 1,800,000 frames",
        "PPO: lr=0.1: return of training -3.0 at 1,800,000 frames",
        "short: short: return of training 20.0 at 1,000 frames; 1.50 minutes of training",
        "written: curves.png",
    ]
    assert Image.open("curves.png").width > 900


def test_a_label_may_hold_any_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two $ matplotlib reads mathematics, and fails where it finds none."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", "1000,20,,90\n")
    assert curves.main(["$\\x$=a", "--title", "$\\frac$"]) == 0


def test_what_is_exported_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every score is kept, of long curves two hundred points; a name holds no folder, and none is written twice."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{n}000,{n / 7},,{n * 2}\n" for n in range(1, 1001))
    write(tmp_path / "long", rows + "500000,,4.25,\n1000000,,5.5,\n")
    write(tmp_path / "short", "1000,20,,90\n")
    command = ["a/b=long", "a_b=short", "a/b=short", "--export", "kept/here"]
    assert curves.main(command) == 0
    assert "written: kept/here" in capsys.readouterr().out
    assert sorted(path.name for path in Path("kept/here").iterdir()) == ["a_b-0", "a_b-1", "a_b-2"]
    found = read_curves(Path("kept/here/a_b-0/metrics.csv"))
    assert found.scores == [(500_000, 4.25), (1_000_000, 5.5)]
    assert len(found.training) == len(found.seconds) == 200
    assert set(found.training) < {(n * 1000, n / 7) for n in range(1, 1001)}
    assert found.training[0] == (1000, 1 / 7)
    assert found.training[-1] == (1_000_000, 1000 / 7)
    assert found.seconds_at([1000, 250_500, 1_000_000]).tolist() == [2, 501, 2000]
    assert [read_curves(Path(f"kept/here/a_b-{n}/metrics.csv")) for n in (1, 2)] == 2 * [
        Curves([(1000, 20.0)], [], [(1000, 90.0)])
    ]
    assert curves.main(["long=kept/here/a_b-0"]) == 0
    assert "long: kept/here/a_b-0: score 5.5 at 1,000,000 frames, best 5.5; 0.56 hours" in capsys.readouterr().out
    assert curves.main(command) == 2
    assert "--export is kept/here, which is there already; give a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: [LABEL=]RUN"),
        (["nothing"], "nothing has no metrics.csv; give the folder of a run, such as runs/NAME or PPO=runs/NAME"),
        (["A=nothing"], "nothing has no metrics.csv; "),
        (["=a"], "a has no metrics.csv; "),
        (
            ["cut"],
            "cut/metrics.csv, or a part of it, is damaged (could not convert string to float: '-'); mend or remove",
        ),
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
    write(tmp_path / "cut", "1000,-")
    assert curves.main(argv) == 2
    assert words in capsys.readouterr().err
    assert not Path("curves.png").exists()
