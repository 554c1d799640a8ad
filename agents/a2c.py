"""A2C, the synchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    EnvConfig,
    Group,
    NetworkConfig,
    OptimConfig,
    RolloutConfig,
    RolloutTrainConfig,
    check_estimator,
)

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import RolloutData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss; the values of the published baselines."""

    estimator: str = "gae"
    """gae (with lmbda 1 the n-step returns of the paper), n_step, vtrace ..., with options in brackets, such as
    gae(lmbda=0.95); or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 0.5
    """Weight of half the squared value error."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over batch and time."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = False
    """Advantages of an update are shifted and scaled to mean 0 and deviation 1."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "state")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.positive_or_null("reward_clip")


def _collector() -> CollectorConfig:
    return CollectorConfig(num_workers=0, unroll=5)  # all wait for each other after every step, as in the paper


def _optim() -> OptimConfig:
    return OptimConfig(name="rmsprop_tf", lr=7e-4, eps=1e-5, decay=0.99)


def _train() -> RolloutTrainConfig:
    return RolloutTrainConfig(minibatches=1, epochs=1)


@dataclass
class A2CConfig(RolloutConfig):
    """A2C."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=_collector)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=_optim)
    train: RolloutTrainConfig = field(default_factory=_train)

    algorithm = "a2c"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with a state value beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info)

    def build(self) -> tuple[Agent, RolloutData]:
        """As :meth:`Config.build`."""
        return make_a2c(self)


def make_a2c(config: A2CConfig) -> tuple[Agent, RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import read_task, rollout_agent
    from offtrace.modules.losses import A2CLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = A2CLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    return rollout_agent(config, info, loss, loss.policy, spec)


def control_config() -> A2CConfig:
    """CartPole, near the settings of RL Baselines3 Zoo."""
    config = A2CConfig(env=EnvConfig(task="CartPole-v1", num_envs=8))
    # value_coef 0.5 before half the square is 0.25 before the whole, where the zoo has 0.5; lr falls linearly, while
    # the zoo's is constant
    # of rollouts this short most of a return is bootstrapped: with the small weight that IMPALA's longer ones take for
    # the value, the score wanders between 80 and 480
    config.loss.entropy_coef = 0.0
    config.train = RolloutTrainConfig(
        total_frames=500_000, minibatches=1, epochs=1, eval_every=50_000, checkpoint_every=100_000, precision="32-true"
    )
    return config


def atari_config() -> A2CConfig:
    """Pong, near the settings of RL Baselines3 Zoo: 16 games, 5 steps, 40 million frames."""
    config = A2CConfig(env=EnvConfig(num_envs=16))
    # 0.5 before half the square is the zoo's 0.25 before the whole; lr falls linearly, the zoo's is constant
    config.loss.value_coef, config.loss.reward_clip = 0.5, 1.0
    config.train.total_frames = 40_000_000
    return config
