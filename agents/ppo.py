"""PPO, proximal policy optimisation with a clipped ratio (Schulman et al. 2017, arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    ConfigError,
    EnvConfig,
    Group,
    NetworkConfig,
    OptimConfig,
    RolloutConfig,
    RolloutTrainConfig,
    check_estimator,
)

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from offtrace.agents.agent import Agent
    from offtrace.agents.data import RolloutData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss; the paper's values for control."""

    estimator: str = "gae(lmbda=0.95)"
    """Of the advantages, which are fixed over the passes: gae, vtrace ..., with options in brackets; or
    package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    clip_epsilon: float = 0.2
    """How far the ratio may move from 1."""
    anneal_clip: bool = False
    """The clip falls to 0 at the last frame."""
    value_clip: float | None = None
    """How far a value may move from what it was when the rollout came; null for any."""
    value_coef: float = 0.5
    """Weight of half the squared value error."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over the steps of a minibatch."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = True
    """Advantages of a minibatch are shifted and scaled to mean 0 and deviation 1."""
    normalize_reward: bool = False
    """Rewards are divided by the running standard deviation of the discounted return, and clipped to 10, in the
    learner; scores stay as they are. For rewards of any size; not with reward_clip."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "state")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.require("clip_epsilon", lambda value: 0 < value < 1, "above 0 and below 1")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.positive_or_null("reward_clip", "value_clip")
        if self.normalize_reward and self.reward_clip is not None:
            raise ConfigError(
                f"{at}.normalize_reward is true, and {at}.reward_clip {self.reward_clip}: normalize_reward must be "
                "false, or reward_clip null"
            )


@dataclass
class TrainConfig(RolloutTrainConfig):
    """The run."""

    deal: Literal["steps", "environments"] = "steps"
    """What is dealt to the minibatches: single steps, or whole environments, which a recurrent network needs."""


def _collector() -> CollectorConfig:
    return CollectorConfig(num_workers=0, unroll=128)


def _optim() -> OptimConfig:
    return OptimConfig(lr=2.5e-4)


@dataclass
class PPOConfig(RolloutConfig):
    """PPO."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=8))
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=_collector)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=_optim)
    train: TrainConfig = field(default_factory=TrainConfig)

    algorithm = "ppo"

    @property
    def deals_steps(self) -> bool:
        """``train.deal`` is steps."""
        return self.train.deal == "steps"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with a state value beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info)

    def build(self) -> tuple[Agent, RolloutData]:
        """As :meth:`Config.build`."""
        return make_ppo(self)


def make_ppo(config: PPOConfig) -> tuple[Agent, RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import read_task, rollout_agent
    from offtrace.modules.losses import PPOLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = PPOLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    if not config.loss.normalize_reward:
        return rollout_agent(config, info, loss, loss.policy, spec, on_rollout=loss.prepare)

    def prepare(rollout: TensorDictBase) -> dict[str, Tensor]:
        number = config.env.num_envs
        rows = data.environments(rollout, of_actor=number)
        return loss.prepare(rollout, (rows, number * max(1, config.collector.num_workers)))

    agent, data = rollout_agent(config, info, loss, loss.policy, spec, on_rollout=prepare)
    return agent, data


def control_config() -> PPOConfig:
    """CartPole, near the settings of RL Baselines3 Zoo."""
    config = PPOConfig(env=EnvConfig(task="CartPole-v1", num_envs=8), collector=CollectorConfig(0, unroll=32))
    # value_coef: before half the square; the zoo has 0.5 before the whole square
    config.loss = LossConfig("gae(lmbda=0.8)", gamma=0.98, anneal_clip=True, entropy_coef=0.0, value_coef=0.01)
    config.optim.lr = 1e-3
    config.train = TrainConfig(
        total_frames=100_000, minibatches=1, epochs=20, eval_every=10_000, checkpoint_every=50_000, precision="32-true"
    )
    return config


def pendulum_config() -> PPOConfig:
    """Pendulum: continuous actions."""
    config = PPOConfig(env=EnvConfig(task="Pendulum-v1", num_envs=8), collector=CollectorConfig(0, unroll=128))
    config.loss = LossConfig(gamma=0.9, entropy_coef=0.0, value_coef=0.05)
    config.optim.lr = 1e-3
    config.train = TrainConfig(
        total_frames=400_000, minibatches=8, epochs=10, eval_every=50_000, checkpoint_every=100_000, precision="32-true"
    )
    return config


def mujoco_config() -> PPOConfig:
    """HalfCheetah, whose observations and rewards have any size; CleanRL's settings, but 8 times 256 steps in place of
    2,048 of one environment, and one network for policy and value."""
    config = PPOConfig(env=EnvConfig(task="HalfCheetah-v5", num_envs=8), collector=CollectorConfig(0, unroll=256))
    config.network.normalize = True
    config.loss = LossConfig(value_clip=0.2, entropy_coef=0.0, normalize_reward=True)
    config.optim.lr = 3e-4
    config.train = TrainConfig(
        total_frames=1_000_000, minibatches=32, epochs=10, eval_every=100_000, checkpoint_every=100_000,
        precision="32-true",
    )  # fmt: skip
    return config


def atari_config() -> PPOConfig:
    """Pong in ten million frames: twice the published step size, and a clip that stays."""
    config = paper_config()
    config.optim.lr, config.loss.anneal_clip, config.train.total_frames = 5e-4, False, 10_000_000
    return config


def paper_config() -> PPOConfig:
    """Pong at the published settings: 8 games, 128 steps, 4 passes of 4 minibatches, 40 million frames."""
    config = PPOConfig()
    config.loss.clip_epsilon, config.loss.anneal_clip, config.loss.reward_clip = 0.1, True, 1.0
    config.train.total_frames = 40_000_000
    return config
