"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1801.01290, 1812.05905; discrete: Christodoulou 2019, 1910.07207)."""

from __future__ import annotations

import math
from typing import Any

from offtrace.agents.agent import Agent
from offtrace.agents.config_base import ConfigError
from offtrace.agents.replay_data import ReplayData
from offtrace.agents.replayed import group_optimizer, make_data, network_options, task_info
from offtrace.agents.sac_config import SACConfig
from offtrace.agents.targets import soft_update
from offtrace.modules.envs import EnvInfo
from offtrace.modules.losses import DiscreteSACLoss, SACLoss, SACv1Loss
from offtrace.modules.networks import build_actor, build_critic, build_value, share_normalizer


def make_sac(config: SACConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``; nothing is started yet.

    The networks are initialised from torch's global generator, so seed it first.

    Raises:
        ValueError: if the task is unknown or the agent cannot act in it.
    """
    info = task_info(config)
    _check_entropy(config, info)
    description = policy_description(config, info)
    actor = build_actor(**description["arguments"])
    shared = network_options(config, info)
    critic = build_critic(**shared, hidden=config.network.critic_hidden, critics=config.network.critics)
    options: dict[str, Any] = {
        "gamma": config.loss.gamma, "target": config.loss.target, "n_step": config.loss.n_step,
        "reward_scale": config.loss.reward_scale,
    }  # fmt: skip
    loss: SACLoss | DiscreteSACLoss | SACv1Loss
    if config.loss.version == 1:
        if info.num_actions is not None:
            raise ConfigError(f"loss.version is 1, which has no form for the discrete actions of {config.task}; use 2")
        shared.pop("action_dim"), shared.pop("num_actions")
        value = build_value(**shared, hidden=config.network.critic_hidden)
        if config.network.normalize:
            share_normalizer(actor.actor, critic, value)
        loss = SACv1Loss(actor, critic, value, **options)
    else:
        options |= {
            "lmbda": config.loss.lmbda, "alpha_init": config.loss.alpha_init, "fixed_alpha": config.loss.fixed_alpha,
            "target_entropy": config.loss.target_entropy, "alpha_loss": config.loss.alpha_loss,
        }  # fmt: skip
        if config.network.normalize:
            share_normalizer(actor.actor, critic)
        kind = SACLoss if info.num_actions is None else DiscreteSACLoss
        loss = kind(actor, critic, **options)
    rates = {"actor": config.optim.lr_actor, "critic": config.optim.lr_critic, "value": config.optim.lr_critic}
    agent = Agent(
        loss,
        loss.actor,
        optimizer=group_optimizer(loss, rates | {"alpha": config.optim.lr_alpha}),
        total_frames=config.train.total_frames,
        schedule="constant",
        clip_grad_norm=config.optim.clip_grad_norm,
        after_update=soft_update(loss, config.optim.tau),
        compile=config.train.compile,
        description={"policy": description, **config.description()},
    )
    return agent, make_data(config, loss.actor, info)


def _check_entropy(config: SACConfig, info: EnvInfo) -> None:
    wanted = config.loss.target_entropy
    most = math.log(info.num_actions) if info.num_actions is not None else math.inf
    if wanted != "auto" and wanted >= most:
        raise ConfigError(
            f"loss.target_entropy is {wanted}; it must be below log({info.num_actions}) = {most:.3f}, the entropy of "
            f"uniform actions in {config.task}"
        )
    if wanted != "auto" and info.num_actions is None and wanted > 0:
        raise ConfigError(
            f"loss.target_entropy is {wanted}, which is for discrete actions; those of {config.task} are continuous: "
            "it must be auto, or at most 0"
        )


def policy_description(config: SACConfig, info: EnvInfo) -> dict[str, Any]:
    """Plain values from which the policy is built again."""
    kind = "tanh" if info.num_actions is None else "categorical"
    arguments = {
        **network_options(config, info), "kind": kind, "hidden": config.network.hidden,
        "smoothing": config.network.smoothing,
    }  # fmt: skip
    return {"builder": "build_actor", "arguments": arguments}
