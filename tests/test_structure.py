"""The house: dependencies point one way, an algorithm is a short file, a default stands in one place or is the same."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from offtrace.agents.registry import AGENTS, config_class
from offtrace.modules import losses

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
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in sources(folder):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "offtrace" and len(parts) > 1:
                assert FOLDERS[parts[1]] <= FOLDERS[folder], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in FOLDERS, f"{path.relative_to(ROOT)} imports the bare {name}"
            inside = path.name in ("ray_backend.py", "ray_cluster.py")
            assert parts[0] != "ray" or inside, f"{path.relative_to(ROOT)} imports {name}"
            if folder != "agents":
                assert parts[0] not in ("lightning", "pytorch_lightning"), f"{path.relative_to(ROOT)} imports {name}"


USES: dict[str, set[str]] = {
    "keys": set(),
    "naming": set(),
    "fork_server": set(),
    "host": set(),
    "machine": set(),
    "returns": {"host"},
    "estimators": {"returns", "keys", "naming"},
    "networks": {"keys", "naming", "host"},
    "losses": {"estimators", "returns", "networks", "keys", "host"},
    "envs": {"keys", "naming"},
    "collectors": {"envs", "keys", "fork_server", "machine"},
    "replay": {"keys"},
}
"""What each part of the modules may know besides itself: neither collector nor replay knows the other, or a loss."""


@pytest.mark.parametrize("part", USES)
def test_each_part_of_the_modules_knows_what_it_needs(part: str) -> None:
    place = ROOT / "modules" / part
    for path in sources(f"modules/{part}") if place.is_dir() else [place.with_suffix(".py")]:
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["offtrace", "modules"] and len(parts) > 2:
                assert parts[2] in USES[part] | {part}, f"{path.relative_to(ROOT)} imports {name}"


def test_every_part_of_the_modules_has_its_rule() -> None:
    parts = {path.relative_to(ROOT / "modules").parts[0].removesuffix(".py") for path in sources("modules")}
    assert parts - {"__init__"} == USES.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        (
            "import offtrace.modules.losses, offtrace.modules.envs, offtrace.modules.networks\n"
            "import offtrace.modules.collectors.make, offtrace.modules.replay.buffer",
            "lightning",
        ),
        (
            "import offtrace.modules.networks, offtrace.modules.envs.make, offtrace.modules.collectors.make\n"
            "import offtrace.modules.replay.buffer",
            "offtrace.modules.losses",
        ),
        ("import offtrace.modules.networks, offtrace.modules.collectors.make", "offtrace.modules.estimators"),
        ("import offtrace.modules.collectors.make", "offtrace.modules.replay"),
        ("import offtrace.modules.estimators.state_values", "offtrace.modules.networks"),
        ("from offtrace.agents import load_policy", "lightning"),
        ("import offtrace.agents.config, offtrace.agents.runs.folders, offtrace.modules.envs.names", "torch"),
        (f"import {', '.join(path.partition(':')[0] for path in AGENTS.values())}", "torch"),
        ("import offtrace.modules.collectors.ray_cluster", "torch"),
        ("import offtrace.modules.collectors.ray_cluster", "ray"),
        ("import offtrace.modules.estimators.names, offtrace.modules.replay.limiter", "torch"),
    ],
)
def test_what_an_import_brings(statement: str, banned: str) -> None:
    """Measured in a fresh interpreter, so that a chain of imports counts as well."""
    code = f"{statement}\nimport sys; sys.exit({banned!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_is_in_the_package() -> None:
    """setuptools is told each folder by name: one that is left out would be missing where users install."""
    told = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {path.parent for folder in FOLDERS for path in sources(folder)}
    assert told == {".".join(("offtrace", *folder.relative_to(ROOT).parts)) for folder in found}


@pytest.mark.parametrize("name", AGENTS)
def test_an_algorithm_is_a_short_file(name: str) -> None:
    path = ROOT / "agents" / f"{name}.py"
    assert AGENTS[name].startswith(f"offtrace.agents.{name}:")
    assert len(path.read_text().splitlines()) <= 200


LOSSES: dict[str, tuple[type[Any], ...]] = {
    "a2c": (losses.A2CLoss,),
    "acer": (losses.ACERLoss, losses.ContinuousACERLoss),
    "dqn": (losses.DQNLoss,),
    "impala": (losses.ImpalaLoss,),
    "mpo": (losses.MPOLoss, losses.DiscreteMPOLoss),
    "ppo": (losses.PPOLoss,),
    "q_actor_critic": (losses.QActorCriticLoss,),
    "reactor": (losses.ReactorLoss,),
    "sac": (losses.SACLoss, losses.DiscreteSACLoss, losses.SACv1Loss),
    "trpo": (losses.TRPOLoss,),
    "vmpo": (losses.VMPOLoss,),
}
OWN_DEFAULT = (losses.SACv1Loss, "reward_scale")
"""The one exception: 5.0, the paper's; the configuration's 1.0 is that of version 2, and version 1's preset sets it."""


@pytest.mark.parametrize("name", AGENTS)
def test_a_loss_and_its_configuration_have_the_same_defaults(name: str) -> None:
    group = get_type_hints(config_class(name))["loss"]
    left = {field.name for field in fields(group)} - {"version"}  # of SAC: which loss it is
    for loss in LOSSES[name]:
        known = inspect.signature(loss).parameters
        for field in fields(group):
            if field.name in known and (loss, field.name) != OWN_DEFAULT:
                assert field.default is not MISSING
                assert known[field.name].default == field.default, f"{field.name} of {loss.__name__}"
                left.discard(field.name)
    assert not left, f"{name} has fields that no loss takes"
