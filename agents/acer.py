"""ACER, the actor-critic with experience replay (Wang et al. 2017, arXiv 1611.01224), and its continuous form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    EnvConfig,
    FeedForwardConfig,
    Group,
    MixedConfig,
    OptimConfig,
    RatioReplayConfig,
    RolloutTrainConfig,
    check_estimator,
)

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import MixedData, RolloutData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss; the values of the paper, but for the entropy."""

    estimator: str = "retrace"
    """retrace, on continuous actions with the paper's root; another, such as retrace(lmbda=0.95); or an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 0.5
    """Weight of half the squared error of the action's value: little where returns are large, 0.01 on CartPole."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, beside the trust region; on continuous actions it needs learn_scale."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over batch and time."""
    clip: float = 10.0
    """Truncation c of the importance weights in the policy gradient; what it cuts off the bias correction puts back."""
    delta: float | None = 1.0
    """Bound of the trust region around the average policy; null for none."""
    num_samples: int = 5
    """Continuous actions only: those that the advantages of the dueling critic are centred on."""
    bound_coef: float = 0.0
    """Continuous actions only: weight of half the squared distance of the policy's mean to the actions' bounds."""
    average_critic: bool = False
    """Continuous actions only: targets come from averages of the critics, which move as the average policy does."""
    learn_scale: bool = False
    """Continuous actions only: learn the standard deviation as well."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = False
    """Divide the policy's gradient by the size of the advantages, so that delta does not depend on that of rewards."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action", every_step=True)
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef", "bound_coef")
        checks.at_least(1, "num_samples")
        checks.require("clip", lambda value: value > 0, "above 0; inf never truncates")
        checks.positive_or_null("delta", "reward_clip")


