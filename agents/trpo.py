"""TRPO, trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    AdamConfig,
    Checks,
    CollectorConfig,
    EnvConfig,
    FeedForwardConfig,
    Group,
    RolloutConfig,
    WholeRolloutTrainConfig,
    check_estimator,
)

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from offtrace.agents.agent import Agent, Update
    from offtrace.agents.data import RolloutData
    from offtrace.modules.envs import EnvInfo
    from offtrace.modules.losses import TRPOLoss


@dataclass
class LossConfig(Group):
    """The loss, and the step of the policy; the values of the published baselines."""

    estimator: str = "gae(lmbda=0.98)"
    """Of the advantages: gae, vtrace ..., with options in brackets; or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    delta: float = 0.01
    """Largest mean KL of a step of the policy, in nats."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    cg_iterations: int = 10
    """Iterations of conjugate gradients, each of which is a product with the Fisher matrix."""
    backtracks: int = 10
    """Fractions of the step that the line search tries, the whole step first."""
    shrink: float = 0.5
    """Each fraction as a part of the one before."""
    normalize_advantage: bool = True
    """Advantages of a rollout are shifted and scaled to mean 0 and deviation 1."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "state")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.positive("delta")
        checks.at_least(0, "damping")
        checks.at_least(1, "cg_iterations", "backtracks")
        checks.require("shrink", lambda value: 0 < value < 1, "above 0 and below 1")
        checks.positive_or_null("reward_clip")


@dataclass
class TRPONetworkConfig(FeedForwardConfig):
    """Policy and value, which have a network each, of the same sizes."""

    init_scale: float | None = None
    """Standard deviation of a continuous action at the start; null: the policy's own."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).normal_scale("init_scale")

    @property
    def critic_hidden(self) -> list[int] | None:
        """Widths of the value's layers."""
        return self.hidden


@dataclass
class TRPOOptimConfig(AdamConfig):
    """Adam, of the value alone."""

    lr: float = 1e-3
    """Step size."""
    schedule: Literal["linear", "constant"] = "constant"
    """linear falls to 0 at the last frame."""
    clip_grad_norm: float | None = None
    """Maximum of the norm of the value's gradient; null for none."""
    critic_steps: int = 20
    """Steps on each rollout, behind the one of the policy."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(1, "critic_steps")


@dataclass
class TRPOTrainConfig(WholeRolloutTrainConfig):
    """The run."""

    precision: Literal["32-true"] = "32-true"
    """Of the learner: products with the Fisher matrix have no digits to lose."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        for name in ("minibatches", "epochs"):  # no flags; but a program may set them
            Checks(self, at).require(name, lambda value: value == 1, "1, because a step is that of a whole rollout")


@dataclass
class TRPOConfig(RolloutConfig):
    """TRPO."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=8))
    network: TRPONetworkConfig = field(default_factory=TRPONetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(num_workers=0, unroll=128))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: TRPOOptimConfig = field(default_factory=TRPOOptimConfig)
    train: TRPOTrainConfig = field(default_factory=TRPOTrainConfig)

    algorithm = "trpo"

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A policy alone; the value has a network of its own."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info, critic=None)

    def build(self) -> tuple[Agent, RolloutData]:
        """As :meth:`Config.build`."""
        return make_trpo(self)


def make_trpo(config: TRPOConfig) -> tuple[Agent, RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import make_optimizer, read_task, rollout_agent, value_of
    from offtrace.modules.losses import TRPOLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    policy = build_policy(**spec["arguments"])
    value = value_of(config, info, policy)
    loss = TRPOLoss(policy, value, **asdict(config.loss))
    return rollout_agent(
        config, info, loss, loss.policy, spec,
        optimizer=make_optimizer("adam", lr=config.optim.lr, eps=config.optim.eps),
        update=trust_region_update(loss, config.optim.critic_steps),
        on_rollout=loss.prepare,
    )  # fmt: skip


def trust_region_update(loss: TRPOLoss, critic_steps: int) -> Update:
    """The step of the policy, then so many gradient steps of the value; the log gets the first of them."""

    def update(agent: Agent, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        found = loss.improve(batch)
        agent.check_finite(found["policy_grad_norm"])
        out, norm = agent.gradient_step(batch)
        for _ in range(critic_steps - 1):
            agent.gradient_step(batch)
        return out.update(found), norm

    return update


def control_config() -> TRPOConfig:
    """CartPole, near the settings of RL Baselines3 Zoo."""
    config = TRPOConfig(env=EnvConfig(task="CartPole-v1", num_envs=2), collector=CollectorConfig(0, unroll=512))
    config.loss.damping, config.loss.cg_iterations, config.loss.shrink = 1e-3, 15, 0.8
    config.optim.critic_steps = 40  # the zoo: 20 passes of 2 minibatches
    config.train = TRPOTrainConfig(total_frames=100_000, eval_every=10_000, checkpoint_every=50_000)
    return config


def pendulum_config() -> TRPOConfig:
    """Pendulum: continuous actions."""
    config = TRPOConfig(env=EnvConfig(task="Pendulum-v1", num_envs=2), collector=CollectorConfig(0, unroll=1024))
    config.loss = LossConfig("gae(lmbda=0.95)", gamma=0.9, cg_iterations=15, shrink=0.8)
    config.optim.critic_steps = 80
    config.train = TRPOTrainConfig(total_frames=400_000, eval_every=50_000, checkpoint_every=100_000)
    return config


def atari_config() -> TRPOConfig:
    """Pong: 8 games, 128 steps, 40 million frames."""
    config = TRPOConfig()
    config.loss.reward_clip, config.train.total_frames = 1.0, 40_000_000
    return config
