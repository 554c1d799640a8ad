"""The README's programs run as printed, and learn."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
PROGRAMS = re.findall(r"run by tests/test_readme.py -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)


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
