"""Dependencies point one way: recipes -> agents -> modules, and only agents and recipes know Lightning."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"modules": 0, "agents": 1, "recipes": 2}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    assert sources(folder)
    for path in sources(folder):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "offtrace" and len(parts) > 1:
                assert FOLDERS[parts[1]] <= FOLDERS[folder], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in FOLDERS, f"{path.relative_to(ROOT)} imports the bare {name}"
            if folder == "modules":
                assert parts[0] not in ("lightning", "pytorch_lightning"), f"{path.relative_to(ROOT)} imports {name}"


ORDER = {"returns": 0, "estimators": 1, "losses": 2}


def test_inside_modules_losses_use_estimators_and_estimators_use_returns() -> None:
    for path in sources("modules"):
        part = path.relative_to(ROOT / "modules").parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            used = parts[2] if name.startswith("offtrace.modules.") else ""
            if used in ORDER and part in ORDER:
                assert ORDER[used] <= ORDER[part], f"{path.relative_to(ROOT)} imports {name}"
            if part in ("collectors", "replay"):
                others = ("losses", "estimators", "returns", "networks", "collectors", "replay")
                assert used == part or used not in others, f"{path.relative_to(ROOT)} imports {name}"
            if part in ("networks", "envs"):
                assert used in ("", part, "keys"), f"{part} stands alone, but {path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        (
            "import offtrace.modules, offtrace.modules.losses, offtrace.modules.envs, offtrace.modules.networks",
            "lightning",
        ),
        ("from offtrace.agents import load_policy", "lightning"),
        ("import offtrace.agents.config, offtrace.modules.envs.names, offtrace.modules.replay.limiter", "torch"),
    ],
)
def test_what_an_import_brings(statement: str, banned: str) -> None:
    """Measured in a fresh interpreter, so that a chain of imports counts as well."""
    code = f"{statement}\nimport sys; sys.exit({banned!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
