"""V-MPO, on-policy maximum a posteriori policy optimisation (Song et al. 2020, arXiv 1909.12238)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from offtrace.agents.config import (
    AdamConfig,
    Checks,
    CollectorConfig,
    EnvConfig,
    Group,
    NetworkConfig,
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
    """V-MPO; the values of the paper's Atari runs."""

    estimator: str = "gae"
    """What the value learns, and advantages are measured from: gae, n_step(n=5) or vtrace, with options in brackets;
    or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    epsilon: float = 0.01
    """Bound of the E-step in nats."""
    epsilon_kl: float = 0.01
    """Bound of the policy's movement, for discrete actions."""
    epsilon_mean: float = 0.01
    """Bound of the mean's movement, for continuous actions."""
    epsilon_cov: float = 1e-5
    """Bound of the covariance's movement, for continuous actions."""
    top_fraction: float = 0.5
    """Advantages that are learnt from."""
    value_coef: float = 1.0
    """Weight of half the squared value error; with network.popart in units of the returns' deviation."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "state")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef")
        checks.positive("epsilon", "epsilon_kl", "epsilon_mean", "epsilon_cov")
        checks.require("top_fraction", lambda value: 0 < value <= 1, "above 0 and at most 1")


@dataclass
class VMPONetworkConfig(NetworkConfig):
    """The shared actor-critic."""

    popart: bool = False
    """Normalise values by the returns' mean and deviation (PopArt)."""


@dataclass
class VMPOConfig(RolloutConfig):
    """V-MPO, on rollouts."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: VMPONetworkConfig = field(default_factory=VMPONetworkConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)

    algorithm = "vmpo"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with a state value beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info, critic_options={"popart": True} if self.network.popart else {})

    def build(self) -> tuple[Agent, RolloutData]:
        """As :meth:`Config.build`."""
        return make_vmpo(self)


def make_vmpo(config: VMPOConfig) -> tuple[Agent, RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import group_optimizer, read_task, rollout_agent
    from offtrace.modules.losses import VMPOLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = VMPOLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    rates = dict.fromkeys(loss.param_groups(), config.optim.lr)
    return rollout_agent(
        config, info, loss, loss.policy, spec,
        optimizer=group_optimizer(loss, rates, eps=config.optim.eps),
        after_update=lambda updates: loss.update_values(),
    )  # fmt: skip


def control_config() -> VMPOConfig:
    """CartPole in minutes."""
    config = VMPOConfig(env=EnvConfig(task="CartPole-v1"), collector=CollectorConfig(unroll=32))
    config.loss.estimator, config.loss.epsilon = "gae(lmbda=0.95)", 0.1
    config.network.normalize = config.network.popart = True  # returns of hundreds drown the policy in shared layers
    config.loss.value_coef = 0.5
    config.optim.lr = 2.5e-3
    config.train = RolloutTrainConfig(
        total_frames=300_000, eval_every=50_000, checkpoint_every=50_000, precision="32-true"
    )
    return config
