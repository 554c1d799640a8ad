"""The command line: every mistake is one sentence, quickly, and before anything heavy is imported."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import yaml

from offtrace.agents.config import ConfigError, ImpalaConfig, default_config, paper_config
from offtrace.agents.runs import RunError, new_run, read_config, write_config
from offtrace.agents.sac_config import SACConfig
from offtrace.recipes import cli, evaluate, impala_atari, impala_control

PRESETS = {"default": default_config, "paper": paper_config}


def parse(*argv: str) -> ImpalaConfig:
    config, _ = cli.parse(list(argv), presets=PRESETS, description="")
    return config


def test_defaults_presets_and_flags() -> None:
    assert parse() == default_config()
    assert parse("--preset", "paper") == paper_config()
    config = parse("--preset=paper", "--env.game", "breakout", "--train.total_frames", "1e6", "--optim.lr=1e-3")
    assert (config.env.game, config.train.total_frames, config.optim.lr) == ("breakout", 1_000_000, 1e-3)
    assert config.optim.name == "rmsprop_tf"
    config = parse("--loss.rho_clip", "inf", "--loss.policy_clip", "null", "--network.hidden", "[64, 32]")
    assert config.loss.rho_clip == float("inf")
    assert config.loss.policy_clip is None
    assert config.network.hidden == [64, 32]


def test_printed_configuration_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--preset", "paper", "--env.game", "boxing", "--print_config")
    assert not end.value.code
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    expected = paper_config()
    expected.env.game = "boxing"
    assert parse("--config", str(path)) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env.gam", "pong"], "there is no flag --env.gam; did you mean --env.game?"),
        (["--lr", "3"], "there is no flag --lr; did you mean --optim.lr?"),
        (["--preset", "papr"], "--preset is 'papr'; it must be one of default, paper; did you mean paper?"),
        (["--env.num_envs", "many"], "env.num_envs is many; it must be a whole number"),
        (["--config"], "--config needs a value"),
        (["--config", "missing.yaml"], "the configuration missing.yaml cannot be read"),
        (["--resume", "runs/missing"], "runs/missing is not the folder of a run: config.yaml cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: str) -> None:
    with pytest.raises((ConfigError, RunError)) as error:
        parse(*argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env: {gme: pong}", "has an unknown key env.gme; did you mean env.game?"),
        ("optimm: {lr: 1}", "has an unknown key optimm; did you mean optim?"),
        ("env: pong", "env is 'pong'; it must hold keys and values"),
        ("- 1", "must hold keys and values, got list"),
        ("{", "is not YAML"),
        ("env: {num_envs: many}", "c.yaml; it must be a whole number"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse("--config", str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_learners_with_a_replay_each_keep_their_number(tmp_path: Path) -> None:
    for config, words in (
        (SACConfig(), "--train.devices cannot change in a resumed run"),
        (ImpalaConfig(), "has no checkpoints/last.ckpt"),
    ):
        folder = tmp_path / config.family
        folder.mkdir()
        write_config(config, folder)
        with pytest.raises((ConfigError, RunError), match=words):
            cli.parse(
                ["--resume", str(folder), "--train.devices", "2"], presets={"default": type(config)}, description=""
            )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env.num_envs", "0"], "env.num_envs is 0; it must be at least 1"),
        (["--collector.unroll", "-3"], "collector.unroll is -3; it must be at least 1"),
        (["--train.minibatches", "5"], "train.minibatches is 5; it must divide env.num_envs, 16"),
        (["--loss.lmbda", "1.5"], "loss.lmbda is 1.5; it must be between 0 and 1"),
        (["--loss.c_clip", "2"], "loss.c_clip is 2; it must not be above loss.rho_clip, 1"),
        (
            ["--network.encoder", "resnt"],
            "network.encoder is resnt; it must be one of shallow, resnet, mlp, or package",
        ),
        (["--collector.device", "gpu"], "collector.device is gpu; it must be cpu, cuda or cuda:<number>"),
        (["--loss.value_coef", "inf"], "loss.value_coef is inf; it must be finite, and at least 0"),
        (["--train.seed", "-1"], "train.seed is -1; it must be at least 0 and below 2**32"),
        (["--optim.lr", "nan"], "optim.lr is nan; it must be above 0"),
        (["--env.game", "pnog"], "env.game: unknown environment 'pnog'; did you mean 'pong'?"),
    ],
)
def test_values_that_cannot_be_run(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.check(parse(*argv))
    assert words in str(error.value)


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.train.name = "one"
    folder = new_run(config)
    write_config(config, folder)
    assert read_config(folder, ImpalaConfig) == config
    assert yaml.safe_load((folder / "versions.json").read_text())["packages"]["torch"]
    with pytest.raises(RunError, match=r"runs/one is not empty and has no checkpoint to --resume; remove it, or give"):
        new_run(config)
    write_config(SACConfig(), folder)
    with pytest.raises(
        RunError, match=r"runs/one is the run of another recipe: its config.yaml has env\..*, which this one does not"
    ):
        read_config(folder, ImpalaConfig)
    (folder / "config.yaml").write_text("env: {game: [")
    with pytest.raises(RunError, match=r"config.yaml is damaged"):
        read_config(folder, ImpalaConfig)
    Path("file").touch()
    monkeypatch.setattr("offtrace.agents.runs.RUNS", Path("file"))
    config.train.name = "two"
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        new_run(config)


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.train.name, config.env.game = "one", "boxing"
    write_config(config, new_run(config))
    with pytest.raises(RunError, match=r"runs/one has no checkpoints/last.ckpt to go on from"):
        parse("--resume", "runs/one")
    (tmp_path / "runs/one/checkpoints").mkdir()
    (tmp_path / "runs/one/checkpoints/last.ckpt").touch()
    with pytest.raises(RunError, match=r"last.ckpt is truncated or not a checkpoint"):
        parse("--resume", "runs/one")
    with zipfile.ZipFile(tmp_path / "runs/one/checkpoints/last.ckpt", "w") as archive:
        archive.writestr("data", "x")
    resumed, checkpoint = cli.parse(
        ["--resume", "runs/one", "--train.total_frames", "5e6"], presets=PRESETS, description=""
    )
    assert (resumed.env.game, resumed.train.total_frames) == ("boxing", 5_000_000)
    assert checkpoint == Path("runs/one/checkpoints/last.ckpt")
    with pytest.raises(ConfigError, match=r"--optim.lr cannot change in a resumed run; only train.total_frames"):
        parse("--resume", "runs/one", "--optim.lr", "1")


@pytest.mark.parametrize("main", [impala_atari.main, impala_control.main])
def test_exit_codes(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--env.gam", "pong"]) == 2  # type: ignore[operator]
    error = capsys.readouterr().err
    assert error.startswith("error: there is no flag --env.gam")
    assert error.count("\n") == 1


def test_evaluate_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path / "none.ckpt")]) == 2
    assert "there is no checkpoint file at" in capsys.readouterr().err
    for name, content in (("cut.ckpt", b"PK\x03\x04 cut"), ("text.ckpt", b"hello")):
        (tmp_path / name).write_bytes(content)
        assert evaluate.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert f"{name} is truncated or not a checkpoint" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)]
)
def test_threads_wait_briefly_unless_told_otherwise(
    given: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.run_recipe(["--preset", "none"], presets={"default": ImpalaConfig}, description="")
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_the_packages_own_warnings_are_one_line() -> None:
    own, other = cli.__file__, str(Path(cli.__file__).parents[1] / ".venv/lib/numpy.py")
    assert cli._one_warning(RuntimeWarning("it failed"), RuntimeWarning, own, 3) == "warning: it failed\n"
    assert cli._one_warning(RuntimeWarning("x"), RuntimeWarning, other, 3, "") == f"{other}:3: RuntimeWarning: x\n"
