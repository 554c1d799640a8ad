"""An actor-critic on rollouts whose critic values actions: Retrace in place of V-trace (arXiv 1606.02647)."""

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
    """The loss."""

    estimator: str = "retrace"
    """retrace, importance_sampling, tree_backup, q_lambda or one_step, with options in brackets, such as
    retrace(lmbda=0.9); or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 0.5
    """Weight of half the squared error of the action's value."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over batch and time."""
    pg_rho_clip: float = 1.0
    """Clip of the ratio in the policy gradient; inf for none."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = False
    """Advantages of an update are shifted and scaled to mean 0 and deviation 1."""
    policy_clip: float | None = None
    """Trust region: steps whose ratio has moved further than this get no policy gradient; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action", every_step=True)
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.require("pg_rho_clip", lambda value: value > 0, "above 0")
        checks.positive_or_null("reward_clip", "policy_clip")


@dataclass
class QActorCriticConfig(RolloutConfig):
    """An actor-critic with action values."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)

    algorithm = "q_actor_critic"
    actions = "discrete"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with the values of all actions beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info, critic="q")

    def build(self) -> tuple[Agent, RolloutData]:
        """As :meth:`Config.build`."""
        return make_q_actor_critic(self)


def make_q_actor_critic(config: QActorCriticConfig) -> tuple[Agent, RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import read_task, rollout_agent
    from offtrace.modules.losses import QActorCriticLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = QActorCriticLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    return rollout_agent(config, info, loss, loss.policy, spec)


def control_config() -> QActorCriticConfig:
    """CartPole in minutes, as IMPALA's."""
    return QActorCriticConfig(
        env=EnvConfig(task="CartPole-v1"),
        collector=CollectorConfig(unroll=32),
        loss=LossConfig(
            estimator="retrace(lmbda=0.95)",
            reduction="mean",
            value_coef=0.01,
            normalize_advantage=True,
            policy_clip=0.2,
        ),
        optim=OptimConfig(lr=2.5e-3),
        train=RolloutTrainConfig(total_frames=150_000, eval_every=50_000, checkpoint_every=50_000, precision="32-true"),
    )


def atari_config() -> QActorCriticConfig:
    """Pong, as IMPALA's."""
    return QActorCriticConfig(
        loss=LossConfig(
            estimator="retrace(lmbda=0.95)", reduction="mean", reward_clip=1.0, normalize_advantage=True,
            policy_clip=0.1,
        )
    )  # fmt: skip
