"""Flags and files in the user's words; the time a wrong command line costs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest
import yaml

from offtrace.agents.config import (
    ConfigError,
    ImpalaConfig,
    control_config,
    default_config,
    paper_config,
    pendulum_config,
)
from offtrace.agents.runs import RunError, write_config
from offtrace.recipes import cli, evaluate
from offtrace.recipes.flags import nearest, numbers, types_of_keys

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
PRESETS = {"default": default_config, "paper": paper_config, "control": control_config, "pendulum": pendulum_config}


def parse(*argv: str) -> ImpalaConfig:
    return cli.parse(list(argv), presets=PRESETS, description="")[0]


def mistake(*argv: str) -> str:
    with pytest.raises((ConfigError, RunError)) as error:
        cli.check(parse(*argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_numbers_in_other_spellings() -> None:
    assert numbers(["--train.total_frames", "2e8", "--train.seed=1_0"], types_of_keys(ImpalaConfig)) == [
        "--train.total_frames",
        "200000000",
        "--train.seed=10",
    ]
    assert numbers(["--loss.rho_clip", "inf", "--loss.c_clip=inf"], types_of_keys(ImpalaConfig)) == [
        "--loss.rho_clip",
        ".inf",
        "--loss.c_clip=.inf",
    ]
    assert numbers(["--train.name", "nan", "--train.name=inf"], types_of_keys(ImpalaConfig)) == [
        "--train.name",
        "nan",
        "--train.name=inf",
    ]
    assert numbers(["--train.seed=1", "1e6"], types_of_keys(ImpalaConfig)) == ["--train.seed=1", "1e6"], (
        "what follows a whole flag is not its value"
    )
    # text stays text, what is no whole number stays what was written, and values of no flag are left alone
    assert numbers(["--train.name", "1e6", "--train.epochs", "1.5", "1e6"], types_of_keys(ImpalaConfig)) == [
        "--train.name",
        "1e6",
        "--train.epochs",
        "1.5",
        "1e6",
    ]


def test_numbers_in_a_file(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e6, 1e-3 and inf for text."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "train: {total_frames: 1e6}\noptim: {lr: 1e-3}\nloss: {rho_clip: inf, c_clip: .inf, policy_clip: null}\n"
    )
    config = parse("--config", str(path))
    assert config.train.total_frames == 1_000_000
    assert isinstance(config.train.total_frames, int)
    assert config.optim.lr == 1e-3
    assert config.loss.rho_clip == config.loss.c_clip == math.inf
    assert config.loss.policy_clip is None
    assert parse("--config", str(path), "--optim.lr", "0.5").optim.lr == 0.5, "a flag is stronger than the file"


@pytest.mark.parametrize("preset", PRESETS)
def test_printed_presets_read_back(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", preset, "--train.name", "1e6", "--loss.pg_rho_clip", "inf"]
    with pytest.raises(SystemExit):
        parse(*argv, "--print_config")
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    config = parse("--config", str(path))
    assert config == parse(*argv)
    assert config.train.name == "1e6"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--train.total_frames", "1.5"], "train.total_frames is 1.5; it must be a whole number"),
        (["--train.total_frames=-5"], "train.total_frames is -5; it must be at least 1"),
        (["--env.protocol", "clasic"], "env.protocol is clasic; it must be one of classic, sticky"),
        (["--network.hidden", "12"], "network.hidden is 12; it must be a list of whole numbers, such as [256]"),
        (["--loss.reward_clip", "a"], "loss.reward_clip is a; it must be a number or null"),
        (["--loss.normalize_advantage", "maybe"], "loss.normalize_advantage is maybe; it must be true or false"),
        (["--loss.gamma", "nan"], "loss.gamma is nan; it must be between 0 and 1"),
        (["--env", "{game: 3}"], "env.game is 3; it must be text"),
        (["--train", "3"], "--train is 3; it must be a YAML file, or keys and values such as {key: value}"),
        (["pong"], "pong stands behind no flag; flags are written --group.name value"),
    ],
)
def test_a_mistake_is_told_in_the_users_words(argv: list[str], told: str) -> None:
    assert mistake(*argv) == told


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {seed: abc}")
    assert mistake("--config", str(path)) == f"train.seed is abc in {path}; it must be a whole number"


def test_a_damaged_value_in_the_folder_of_a_run(tmp_path: Path) -> None:
    content = asdict(default_config())
    content["train"]["seed"] = "abc"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert (
        mistake("--resume", str(tmp_path)) == f"train.seed is abc in {tmp_path}/config.yaml; it must be a whole number"
    )


def test_a_resumed_run_keeps_what_no_preset_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither defaults nor presets of today change a run that began with others."""
    config = paper_config()
    config.loss.gamma, config.loss.rho_clip, config.train.name = 0.5, math.inf, "7"
    write_config(config, tmp_path)
    with pytest.raises(SystemExit):
        parse("--resume", str(tmp_path), "--train.total_frames", "5", "--print_config")
    config.train.total_frames = 5
    assert yaml.safe_load(capsys.readouterr().out) == asdict(config)


