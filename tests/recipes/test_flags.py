"""Flags and files in the user's words; the time a wrong command line costs."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from offtrace.agents.config import ConfigError
from offtrace.agents.impala import atari_config, paper_config
from offtrace.agents.q_actor_critic import QActorCriticConfig
from offtrace.agents.runs.folders import RunError, config_text, write_config
from offtrace.recipes import cli, evaluate
from offtrace.recipes.flags import numbers, types_of_keys
from tests.recipes import recipes
from tests.recipes.recipes import TRAINING

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
TYPES = types_of_keys(QActorCriticConfig)


LIST = "a list of whole numbers in one word such as [64,64] or null"


def parse(*argv: str) -> Any:
    return recipes.parse("q_actor_critic", *argv)


def mistake(*argv: str, recipe: str = "impala_atari") -> str:
    with pytest.raises((ConfigError, RunError)) as error:
        cli.check(recipes.parse(recipe, *argv))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "read"),
    [
        (["--train.total_frames", "2e8", "--train.seed=1_0"], ["--train.total_frames", "200000000", "--train.seed=10"]),
        (["--loss.pg_rho_clip", "inf"], ["--loss.pg_rho_clip", ".inf"]),
        (["--loss.pg_rho_clip=inf"], ["--loss.pg_rho_clip=.inf"]),
        # text stays text, what is no whole number stays what was written, and values of no flag are left alone
        (["--train.name", "nan", "--train.name=inf"], ["--train.name", "nan", "--train.name=inf"]),
        (["--train.name", "1e6", "--train.epochs", "1.5"], ["--train.name", "1e6", "--train.epochs", "1.5"]),
        (["--loss.estimator", "vtrace(rho_clip=inf)"], ["--loss.estimator", "vtrace(rho_clip=inf)"]),
        # what follows a whole flag is not its value
        (["--train.seed=1", "1e6"], ["--train.seed=1", "1e6"]),
        (["1e6"], ["1e6"]),
    ],
)
def test_numbers_in_other_spellings(argv: list[str], read: list[str]) -> None:
    assert numbers(argv, TYPES) == read


def test_numbers_in_a_file(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e6, 1e-3 and inf for text."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "train: {total_frames: 1e6}\noptim: {lr: 1e-3}\n"
        "loss: {pg_rho_clip: inf, policy_clip: null, estimator: retrace(lmbda=0.9)}\n"
    )
    config = parse("--config", str(path))
    assert config.train.total_frames == 1_000_000
    assert isinstance(config.train.total_frames, int)
    assert config.optim.lr == 1e-3
    assert config.loss.pg_rho_clip == math.inf
    assert config.loss.policy_clip is None
    assert config.loss.estimator == "retrace(lmbda=0.9)"
    assert parse("--config", str(path), "--optim.lr", "0.5").optim.lr == 0.5, "a flag is stronger than the file"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--train.total_frames", "1.5"], "train.total_frames is 1.5; it must be a whole number"),
        (["--train.total_frames=-5"], "train.total_frames is -5; it must be at least 1"),
        (["--env.protocol", "clasic"], "env.protocol is clasic; it must be one of classic, sticky"),
        (["--network.hidden", "12"], f"network.hidden is 12; it must be {LIST}"),
        (["--network.hidden", "64", "64", "--train.seed=1"], f"network.hidden is 64 64; it must be {LIST}"),
        (["--network.hidden", "[64,", "64]"], f"network.hidden is [64, 64]; it must be {LIST}"),
        (["--loss.reward_clip", "a"], "loss.reward_clip is a; it must be a number or null"),
        (["--loss.normalize_advantage", "maybe"], "loss.normalize_advantage is maybe; it must be true or false"),
        (["--loss.gamma", "nan"], "loss.gamma is nan; it must be between 0 and 1"),
        (["--env", "{task: 3}"], "env.task is 3; it must be text"),
        (["--env", "{tsk: pong}"], "--env is {tsk: pong}, which has an unknown key env.tsk; did you mean env.task?"),
        (
            ["--env", "{env: {task: pong}}"],
            "--env is {env: {task: pong}}, which has the group env inside; it must have keys of env alone, or be given "
            "as --config",
        ),
        (["--train", "3"], "--train is 3; it must be a YAML file, or keys and values such as {key: value}"),
        (["--train.seed="], "train.seed is empty; it must be a whole number"),
        (["pong"], "pong stands behind no flag; flags are written --group.name value"),
    ],
)
def test_a_mistake_is_told_in_the_users_words(argv: list[str], told: str) -> None:
    assert mistake(*argv) == told


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {seed: abc}")
    assert mistake("--config", str(path)) == f"train.seed is abc in {path}; it must be a whole number"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {seed: null}", "train.seed is null; it must have a value, such as 0"),
        ("train: {eval_every: null}", "train.eval_every is null; it must have a value, such as 1000000"),
        ("collector: {num_workers: null}", "collector.num_workers is null; it must have a value, such as 1"),
        ("env: {task: null}", "env.task is null; it must have a value, such as pong"),
        ("loss: {gamma: null}", "loss.gamma is null; it must have a value, such as 0.99"),
    ],
)
def test_a_null_where_there_is_none(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert mistake("--config", str(path)) == told
    group, values = text.split(": ", 1)
    assert mistake(f"--{group}", values) == told


def test_a_flag_as_a_key_of_a_file_is_told_where_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train.seed: 3")
    assert mistake("--config", str(path)) == f"{path} has the key train.seed; it must be seed, in the group train"


@pytest.mark.parametrize(
    ("recipe", "argv", "told"),
    [
        ("sac_control", ["--loss.target_entropy", "nan"], "loss.target_entropy is nan; it must be finite, or auto"),
        (
            "sac_control",
            ["--loss.fixed_alpha", "inf"],
            "loss.fixed_alpha is inf; it must be finite, at least 0,",
        ),
        (
            "mpo_control",
            ["--network.init_scale", "inf"],
            "network.init_scale is inf; it must be above 0 and finite",
        ),
        (
            "trpo",
            ["--network.init_scale", "50"],
            "network.init_scale is 50.0; it must be from 0.006738 to 7.389",
        ),
    ],
)
def test_numbers_that_no_network_could_take(recipe: str, argv: list[str], told: str) -> None:
    assert mistake(*argv, recipe=recipe).startswith(told)


def test_a_damaged_value_in_the_folder_of_a_run(tmp_path: Path) -> None:
    content = yaml.safe_load(config_text(atari_config()))
    content["train"]["seed"] = "abc"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert (
        mistake("--resume", str(tmp_path)) == f"train.seed is abc in {tmp_path}/config.yaml; it must be a whole number"
    )


def test_a_resumed_run_keeps_what_no_preset_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither defaults nor presets of today change a run that began with others."""
    config = paper_config()
    config.loss.gamma, config.loss.estimator, config.train.name = 0.5, "vtrace(rho_clip=inf)", "7"
    write_config(config, tmp_path)
    with pytest.raises(SystemExit):
        recipes.parse("impala_atari", "--resume", str(tmp_path), "--train.total_frames", "5", "--print_config")
    config.train.total_frames = 5
    assert yaml.safe_load(capsys.readouterr().out) == {"algorithm": "impala", **asdict(config)}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["x", "--episods", "3"], "there is no flag --episods; did you mean --episodes?"),
        (["x", "--mode", "foo"], "--mode: invalid choice: 'foo'"),
        (["x", "--episodes", "0"], "--episodes is 0; it must be at least 1"),
        (["x", "--seed", str(2**64)], f"--seed is {2**64}; it must be at least 0 and below 2**32"),
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
    config = atari_config()
    config.train.accelerator, config.train.devices = accelerator, devices
    config.collector.device = "cuda:1" if gpus == 8 else "cpu"
    if told is None:
        config.check_devices(gpus)
        return
    with pytest.raises(ConfigError) as error:
        config.check_devices(gpus)
    assert str(error.value) == told


