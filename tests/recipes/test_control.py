"""SAC, MPO and V-MPO as a user runs them: what is refused, what is survived, what is left behind."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from offtrace.agents.callbacks import Meters, WeightSync
from offtrace.agents.data import ActingData
from offtrace.agents.runs import run as runs
from offtrace.agents.runs.training import Summary
from offtrace.agents.sac import SACConfig
from offtrace.modules.envs.simulator import Simulator
from offtrace.recipes import cli, evaluate, mpo_control, sac_control, vmpo_control

TINY = [
    "--network.hidden=[8,8]", "--network.critic_hidden=[8,8]", "--replay.capacity=300", "--replay.batch_size=8",
    "--replay.min_size=16", "--replay.samples_per_insert=2", "--train.total_frames=64", "--train.eval_episodes=1",
    "--train.log_every=0", "--train.name=a",
]  # fmt: skip
OWN = "tests.recipes.own_tasks"
RUN = Path("runs/a")

pytestmark = pytest.mark.usefixtures("own_folder")


def sac(*argv: str) -> int:
    return sac_control.main([*TINY, *argv])


def mpo(*argv: str) -> int:
    return mpo_control.main([*TINY, "--env.num_envs=1", *argv])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def rows() -> list[dict[str, str]]:
    with open(RUN / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(name: str) -> list[float]:
    return [float(row[name]) for row in rows() if row.get(name)]


def weights() -> dict[str, Any]:
    content = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    return dict(content["state_dict"])


@pytest.mark.parametrize(
    ("run", "argv", "told"),
    [
        (sac, ["--env.task=Pendulum-v1", "--env.action_repeat=4"], "env.action_repeat is 4, which only tasks of dm_c"),
        (sac, ["--env.task=Pendulum-v1", "--env.pixels=true"], "env.pixels is true, which only tasks of dm_control"),
        (mpo, [f"--env.task={OWN}:Short", "--env.action_repeat=2"], "is an own environment: it must be 1"),
        (sac, ["--env.task=walker-wlak"], "did you mean walker-walk? (it has stand, walk, run)"),
        (mpo, ["--env.task=wlaker-walk", "--env.action_repeat=4"], "environment 'wlaker-walk'; did you mean walker-wa"),
        (sac, ["--preset=v1", "--env.task=CartPole-v1"], "no form for the discrete actions of CartPole-v1: it must"),
        (sac, ["--collector.max_restarts=3"], "collector.max_restarts is 3, and collector.num_workers is 0: an env"),
        (sac, ["--collector.step_timeout=3"], "collector.step_timeout is 3, and collector.num_workers is 0: an env"),
        (sac, ["--collector.max_restarts=-1"], "collector.max_restarts is -1; it must be at least 0"),
        (sac, ["--collector.backend=ray"], "collector.backend is ray, and collector.num_workers is 0, which acts in"),
        (sac, ["--collector.address=head:6379"], "collector.address is head:6379; it must be empty where backend is p"),
        (sac, ["--collector.placement=near"], "collector.placement is near; it must be spread where backend is proc"),
        (
            sac,
            ["--collector.backend=ray", "--collector.num_workers=1", "--collector.acting=server"],
            "collector.acting is server, and collector.backend is ray, whose actors have a copy of the policy each",
        ),
        (
            sac,
            ["--collector.backend=ray", "--collector.num_workers=1", "--collector.device=cuda"],
            "collector.device is cuda, and collector.backend is ray, whose actors act on the CPU",
        ),
        (sac, ["--env.task=CartPole-v1", "--loss.target_entropy=0.7"], "must be below log(2) = 0.693"),
        (sac, ["--preset=discrete", "--env.task=Pendulum-v1"], "those of Pendulum-v1 are continuous: it must be auto"),
        (sac, ["--collector.unroll=100"], "learners 100 frames; it must not be more than train.total_frames, 64"),
        (sac, ["--replay.samples_per_insert=1e9"], "125,000,000 updates for each collected step; with a replay.batch"),
        (sac, ["--env.task=CartPole-v1", "--network.smoothing=0.5"], "smoothing is 0.5; CartPole-v1 has discrete"),
        (mpo, ["--env.task=CartPole-v1", "--network.noise_correlation=0.5"], "noise_correlation is 0.5; CartPole-v1"),
        (
            sac,
            ["--network.smoothing=0.5", "--network.noise_correlation=0.5"],
            "network.smoothing is 0.5 and network.noise_correlation 0.5; both make actions last: one of them must be 0",
        ),
        (mpo, ["--preset=dmpo", "--env.task=CartPole-v1"], "those of CartPole-v1 are discrete"),
        (mpo, ["--preset=full", "--env.task=CartPole-v1"], "loss.covariance is full; DiscreteMPOLoss has no such"),
        (mpo, ["--env.task=CartPole-v1", "--network.init_scale=1"], "network.init_scale is 1.0; the actions of Cart"),
        (sac, ["--loss.estimator=tree_backup"], "loss.estimator is tree_backup, which needs probabilities of discrete"),
        (mpo, ["--loss.estimator=tree_backup", f"--env.task={OWN}:Short"], "loss.estimator is tree_backup, which"),
        (sac, ["--network.encoder=shallow"], "cartpole-swingup shows vectors; it must be auto, mlp or layernorm_mlp"),
        (
            sac,
            ["--env.task=pong", "--network.encoder=mlp", "--train.total_frames=512"],
            "network.encoder is mlp, and pong shows images; it must be auto, shallow or resnet",
        ),
        (
            mpo,
            ["--env.task=pong", "--network.encoder=layernorm_mlp", "--train.total_frames=512"],
            "network.encoder is layernorm_mlp, and pong shows images; it must be auto, shallow or resnet",
        ),
        (sac, [f"--env.task={OWN}:wide"], "has actions from -2 to 2; the agents act in [-1, 1]"),
        (sac, ["--replay.capacity=5"], "replay.capacity is 5; it must hold replay.batch_size, 8, and replay.min_size"),
        (sac, ["--env.num_envs=30"], "for 30 environments and a collector.unroll of 8 it must be at least 510"),
        (
            mpo,
            ["--loss.estimator=retrace", "--replay.length=20", "--replay.batch_size=40"],
            "batches of 2 sequences of 20 steps from 1 environment it must be at least 21",
        ),
        (sac, ["--replay.samples_per_insert=0.001"], "more than the replay's 300; raise it to 0.0267 at least"),
        (mpo, ["--replay.samples_per_insert=0.1"], "64 steps of each learner's actors; the first update comes after 9"),
        (mpo, ["--env.task=pong"], "total_frames is 64, 16 steps of each learner's actors; the first update comes af"),
        (mpo, [f"--env.task={OWN}:repeated"], "total_frames is 64, 16 steps of each learner's actors; the first upda"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_sentence(
    run: Callable[..., int], argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    assert told in error_line(capsys)
    assert not RUN.exists()


@pytest.mark.slow
def test_episodes_shorter_than_the_sequences_are_learned_from() -> None:
    assert sac(f"--env.task={OWN}:Short", "--loss.estimator=retrace", "--replay.length=4", "--replay.min_size=24") == 0
    assert column("train/updates")[-1] == (64 - 24) * 2 // 8
    assert all(map(math.isfinite, column("train/loss_critic")))


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--network.normalize=true"], ["--loss.estimator=retrace", "--replay.length=4"]])
def test_a_simulator_that_diverges_costs_its_episode_only(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every twentieth step of 64: said when it happens, in the log, in the summary and at the end."""
    with pytest.warns(RuntimeWarning, match=r"diverging: environment 0 failed at step 20 .* its episode was dropped"):
        assert sac(f"--env.task={OWN}:diverging", "--replay.min_size=20", *argv) == 0
    out, err = capsys.readouterr()
    assert "3 episodes dropped" in out
    assert "· 3 episodes dropped" in err
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["dropped_episodes"] == 3
    assert summary["frames"] == 64
    assert summary["updates"] == (64 - 20) * 2 // 8
    assert column("train/dropped_episodes")[-1] == 3
    assert column("replay/steps")[-1] == 64 - 3
    assert all(torch.isfinite(value).all() for value in weights().values())
    for name in ("train/loss_critic", "train/grad_norm", "eval/return"):
        assert column(name), name
        assert all(map(math.isfinite, column(name))), name


