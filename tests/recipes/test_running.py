"""From a right configuration to the summary line, in this process: resuming, refusing, drawing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from offtrace.agents.config import CollectorConfig
from offtrace.agents.impala import atari_config, control_config
from offtrace.agents.runs.curves import read_curves
from offtrace.agents.runs.training import learner_threads
from offtrace.recipes import evaluate, impala_atari, impala_control

TINY = [
    "--collector.num_workers=0", "--env.num_envs=4", "--collector.unroll=8", "--train.minibatches=2",
    "--train.epochs=1", "--train.eval_episodes=2", "--train.eval_every=64", "--train.log_every=0",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_folder")


def train(*argv: str) -> int:
    return impala_control.main([*TINY, "--train.name=a", *argv])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_an_import_swallows_ends_the_start_all_the_same(
    number: signal.Signals, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            if not lost:
                raise ImportError("initialization failed") from error
        time.sleep(20)
        raise AssertionError("it goes on")

    monkeypatch.setattr("offtrace.agents.runs.run.run", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's jobs in the background ignore it
    try:
        assert train() == 128 + number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(Path("runs").iterdir())


@pytest.mark.slow
def test_a_resumed_run_keeps_its_curve_and_its_new_budget(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/a")
    assert train("--train.total_frames=128") == 0
    training, scores, seconds = read_curves(run / "metrics.csv")
    assert scores[-1][0] == 128
    capsys.readouterr()

    assert impala_control.main(["--resume", "runs/a"]) == 2
    assert "runs/a has trained 128 of 128 frames; give more by --train.total_frames" in error_line(capsys)
    assert read_curves(run / "metrics.csv") == (training, scores, seconds), "a refused resume changes nothing"

    assert impala_control.main(["--resume", "runs/a", "--train.total_frames", "256"]) == 0
    longer, more, whole = read_curves(run / "metrics.csv")
    assert longer[: len(training)] == training
    assert more[: len(scores)] == scores
    assert more[-1][0] == 256
    assert whole[: len(seconds)] == seconds
    assert whole[-1][1] > seconds[-1][1]
    steps = [frames for frames, _ in longer]
    assert steps == sorted(steps)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["total_frames"] == 256
    assert len(json.loads((run / "versions.json").read_text())["resumed"]) == 1


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--train.total_frames=64", "--network.hidden=[64, 64]") == 0
    capsys.readouterr()
    last = Path("runs/a/checkpoints/last.ckpt")
    good = last.read_bytes()
    content = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    content["network"]["hidden"] = [8, 8]
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(content))
    assert impala_control.main(["--resume", "runs/a", "--train.total_frames=640"]) == 2
    assert "last.ckpt is of another network: its hidden is [64, 64], the run's is [8, 8]" in error_line(capsys)
    last.write_bytes(good[: len(good) // 2])
    assert impala_control.main(["--resume", "runs/a", "--train.total_frames=640"]) == 2
    assert "last.ckpt is truncated or not a checkpoint" in error_line(capsys)
    assert Path("runs/a/metrics.csv").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--train.devices=4096", "--train.accelerator=cpu"], "train.devices is 4096"),
        (
            ["--network.encoder=shallow"],
            "network.encoder is shallow, and CartPole-v1 shows vectors; it must be auto, mlp",
        ),
        (["--env.task=no_such_module:make"], "no_such_module"),
        (["--network.encoder=no_such_module:net"], "network 'no_such_module:net' cannot be imported"),
        (["--loss.estimator=vtrace(lmbda=1.5)"], "lmbda must be in [0, 1], got 1.5"),
        (["--loss.estimator=vtrace(c_clip=2)"], "c_clip"),
        (["--loss.estimator=gae(gamma=0.5)"], "gamma"),
        (["--network.init_scale=0.5"], "network.init_scale is 0.5; the actions of CartPole-v1 are discrete"),
    ],
)
def test_a_refused_start_leaves_no_folder(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*argv) == 2
    assert told in error_line(capsys)
    assert not Path("runs/a").exists()


def test_a_failure_in_training_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a ValueError: once a run has begun, its folder and the whole error stay."""

    def fail(config: Any, folder: Path, resume: Path | None) -> None:
        (folder / "metrics.csv").touch()
        raise ValueError("the sky fell\nand more")

    monkeypatch.setattr("offtrace.agents.runs.run.train", fail)
    assert train() == 1
    assert "training stopped: the sky fell" in error_line(capsys)
    assert "and more" in Path("runs/a/error.txt").read_text()


@pytest.mark.slow
def test_a_picture_that_fails_does_not_lose_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("offtrace.agents.runs.run.plot_curves", fail)
    assert train("--train.total_frames=64") == 0
    out, err = capsys.readouterr()
    assert "the learning curve was not made: no space left" in err
    assert "after 64 frames" in out


def test_ctrl_c_before_training_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offtrace.agents.runs.run.run", interrupt)
    assert train() == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert not list(Path("runs").iterdir())


@pytest.mark.slow
def test_pendulum_trains_and_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    assert impala_control.main(["--preset=pendulum", *TINY, "--train.name=a", "--train.total_frames=64"]) == 0
    capsys.readouterr()
    last = "runs/a/checkpoints/last.ckpt"
    assert evaluate.main([last, "--episodes=3", "--mode=greedy", "--seed=5"]) == 0
    assert capsys.readouterr().out.startswith("Pendulum-v1, greedy actions, 3 whole episodes")
    outputs = []
    for _ in range(2):
        assert evaluate.main([last, "--episodes=3", "--mode=sample", "--seed=5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1], "the seed decides everything, the drawn actions too"
    assert evaluate.main([last, "--episodes=1", "--gif=episode.gif"]) == 0
    assert "action change 0." in capsys.readouterr().out
    assert Path("episode.gif").read_bytes().startswith(b"GIF")
    assert evaluate.main([last, "--device=cuda:77"]) == 2
    assert "--device is cuda:77; this machine has cpu and" in error_line(capsys)


@pytest.mark.slow
def test_the_actions_of_a_protocol_are_not_those_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--train.name=p", "--train.total_frames=128", "--train.final_eval=false", "--train.eval_every=1000000"]
    assert impala_atari.main([*TINY, *argv, "--env.num_envs=2", "--train.eval_episodes=1"]) == 0
    assert Path("runs/p/episode.gif").read_bytes().startswith(b"GIF")
    capsys.readouterr()
    assert evaluate.main(["runs/p/checkpoints/last.ckpt", "--protocol=sticky"]) == 2
    assert "the policy knows 6 actions of pong; it has 18 under the sticky protocol" in error_line(capsys)


@pytest.mark.parametrize(
    ("workers", "devices", "limit", "threads"),
    [(0, 1, None, 8), (2, 1, None, 6), (2, 2, None, 2), (9, 1, None, 1), (0, 1, "3", 3), (6, 1, "3", 2), (0, 1, "", 8)],
)
def test_threads_of_the_learner(
    workers: int, devices: int, limit: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cores that the actors leave over, and never more than OMP_NUM_THREADS says."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    config = control_config()
    config.collector.num_workers, config.train.devices = workers, devices
    assert learner_threads(config) == threads


@pytest.mark.parametrize(("acting", "emulator", "threads"), [("copies", 3, 2), ("server", 1, 5), ("server", 3, 1)])
def test_emulators_and_server_take_cores_too(
    acting: Literal["copies", "server"], emulator: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = atari_config()
    config.collector = CollectorConfig(num_workers=2, acting=acting, emulator_threads=emulator)
    assert learner_threads(config) == threads