ANSWERS = """
import contextlib, io, json, runpy, sys
found = []
for argv in ARGVS:
    sys.argv = [RECIPE, *argv]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(RECIPE, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    heavy = {"torch", "lightning", "torchrl", "tensordict"} & set(sys.modules)
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": sorted(heavy)})
print(json.dumps(found))
"""


def answers(name: str, argvs: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """What a recipe answers to each command line, in a fresh interpreter and an empty folder that stays empty."""
    script = folder / "work" / "run.py"
    script.parent.mkdir()
    script.write_text(f"RECIPE, ARGVS = {str(RECIPES / f'{name}.py')!r}, {argvs!r}\n{ANSWERS}")
    empty = folder / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)], cwd=empty, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not list(empty.iterdir()), "nothing is left behind"
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_answers_from_any_folder_without_anything_heavy(name: str, tmp_path: Path) -> None:
    """Help, configuration and mistakes are answered at once: no torch, Lightning or TorchRL is loaded on the way."""
    wrong = [["--train.seed", "x"], ["--taks", "pong"], ["--loss.estimator", "retrce"], ["--collector.unroll", "0"],
             ["--loss.estimator", "n_step(n=0)"], ["--loss.estimator", "n_step(gamma=0.9)"],
             ["--network.encoder", "no_such_module:make"], ["--env.task", "no_such_module:make"]]  # fmt: skip
    helped, printed, *refused = answers(name, [["--help"], ["--print_config"], *wrong], tmp_path)
    for answer in (helped, printed):
        assert (answer["code"], answer["err"], answer["heavy"]) == (0, "", [])
    for answer in refused:
        assert (answer["code"], answer["out"], answer["heavy"]) == (2, "", [])
        assert answer["err"].startswith("error: ")
        assert answer["err"].count("\n") == 1
    started = recipes.parse(name)
    config = asdict(started)
    assert yaml.safe_load(printed["out"]) == {"algorithm": started.algorithm, **config}
    for group, values in config.items():
        for key in values:
            assert f"--{group}.{key} " in helped["out"], "the help explains every flag"
    assert "Environments per actor" in helped["out"]
    for preset in recipes.presets_of(name):
        assert re.search(rf"^ +{preset}: \w+", helped["out"], re.MULTILINE), f"what the preset {preset} is"
    undocumented = re.findall(r"--(\w+\.\w+) \S+\s+\((?:type|default)", helped["out"])
    assert not undocumented, "every field has a sentence of its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argv", "told"),
    [
        ("sac_control", ["--loss.estimator=tree_backup"], "loss.estimator is tree_backup"),
        ("dqn", [], "env.task is {}, whose actions are continuous; dqn needs discrete ones"),
    ],
)
def test_actions_that_do_not_fit_are_known_at_once(name: str, argv: list[str], told: str, tmp_path: Path) -> None:
    tasks = ("walker-walk", "Pendulum-v1")
    found = answers(name, [[*argv, f"--env.task={task}"] for task in tasks], tmp_path)
    for task, answer in zip(tasks, found, strict=True):
        assert (answer["code"], answer["heavy"]) == (2, [])
        assert answer["err"].startswith(f"error: {told.format(task)}")
        assert answer["err"].count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), [("evaluate", ["x", "--episods=3"]), ("offpolicy_study", ["--lag=3"])])
def test_the_other_programs_answer_likewise(name: str, wrong: list[str], tmp_path: Path) -> None:
    helped, refused = answers(name, [["--help"], wrong], tmp_path)
    assert (helped["code"], helped["err"], helped["heavy"]) == (0, "", [])
    assert (refused["code"], refused["out"], refused["heavy"]) == (2, "", [])
    assert refused["err"].count("\n") == 1
