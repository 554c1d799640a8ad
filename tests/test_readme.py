"""The README's programs run as printed, and learn; its commands are right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from offtrace.recipes import cli, compare, curves, doctor, offpolicy_study
from tests.recipes.recipes import TRAINING, parse

README = Path(__file__).resolve().parent.parent / "README.md"
PROGRAMS = re.findall(r"run by tests/test_readme.py -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
COMMANDS = re.findall(r"^python recipes/(\w+)\.py(.*)$", README.read_text(), re.MULTILINE)


def test_every_command_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be told without a run or a GPU."""
    assert len(PROGRAMS) == 2
    assert {"impala_atari", "sac_control", "evaluate"} <= {name for name, _ in COMMANDS}
    assert {name for name, _ in COMMANDS} <= {*TRAINING, "offpolicy_study", "compare", "curves", "evaluate", "doctor"}
    for name, rest in COMMANDS:
        argv = shlex.split(rest, comments=True)
        if name == "offpolicy_study":
            offpolicy_study.parse(argv)
        elif name == "compare":
            compare.parse([word.replace("mytask:make", "tests.conformance.tasks:Vector") for word in argv])
        elif name == "curves":
            runs = [word.partition("=")[2] or word for word in argv]
            for run in (Path(run) for run in runs if run.startswith("runs/")):
                (tmp_path / run).mkdir(parents=True)
                (tmp_path / run / "metrics.csv").touch()
            monkeypatch.chdir(tmp_path)
            curves.parse(argv)
        elif name == "doctor":
            doctor.parse(argv)
        elif name in TRAINING and "--resume" not in argv:
            config = parse(name, *argv)
            config.validate()
            if "gpu" not in argv:
                cli.check(config)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "name"), [(0, "ImpalaLoss"), (1, "SACLoss")])
def test_the_composed_loops_run_and_learn(program: int, name: str, tmp_path: Path) -> None:
    code = PROGRAMS[program]
    assert f"loss = {name}(" in code
    assert len(code.split("if __name__")[1].strip().splitlines()) <= 25, "the README promises short loops"
    script = tmp_path / "loop.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    returns = [float(value) for value in re.findall(r"return (-?[\d.]+)", done.stdout)]
    assert len(returns) >= 5, done.stdout
    if name == "ImpalaLoss":  # CartPole: a step is worth 1
        assert max(returns[-4:]) > 2 * returns[0], done.stdout
    else:  # Pendulum: every step costs
        assert max(returns[-2:]) > 0.7 * returns[0], done.stdout
