"""Every recipe trains, is evaluated and goes on from its checkpoint; the user's own parts are found by import path."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from offtrace.recipes import evaluate
from tests.recipes.recipes import MIXING, ON_ROLLOUTS, WHOLE, main_of

COMMON = ["--collector.num_workers=0", "--train.total_frames=64", "--train.eval_episodes=1", "--train.log_every=0",
          "--train.record=false", "--train.name=a"]  # fmt: skip
ROLLOUTS = [*COMMON, "--env.num_envs=4", "--collector.unroll=8", "--train.minibatches=2"]
UNDEALT = [*COMMON, "--env.num_envs=4", "--collector.unroll=8", "--optim.critic_steps=2"]
REPLAY = [*COMMON, "--env.num_envs=2", "--collector.unroll=8", "--replay.capacity=400", "--replay.batch_size=8",
          "--replay.min_size=24", "--replay.samples_per_insert=2"]  # fmt: skip
MIXED = [*COMMON, "--env.num_envs=2", "--collector.unroll=8", "--replay.capacity=400", "--replay.min_size=16"]
REPLAYED = ["--replay.share=0.5", "--replay.capacity=400", "--replay.min_size=32", "--train.minibatches=2"]
SMALL = ["--network.hidden=[8,8]"]
SEPARATE = [*SMALL, "--network.critic_hidden=[8,8]"]
CONTINUOUS, DISCRETE = "--env.task=Pendulum-v1", "--env.task=CartPole-v1"
RUN = Path("runs/a")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]


def column(name: str) -> list[float]:
    with open(RUN / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def finite() -> None:
    """Every number in the log is one."""
    with open(RUN / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row.get("train/grad_norm") for row in rows)
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value), row


def arguments(name: str) -> list[str]:
    separate = name in ("sac_control", "mpo_control")
    if name in MIXING:
        return [*MIXED, *SMALL]
    if name in WHOLE:
        return [*UNDEALT, *SMALL]
    return [*ROLLOUTS] if name in ON_ROLLOUTS else [*REPLAY, *(SEPARATE if separate else SMALL)]


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("impala_control", [*SMALL, "--preset=default"]),
        ("impala_control", [*SMALL, "--preset=pendulum"]),
        ("impala_control", [*SMALL, *REPLAYED]),
        ("impala_control", [*SMALL, *REPLAYED, "--network.recurrent=8", "--replay.storage=memmap"]),
        ("impala_control", ["--preset=laser", *SMALL, *REPLAYED]),
        ("a2c", SMALL),
        ("a2c", [*SMALL, CONTINUOUS, "--loss.estimator=n_step(n=3)"]),
        ("a2c", [DISCRETE, "--preset=atari"]),
        ("ppo", SMALL),
        ("ppo", [*SMALL, "--preset=pendulum", "--loss.value_clip=0.2"]),
        ("ppo", [*SMALL, "--network.recurrent=8", "--train.deal=environments"]),
        ("ppo", [DISCRETE, "--preset=atari"]),
        ("trpo", []),
        ("trpo", ["--preset=pendulum", "--network.normalize=true", "--loss.estimator=vtrace(lmbda=0.9)"]),
        ("trpo", [DISCRETE, "--preset=atari", "--loss.damping=0"]),
        ("q_actor_critic", SMALL),
        ("q_actor_critic", [*SMALL, "--loss.estimator=tree_backup(lmbda=0.9)"]),
        ("q_actor_critic", [DISCRETE, "--preset=atari"]),
        ("acer_control", []),
        ("acer_control", ["--replay.ratio=0", "--loss.delta=null"]),
        ("acer_control", ["--replay.storage=memmap", "--network.normalize=true", "--loss.entropy_coef=0.01"]),
        ("acer_atari", [DISCRETE]),
        ("acer_control", [CONTINUOUS, "--network.critic_hidden=[8,8]"]),
        (
            "acer_control",
            [
                "--preset=pendulum",
                "--loss.learn_scale=true",
                "--network.normalize=true",
                "--replay.sequences=2",
            ],
        ),
        ("vmpo_control", SMALL),
        ("vmpo_control", [*SMALL, CONTINUOUS, "--network.popart=false"]),
        ("dqn", []),
        ("dqn", ["--loss.estimator=retrace(lmbda=0.9)", "--replay.length=4"]),
        ("dqn", ["--preset=rainbow", DISCRETE, "--replay.min_size=32"]),
        ("dqn", ["--loss.double=false", "--network.normalize=true"]),
        ("sac_control", [CONTINUOUS]),
        ("sac_control", [CONTINUOUS, "--loss.estimator=n_step(n=3)", "--replay.min_size=32"]),
        ("sac_control", [CONTINUOUS, "--loss.estimator=n_step(n=1)"]),
        ("sac_control", [CONTINUOUS, "--replay.sampler=prioritized"]),
        ("sac_control", ["--preset=v1", CONTINUOUS]),
        ("sac_control", ["--preset=discrete", "--loss.estimator=tree_backup", "--replay.length=4"]),
        ("mpo_control", [CONTINUOUS, "--replay.min_size=32"]),
        ("mpo_control", [DISCRETE, "--replay.min_size=32"]),
        ("mpo_control", [CONTINUOUS, "--preset=full", "--replay.min_size=32"]),
        ("mpo_control", [CONTINUOUS, "--network.atoms=51", "--network.v_max=200", "--replay.min_size=32"]),
        ("mpo_control", ["--preset=discrete", "--replay.length=4"]),
        ("reactor_control", ["--replay.length=4"]),
        ("reactor_control", ["--preset=memory", "--replay.length=4", "--loss.priority=total_variation"]),
        ("reactor_control", ["--replay.length=4", "--network.atoms=0", "--network.normalize=true", "--loss.clip=5"]),
        ("reactor_atari", [DISCRETE, "--replay.length=4", "--loss.estimator=tree_backup(lmbda=0.9)"]),
    ],
)
def test_a_recipe_trains_and_goes_on(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of(name)
    assert main([*arguments(name), *argv]) == 0, capsys.readouterr().err
    before = json.loads((RUN / "summary.json").read_text())
    assert (before["frames"], before["signal"]) == (64, 0)
    assert before["updates"] > 0
    finite()
    assert main(["--resume", str(RUN), "--train.total_frames=96"]) == 0, capsys.readouterr().err
    after = json.loads((RUN / "summary.json").read_text())
    assert after["frames"] == 96
    assert after["updates"] > before["updates"]
    finite()
    capsys.readouterr()
    assert evaluate.main([str(RUN / "checkpoints/last.ckpt"), "--episodes=2", "--mode=greedy"]) == 0
    assert "greedy actions, 2 whole episodes, raw scores" in capsys.readouterr().out


def test_ppo_logs_the_diagnostics_of_its_rollouts() -> None:
    """Beside the other hook that sees them, which moves the normaliser, and so the policy, a little."""
    assert main_of("ppo")([*ROLLOUTS, *SMALL, "--network.normalize=true", "--loss.estimator=gae(lmbda=0.0)"]) == 0
    assert set(column("rollout/trace_length")) == {0.0}
    assert all(0.99 < ess <= 1 for ess in column("rollout/ess"))
    finite()


@pytest.mark.parametrize("name", ["impala_atari", "dqn", "acer_atari", "reactor_atari"])
def test_images_from_end_to_end(name: str) -> None:
    """Every kind of data once on what an Atari game shows."""
    argv = ["--env.task=pong", "--train.total_frames=256", "--train.final_eval=false", "--train.eval_every=1000000"]
    network = ["--network.hidden=[16]", "--network.encoder=shallow"]
    if name == "dqn":
        argv += ["--preset=rainbow", "--replay.min_size=32", "--env.num_envs=2", "--replay.capacity=500"]
    if name == "reactor_atari":
        argv += ["--network.recurrent=8", "--replay.length=4", "--env.num_envs=2", "--replay.capacity=500"]
    data = ROLLOUTS if name in ON_ROLLOUTS else MIXED if name in MIXING else REPLAY
    assert main_of(name)([*data, *network, *argv]) == 0
    assert json.loads((RUN / "summary.json").read_text())["frames"] == 256
    finite()


OWN = """
from pathlib import Path

