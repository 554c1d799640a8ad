"""DQN (Mnih et al. 2015): double, dueling, n-step, prioritised, and C51 where they are asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    EnvConfig,
    FeedForwardConfig,
    Group,
    OffPolicyConfig,
    OptimConfig,
    ReplayConfig,
    ReplayTrainConfig,
    check_estimator,
)

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import ReplayData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss, and how the policy explores."""

    estimator: str = "one_step"
    """one_step, n_step(n=3), retrace, q_lambda ..., with options in brackets; or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    double: bool = True
    """The online network chooses the next action, the target network values it (van Hasselt et al. 2016)."""
    loss_function: Literal["huber", "l2"] = "huber"
    """Of the temporal difference error; C51 has its cross entropy."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    epsilon_start: float = 1.0
    """Share of random actions at the start."""
    epsilon_end: float = 0.05
    """Share of random actions in the end."""
    epsilon_fraction: float = 0.1
    """Part of the training over which the one becomes the other."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action")
        checks = Checks(self, at)
        checks.fraction("gamma", "epsilon_start", "epsilon_end")
        checks.require("epsilon_fraction", lambda value: 0 < value <= 1, "above 0 and at most 1")
        checks.positive_or_null("reward_clip")


@dataclass
class DQNNetworkConfig(FeedForwardConfig):
    """The network of action values."""

    dueling: bool = False
    """A state value and advantages (Wang et al. 2016)."""
    atoms: int = 0
    """Of C51, 51; 0: plain values."""
    v_max: float = 10.0
    """C51's returns reach from minus this to this."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).categorical()


@dataclass
class DQNOptimConfig(OptimConfig):
    """The optimiser, and the target network."""

    lr: float = 1e-4
    """Step size at the start."""
    schedule: Literal["linear", "constant"] = "constant"
    """linear falls to 0 at the last frame."""
    clip_grad_norm: float | None = 10.0
    """Maximum of the gradient's global norm; null for none."""
    target_every: int = 250
    """Updates between two copies into the target network."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(1, "target_every")


def _replay() -> ReplayConfig:
    return ReplayConfig(capacity=100_000, batch_size=32, samples_per_insert=8.0, min_size=20_000)


@dataclass
class DQNConfig(OffPolicyConfig):
    """DQN."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=8))
    network: DQNNetworkConfig = field(default_factory=DQNNetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(num_workers=0, unroll=4))
    replay: ReplayConfig = field(default_factory=_replay)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: DQNOptimConfig = field(default_factory=DQNOptimConfig)
    train: ReplayTrainConfig = field(default_factory=ReplayTrainConfig)

    algorithm = "dqn"
    actions = "discrete"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network of action values, and the epsilon-greedy policy that follows from them."""
        from offtrace.agents.assemble import policy_spec

        options: dict[str, Any] = {"dueling": self.network.dueling}
        if self.network.atoms:
            options |= {"atoms": self.network.atoms, "v_max": self.network.v_max}
        return policy_spec(self, info, head="greedy", critic="q", critic_options=options)

    def build(self) -> tuple[Agent, ReplayData]:
        """As :meth:`Config.build`."""
        return make_dqn(self)


def make_dqn(config: DQNConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import read_task, replay_agent
    from offtrace.agents.targets import hard_update
    from offtrace.modules.losses import DQNLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = DQNLoss(build_policy(**spec["arguments"]), priorities=config.replay.prioritized, **asdict(config.loss))
    after_update = hard_update(loss, config.optim.target_every)
    return replay_agent(config, info, loss, loss.policy, spec, after_update=after_update)


def control_config() -> DQNConfig:
    """CartPole, near the settings of RL Baselines3 Zoo."""
    config = DQNConfig(env=EnvConfig(task="CartPole-v1", num_envs=4))
    config.network = DQNNetworkConfig(hidden=[256, 256], activation="relu")
    config.replay = ReplayConfig(capacity=100_000, batch_size=64, samples_per_insert=32.0, min_size=1_000)
    config.loss.epsilon_end, config.loss.epsilon_fraction = 0.04, 0.16
    # with a constant step size the last evaluation of a run is often a bad one
    config.optim.lr, config.optim.target_every, config.optim.schedule = 1e-3, 100, "linear"
    config.train = ReplayTrainConfig(
        total_frames=50_000, eval_every=5_000, checkpoint_every=25_000, precision="32-true"
    )
    return config


def atari_config() -> DQNConfig:
    """Pong, near the settings of RL Baselines3 Zoo, 40 million frames."""
    # the defaults are double, with min_size 20,000 and eps 1e-5; the zoo has plain DQN, a start at 100,000 and eps 1e-8
    config = DQNConfig()
    config.loss.reward_clip, config.loss.epsilon_end = 1.0, 0.01
    config.train = ReplayTrainConfig(total_frames=40_000_000, eval_every=1_000_000, checkpoint_every=1_000_000)
    return config


def rainbow_config() -> DQNConfig:
    """Pong with double, dueling, 3 steps, prioritised replay and C51 (Hessel et al. 2018), without noisy layers."""
    config = atari_config()
    config.network.dueling, config.network.atoms = True, 51
    config.replay.sampler, config.replay.alpha, config.replay.beta = "prioritized", 0.5, 0.4
    config.loss.estimator = "n_step(n=3)"
    config.optim.lr, config.optim.eps, config.optim.target_every = 6.25e-5, 1.5e-4, 2_000
    return config
