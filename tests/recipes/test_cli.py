"""The command line: every mistake is one sentence, quickly, and before anything heavy is imported."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from offtrace.agents.a2c import A2CConfig
from offtrace.agents.config import ConfigError, Machine, ShareReplayConfig
from offtrace.agents.impala import ImpalaConfig, atari_config, paper_config
from offtrace.agents.runs import checkpoint
from offtrace.agents.runs.checkpoint import CheckpointError, load_policy
from offtrace.agents.runs.folders import RunError, new_run, read_config, write_config
from offtrace.agents.sac import SACConfig
from offtrace.modules.envs import EnvironmentFailure
from offtrace.recipes import cli, evaluate
from tests.recipes import recipes
from tests.recipes.recipes import EVERY_PRESET, ON_ROLLOUTS, TRAINING, main_of

PRESETS = {"default": atari_config, "paper": paper_config}


def parse(*argv: str) -> ImpalaConfig:
    config = cli.parse(list(argv), presets=PRESETS, description="").config
    assert isinstance(config, ImpalaConfig)
    return config


def test_defaults_presets_and_flags() -> None:
    assert parse() == atari_config()
    assert parse("--preset", "paper") == paper_config()
    config = parse("--preset=paper", "--env.task", "breakout", "--train.total_frames", "1e6", "--optim.lr=1e-3")
    assert (config.env.task, config.train.total_frames, config.optim.lr) == ("breakout", 1_000_000, 1e-3)
    assert config.optim.name == "rmsprop_tf"
    config = parse("--loss.estimator", "vtrace(rho_clip=inf)", "--loss.policy_clip", "null", "--network.hidden", "[64]")
    assert config.loss.estimator == "vtrace(rho_clip=inf)"
    assert config.loss.policy_clip is None
    assert config.network.hidden == [64]
    assert parse("--network.hidden", "null").network.hidden is None


@pytest.mark.parametrize(("name", "preset"), EVERY_PRESET)
def test_every_preset_is_right_and_reads_back_as_printed(
    name: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset_itself = recipes.presets_of(name)[preset]()
    argv = [f"--preset={preset}", "--train.name", "1e6", "--loss.gamma=0.5", "--network.v_max=300"]
    argv = argv if "v_max" in vars(preset_itself.network) else argv[:-1]
    with pytest.raises(SystemExit) as end:
        recipes.parse(name, *argv, "--print_config")
    assert not end.value.code
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    config = recipes.parse(name, "--config", str(path))
    assert config == recipes.parse(name, *argv)
    assert (config.train.name, config.loss.gamma) == ("1e6", 0.5)
    cli.check(config)
    cli.check(preset_itself)


def test_what_fits_the_machine_is_shown_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen for new runs; a flag or a file that says otherwise wins, and a run that goes on keeps what it had."""
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(16))
    command = cli.parse([], presets=PRESETS, description="")
    chosen = command.config
    assert (chosen.collector.num_workers, chosen.env.num_envs, chosen.train.unrolls) == (8, 8, 32)  # type: ignore[attr-defined]
    assert command.fitted.startswith("16 cores, no GPU: half of the cores act")
    with pytest.raises(SystemExit):
        parse("--print_config")
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert yaml.safe_load(path.read_text())["collector"]["num_workers"] == 8
    for argv, actors in (
        (["--collector.num_workers", "3"], 3),
        (["--collector.num_workers=3"], 3),
        (["--collector={num_workers: 3}"], 3),
    ):
        config = parse(*argv)
        assert (config.collector.num_workers, config.train.unrolls) == (actors, 32)
        cli.check(config)
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(64, 1))
    assert parse("--config", str(path)) == chosen, "a file that holds all values"
    path.write_text("env: {num_envs: 8}")
    config = parse("--config", str(path), "--collector.acting", "copies")
    assert (config.env.num_envs, config.collector.acting, config.collector.num_workers) == (8, "copies", 32)
    cli.check(config)
    write_config(atari_config(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with zipfile.ZipFile(tmp_path / "checkpoints" / "last.ckpt", "w") as archive:
        archive.writestr("data", "x")
    assert parse("--resume", str(tmp_path)) == atari_config()
    assert parse("--resume", str(tmp_path), "--collector.device", "cuda").collector.device == "cuda"


@pytest.mark.usefixtures("own_folder")
def test_a_new_run_says_how_it_fits_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(cli, "run_in", lambda folder, config, resume: ran.append(config) or 0)
    for rank, cores, told in (("0", 2, 1), ("1", 16, 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(cli, "this_machine", lambda cores=cores: Machine(cores))
        assert main_of("impala_atari")(["--train.name=one"]) == 0
        line = (
            "2 cores, no GPU: as the preset says, because a learner has fewer than 4 cores (1 actor of 16 environments)"
        )
        assert capsys.readouterr().err.splitlines().count(line) == told
    assert ran[1] == ran[0], "learners of one run that find other machines have what the first one chose"


def test_presets_differ() -> None:
    for name in TRAINING:
        found = [make() for make in recipes.presets_of(name).values()]
        for index, config in enumerate(found):
            assert config not in found[:index], f"{name} has a preset twice"
            assert type(config) is type(found[0]), "a resumed run is of one class, whatever its preset was"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env.taks", "pong"], "there is no flag --env.taks; did you mean --env.task?"),
        (["--env.game", "pong"], "there is no flag --env.game; env has task, num_envs, protocol, "),
        (["--loss.lamda", "0.9"], "there is no flag --loss.lamda; loss has estimator, gamma, "),
        (["--lr", "3"], "there is no flag --lr; did you mean --optim.lr?"),
        (["--preset", "papr"], "--preset is 'papr'; it must be one of default, paper; did you mean paper?"),
        (["--env.num_envs", "many"], "env.num_envs is many; it must be a whole number"),
        (["--config"], "--config needs a value"),
        (["--resume", ""], "--resume is empty; give it a value, or leave it out"),
        (
            ["--config=a.yaml", "--config", "b.yaml"],
            "--config is given 2 times, as a.yaml and b.yaml; it must be given",
        ),
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
        ("env: {tsk: pong}", "has an unknown key env.tsk; did you mean env.task?"),
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


@pytest.mark.parametrize("config", [SACConfig(), A2CConfig()])
def test_a_run_may_go_on_with_its_replay_elsewhere(config: Any, tmp_path: Path) -> None:
    write_config(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with zipfile.ZipFile(tmp_path / "checkpoints/last.ckpt", "w") as archive:
        archive.writestr("data", "x")
    argv, presets = ["--resume", str(tmp_path), "--replay.device", "cuda"], {"default": type(config)}
    if isinstance(config, A2CConfig):  # which has none, and names it to nobody
        with pytest.raises(ConfigError, match=r"only (?!.*replay\.device).* can$"):
            cli.parse([*argv[:2], "--optim.lr", "1"], presets=presets, description="")
    else:
        assert cli.parse(argv, presets=presets, description="").config.replay.device == "cuda"


def test_learners_with_a_replay_each_keep_their_number(tmp_path: Path) -> None:
    for config, words in (
        (SACConfig(), "--train.devices cannot change in a resumed run"),
        (ImpalaConfig(replay=ShareReplayConfig(share=0.5)), "--train.devices cannot change in a resumed run"),
        (ImpalaConfig(), "has no checkpoints/last.ckpt"),
    ):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
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
        (["--collector.emulator_threads", "0"], "collector.emulator_threads is 0; it must be at least 1"),
        (
            ["--collector.emulator_threads", "2", "--env.task", "CartPole-v1"],
            "collector.emulator_threads is 2, which only Atari games have; CartPole-v1 is none: it must be 1",
        ),
        (["--train.minibatches", "5"], "train.minibatches is 5; it must divide env.num_envs, 16"),
        (["--loss.gamma", "1.5"], "loss.gamma is 1.5; it must be between 0 and 1"),
        (["--loss.policy_clip", "0"], "loss.policy_clip is 0.0; it must be above 0, or null"),
        (
            ["--network.encoder", "resnt"],
            "network.encoder is resnt; it must be one of auto, shallow, resnet, mlp, layernorm_mlp, or package",
        ),
        (["--collector.device", "gpu"], "collector.device is gpu; it must be cpu, cuda or cuda:<number>"),
        (["--loss.value_coef", "inf"], "loss.value_coef is inf; it must be finite, and at least 0"),
        (["--train.seed", "-1"], "train.seed is -1; it must be at least 0 and below 2**32"),
        (["--optim.lr", "nan"], "optim.lr is nan; it must be above 0"),
        (["--env.task", "pnog"], "env.task: unknown environment 'pnog'; did you mean pong?"),
    ],
)
def test_values_that_cannot_be_run(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.check(parse(*argv))
    assert words in str(error.value)


STATE = ("impala_atari", "a2c", "ppo", "trpo", "vmpo_control")
ACTION = ("q_actor_critic", "dqn", "sac_control", "mpo_control")


@pytest.mark.parametrize(
    ("names", "spec", "near"),
    [
        (STATE, "vtarce", "; did you mean vtrace?"),
        (STATE, "vtrace(lmda=0.9)", "; did you mean lmbda?"),
        (STATE, "vtrace(gamma=0.9)", "give loss.gamma, and leave it out of 'vtrace(gamma=0.9)'"),
        (STATE, "gae(lmbda=1.5)", "lmbda must be in [0, 1], got 1.5"),
        (STATE, "vtrace(c_clip=2)", "c_clip must be at most rho_clip, 1.0, got 2"),
        (STATE, "vtrace(rho_clip=-1)", "rho_clip must be above 0, got -1"),
        (STATE, "n_step(n=0)", "n must be 1 or more, and whole, got 0"),
        (STATE, "vtrace(lambda=0.9)", "(lmbda, not lambda)"),
        (STATE, "vtrace(0.9)", "options of an estimator go by their names"),
        (STATE, "vtrace(lmbda='high')", "lmbda must be a number, got 'high'"),
        (STATE, "retrace", "'retrace' is of action values, and one of state values is needed: 'vtrace'"),
        (STATE, "v trace", "an estimator is a name, options in brackets behind it"),
        (ACTION, "tree_bakup", "; did you mean tree_backup?"),
        (ACTION, "retrace(lmbd=0.9)", "; did you mean lmbda?"),
        (ACTION, "retrace(lmbda=-0.1)", "lmbda must be in [0, 1], got -0.1"),
        (ACTION, "retrace(root=0)", "root must be 1 or more, and whole, got 0"),
        (ACTION, "n_step(n=0)", "n must be 1 or more, and whole, got 0"),
        (ACTION, "n_step(n=2.5)", "n must be 1 or more, and whole, got 2.5"),
        (ACTION, "n_step(n=inf)", "n must be 1 or more, and whole, got inf"),
        (ACTION, "vtrace", "'vtrace' is of state values, and one of action values is needed: 'one_step'"),
        ((*STATE, *ACTION), "no_such_module:Trace", "the estimator 'no_such_module:Trace' cannot be imported"),
    ],
)
def test_estimators_that_do_not_fit(names: tuple[str, ...], spec: str, near: str) -> None:
    estimator = recipes.parse(names[0], f"--loss.estimator={spec}").loss.estimator  # type: ignore[attr-defined]
    for name in names:
        config: Any = recipes.presets_of(name)["default"]()
        config.loss.estimator = estimator
        with pytest.raises(ConfigError) as error:
            cli.check(config)
        assert str(error.value).startswith("loss.estimator: ")
        assert near in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TRAINING)
def test_misspelt_flags_tasks_and_networks_name_the_nearest(name: str) -> None:
    for argv, words in (
        (["--loss.estimatr=vtrace"], "there is no flag --loss.estimatr; did you mean --loss.estimator?"),
        (["--collector.unrol=3"], "there is no flag --collector.unrol; did you mean --collector.unroll?"),
        (["--env.task=CartPoel-v1"], "unknown environment 'CartPoel-v1'; did you mean CartPole-v1?"),
        (["--env.task=wlaker-walk"], "unknown environment 'wlaker-walk'; did you mean walker-walk?"),
        (["--network.encoder=layernorm_mpl"], "package.module:function; did you mean layernorm_mlp?"),
        (["--network.activation=rleu"], "network.activation is rleu; it must be one of tanh, relu"),
    ):
        with pytest.raises(ConfigError) as error:
            cli.check(recipes.parse(name, *argv))
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    for group, field, value, words in (
        ("env", "task", "wlaker-walk", "unknown environment 'wlaker-walk'; did you mean walker-walk?"),
        ("network", "encoder", "layernorm_mpl", "package.module:function; did you mean layernorm_mlp?"),
    ):
        config = recipes.presets_of(name)["default"]()
        setattr(getattr(config, group), field, value)
        with pytest.raises(ConfigError) as error:
            cli.check(config)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("dqn", ["--loss.doubel=true"], "there is no flag --loss.doubel; did you mean --loss.double?"),
        ("dqn", ["--network.duelling=true"], "there is no flag --network.duelling; did you mean --network.dueling?"),
        ("dqn", ["--replay.samplr=uniform"], "there is no flag --replay.samplr; did you mean --replay.sampler?"),
        ("ppo", ["--loss.clip_epsilo=0.1"], "there is no flag --loss.clip_epsilo; did you mean --loss.clip_epsilon?"),
        ("trpo", ["--optim.critic_step=1"], "there is no flag --optim.critic_step; did you mean --optim.critic_steps?"),
        ("sac_control", ["--optim.lr_acto=1"], "there is no flag --optim.lr_acto; did you mean --optim.lr_actor?"),
        ("mpo_control", ["--loss.epsilon_men=1"], "there is no flag --loss.epsilon_men; did you mean --loss.epsilon_m"),
        ("vmpo_control", ["--network.popar=true"], "there is no flag --network.popar; did you mean --network.popart?"),
        ("q_actor_critic", ["--loss.pg_rho_clp=1"], "no flag --loss.pg_rho_clp; did you mean --loss.pg_rho_clip?"),
    ],
)
def test_misspelt_flags_of_one_algorithm(name: str, argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipes.parse(name, *argv)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["dqn", "sac_control", "mpo_control"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--network.recurrent=16"], "there is no flag --network.recurrent; network has encoder, hidden, "),
        (["--replay.sampler=prioritised"], "replay.sampler is prioritised; it must be one of uniform, prioritized"),
        (["--replay.alpha=-0.1"], "replay.alpha is -0.1; it must be at least 0"),
        (["--replay.alpha=nan"], "replay.alpha is nan; it must be finite, and at least 0"),
        (["--replay.beta=1.5"], "replay.beta is 1.5; it must be between 0 and 1"),
        (["--replay.beta=-1"], "replay.beta is -1.0; it must be between 0 and 1"),
        (
            ["--loss.estimator=retrace", "--replay.length=5", "--replay.batch_size=32"],
            "replay.batch_size is 32; loss.estimator retrace learns from sequences of replay.length, 5, steps: it must "
            "be a multiple of that",
        ),
        (
            ["--loss.estimator=q_lambda(lmbda=0.9)", "--replay.length=1"],
            "replay.length is 1; loss.estimator q_lambda(lmbda=0.9) needs sequences of 2 steps or more, or must be one",
        ),
        (["--replay.capacity=500"], "replay.capacity is 500; it must hold replay.batch_size,"),
        (
            ["--replay.min_size=64", "--replay.batch_size=64", "--loss.estimator=n_step(n=3)"],
            "replay.min_size is 64; for batches of 64 sequences of 3 steps from",
        ),
    ],
)
def test_what_a_replay_cannot_give(name: str, argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.check(recipes.parse(name, *argv))
    assert words.format(recipes.presets_of(name)["default"]().algorithm) in str(error.value)
    assert "\n" not in str(error.value)


def test_sequences_are_not_torn_apart() -> None:
    with pytest.raises(ConfigError, match=r"train\.deal is steps, which would tear sequences apart: it must be env"):
        cli.check(recipes.parse("ppo", "--network.recurrent=16"))
    cli.check(recipes.parse("ppo", "--network.recurrent=16", "--train.deal=environments"))
    with pytest.raises(ConfigError, match=r"train\.minibatches is 7; it must divide the 256 steps of a rollout"):
        cli.check(recipes.parse("ppo", "--train.minibatches=7"))
    with pytest.raises(ConfigError, match=r"train\.minibatches is 16; it must divide env\.num_envs, 8"):
        cli.check(recipes.parse("ppo", "--train.minibatches=16", "--train.deal=environments"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--loss.delta=0"], "loss.delta is 0.0; it must be above 0"),
        (["--loss.delta=inf"], "loss.delta is inf; it must be above 0 and finite"),
        (["--loss.damping=-1"], "loss.damping is -1.0; it must be at least 0"),
        (["--loss.cg_iterations=0"], "loss.cg_iterations is 0; it must be at least 1"),
        (["--loss.backtracks=0"], "loss.backtracks is 0; it must be at least 1"),
        (["--loss.shrink=1"], "loss.shrink is 1.0; it must be above 0 and below 1"),
        (["--optim.critic_steps=0"], "optim.critic_steps is 0; it must be at least 1"),
        (["--train.minibatches=4"], "there is no flag --train.minibatches"),
        (["--train.epochs=4"], "there is no flag --train.epochs"),
        (["--network.recurrent=16"], "there is no flag --network.recurrent; network has encoder, hidden, "),
        (["--train.precision=bf16-mixed"], "train.precision is bf16-mixed; it must be"),
    ],
)
def test_what_trpo_does_not_take(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.check(recipes.parse("trpo", *argv))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_trpo_deals_no_rollout_to_minibatches() -> None:
    config: Any = recipes.presets_of("trpo")["default"]()
    config.train.minibatches = 2
    with pytest.raises(ConfigError, match=r"train\.minibatches is 2; it must be 1, because a step is that of a whole"):
        cli.check(config)


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = atari_config()
    config.train.name = "one"
    folder = new_run(config)
    assert read_config(folder, ImpalaConfig) == config
    assert yaml.safe_load((folder / "versions.json").read_text())["packages"]["torch"]
    with pytest.raises(RunError, match=r"runs/one is not empty: a run may be going on there, .* give another --train"):
        new_run(config)
    write_config(SACConfig(), folder)
    with pytest.raises(RunError, match=r"runs/one is a run of sac, and this recipe trains impala"):
        read_config(folder, ImpalaConfig)
    (folder / "config.yaml").write_text("env: {task: [")
    with pytest.raises(RunError, match=r"config.yaml is damaged"):
        read_config(folder, ImpalaConfig)
    Path("file").touch()
    monkeypatch.setattr("offtrace.agents.runs.folders.RUNS", Path("file"))
    config.train.name = "two"
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        new_run(config)


@pytest.mark.parametrize(
    ("trained", "by"), [("a2c", "ppo"), ("ppo", "sac_control"), ("sac_control", "dqn"), ("impala_control", "a2c")]
)
def test_a_run_goes_on_only_with_its_own_algorithm(
    trained: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2C's keys are some of PPO's, and PPO has no replay: neither may decide."""
    monkeypatch.chdir(tmp_path)
    folder = new_run(recipes.parse(trained, "--train.name=one"))
    own, other = recipes.parse(trained).algorithm, recipes.parse(by).algorithm
    with pytest.raises(RunError, match=f"runs/one is a run of {own}, and this recipe trains {other}"):
        recipes.parse(by, "--resume", str(folder))
    with pytest.raises(ConfigError, match=f"config.yaml configures {own}, and this recipe trains {other}"):
        recipes.parse(by, "--config", str(folder / "config.yaml"))
    assert recipes.parse(trained, "--config", str(folder / "config.yaml")) == recipes.parse(trained, "--train.name=one")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda content: content.pop("algorithm"), "is damaged: algorithm is missing"),
        (lambda content: content.pop("loss"), "is damaged: loss is missing"),
        (lambda content: content["loss"].update(other=1), "has loss.other, which impala does not know"),
    ],
)
def test_an_edited_configuration_of_a_run(tmp_path: Path, edit: Callable[[Any], Any], words: str) -> None:
    write_config(atari_config(), tmp_path)
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    edit(content)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RunError, match=words):
        read_config(tmp_path, ImpalaConfig)


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = atari_config()
    config.train.name, config.env.task = "one", "boxing"
    new_run(config)
    with pytest.raises(RunError, match=r"runs/one has no checkpoints/last.ckpt to go on from"):
        parse("--resume", "runs/one")
    (tmp_path / "runs/one/checkpoints").mkdir()
    (tmp_path / "runs/one/checkpoints/last.ckpt").touch()
    with pytest.raises(RunError, match=r"last.ckpt is truncated or not a checkpoint"):
        parse("--resume", "runs/one")
    with zipfile.ZipFile(tmp_path / "runs/one/checkpoints/last.ckpt", "w") as archive:
        archive.writestr("data", "x")
    resumed, checkpoint, fitted = cli.parse(
        ["--resume", "runs/one", "--train.total_frames", "5e6"], presets=PRESETS, description=""
    )
    assert (resumed.env.task, resumed.train.total_frames) == ("boxing", 5_000_000)
    assert checkpoint == Path("runs/one/checkpoints/last.ckpt")
    assert not fitted
    with pytest.raises(ConfigError, match=r"--optim.lr cannot change in a resumed run; only train.total_frames"):
        parse("--resume", "runs/one", "--optim.lr", "1")


@pytest.mark.parametrize("name", TRAINING)
def test_no_flag_is_offered_that_is_always_refused(name: str) -> None:
    network = vars(recipes.parse(name).network)
    reactor = name.startswith("reactor")
    assert ("recurrent" in network) == (name in ON_ROLLOUTS or reactor)
    assert ("init_scale" in network) == (name not in ("dqn", "sac_control") and not reactor)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("mke", "has no 'mke'; did you mean make?"),
        ("narrow", "must take (observation_shape, hidden), and takes (shape)"),
    ],
)
def test_an_own_network_is_looked_at_before_anything_starts(
    function: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"own_{function}_nets"
    Path(f"{name}.py").write_text("def make(shape, hidden): ...\n\ndef narrow(shape): ...\n")
    assert main_of("ppo")([f"--network.encoder={name}:{function}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: network.encoder: ")
    assert words in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_what_a_loss_of_every_step_cannot_learn_from_is_told_with_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"loss.estimator is n_step\(n=5\), which learns from the first step"):
        cli.check(recipes.parse("q_actor_critic", "--loss.estimator=n_step(n=5)"))
    cli.check(recipes.parse("q_actor_critic", "--loss.estimator=n_step(n=1)"))


@pytest.mark.parametrize("name", TRAINING)
def test_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of(name)(["--env.taks", "pong"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no flag --env.taks")
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


def gone(num_envs: int, seed: int) -> Any:
    """A task whose server does not answer."""
    raise EnvironmentFailure("the server is gone\nsince yesterday")


def test_evaluate_in_a_task_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"env": {"name": f"{__name__}:gone", "options": {}}, "eval_mode": "greedy"}
    monkeypatch.setattr(checkpoint, "load_policy", lambda path: torch.nn.Linear(1, 1))
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: {checkpoint.CHECKPOINT_KEY: saved})
    monkeypatch.setattr(evaluate, "checkpoint_file", lambda path: path)
    assert evaluate.main(["last.ckpt"]) == 1
    told = f"error: the episodes of {__name__}:gone were not played to the end: the server is gone\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("names", [(), ("last.ckpt",), ("best.ckpt", "last.ckpt")])
def test_the_folder_of_a_run_leads_to_its_checkpoints(
    names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever reads a checkpoint says which there are."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    for path in (folder.parent, folder, folder / "bst.ckpt", folder.parent / "best.ckpt"):
        assert evaluate.main([str(path)]) == 2
        with pytest.raises(CheckpointError) as raised:
            load_policy(path)
        for told in (capsys.readouterr().err, str(raised.value)):
            assert str(path) in told
            assert all((str(folder / name) in told) == (name in names) for name in ("best.ckpt", "last.ckpt"))


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
    presets: Any = {"default": ImpalaConfig}
    cli.run_recipe(["--preset", "none"], presets=presets, description="")
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_the_packages_own_warnings_are_one_line() -> None:
    own, other = cli.__file__, str(Path(cli.__file__).parents[1] / ".venv/lib/numpy.py")
    assert cli._one_warning(RuntimeWarning("it failed"), RuntimeWarning, own, 3) == "warning: it failed\n"
    assert cli._one_warning(RuntimeWarning("x"), RuntimeWarning, other, 3, "") == f"{other}:3: RuntimeWarning: x\n"


def test_an_optimiser_that_is_always_adam_has_no_flag_for_another() -> None:
    with pytest.raises(ConfigError, match=r"there is no flag --optim\.name"):
        recipes.parse("vmpo_control", "--optim.name=rmsprop")
