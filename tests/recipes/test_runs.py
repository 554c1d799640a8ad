"""Every recipe end to end at a tiny budget: files, resume, evaluation, signals, failures."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensordict import TensorDict

from offtrace.agents import load_policy
from tests.marks import needs_ray

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sockets")]  # all of it starts processes

TINY = ["--env.num_envs", "4", "--collector.unroll", "8", "--train.minibatches", "2", "--train.epochs", "1",
        "--train.eval_episodes", "2", "--train.log_every", "0"]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def recipe(name: str, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RECIPES / f"{name}.py"), *argv],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False, env=environment(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished CartPole run, from a folder of its own."""
    folder = tmp_path_factory.mktemp("cartpole")
    done = recipe("impala_control", folder, *TINY, "--train.name", "a", "--train.total_frames", "640")
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout
    return folder


def test_a_run_leaves_what_it_promises(cartpole: Path) -> None:
    run = cartpole / "runs" / "a"
    for name in ("config.yaml", "versions.json", "metrics.csv", "summary.json", "curve.png"):
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("events.out.tfevents.*"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["frames"] == 640
    assert summary["updates"] == 640 // 32 * 2
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for key in (
        "train/lag",
        "train/lag_max",
        "train/entropy",
        "train/rho_clipped",
        "train/frames_per_second",
        "train/seconds",
        "eval/return",
    ):
        assert any(row[key] for row in rows), key
    # one worker, two updates a rollout, pushed once a rollout: 2 + 1 + 1
    assert max(float(row["train/lag_max"] or 0) for row in rows) <= 4


def test_the_policy_acts_without_lightning(cartpole: Path) -> None:
    path = cartpole / "runs/a/checkpoints/last.ckpt"
    assert "state_dict" in torch.load(path, weights_only=True)
    policy = load_policy(path)
    step = policy(TensorDict({"observation": torch.zeros(5, 4)}, [5]))
    assert step["action"].shape == (5,)


def test_evaluate(cartpole: Path) -> None:
    done = recipe("evaluate", cartpole, "runs/a/checkpoints/last.ckpt", "--episodes", "4")
    assert done.returncode == 0, done.stderr
    assert "CartPole-v1, sample actions, 4 whole episodes" in done.stdout
    damaged = cartpole / "cut.ckpt"
    damaged.write_bytes((cartpole / "runs/a/checkpoints/last.ckpt").read_bytes()[:5000])
    done = recipe("evaluate", cartpole, "cut.ckpt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cut.ckpt is truncated or not a checkpoint")
    content = bytearray((cartpole / "runs/a/checkpoints/last.ckpt").read_bytes())
    with zipfile.ZipFile(cartpole / "runs/a/checkpoints/last.ckpt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200] ^= 1  # one bit of one weight
    damaged.write_bytes(content)
    done = recipe("evaluate", cartpole, "cut.ckpt")
    assert done.returncode == 2
    assert "does not have its checksum" in done.stderr


def test_a_checkpoint_of_another_network(cartpole: Path) -> None:
    content = torch.load(cartpole / "runs/a/checkpoints/last.ckpt", weights_only=True)
    content["offtrace"]["policy"]["arguments"]["hidden"] = [8, 8]
    torch.save(content, cartpole / "other.ckpt")
    done = recipe("evaluate", cartpole, "other.ckpt")
    assert done.returncode == 2
    assert "holds the weights of another network" in done.stderr
    assert done.stderr.count("\n") == 1


def test_resume_goes_on(cartpole: Path) -> None:
    done = recipe("impala_control", cartpole, "--resume", "runs/a", "--train.total_frames", "960")
    assert done.returncode == 0, done.stderr
    summary = json.loads((cartpole / "runs/a/summary.json").read_text())
    assert summary["frames"] == 960
    assert summary["updates"] == 960 // 32 * 2


def test_atari_with_a_video(tmp_path: Path) -> None:
    done = recipe(
        "impala_atari", tmp_path, *TINY, "--train.name", "p", "--train.total_frames", "512",
        "--train.eval_episodes", "1",
        "--train.final_eval", "false", "--network.recurrent", "16", "--train.precision", "bf16-mixed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/p/episode.gif").read_bytes()[:3] == b"GIF"


REPLAYED = ["--replay.share=0.5", "--replay.capacity=4000", "--replay.min_size=64", "--network.recurrent=8",
            "--replay.whole_episodes=true"]  # fmt: skip


@pytest.mark.parametrize(("number", "more"), [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, REPLAYED)])
def test_signals_save_and_end(tmp_path: Path, number: signal.Signals, more: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "impala_control.py"), *TINY, "--train.name", "s",
         "--train.total_frames", "100000000", *more],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    metrics = tmp_path / "runs/s/metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "go on with --resume runs/s" in out
    assert (tmp_path / "runs/s/checkpoints/last.ckpt").exists()
    assert children
    _, left = psutil.wait_procs(children, timeout=60)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE], "processes are left behind"
    if more:  # with the replay
        frames = json.loads((tmp_path / "runs/s/summary.json").read_text())["frames"]
        done = recipe("impala_control", tmp_path, "--resume", "runs/s", "--train.total_frames", str(frames + 256))
        assert done.returncode == 0, done.stderr
        assert "empty replay" not in done.stderr
        assert json.loads((tmp_path / "runs/s/summary.json").read_text())["frames"] >= frames + 256