import torch
from offtrace.modules.estimators import TraceEstimator, VTrace


class Shallow(VTrace):
    def __init__(self, *, depth=1.0, **options):
        super().__init__(**options)
        Path("made").write_text(str(depth))
        self.depth = depth


class Cut(TraceEstimator):
    uses_behaviour = True

    def __init__(self, *, depth=1.0, **options):
        super().__init__(**options)
        Path("made").write_text(str(depth))
        self.depth = depth

    def trace(self, *, log_pi, log_rho):
        return self.lmbda * log_rho.exp().clamp(max=self.depth)


def net(shape, hidden):
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape[0], 7), torch.nn.Tanh())
    layer.out_features = 7
    return layer


def wide(shape, hidden):
    layer = torch.nn.Linear(shape[0], 9)
    return layer
"""


@pytest.fixture
def own_code(tmp_path: Path) -> str:
    """The name of a module in the folder that the recipe is called from."""
    name = f"own_{tmp_path.name}".replace("-", "_")  # a module of another test would be found instead
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("impala_control", []),
        ("a2c", []),
        ("ppo", []),
        ("trpo", []),
        ("vmpo_control", []),
        ("q_actor_critic", []),
        ("dqn", ["--replay.length=4"]),
        ("sac_control", [CONTINUOUS, "--replay.length=4"]),
        ("sac_control", ["--preset=discrete", "--replay.length=4"]),
        ("mpo_control", [CONTINUOUS, "--replay.length=4"]),
    ],
)
def test_an_own_estimator_with_options(name: str, argv: list[str], own_code: str) -> None:
    kind = "Cut" if name in ("q_actor_critic", "dqn", "sac_control", "mpo_control") else "Shallow"
    spec = f"{own_code}:{kind}(depth=0.5, lmbda=0.9)"
    assert main_of(name)([*arguments(name), *argv, "--loss.estimator", spec]) == 0
    assert Path("made").read_text() == "0.5"
    assert yaml.safe_load((RUN / "config.yaml").read_text())["loss"]["estimator"] == spec
    finite()
    Path("made").unlink()
    assert main_of(name)(["--resume", str(RUN), "--train.total_frames=96"]) == 0
    assert Path("made").read_text() == "0.5", "a resumed run has it as well"


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("impala_control", "{}:Shallow(dept=1)", "has no option 'dept', its options are 'depth', "),
        (
            "sac_control",
            "{}:Cut(dept=1)",
            "has no option 'dept', its options are 'depth', 'lmbda'; did you mean depth?",
        ),
        ("impala_control", "{}:Shallow(gamma=0.9)", "give loss.gamma, and leave it out of"),
        ("sac_control", "{}:Cut(alpha=0.5)", "loss.estimator: the loss draws its own actions at its own temperature"),
        ("sac_control", "{}:Shallow", "Shallow estimates state values, and an estimator of action values is needed"),
        ("impala_control", "{}:Cut", "Cut estimates action values, and an estimator of state values is needed"),
        ("dqn", "{}:Nothing", "has no 'Nothing'"),
        ("ppo", "{}:net", "loss.estimator: "),
    ],
)
def test_an_own_estimator_that_does_not_fit(
    name: str, spec: str, words: str, own_code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(name)([*arguments(name), "--loss.estimator", spec.format(own_code)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("q_actor_critic", []),
        ("dqn", []),
        ("dqn", ["--network.dueling=true", "--network.atoms=11"]),
        ("sac_control", [CONTINUOUS]),
        ("mpo_control", [CONTINUOUS, "--replay.min_size=32"]),
    ],
)
def test_an_own_network_is_resumed(
    name: str, argv: list[str], own_code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network of a checkpoint is compared with that of the run, whatever it is made of."""
    main = main_of(name)
    assert main([*arguments(name), *argv, f"--network.encoder={own_code}:net"]) == 0
    finite()
    assert main(["--resume", str(RUN), "--train.total_frames=96"]) == 0
    assert json.loads((RUN / "summary.json").read_text())["frames"] == 96
    assert evaluate.main([str(RUN / "checkpoints/last.ckpt"), "--episodes=1"]) == 0
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    config["network"]["encoder"] = f"{own_code}:wide"
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["--resume", str(RUN), "--train.total_frames=128"]) == 2
    assert f"is of another network: its network is {own_code}:net, the run's is {own_code}:wide" in (
        capsys.readouterr().err
    )
