"""MPO and DMPO (Abdolmaleki et al. 2018, arXiv 1806.06920), and their form for discrete actions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    ConfigError,
    EnvConfig,
    Group,
    OffPolicyConfig,
    ReplayConfig,
    SeparateNetworksConfig,
    SeparateOptimConfig,
    SeparateTrainConfig,
    check_estimator,
)
from offtrace.modules.envs.suite import control_name

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import ReplayData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """Maximum a posteriori policy optimisation; Acme's values."""

    estimator: str = "n_step(n=5)"
    """What the critic learns: one_step, n_step(n=5), which is not corrected, retrace(lmbda=0.95), importance_sampling,
    q_lambda, and for discrete actions tree_backup; or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of the policy; diagonal bounds each dimension by itself."""
    num_samples: int = 20
    """Actions per state in the E-step."""
    epsilon: float = 0.1
    """Bound of the E-step in nats."""
    epsilon_mean: float | None = None
    """Bound of the mean's movement; null: 0.01 per dimension, or 0.1 jointly."""
    epsilon_cov: float | None = None
    """Bound of the covariance's movement; null: 1e-6 per dimension, or 1e-4 jointly."""
    epsilon_policy: float = 2.5e-3
    """Bound of the policy's movement, for discrete actions."""
    action_penalty: bool = True
    """Penalise samples outside the bounds."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(1, "num_samples")
        checks.positive("epsilon", "epsilon_policy")
        checks.finite_or_null("epsilon_mean", "epsilon_cov")


@dataclass
class MPONetworkConfig(SeparateNetworksConfig):
    """Policy and critic; Acme's."""

    hidden: list[int] | None = field(default_factory=lambda: [256, 256, 256])
    """Widths of the policy's layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Widths of a critic's layers."""
    critics: int = 1
    """Critics, of which the smallest value counts."""
    atoms: int = 0
    """Of a categorical critic, 51, which makes this DMPO; 0: plain values."""
    v_max: float = 150.0
    """The categorical critic's returns reach from minus this to this."""
    init_scale: float | None = None
    """Standard deviation of a continuous action at the start; null: the policy's own."""

    vector_encoder = "layernorm_mlp"

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).categorical()
        Checks(self, at).finite_or_null("init_scale")


@dataclass
class MPOOptimConfig(SeparateOptimConfig):
    """Adam, and the target networks; those of Acme's control scripts."""

    lr_dual: float = 1e-2
    """Step size of the multipliers."""
    target_every: int = 100
    """Updates between two copies into the target networks."""
    clip_grad_norm: float | None = 40.0
    """Maximum of the gradient's norm in each of the networks; null for none."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.positive("lr_dual")
        checks.at_least(1, "target_every")


@dataclass
class MPOConfig(OffPolicyConfig):
    """MPO, DMPO and their form for discrete actions."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(task="cartpole-swingup", num_envs=1))
    network: MPONetworkConfig = field(default_factory=MPONetworkConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(num_workers=0, unroll=8))
    replay: ReplayConfig = field(default_factory=lambda: ReplayConfig(samples_per_insert=64.0))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: MPOOptimConfig = field(default_factory=MPOOptimConfig)
    train: SeparateTrainConfig = field(default_factory=SeparateTrainConfig)

    algorithm = "mpo"

    def floats_per_step(self, info: EnvInfo) -> int:
        """As :meth:`OffPolicyConfig.floats_per_step`; a full covariance is a matrix."""
        size = info.action_dim or 0
        return super().floats_per_step(info) + (size * size - size if self.loss.covariance == "full" else 0)

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A Gaussian policy, or a categorical one for discrete actions."""
        from offtrace.agents.assemble import policy_spec

        if info.num_actions is not None:
            return policy_spec(self, info, head="categorical", critic=None)
        kind = "gaussian" if self.loss.covariance == "diagonal" else "full_gaussian"
        options = {"init_scale": 0.5}  # it shrinks slowly: this is the exploration
        return policy_spec(self, info, head=kind, head_options=options, critic=None)

    def build(self) -> tuple[Agent, ReplayData]:
        """As :meth:`Config.build`."""
        return make_mpo(self)

    def validate(self) -> None:
        """As :meth:`Config.validate`; the returns of dm_control fit the categorical critic."""
        super().validate()
        repeat, gamma, v_max = self.env.action_repeat, self.loss.gamma, self.network.v_max
        largest = repeat / (1 - gamma) if gamma < 1 else math.inf
        if self.network.atoms and control_name(self.task) is not None and v_max < largest:
            raise ConfigError(
                f"network.v_max is {v_max:g}; with loss.gamma {gamma:g} and env.action_repeat {repeat} the returns of "
                f"dm_control reach {largest:g}: it must be that or more"
            )


def make_mpo(config: MPOConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import critics_of, group_optimizer, loss_options, read_task, replay_agent
    from offtrace.agents.targets import hard_update
    from offtrace.modules.losses import DiscreteMPOLoss, MPOLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    policy = build_policy(**spec["arguments"])
    critic = critics_of(config, info, policy, atoms=config.network.atoms, v_max=config.network.v_max)
    priorities = config.replay.prioritized
    kind: Any = MPOLoss if info.num_actions is None else DiscreteMPOLoss
    loss = kind(policy, critic, **loss_options(kind, config.loss, "epsilon_policy"), priorities=priorities)
    optim = config.optim
    rates = {"actor": optim.lr_actor, "critic": optim.lr_critic, "duals": optim.lr_dual}
    return replay_agent(
        config, info, loss, loss.policy, spec,
        optimizer=group_optimizer(loss, rates),
        after_update=hard_update(loss, optim.target_every),
    )  # fmt: skip


def control_config() -> MPOConfig:
    """dm_control, as Acme's control scripts."""
    return MPOConfig(loss=LossConfig(estimator="n_step(n=4)"))


def discrete_config() -> MPOConfig:
    """CartPole with discrete actions."""
    config = MPOConfig()
    config.env.task, config.env.num_envs = "CartPole-v1", 4
    config.loss.estimator = "retrace(lmbda=0.95)"  # with uncorrected n steps the score wanders between 280 and 450
    config.train.total_frames, config.train.eval_every = 50_000, 5_000
    return config


def dmpo_config() -> MPOConfig:
    """A categorical critic."""
    return MPOConfig(network=MPONetworkConfig(atoms=51), loss=LossConfig(estimator="n_step(n=4)"))


def full_covariance_config() -> MPOConfig:
    """A policy with full covariance, bounded jointly."""
    return MPOConfig(loss=LossConfig(estimator="n_step(n=4)", covariance="full"))
