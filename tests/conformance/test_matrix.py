"""Every registered agent on every kind of task trains, is evaluated, resumed and loaded, or refuses in a sentence."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offtrace.agents.config import Config, ConfigError, MixedConfig, OffPolicyConfig
from offtrace.agents.registry import AGENTS, config_class
from offtrace.agents.runs.checkpoint import load_policy
from offtrace.agents.runs.training import train
from offtrace.modules.envs import make_env

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]
HERE = "tests.conformance.tasks"
DISCRETE = ("Vector", "Images", "Masked", "MultiDiscrete", "Dictionary")
CONTINUOUS = ("Continuous", "ContinuousImages")
ENVS, UNROLL = 2, 8


def small(config: Config, task: str) -> Any:
    """Two updates or more, in a second or two."""
    found: Any = config
    found.env.task = f"{HERE}:{task}"
    found.env.num_envs, found.collector.unroll, found.collector.num_workers = ENVS, UNROLL, 0
    found.network.hidden = [16] if "Images" in task else [8, 8]
    found.train.total_frames, found.train.eval_episodes = 4 * ENVS * UNROLL, 2
    found.train.eval_every = found.train.checkpoint_every = 10**9
    found.train.log_every, found.train.accelerator, found.train.precision = 0.0, "cpu", "32-true"
    if isinstance(config, OffPolicyConfig):
        found.replay.capacity, found.replay.batch_size, found.replay.min_size = 400, 8, 24
        found.replay.samples_per_insert, found.replay.length = 2.0, 4
        if hasattr(found.network, "critic_hidden"):
            found.network.critic_hidden = [8, 8]
    elif isinstance(config, MixedConfig) and config.replay.form:
        if hasattr(found.network, "critic_hidden") and task in CONTINUOUS:
            found.network.critic_hidden = [8, 8]
        found.train.minibatches, found.train.epochs, found.replay.capacity, found.replay.min_size = 1, 1, 400, 32
        if "ratio" in config.replay.form:
            found.replay.ratio = 1.0
    elif config.algorithm == "trpo":  # its step is one of a whole rollout
        found.optim.critic_steps = 2
    else:
        found.train.minibatches, found.train.epochs = 2, 1
    return found


def kinds(algorithm: str, **changes: Any) -> Callable[[], Any]:
    """A configuration with some fields changed, ``group__name=value``."""

    def make() -> Any:
        config: Any = config_class(algorithm)()
        for path, value in changes.items():
            group, name = path.split("__")
            setattr(getattr(config, group), name, value)
        return config

    return make


VARIANTS: dict[str, Callable[[], Any]] = {
    **{name: kinds(name) for name in AGENTS},
    "dqn-rainbow": kinds(
        "dqn", network__dueling=True, network__atoms=11, replay__sampler="prioritized", loss__estimator="n_step(n=3)"
    ),
    "sac-retrace-prioritized": kinds("sac", loss__estimator="retrace(lmbda=0.9)", replay__sampler="prioritized"),
    "sac-retrace-lazy": kinds("sac", loss__estimator="retrace(lmbda=0.9)", replay__sampler="lazy"),
    "sac-v1": kinds("sac", loss__version=1, loss__reward_scale=5.0),
    "mpo-retrace": kinds("mpo", loss__estimator="retrace(lmbda=0.9)"),
    "dmpo": kinds("mpo", network__atoms=11),
    "reactor-values": kinds("reactor", network__atoms=0, network__recurrent=0, replay__sampler="uniform"),
    "impala-replay": kinds("impala", replay__share=0.5),
    "impala-burn-in": kinds("impala", replay__share=0.5, network__recurrent=8, replay__burn_in=4),
    "impala-whole-episodes": kinds("impala", replay__share=0.5, network__recurrent=8, replay__whole_episodes=True),
    "laser": kinds("impala", replay__share=0.5, loss__max_kl=0.01, loss__entropy_on_replay=False),
    "vmpo-popart": kinds("vmpo", network__popart=True),
}
ONLY_DISCRETE = {"dqn", "laser", "q_actor_critic", "dqn-rainbow", "reactor", "reactor-values"}
ONLY_CONTINUOUS = {"sac-v1", "dmpo"}


def refused(variant: str, task: str) -> bool:
    return (variant in ONLY_DISCRETE and task in CONTINUOUS) or (variant in ONLY_CONTINUOUS and task in DISCRETE)


@pytest.mark.parametrize("task", DISCRETE + CONTINUOUS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_agent_trains_on_a_task_or_refuses_it(variant: str, task: str, tmp_path: Path) -> None:
    config = small(VARIANTS[variant](), task)
    if refused(variant, task):
        with pytest.raises(ConfigError, match=r"discrete|continuous") as raised:
            validate_and_build(config)
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.iterdir())
        return
    runs(config, tmp_path)


@pytest.mark.parametrize("task", ["Vector", "Images", "Continuous"])
@pytest.mark.parametrize("variant", [*AGENTS, "impala-replay"])
def test_an_lstm_trains_where_the_algorithm_has_one(variant: str, task: str, tmp_path: Path) -> None:
    config = small(VARIANTS[variant](), task)
    if "recurrent" not in vars(config.network) or refused(variant, task):
        return
    config.network.recurrent = 8
    if variant == "ppo":
        config.train.deal, config.train.minibatches = "environments", 2
    runs(config, tmp_path)


@pytest.mark.parametrize("algorithm", AGENTS)
def test_a_network_of_the_users_reads_dictionaries(algorithm: str, tmp_path: Path) -> None:
    config = small(config_class(algorithm)(), "Dictionary")
    config.env.flatten, config.network.encoder = False, f"{HERE}:own_encoder"
    config.network.normalize = True
    runs(config, tmp_path)


def validate_and_build(config: Config) -> None:
    config.validate()
    config.build()


def runs(config: Any, folder: Path) -> None:
    """Trains with finite losses, evaluates, is resumed, and its policy acts."""
    config.validate()
    summary = train(config, folder)
    assert summary.updates >= 2
    assert summary.algorithm == config.algorithm
    assert summary.last_score is not None
    assert math.isfinite(summary.last_score)
    losses = read_losses(folder / "metrics.csv")
    assert losses
    for name, values in losses.items():
        assert all(math.isfinite(value) for value in values), name
    last = folder / "checkpoints" / "last.ckpt"
    config.train.total_frames *= 2
    resumed = train(config, folder, last)
    assert resumed.updates > summary.updates
    assert resumed.frames == config.train.total_frames
    policy = load_policy(last)
    options = {name: value for name, value in config.env_options().items() if name != "last_step"}
    env = make_env(config.task, 2, seed=5, evaluation=True, last_step=config.network.recurrent > 0, **options)
    step = policy(env.reset())
    action = step["action"]
    assert action.shape == env.action_spec.shape
    if not action.is_floating_point() or config.algorithm == "sac":  # a normal distribution has no bounds: they clip
        assert env.action_spec.is_in(action)
    assert torch.isfinite(action.float()).all()
    env.step(step)  # the task checks that what is executed is legal and inside its bounds
    env.close()


def read_losses(path: Path) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("train/loss_") and value:
                found.setdefault(name, []).append(float(value))
    return found
