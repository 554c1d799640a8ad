"""The README's program runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_composed_loop_runs_and_learns(tmp_path: Path) -> None:
    code = re.search(r"run by tests/test_readme.py -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 25, "the README promises a short loop"
    script = tmp_path / "loop.py"
    script.write_text(code[1])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    returns = [float(value) for value in re.findall(r"return ([\d.]+)", done.stdout)]
    assert len(returns) >= 5, done.stdout
    assert max(returns[-4:]) > 2 * returns[0], done.stdout