@pytest.mark.filterwarnings("ignore:dead:RuntimeWarning")
@pytest.mark.slow
def test_a_simulator_that_does_not_come_back_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert sac(f"--env.task={OWN}:dead", "--replay.min_size=20", "--train.total_frames=1000") == 1
    _, err = capsys.readouterr()
    assert "error: training stopped: the simulator failed in each of the last 104 steps; there is nothing to" in err
    assert (RUN / "checkpoints/last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:hopeless:RuntimeWarning")
@pytest.mark.slow
def test_a_simulator_that_fails_in_every_evaluation_costs_the_score_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(
        UserWarning, match="no score at 64 frames: the simulator failed in each of 2 episodes of the evaluation"
    ):
        assert sac(f"--env.task={OWN}:hopeless", "--replay.min_size=20", "--train.eval_episodes=2") == 0
    out, _ = capsys.readouterr()
    assert "no evaluation yet after 64 frames, 3 episodes dropped" in out
    assert json.loads((RUN / "summary.json").read_text())["scores"] == []


@pytest.mark.slow
def test_a_damaged_replay_is_refused_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert sac(f"--env.task={OWN}:Short", "--train.final_eval=false") == 0
    folder = max((RUN / "replay/rank0").iterdir())
    damaged = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    capsys.readouterr()
    for _ in range(2):
        assert sac_control.main(["--resume", "runs/a", "--train.total_frames=128"]) == 2
        told = error_line(capsys)
        assert f"the replay in '{folder}' is damaged: {damaged.name} has" in told
        assert told.endswith("remove runs/a/replay to go on with an empty one")
    assert {file: file.read_bytes() for file in kept} == kept
    shutil.rmtree(RUN / "replay")
    with pytest.warns(RuntimeWarning, match="runs/a/replay is gone: the run goes on with an empty replay"):
        assert sac_control.main(["--resume", "runs/a", "--train.total_frames=128"]) == 0