@dataclass
class ACERNetworkConfig(FeedForwardConfig):
    """Policy and action values share a network; of continuous actions policy, value and advantage have one each."""

    critic_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Continuous actions only: widths of the value's and the advantage's layers."""
    init_scale: float | None = None
    """Continuous actions only: their standard deviation at the start; null: 0.3."""
    critics = 1  # no field, and so no flag

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).sizes("critic_hidden")
        Checks(self, at).normal_scale("init_scale")


@dataclass
class ACEROptimConfig(OptimConfig):
    """The optimiser, and the average policy."""

    clip_grad_norm: float | None = 10.0
    """Maximum of the gradient's norm in each of the networks; null for none."""
    average_decay: float = 0.99
    """The average policy keeps this share of itself after every update."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).require("average_decay", lambda value: 0 <= value < 1, "at least 0 and below 1")


@dataclass
class ACERConfig(MixedConfig):
    """ACER."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: ACERNetworkConfig = field(default_factory=ACERNetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(unroll=20))
    replay: RatioReplayConfig = field(default_factory=lambda: RatioReplayConfig(capacity=80_000, min_size=16_000))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: ACEROptimConfig = field(default_factory=lambda: ACEROptimConfig(lr=7e-4, schedule="constant"))
    train: RolloutTrainConfig = field(default_factory=lambda: RolloutTrainConfig(minibatches=1, epochs=1))

    algorithm = "acer"
    rescale_actions = True
    values = "action"
    continuous_only = ("network.critic_hidden",)

    def check_kind(self, kind: Literal["discrete", "continuous"]) -> None:
        """As :meth:`Config.check_kind`; the entropy of a fixed scale cannot be learnt."""
        if kind == "continuous" and not self.loss.learn_scale:
            words = f"0, since the actions of {self.task} are continuous and loss.learn_scale false fixes their entropy"
            Checks(self.loss, "loss").require("entropy_coef", lambda value: value == 0, words)

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with the values of all actions beside the policy; of continuous actions a normal policy alone."""
        from offtrace.agents.assemble import policy_spec

        if info.num_actions is not None:
            return policy_spec(self, info, critic="q")
        return policy_spec(self, info, head="normal", critic=None, head_options={"init_scale": 0.3})

    def build(self) -> tuple[Agent, MixedData | RolloutData]:
        """As :meth:`Config.build`."""
        return make_acer(self)


def make_acer(config: ACERConfig) -> tuple[Agent, MixedData | RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import critics_of, loss_options, make_optimizer, mixed_agent, read_task, value_of
    from offtrace.agents.targets import soft_update
    from offtrace.modules.losses import ACERLoss, ContinuousACERLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    policy = build_policy(**spec["arguments"])
    if info.num_actions is not None:
        loss: Any = ACERLoss(policy, **loss_options(ACERLoss, config.loss))
    else:
        value, advantage = value_of(config, info, policy), critics_of(config, info, policy)
        loss = ContinuousACERLoss(policy, value, advantage, **loss_options(ContinuousACERLoss, config.loss))
    groups: Any = [{"params": group} for group in loss.param_groups().values()]
    make = make_optimizer(config.optim.name, lr=config.optim.lr, eps=config.optim.eps, decay=config.optim.decay)
    return mixed_agent(
        config, info, loss, loss.policy, spec,
        optimizer=lambda _: make(groups), after_update=soft_update(loss, 1 - config.optim.average_decay),
    )  # fmt: skip


def control_config() -> ACERConfig:
    """CartPole in minutes: 8 environments, normalised advantages, a critic of little weight, 150,000 steps."""
    config = ACERConfig(env=EnvConfig("CartPole-v1", 8), optim=ACEROptimConfig(lr=2e-3))
    config.replay.capacity, config.replay.min_size, config.train.precision = 40_000, 8_000, "32-true"
    config.loss = LossConfig("retrace(lmbda=0.95)", value_coef=0.01, normalize_advantage=True)
    config.train.total_frames, config.train.eval_every, config.train.checkpoint_every = 150_000, 15_000, 50_000
    return config


def continuous_config() -> ACERConfig:
    """cartpole-swingup of dm_control: behind each fresh sequence of 10 steps 8 batches of 32 replayed ones, Adam."""
    config = ACERConfig(env=EnvConfig("cartpole-swingup", num_envs=1, action_repeat=2))
    config.collector.unroll, config.train.precision = 10, "32-true"
    config.network.hidden, config.network.activation = [256, 256], "relu"
    config.replay = RatioReplayConfig(ratio=8.0, sequences=32, capacity=500_000, min_size=5_000)
    config.loss = LossConfig("retrace(lmbda=0.7)", clip=5.0, bound_coef=10.0, average_critic=True)
    config.loss.normalize_advantage = True
    config.optim = ACEROptimConfig(lr=3e-4, schedule="constant", average_decay=0.995, clip_grad_norm=40.0)
    config.train.total_frames, config.train.eval_every, config.train.checkpoint_every = 500_000, 50_000, 100_000
    return config


def pendulum_config() -> ACERConfig:
    """Pendulum-v1 of Gymnasium, with the settings of :func:`continuous_config`."""
    return replace(continuous_config(), env=EnvConfig(task="Pendulum-v1", num_envs=1))


def atari_config() -> ACERConfig:
    """Pong on a small machine: 5,000 steps of each of 16 games in the replay; Adam, and no trust region."""
    config = ACERConfig(loss=LossConfig(value_coef=2.5, entropy_coef=0.01, delta=None, normalize_advantage=True))
    config.loss.estimator, config.loss.reward_clip, config.optim.lr = "retrace(lmbda=0.95)", 1.0, 4e-4
    config.train.total_frames = 10_000_000
    return config


def paper_config() -> ACERConfig:
    """The published settings: 50,000 steps of each of 16 games in the replay, RMSProp, 200 million frames."""
    config = ACERConfig(loss=LossConfig(entropy_coef=0.001, reward_clip=1.0))
    config.replay.capacity, config.replay.min_size = 800_000, 160_000
    config.optim.name, config.train.total_frames = "rmsprop_tf", 200_000_000
    return config