def test_nearest() -> None:
    assert nearest("--lr", ["--optim.lr", "--loss.gamma"]) == "; did you mean --optim.lr?"
    assert nearest("--zzzzzzzz", ["--optim.lr"]) == ""


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["x", "--episods", "3"], "there is no flag --episods; did you mean --episodes?"),
        (["x", "--mode", "foo"], "--mode: invalid choice: 'foo'"),
        (["x", "--episodes", "0"], "--episodes is 0; it must be at least 1"),
        (["x", "--gif", "/no/such/folder/a.gif"], "there is no folder /no/such/folder"),
        (["x", "--gif", "a.mp4"], "--gif is a.mp4; it must be the name of a file that ends in .gif"),
        ([], "the following arguments are required: checkpoint"),
    ],
)
def test_mistakes_of_evaluate(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(argv) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("accelerator", "devices", "gpus", "told"),
    [
        ("gpu", 1, 0, "train.accelerator is gpu; this machine has none that torch can use"),
        ("gpu", 3, 2, "train.devices is 3; this machine has 2 GPUs"),
        ("auto", 3, 2, "train.devices is 3; this machine has 2 GPUs"),
        ("auto", 5, 0, "train.devices is 5; this machine has 4 cores for learners on the CPU"),
        ("cpu", 5, 8, "train.devices is 5; this machine has 4 cores for learners on the CPU"),
        ("auto", 2, 2, None),
        ("cpu", 4, 2, None),
        ("gpu", 8, 8, None),
    ],
)
def test_devices_that_are_not_there(
    accelerator: Literal["auto", "cpu", "gpu"],
    devices: int,
    gpus: int,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    config = default_config()
    config.train.accelerator, config.train.devices = accelerator, devices
    config.collector.device = "cuda:1" if gpus == 8 else "cpu"
    if told is None:
        config.check_devices(gpus)
        return
    with pytest.raises(ConfigError) as error:
        config.check_devices(gpus)
    assert str(error.value) == told


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--train.seed", "x"], 2), (["--gme", "pong"], 2)])
@pytest.mark.parametrize("name", ["impala_atari", "impala_control", "sac_control", "mpo_control", "vmpo_control"])
def test_answers_from_any_folder_without_anything_heavy(name: str, argv: list[str], code: int, tmp_path: Path) -> None:
    """Help and mistakes are answered at once: neither torch nor Lightning nor TorchRL is loaded on the way."""
    script = tmp_path / "work" / "run.py"
    script.parent.mkdir()
    script.write_text(
        f"import runpy, sys\nsys.argv = {[str(RECIPES / f'{name}.py'), *argv]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    heavy = {'torch', 'lightning', 'torchrl'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)
    assert not list(folder.iterdir()), "nothing is left behind"


def test_the_help_explains_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "offtrace.recipes.impala_atari", "--help"], capture_output=True, text=True, check=True
    )
    for group, values in asdict(default_config()).items():
        for name in values:
            assert f"--{group}.{name}" in done.stdout
    assert "Environments per actor process." in done.stdout
