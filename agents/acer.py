"""ACER, the actor-critic with experience replay (Wang et al. 2017, arXiv 1611.01224), on discrete actions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    ConfigError,
    EnvConfig,
    FeedForwardConfig,
    Group,
    MixedConfig,
    MixedReplayConfig,
    OptimConfig,
    RolloutTrainConfig,
    check_estimator,
    samples_of,
)

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import MixedData, RolloutData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss; the values of the paper, but for the entropy."""

    estimator: str = "retrace"
    """retrace is the paper's; or another of action values, with options in brackets, such as retrace(lmbda=0.95); or
    package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 0.5
    """Weight of half the squared error of the action's value."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, beside the trust region."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over batch and time."""
    clip: float = 10.0
    """Truncation c of the importance weights in the policy gradient; what it cuts off the bias correction puts back."""
    delta: float | None = 1.0
    """Bound of the trust region around the average policy; null for none."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.require("clip", lambda value: value > 0, "above 0; inf never truncates")
        checks.positive_or_null("delta", "reward_clip")
        if not samples_of(self.estimator, 2).every_step:
            raise ConfigError(
                f"{at}.estimator is {self.estimator}, which learns from the first step of a sequence alone; here every "
                "step of a rollout is learnt from: it must be another, such as retrace"
            )


@dataclass
class ACEROptimConfig(OptimConfig):
    """The optimiser, and the average policy."""

    name: Literal["adam", "rmsprop", "rmsprop_tf"] = "rmsprop_tf"
    """adam, torch's rmsprop, or the paper's rmsprop_tf."""
    lr: float = 7e-4
    """Step size at the start."""
    schedule: Literal["linear", "constant"] = "constant"
    """linear falls to 0 at the last frame."""
    clip_grad_norm: float | None = 10.0
    """Maximum of the gradient's global norm; null for none."""
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
    network: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(unroll=20))
    replay: MixedReplayConfig = field(default_factory=lambda: MixedReplayConfig(capacity=80_000, min_size=16_000))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: ACEROptimConfig = field(default_factory=ACEROptimConfig)
    train: RolloutTrainConfig = field(default_factory=lambda: RolloutTrainConfig(minibatches=1, epochs=1))

    algorithm = "acer"
    actions = "discrete"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with the values of all actions beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info, critic="q")

    def build(self) -> tuple[Agent, MixedData | RolloutData]:
        """As :meth:`Config.build`."""
        return make_acer(self)


def make_acer(config: ACERConfig) -> tuple[Agent, MixedData | RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import mixed_agent, read_task
    from offtrace.agents.targets import soft_update
    from offtrace.modules.losses import ACERLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = ACERLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    average = soft_update(loss, 1 - config.optim.average_decay)
    return mixed_agent(config, info, loss, loss.policy, spec, after_update=average)


def control_config() -> ACERConfig:
    """CartPole, near the settings of RL Baselines Zoo: 8 environments, a step size that falls, 500,000 steps."""
    config = ACERConfig(env=EnvConfig(task="CartPole-v1", num_envs=8))
    config.replay = MixedReplayConfig(capacity=40_000, min_size=8_000)
    config.optim.schedule = "linear"
    config.train = RolloutTrainConfig(
        total_frames=500_000, minibatches=1, epochs=1, eval_every=50_000, checkpoint_every=100_000, precision="32-true"
    )
    return config


def atari_config() -> ACERConfig:
    """Pong, near the settings of RL Baselines Zoo: 16 games, 5,000 steps of each in the replay."""
    config = ACERConfig()
    config.loss.reward_clip = 1.0
    config.train.total_frames = 10_000_000
    return config


def paper_config() -> ACERConfig:
    """The published settings: 50,000 steps of each of 16 games in the replay, 200 million frames."""
    config = atari_config()
    config.replay = MixedReplayConfig(capacity=800_000, min_size=160_000)
    config.loss.entropy_coef = 0.001
    config.train.total_frames = 200_000_000
    return config