@pytest.mark.slow
def test_where_the_last_replay_is_damaged_that_of_the_checkpoint_before_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sac(f"--env.task={OWN}:Short", "--train.record=false", "--train.checkpoint_every=32") == 0
    last = RUN / "checkpoints/last.ckpt"
    before = torch.load(last.with_name("previous.ckpt"), weights_only=True)["offtrace"]["frames"]
    damaged = max(max((RUN / "replay/rank0").iterdir()).iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    argv = ["--resume", "runs/a", "--train.total_frames=128"]
    assert sac_control.main(argv) == 2
    assert f"or {last} to go on from the checkpoint before" in error_line(capsys)
    last.unlink()
    with pytest.warns(RuntimeWarning, match="the run goes on from previous.ckpt"):
        assert sac_control.main(argv) == 0
    assert f"going on from {before} frames" in capsys.readouterr().err
    assert column("replay/steps")[-1] == 128


@pytest.mark.slow
def test_a_run_goes_on_without_an_actor_that_died(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step that was delivered is in the replay, and entitles to as many updates as in any other run."""
    argv = ["--env.task=tests.recipes.crashing:Crashing", "--collector.num_workers=2", "--train.record=false"]
    with pytest.warns(RuntimeWarning, match=r"actor process \d ended by itself at step \d+ \(exit code 1\); a new one"):
        assert sac(*argv, "--train.total_frames=128") == 0
    out, err = capsys.readouterr()
    assert "restarts 1, " in out
    assert "restarts 1" in err
    summary = json.loads((RUN / "summary.json").read_text())
    assert (summary["frames"], summary["restarts"]) == (128, 1)
    assert summary["updates"] == (128 - 16) * 2 // 8
    assert column("collector/restarts")[-1] == 1
    assert column("replay/steps")[-1] == 128
    assert "error" not in err


def flip(content: bytes) -> bytes:
    """One bit of the largest tensor."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        place = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset + 200
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda content: content[:1000], flip, lambda _: b"", None])
def test_a_run_survives_its_last_checkpoint(
    damage: Callable[[bytes], bytes] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before takes its place, with the replay that belongs to it, until there is a new one."""
    argv = [f"--env.task={OWN}:Short", "--train.record=false", "--train.checkpoint_every=32"]
    assert sac(*argv) == 0
    last, before = (RUN / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    frames, lost = (torch.load(path, weights_only=True)["offtrace"]["frames"] for path in (before, last))
    assert 0 < frames < lost == 64
    kept = before.read_bytes()
    if damage is None:  # killed between two renames
        last.unlink()
    else:
        last.write_bytes(damage(last.read_bytes()))
    told = f"last.ckpt.*; the run goes on from previous.ckpt, and what it had learnt after {frames} frames is lost"
    with pytest.warns(RuntimeWarning, match=told):
        assert sac_control.main(["--resume", "runs/a", f"--train.total_frames={frames + 8}"]) == 0
    assert before.read_bytes() == kept, "the damaged one must not take the place of the good one"
    summary = json.loads((RUN / "summary.json").read_text())
    assert (summary["frames"], summary["updates"]) == (frames + 8, (frames + 8 - 16) * 2 // 8)
    assert column("replay/steps")[-1] == frames + 8
    for path in (last, before):
        path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    assert sac_control.main(["--resume", "runs/a", "--train.total_frames=128"]) == 2
    error = error_line(capsys)
    assert "last.ckpt is truncated" in error
    assert "the one before it cannot be used either: runs/a/checkpoints/previous.ckpt is truncated" in error


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_replay(capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM in the middle of a rollout; the resumed run ends with every step it ever collected."""
    argv = [f"--env.task={OWN}:Stopped", "--train.total_frames=128", "--replay.capacity=900"]
    assert sac(*argv) == 128 + signal.SIGTERM
    assert "go on with --resume runs/a" in capsys.readouterr().out
    before = json.loads((RUN / "summary.json").read_text())
    assert before["signal"] == signal.SIGTERM
    assert 56 <= before["frames"] <= 64
    assert sac_control.main(["--resume", "runs/a"]) == 0
    after = json.loads((RUN / "summary.json").read_text())
    assert (after["frames"], after["updates"], after["signal"]) == (128, (128 - 16) * 2 // 8, 0)
    assert column("replay/steps")[-1] == 128
    assert column("replay/samples_per_insert")[-1] == 2


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C interrupts, which jobs in the background of a script ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_callbacks_are_set_up_has_its_exit_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a KeyboardInterrupt there Lightning makes exit code 1."""
    own = WeightSync.setup

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return own(*args, **kwargs)

    monkeypatch.setattr(WeightSync, "setup", interrupted)
    assert sac(f"--env.task={OWN}:Short") == 128 + number
    assert not RUN.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Meters, "on_train_end"), (ActingData, "teardown"), (runs, "plot_curves"), (runs, "record_episode")],
)
def test_an_interrupt_behind_the_last_update_loses_nothing(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert sac(f"--env.task={OWN}:Short") == 128 + signal.SIGINT
    assert json.loads((RUN / "summary.json").read_text())["frames"] == 64
    assert "--resume" not in capsys.readouterr().out, "nothing is left to train"
    assert len(rows()) > 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert evaluate.main([str(RUN / "checkpoints/last.ckpt"), "--episodes=1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "repeat", "preset", "metric"),
    [
        (sac, 20, "default", "train/alpha"),
        (sac, 1, "discrete", "train/alpha"),
        (mpo, 20, "default", "train/loss_critic"),
        (mpo, 1, "discrete", "train/loss_critic"),
    ],
)
def test_replayed_recipes_from_end_to_end(
    run: Callable[..., int], repeat: int, preset: str, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An episode of dm_control has a thousand steps: with an action for twenty of them it is soon over."""
    argv = [f"--env.action_repeat={repeat}", f"--train.total_frames={64 * repeat}", f"--preset={preset}"]
    assert run(*argv, "--env.num_envs=1", f"--train.eval_every={32 * repeat}") == 0
    out, err = capsys.readouterr()
    assert f"score {column('eval/return')[-1]:.1f}" in out
    continuous = preset != "discrete"
    assert ("action change" in out) == bool(column("eval/action_change")) == continuous
    assert "steps before the first update" in err
    assert "updates/s" in err
    for name in ("config.yaml", "versions.json", "metrics.csv", "curve.png", "episode.gif"):
        assert (RUN / name).stat().st_size > 0, name
    summary = json.loads((RUN / "summary.json").read_text())
    task = yaml.safe_load((RUN / "config.yaml").read_text())["env"]["task"]
    assert (summary["task"], summary["algorithm"], summary["seed"]) == (task, run.__name__, 0)
    assert (summary["frames"], summary["updates"]) == (64 * repeat, (64 - 16) * 2 // 8)
    assert summary["updates_per_second"] > 0
    assert (summary["evaluation"]["action_change"] is not None) == continuous
    assert [frames for frames, _ in summary["scores"]] == [32 * repeat, 64 * repeat]
    assert column("replay/samples_per_insert")[-1] == 2
    for name in (metric, "train/updates_per_second", "train/lag", "train/grad_norm", "replay/age", "replay/age_max"):
        assert column(name), name
    assert evaluate.main(["runs/a/checkpoints/last.ckpt", "--episodes=2"]) == 0
    assert f"{task}, greedy actions, 2 whole episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_machine_that_cannot_render_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("No OpenGL rendering backend could be loaded")

    monkeypatch.setattr(Simulator, "camera", fail)
    assert sac("--env.action_repeat=20", "--train.total_frames=1280", "--train.final_eval=false") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "the recorded episode was not made" in line]
    assert len(told) == 1
    assert "this machine cannot render (RuntimeError: No OpenGL rendering backend could be loaded); images" in told[0]
    assert not (RUN / "episode.gif").exists()


@pytest.mark.slow
def test_vmpo_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--env.num_envs=4", "--collector.unroll=8", "--collector.num_workers=0", "--network.hidden=[8,8]",
        "--train.total_frames=64", "--train.eval_episodes=1", "--train.log_every=0", "--train.name=a",
    ]  # fmt: skip
    assert vmpo_control.main(argv) == 0
    summary = json.loads((RUN / "summary.json").read_text())
    assert (summary["task"], summary["algorithm"]) == ("CartPole-v1", "vmpo")
    assert (summary["frames"], summary["updates"]) == (64, 2 * 4 * 4)
    capsys.readouterr()
    assert evaluate.main(["runs/a/checkpoints/last.ckpt", "--episodes=2"]) == 0
    assert "CartPole-v1, sample actions, 2 whole episodes" in capsys.readouterr().out


def stopped_by(number: int, *, frames: int = 0, updates: int = 0) -> Summary:
    return Summary(
        task="t", algorithm="sac", seed=0, frames=frames, updates=updates, episodes=0, dropped_episodes=0, restarts=0,
        frames_per_second=0.0, updates_per_second=0.0, seconds=1.0, scores=[], evaluation=None, signal=number,
        first_update_at=0.0,
    )  # fmt: skip


def test_a_run_that_was_stopped_before_its_first_update_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = stopped_by(15)
    monkeypatch.setattr("offtrace.agents.runs.run.train", lambda *_: summary)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert cli.run_in(folder, SACConfig(), None) == 128 + 15
    assert not folder.exists()
    assert "stopped by SIGTERM before the first update; nothing is kept" in capsys.readouterr().out
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    assert cli.run_in(folder, SACConfig(), None) == 128 + 15
    out = capsys.readouterr().out
    assert out.startswith("stopped by SIGTERM; no evaluation yet after 0 frames")
    assert out.endswith(f"; go on with --resume {folder}\n")


def test_a_run_that_has_learnt_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing could write a last checkpoint: there are metrics, and perhaps best.ckpt."""
    summary = stopped_by(2, frames=64, updates=3)
    monkeypatch.setattr("offtrace.agents.runs.run.train", lambda *_: summary)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/best.ckpt").touch()
    assert cli.run_in(tmp_path / "run", SACConfig(), None) == 128 + 2
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()


@pytest.mark.slow
def test_nothing_is_recorded_where_that_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert sac("--train.record=false") == 0
    assert not (RUN / "episode.gif").exists()
    assert "recording" not in capsys.readouterr().err
