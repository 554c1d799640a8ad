"""The doctor: each check is a line, whatever becomes of it, and what the lines say is so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offtrace.agents.config import Machine, available_cores
from offtrace.agents.runs import doctor as checks
from offtrace.agents.runs import isolated
from offtrace.agents.runs.isolated import Check, Missing, line_of
from offtrace.modules.collectors.ray_cluster import cluster_size
from offtrace.recipes import doctor
from tests.recipes import faulty_checks as faulty

ROOT = Path(__file__).resolve().parents[2]


def gone(pids: Path) -> bool:
    """Whether the processes of ``faulty.hangs`` have ended; who has ended may wait for its parent to hear of it."""
    for pid in map(int, pids.read_text().split()):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            pass
    return True


@pytest.mark.slow
def test_whatever_becomes_of_a_check_is_a_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_PATIENCE", 0.5)
    pids = tmp_path / "pids"
    groups = [
        [Check("first", faulty.found), Check("dead", faulty.dies), Check("broken", faulty.raises, needed=False)],
        [Check("hung", partial(faulty.hangs, pids), limit=2.0), Check("left", faulty.leaves), Check("z", faulty.found)],
    ]
    assert doctor.examine(groups) == 1
    out, err = capsys.readouterr()
    assert not err
    assert out.splitlines() == [
        "ok       first   here",
        "failed   dead    its process ended with exit code 7",
        "failed   broken  OSError: the disk",
        "failed   hung    it did not end within 2 s",
        "failed   left    SystemExit: 3",
        "ok       z       here",
        "failed and needed: dead, hung, left",
    ]
    assert gone(pids)


def test_what_is_not_needed_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [[Check("a", faulty.found), Check("b", faulty.raises, needed=False)]]
    assert doctor.examine(groups, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert [line["state"] for line in told["checks"]] == ["ok", "failed"]
    assert told["checks"][1] == {"name": "b", "state": "failed", "text": "OSError: the disk", "needed": False}


def test_what_is_missing_has_failed_only_where_it_is_needed() -> None:
    def absent() -> str:
        raise Missing("not installed: pip install it")

    assert line_of(Check("x", absent, needed=False)) == ("x", "missing", "not installed: pip install it", False)
    assert line_of(Check("x", absent)) == ("x", "failed", "not installed: pip install it", True)


@pytest.mark.slow
def test_nothing_is_left_of_a_doctor_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from offtrace.agents.runs.isolated import Check, run_isolated\n"
        "from tests.recipes.faulty_checks import hangs\n"
        "list(run_isolated([[Check('hung', partial(hangs, Path(sys.argv[1])))]]))"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(pids)], cwd=ROOT)
    while not pids.exists():
        time.sleep(0.05)
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    limit = time.monotonic() + 30
    while not gone(pids):
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--task", "walker-wlak"], "did you mean walker-walk?"),
        (["--task"], "--task: expected one argument"),
        (["--adress", "a:1"], "there is no flag --adress; did you mean --address?"),
        (["--address", "somewhere"], "it must be host:port of a Ray cluster's head, or auto"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


PYPROJECT = """[project]
dependencies = ["torch>=2.11", "torchrl>=0.14.1,<0.15", "gymnasium>=1.0", "rich>=13", "lab>=1; python_version < '3'"]
"""
CONSTRAINTS = "# tested\ntorch==2.13.0\ntorchrl==0.14.1\ngymnasium==1.4.0; python_version >= '3'\n"


def test_versions_are_compared_with_what_is_required_and_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": "2.13.0+cpu", "torchrl": "0.15.0", "gymnasium": "1.3.9"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(checks, "_TOP", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    assert checks.package("torch") == "2.13.0+cpu"
    with pytest.raises(ValueError, match=r"^0.15.0; it must be <0.15,>=0.14.1: pip install 'torchrl<0.15,>=0.14.1'$"):
        checks.package("torchrl")
    assert checks.package("gymnasium") == "1.3.9; constraints.txt has 1.4.0, which was tested"
    with pytest.raises(Missing, match=r"^not installed: pip install 'rich>=13'$"):
        checks.package("rich")
    with pytest.raises(ValueError, match=r"^rich: not installed: "):
        checks.others()
    installed["rich"] = "15.0.0"
    assert checks.others() == "2 packages as required"


def test_a_folder_that_runs_cannot_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "not" / "there"
    assert checks.room(below, 1, "").startswith(f"{below}, ")
    assert not list(tmp_path.iterdir()), "looking makes nothing"
    with pytest.raises(ValueError, match="GB free, which is little; make room"):
        checks.room(below, 1e30, "make room")
    (tmp_path / "not").write_text("a file")
    with pytest.raises(ValueError, match=r"not cannot be written \(Not a directory\); it must be a folder"):
        checks.room(below, 1, "elsewhere")
    monkeypatch.setenv("TMPDIR", str(below))
    with pytest.raises(ValueError, match=f"TMPDIR is {below}, which cannot be written"):
        checks.temporary()


def test_flags_are_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "this_machine", lambda: Machine(16))
    told = checks.fits(None)
    assert told.startswith("impala_atari.py takes --env.num_envs 8 --collector.num_workers 8 --train.unrolls 32; 16 ")
    assert "half of the cores act" in told
    assert "--env.task" not in checks.fits("breakout")
    assert checks.fits("walker-walk").startswith("impala_control.py takes its preset; 16 cores, no GPU: ")


def test_a_cluster_is_the_nodes_that_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [(True, {"CPU": 4.0, "GPU": 1.0}), (True, {"CPU": 2.0}), (False, {"CPU": 8.0}), (True, {})]
    nodes = [{"Alive": alive, "Resources": own} for alive, own in resources]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))
    assert cluster_size() == (3, 6.0, 1.0)


@pytest.mark.slow
def test_the_doctor_tells_the_truth_of_this_machine(tmp_path: Path) -> None:
    """From another folder, with a task of the user's own there, and an address where nobody listens."""
    (tmp_path / "mytask.py").write_text("import gymnasium\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    argv = ["--json", "--task", "mytask:make", "--address", "127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "doctor.py"), *argv],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert not done.stderr
    told = json.loads(done.stdout)
    lines = {line["name"]: line for line in told["checks"]}
    assert not told["ok"]
    assert [name for name, line in lines.items() if line["state"] == "failed" and line["needed"]] == ["Ray"]
    has_ray = importlib.util.find_spec("ray") is not None
    assert ("127.0.0.1:1, where nobody listens" if has_ray else "pip install 'offtrace[ray]'") in lines["Ray"]["text"]
    for name in checks.PARTS:
        assert lines[name]["text"].split(";")[0] == importlib.metadata.version(name)
    assert lines["cores"]["text"].startswith(f"{available_cores()} of {os.cpu_count()}")
    assert lines["folder of runs"]["text"].startswith(f"{tmp_path / 'runs'}, ")
    for name in (*checks.BACKENDS, "Atari", "--task mytask:make"):
        assert lines[name]["text"].endswith(" steps/s"), lines[name]
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mytask.py"]
