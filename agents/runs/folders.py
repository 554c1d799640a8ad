"""Folders of runs: configuration, versions, and what a resumed run reads back. Imports neither torch nor Lightning."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from offtrace.agents.config import Config

RUNS = Path("runs")


class RunError(ValueError):
    """A run's folder that cannot be made or used; the message is one sentence."""


def new_run(config: Config, made: list[Path] | None = None) -> Path:
    """Makes ``runs/<name>`` with its ``config.yaml``.

    The name is ``config.train.name``, or made from task, algorithm, seed and time, counted up where two runs begin in
    one second. ``made`` gets the folder as soon as it is there, for an interruption may come before it is returned.

    Raises:
        RunError: if the folder exists with something in it, or cannot be written.
    """
    name = config.train.name
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts):
        raise RunError(f"train.name is {name or repr(name)}; it must be the name of a folder inside {RUNS}")
    try:
        folder = _fresh_folder(config) if name is None else RUNS / name
        if folder.exists() and any(folder.iterdir()):
            raise RunError(_occupied(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if made is not None:
            made.append(folder)
        try:
            write_config(config, folder)
        except BaseException:  # Ctrl-C as well
            discard(folder)
            raise
    except OSError as error:
        raise RunError(f"the run folder {error.filename} cannot be written: {error.strerror}") from error
    return folder


def _fresh_folder(config: Config) -> Path:
    task = config.task.replace("/", "-").replace(":", "-")
    name = f"{task}-{config.algorithm}-s{config.train.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    RUNS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # of two processes only one can make it
        except FileExistsError:
            continue
        return folder
    raise AssertionError("never reached")


def _occupied(folder: Path) -> str:
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return f"{folder} holds a run already; go on with it by --resume {folder}, or give another --train.name"
    return (
        f"{folder} is not empty: a run may be going on there, or ended before its first checkpoint; "
        "give another --train.name, or remove it"
    )


def write_config(config: Config, folder: Path, *, resumed: bool = False) -> None:
    """Writes ``config.yaml`` and ``versions.json``; a resumed run keeps the first versions and adds the new ones."""
    temporary = folder / f".config.yaml.{os.getpid()}"
    temporary.write_text(config_text(config))
    temporary.replace(folder / "config.yaml")  # other learners may be reading it
    found = versions()
    if resumed:
        found = _with_resumption(folder / "versions.json", found)
    (folder / "versions.json").write_text(json.dumps(found, indent=2) + "\n")


def config_text(config: Config) -> str:
    """The YAML of a configuration, its algorithm first."""
    return yaml.safe_dump({"algorithm": config.algorithm, **asdict(config)}, sort_keys=False)


def _with_resumption(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    try:
        first = json.loads(path.read_text())
        return {**first, "resumed": [*first.get("resumed", []), found]}
    except (OSError, ValueError, AttributeError, TypeError):  # lost or edited: the new versions are still worth keeping
        return {"resumed": [found]}


def discard(folder: Path, *, loggers: bool = False) -> bool:
    """Removes the folder of a run that was refused before it began, so that its name is free; ``False`` if it began.

    Another learner may have removed it. ``loggers``: what they write before the first update counts for nothing.
    """
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()} - {"config.yaml", "versions.json"}
    if loggers:
        names = {name for name in names if name != "hparams.yaml" and not name.startswith("events.out.tfevents.")}
    if names:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def keep_metrics(folder: Path, frames: int) -> None:
    """Puts ``metrics.csv`` aside as ``metrics.part<n>.csv``: Lightning's CSV logger removes what a resumed run had.

    What lies behind the ``frames`` of the checkpoint it goes on from is left out, in all parts, since it is trained
    again; and so is a row that was broken off.
    """
    metrics = folder / "metrics.csv"
    if metrics.exists():
        metrics.rename(folder / f"metrics.part{len(metric_parts(metrics))}.csv")
    for part in metric_parts(metrics):
        with open(part, newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        place = header.index("step") if "step" in header else None
        kept = [row for row in rows if place is not None and len(row) == len(header) and int(row[place]) <= frames]
        if len(kept) < len(rows):
            shorter = part.with_suffix(".tmp")
            with open(shorter, "w", newline="") as file:
                csv.writer(file).writerows([header, *kept])
            shorter.replace(part)


def metric_parts(metrics: Path) -> list[Path]:
    """The files :func:`keep_metrics` put aside beside ``metrics.csv``, the oldest first."""
    parts: list[Path] = []
    while (part := metrics.with_name(f"metrics.part{len(parts)}.csv")).exists():
        parts.append(part)
    return parts


ConfigT = TypeVar("ConfigT", bound=Config)


def read_config(folder: Path, kind: type[ConfigT]) -> ConfigT:
    """The configuration, of type ``kind``, that a run was started with.

    Raises:
        RunError: if the folder or its ``config.yaml`` is missing or damaged, or of another algorithm.
    """
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        if content["algorithm"] != kind.algorithm:
            raise RunError(
                f"{folder} is a run of {content['algorithm']}, and this recipe trains {kind.algorithm}; resume it with "
                "the recipe that it was started with"
            )
        groups = get_type_hints(kind)
        for field in fields(kind):
            for key in sorted(set(content[field.name]) - {own.name for own in fields(groups[field.name])}):
                raise RunError(f"{path} has {field.name}.{key}, which {kind.algorithm} does not know")
        return kind(**{f.name: groups[f.name](**content[f.name]) for f in fields(kind)})
    except OSError as error:
        raise RunError(f"{folder} is not the folder of a run: {path.name} cannot be read ({error.strerror})") from error
    except KeyError as error:
        raise RunError(f"{path} is damaged: {error.args[0]} is missing") from error
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def versions() -> dict[str, Any]:
    """What a result depends on: packages, commit, command, machine."""
    packages = ("offtrace", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "ale-py", "numpy")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        "packages": found,
        "commit": commit_of(Path(__file__).resolve().parent),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "gpus": _gpus(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def commit_of(folder: Path) -> str | None:
    """The git commit of a folder, ``+`` behind it where files differ from it; ``None`` if git does not track it.

    An installed copy inside somebody's repository is not tracked there, and that repository's commit says nothing.
    """
    if not _output(["git", "ls-files", "."], folder):
        return None
    commit = _output(["git", "rev-parse", "HEAD"], folder)
    return commit and commit + ("+" if _output(["git", "status", "--porcelain"], folder) else "")


def _output(command: list[str], folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpus() -> list[str]:
    found = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return found.splitlines() if found else []


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