def test_a_signal_before_torch_is_there(tmp_path: Path) -> None:
    """Nothing is left, so that the name is free."""
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "impala_control.py"), *TINY, "--train.name", "s"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    while not (tmp_path / "runs/s/versions.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.splitlines()[-1] == "terminated"  # behind the line that names the run, or before it
    assert not list((tmp_path / "runs").iterdir())


def test_a_signal_while_the_actors_start(tmp_path: Path) -> None:
    """To the whole process group, as timeout and batch systems send it."""
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "impala_control.py"), *TINY, "--train.name", "s"], start_new_session=True,
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 120

    def acts() -> bool:
        """Whether there is a fork of the fork server."""

        def forks(parent: psutil.Process) -> list[psutil.Process]:  # what it imports may run programs
            return [p for p in parent.children() if is_fork(p)]

        def is_fork(child: psutil.Process) -> bool:
            try:
                return "forkserver" in " ".join(child.cmdline())
            except psutil.Error:  # a program that has ended since
                return False

        return any(forks(server) for server in forks(psutil.Process(process.pid)))

    while not acts() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM" in out
    _, left = psutil.wait_procs(children, timeout=60)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE], "processes are left behind"


OWN = """
import time, numpy as np, gymnasium
class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0
    def reset(self, **kwargs): return np.zeros(2, np.float32), {}
    def step(self, action):
        self.steps += 1
        if self.steps > 40 and HOW == "raise": raise KeyError("no such wall")
        if self.steps > 40 and HOW == "hang": time.sleep(1000)
        reward = float("nan") if self.steps > 40 and HOW == "nan" else 1.0
        return np.zeros(2, np.float32), reward, self.steps % 7 == 0, False, {}
def make(): return Env()
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "environment 0 raised KeyError at step 41: 'no such wall'"),
        ("nan", "environment 0 returned a reward that is not finite at step 41"),
        ("hang", "has made no step for"),
    ],
)
def test_an_environment_that_fails_stops_the_run(tmp_path: Path, how: str, words: str) -> None:
    (tmp_path / "own_env.py").write_text(f"HOW = {how!r}\n{OWN}")
    argv = [*TINY, "--env.task", "own_env:make", "--train.name", "f", "--train.total_frames", "100000",
            "--train.checkpoint_every", "64", "--collector.step_timeout", "5",
            "--collector.max_restarts", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(RECIPES / "impala_control.py"), *argv], cwd=tmp_path, capture_output=True, text=True,
        timeout=200, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert "the last checkpoint is kept: runs/f/checkpoints/last.ckpt" in done.stderr
    content: Any = torch.load(tmp_path / "runs/f/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@needs_ray
def test_a_cluster_that_is_not_there_is_refused_and_the_name_is_free(tmp_path: Path) -> None:
    argv = ["--train.name=a", "--collector.backend=ray", "--collector.address=127.0.0.1:1"]
    done = recipe("impala_control", tmp_path, *argv)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: address is 127.0.0.1:1, where nobody listens (")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize("name", ["impala_control", "dqn"])
def test_a_run_on_ray_ends_and_leaves_nothing(tmp_path: Path, sockets: None, name: str) -> None:
    """Of rollouts, and of a replay that Ray actors fill."""
    folder = Path(os.environ["TMPDIR"])
    frames = 2048 if name == "dqn" else 4096
    more = ["--replay.min_size=200", "--collector.unroll=16"] if name == "dqn" else ["--train.eval_every=2048"]
    done = recipe(
        name, tmp_path, "--train.name=a", "--collector.backend=ray", "--collector.num_workers=1",
        "--train.record=false", f"--train.total_frames={frames}", "--train.eval_episodes=2", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert summary["frames"] >= frames
    assert summary["restarts"] == 0
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert not list(folder.glob("ray*"))


def _output(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it prints until it ends; with its children it is ended where it does not."""
    try:
        return process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        return process.communicate()


def test_two_nodes_under_torchrun_make_one_run(tmp_path: Path) -> None:
    """Both of this machine; the command is that of docs/cluster.md, without Ray."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
        "--master_addr", "127.0.0.1", "--master_port", port,
    ]  # fmt: skip
    flags = [*TINY, "--train.num_nodes", "2", "--train.accelerator", "cpu", "--train.total_frames", "1280"]
    nodes = [
        subprocess.Popen(
            [*command, "--node_rank", rank, str(RECIPES / "impala_control.py"), *flags, "--train.name", "t"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    with ThreadPoolExecutor() as readers:  # neither may wait for the other's pipe to be read
        (first, its_errors), (second, errors) = readers.map(_output, nodes)
    assert [node.returncode for node in nodes] == [0, 0], its_errors + errors
    assert "after 1,280 frames" in first
    assert "frames" not in second + errors
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["t"]
    summary = json.loads((tmp_path / "runs/t/summary.json").read_text())
    assert (summary["frames"], summary["updates"]) == (1280, 1280 // 64 * 2)  # of both nodes, not twice those of one
    load_policy(tmp_path / "runs/t/checkpoints/last.ckpt")


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    done = recipe("impala_control", tmp_path, "--train.devices", "4096", "--train.accelerator", "cpu")
    assert done.returncode == 2
    assert "error: train.devices is 4096; this machine has" in done.stderr
