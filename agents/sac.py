"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1801.01290, 1812.05905; discrete: Christodoulou 2019, 1910.07207)."""

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
from offtrace.modules.estimators.names import parse_spec

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import ReplayData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """Soft actor-critic; the paper's values."""

    version: Literal[2, 1] = 2
    """2: temperature learnt (Haarnoja et al. 2018b); 1: value network and reward scale (2018a)."""
    estimator: str = "one_step"
    """What the critics learn: one_step, n_step(n=5), retrace(lmbda=0.95), importance_sampling, q_lambda, and for
    discrete actions tree_backup; or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    alpha_init: float = 1.0
    """Temperature at the start."""
    fixed_alpha: float | None = None
    """A temperature that does not learn; null learns it."""
    target_entropy: float | Literal["auto"] = "auto"
    """In nats; auto: minus the dimensions of an action, or entropy_fraction of the largest where they are discrete."""
    entropy_fraction: float = 0.98
    """Of discrete actions: the target entropy in parts of that of uniform legal actions."""
    alpha_loss: Literal["alpha", "log_alpha"] = "alpha"
    """What the temperature's loss multiplies."""
    reward_scale: float = 1.0
    """Factor of the reward; version 1 needs one: see its preset."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "action")
        checks = Checks(self, at)
        checks.fraction("gamma", "entropy_fraction")
        checks.positive("alpha_init", "reward_scale")
        checks.require("fixed_alpha", lambda x: x is None or 0 <= x < math.inf, "finite, at least 0, or null")
        checks.require("target_entropy", lambda value: value == "auto" or math.isfinite(value), "finite, or auto")
        name, _ = parse_spec(self.estimator)
        if self.version == 1 and ":" not in name and name not in ("one_step", "n_step"):  # of an own one the loss knows
            raise ConfigError(
                f"{at}.estimator is {self.estimator}; version 1 has no target critics: it must be one_step or n_step"
            )


@dataclass
class SACOptimConfig(SeparateOptimConfig):
    """Adam, and the target networks."""

    lr_alpha: float = 3e-4
    """Step size of the temperature's logarithm."""
    tau: float = 0.005
    """Share of the new weights in the target critics after every update."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.positive("lr_alpha")
        checks.require("tau", lambda value: 0 < value <= 1, "above 0 and at most 1")


@dataclass
class SACConfig(OffPolicyConfig):
    """Soft actor-critic."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(task="cartpole-swingup", num_envs=1))
    network: SeparateNetworksConfig = field(default_factory=SeparateNetworksConfig)
    collector: CollectorConfig = field(default_factory=lambda: CollectorConfig(num_workers=0, unroll=8))
    replay: ReplayConfig = field(default_factory=lambda: ReplayConfig(min_size=5_000))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: SACOptimConfig = field(default_factory=SACOptimConfig)
    train: SeparateTrainConfig = field(default_factory=SeparateTrainConfig)

    algorithm = "sac"

    def floats_per_step(self, info: EnvInfo) -> int:
        """As :meth:`Config.floats_per_step`; a tanh policy writes the sample before the tanh as well."""
        return super().floats_per_step(info) + (info.action_dim or 0)

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A tanh-Gaussian, or a categorical policy for discrete actions. Noise lasts where no ratio is read."""
        from offtrace.agents.assemble import policy_spec

        discrete, network = info.num_actions is not None, self.network
        lasts = not (discrete or network.smoothing) and parse_spec(self.loss.estimator)[0] in ("one_step", "n_step")
        noise = 0.8**self.env.action_repeat if lasts else 0.0
        return policy_spec(self, info, head="categorical" if discrete else "tanh", critic=None, noise_correlation=noise)

    def build(self) -> tuple[Agent, ReplayData]:
        """As :meth:`Config.build`."""
        return make_sac(self)


def make_sac(config: SACConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import critics_of, group_optimizer, loss_options, read_task, replay_agent, value_of
    from offtrace.agents.targets import soft_update
    from offtrace.modules.losses import DiscreteSACLoss, SACLoss, SACv1Loss
    from offtrace.modules.networks import build_policy

    old = config.loss.version == 1
    info = read_task(config)
    if old and info.num_actions is not None:
        raise ConfigError(
            f"loss.version is 1, which has no form for the discrete actions of {config.task}: it must be 2"
        )
    _check_entropy(config, info)
    spec = config.policy_spec(info)
    policy = build_policy(**spec["arguments"])
    networks = [policy, critics_of(config, info, policy)]
    if old:
        networks.append(value_of(config, info, policy))
    kind: Any = SACv1Loss if old else DiscreteSACLoss if info.num_actions is not None else SACLoss
    options = loss_options(kind, config.loss, "version", "entropy_fraction")
    loss = kind(*networks, priorities=config.replay.prioritized, **options)
    optim = config.optim
    rates = {"actor": optim.lr_actor, "critic": optim.lr_critic, "value": optim.lr_critic, "alpha": optim.lr_alpha}
    return replay_agent(
        config, info, loss, loss.actor, spec,
        optimizer=group_optimizer(loss, rates),
        after_update=soft_update(loss, optim.tau),
    )  # fmt: skip


def _check_entropy(config: SACConfig, info: EnvInfo) -> None:
    wanted = config.loss.target_entropy
    if wanted == "auto":
        return
    if info.num_actions is None and wanted > 0:
        raise ConfigError(
            f"loss.target_entropy is {wanted}, which is for discrete actions; those of {config.task} are continuous: "
            "it must be auto, or at most 0"
        )
    if info.num_actions is not None and wanted >= math.log(info.num_actions):
        raise ConfigError(
            f"loss.target_entropy is {wanted}; it must be below log({info.num_actions}) = "
            f"{math.log(info.num_actions):.3f}, the entropy of uniform actions in {config.task}"
        )


def control_config() -> SACConfig:
    """dm_control."""
    config = SACConfig()
    config.loss.alpha_init = 0.1  # pytorch_sac's for dm_control, whose rewards are at most 1
    config.optim.lr_critic = 1e-3  # with the policy's 3e-4, one of two cartpole-swingup runs stayed at 650
    return config


def discrete_config() -> SACConfig:
    """CartPole with discrete actions."""
    config = control_config()
    config.env.task, config.env.num_envs = "CartPole-v1", 4
    config.replay.samples_per_insert, config.replay.min_size = 128.0, 1_000
    config.optim.lr_actor = config.optim.lr_critic = 1e-3
    config.optim.tau = 0.02
    config.loss.target_entropy = 0.2  # 0.98 log 2, the usual, is next to a coin
    config.train.total_frames, config.train.eval_every = 30_000, 5_000
    return config


def pixel_config() -> SACConfig:
    """dm_control from images."""
    config = control_config()
    config.env.pixels, config.env.action_repeat = True, 4
    config.network.hidden = [256, 256, 256]
    config.replay.capacity = 300_000  # 6.4 GB: of the three stacked frames each is stored once
    return config


def v1_config() -> SACConfig:
    """The first version: value network, and a reward scale for the temperature, 5 to 20 for Gym's larger rewards."""
    config = SACConfig()
    config.loss.version, config.loss.reward_scale = 1, 20.0
    config.optim.lr_critic = 1e-3  # as control_config
    return config
