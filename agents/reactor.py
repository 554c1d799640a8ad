"""Reactor (Gruslys et al. 2018, arXiv 1704.04651): recurrent, distributional, beta-LOO, prioritised sequences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    ConfigError,
    EnvConfig,
    FeedForwardConfig,
    Group,
    OffPolicyConfig,
    RecurrentReplayConfig,
    ReplayTrainConfig,
    TargetAdamConfig,
    check_estimator,
)
from offtrace.agents.config.estimator import Samples

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import ReplayData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss."""

    estimator: str = "retrace"
    """retrace is the paper's; or another of action values, such as tree_backup(lmbda=0.9), or package.module:Class."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 1.0
    """Weight of the critic's term."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    clip: float = 1.0
    """c of beta = min(c, 1 / mu) in the policy gradient: the larger, the smaller its bias and larger its variance."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    priority: Literal["td", "total_variation"] = "td"
    """A sequence's mean absolute Retrace error, or mean total variation between a distribution and its target."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action", every_step=True)
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.require("clip", lambda value: value > 0, "above 0; inf never truncates")
        checks.positive_or_null("reward_clip")


@dataclass
class ReactorNetworkConfig(FeedForwardConfig):
    """One encoder, which the critic alone trains; behind it policy and critic have a core and a head each."""

    recurrent: int = 128
    """Width of each of the two LSTMs, which also read the last action and reward; 0 for none."""
    epsilon: float = 0.01
    """Uniform share of the policy: (1 - epsilon) softmax + epsilon / actions acts, is stored and is learnt."""
    dueling: bool = True
    """A state value and advantages (Wang et al. 2016), of each atom."""
    atoms: int = 51
    """Of the distributions of returns; 0: plain values."""
    v_max: float = 10.0
    """Returns reach from minus this to this."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.at_least(0, "recurrent")
        checks.require("epsilon", lambda value: 0 <= value < 1, "at least 0 and below 1")
        checks.categorical()


def _replay() -> RecurrentReplayConfig:
    return RecurrentReplayConfig(
        capacity=200_000, batch_size=4 * 32, length=32, samples_per_insert=8.0, min_size=10_000,
        sampler="lazy", alpha=1.0, beta=1.0, epsilon=0.1,
    )  # fmt: skip


def _optim() -> TargetAdamConfig:
    return TargetAdamConfig(lr=5e-5, schedule="constant", clip_grad_norm=10.0)


def _train(frames: int = 40_000_000, every: int = 1_000_000) -> ReplayTrainConfig:
    return ReplayTrainConfig(
        total_frames=frames, eval_every=every, checkpoint_every=every, eval_mode="sample", precision="32-true"
    )


@dataclass
class ReactorConfig(OffPolicyConfig):
    """Reactor."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=8))
    network: ReactorNetworkConfig = field(default_factory=ReactorNetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(num_workers=0, unroll=16))
    replay: RecurrentReplayConfig = field(default_factory=_replay)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: TargetAdamConfig = field(default_factory=_optim)
    train: ReplayTrainConfig = field(default_factory=_train)

    algorithm = "reactor"
    actions = "discrete"

    @property
    def samples(self) -> Samples:
        """Sequences, whatever the estimator: the network may have a memory."""
        return Samples(self.replay.length, True)

    def floats_per_step(self, info: EnvInfo) -> int:
        """As :meth:`Config.floats_per_step`; the critic has an LSTM of its own."""
        return super().floats_per_step(info) + 2 * self.network.recurrent

    def validate(self) -> None:
        """As :meth:`Config.validate`; samples are sequences, and only distributions have a variation."""
        if self.replay.length < 2:
            raise ConfigError(f"replay.length is {self.replay.length}; Reactor's samples are sequences: at least 2")
        if self.loss.priority == "total_variation" and not self.network.atoms:
            raise ConfigError("loss.priority is total_variation, and network.atoms 0, plain values: it must be td")
        super().validate()

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A policy, mixed with a uniform share, and the values of all actions over one encoder."""
        from offtrace.agents.assemble import policy_spec

        network = self.network
        critic = {name: getattr(network, name) for name in ("dueling", "atoms", "v_max")}
        return policy_spec(
            self, info, head_options={"epsilon": network.epsilon}, critic="q", critic_options=critic,
            separate_cores=network.recurrent > 0, detach_policy=True,
        )  # fmt: skip

    def build(self) -> tuple[Agent, ReplayData]:
        """As :meth:`Config.build`."""
        return make_reactor(self)


def make_reactor(config: ReactorConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    import torch

    from offtrace.agents.assemble import read_task, replay_agent
    from offtrace.agents.targets import hard_update
    from offtrace.modules.losses import ReactorLoss
    from offtrace.modules.networks import build_policy

    info, optim = read_task(config), config.optim
    spec = config.policy_spec(info)
    loss = ReactorLoss(build_policy(**spec["arguments"]), priorities=config.replay.prioritized, **asdict(config.loss))
    return replay_agent(
        config, info, loss, loss.policy, spec,
        optimizer=partial(torch.optim.Adam, lr=optim.lr, betas=(optim.beta1, 0.999), eps=optim.eps, fused=True),
        after_update=hard_update(loss, optim.target_every),
    )  # fmt: skip


def control_config() -> ReactorConfig:
    """CartPole, without LSTMs. With the paper's clip of 1 two of three seeds end below 500."""
    config = ReactorConfig(env=EnvConfig(task="CartPole-v1", num_envs=4))
    config.network = ReactorNetworkConfig(recurrent=0, hidden=[128, 128], activation="relu", v_max=100.0)
    config.loss.clip, config.replay.capacity, config.replay.min_size = 10.0, 50_000, 1_000
    config.replay.length, config.replay.batch_size, config.replay.samples_per_insert = 16, 16 * 16, 32.0
    config.optim.lr, config.optim.target_every, config.optim.schedule = 1e-3, 100, "linear"
    config.train = _train(50_000, 5_000)
    return config


def memory_config() -> ReactorConfig:
    """CartPole without its velocities, which two LSTMs have to infer."""
    config = control_config()
    config.env.task = "offtrace.modules.envs.memory:cartpole_positions"
    config.network.hidden, config.network.recurrent = [64], 64
    config.train = _train(100_000, 5_000)
    return config


def atari_config() -> ReactorConfig:
    """Pong on a small machine: the learner also acts, into a smaller replay, with an update every 16 steps."""
    config = ReactorConfig()
    config.loss.reward_clip = 1.0
    return config


def paper_config() -> ReactorConfig:
    """The published settings, as far as they are known: an update every 4 steps, 10 actors, 200 million frames."""
    config = atari_config()
    config.env.num_envs, config.collector.num_workers = 1, 10
    config.replay.capacity, config.replay.min_size, config.replay.samples_per_insert = 1_000_000, 50_000, 32.0
    config.loss.priority, config.train.total_frames = "total_variation", 200_000_000
    return config
