"""MPO and DMPO (Abdolmaleki et al. 2018, arXiv 1806.06920), their discrete form, and V-MPO (1909.12238)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from offtrace.agents.acting import rollout_collector
from offtrace.agents.agent import Agent
from offtrace.agents.config_base import ConfigError
from offtrace.agents.data import OnPolicyData
from offtrace.agents.impala import actor_critic_description
from offtrace.agents.mpo_config import MPOConfig, VMPOConfig
from offtrace.agents.replay_data import ReplayData
from offtrace.agents.replayed import group_optimizer, make_data, network_options, task_info
from offtrace.agents.targets import hard_update
from offtrace.modules.envs import EnvInfo, env_info
from offtrace.modules.losses import DiscreteMPOLoss, MPOLoss, VMPOLoss
from offtrace.modules.networks import build_actor, build_critic, build_policy, share_normalizer

ATOMS = 51


def make_mpo(config: MPOConfig) -> tuple[Agent, ReplayData]:
    """The agent and the data module of ``config``; nothing is started yet.

    The networks are initialised from torch's global generator, so seed it first.

    Raises:
        ValueError: if the task is unknown or the agent cannot act in it.
    """
    info = task_info(config)
    description = policy_description(config, info)
    policy = build_actor(**description["arguments"])
    critic = build_critic(
        **network_options(config, info), hidden=config.network.critic_hidden, critics=config.network.critics,
        atoms=ATOMS if config.loss.critic == "categorical" else 0, v_max=config.loss.v_max,
    )  # fmt: skip
    if config.network.normalize:
        share_normalizer(policy.actor, critic)
    shared: dict[str, Any] = {
        "gamma": config.loss.gamma, "target": config.loss.target, "n_step": config.loss.n_step,
        "lmbda": config.loss.lmbda, "epsilon": config.loss.epsilon,
    }  # fmt: skip
    loss: MPOLoss | DiscreteMPOLoss
    if info.num_actions is not None:
        loss = DiscreteMPOLoss(policy, critic, **shared, epsilon_policy=config.loss.epsilon_policy)
    else:
        loss = MPOLoss(
            policy, critic, **shared, action_dim=info.action_dim, covariance=config.loss.covariance,
            epsilon_mean=config.loss.epsilon_mean, epsilon_cov=config.loss.epsilon_cov,
            action_penalty=config.loss.action_penalty, num_samples=config.loss.num_samples,
        )  # fmt: skip
    rates = {"actor": config.optim.lr_actor, "critic": config.optim.lr_critic, "duals": config.optim.lr_dual}
    agent = Agent(
        loss,
        loss.policy,
        optimizer=group_optimizer(loss, rates),
        total_frames=config.train.total_frames,
        schedule="constant",
        clip_grad_norm=config.optim.clip_grad_norm,
        after_update=hard_update(loss, config.optim.target_every),
        compile=config.train.compile,
        description={"policy": description, **config.description()},
    )
    return agent, make_data(config, loss.policy, info)


def policy_description(config: MPOConfig, info: EnvInfo) -> dict[str, Any]:
    """Plain values from which the policy is built again.

    Raises:
        ConfigError: when the task's actions are discrete and the configuration is for continuous ones.
    """
    kind = "gaussian" if config.loss.covariance == "diagonal" else "full_gaussian"
    if info.num_actions is not None:
        for flag, value, usual in (
            ("loss.critic", config.loss.critic, "scalar"),
            ("loss.covariance", config.loss.covariance, "diagonal"),
        ):
            if value != usual:
                raise ConfigError(
                    f"{flag} is {value}, which needs continuous actions; those of {config.task} are discrete"
                )
        kind = "categorical"
    arguments = {
        **network_options(config, info), "kind": kind, "hidden": config.network.hidden,
        "init_scale": config.network.init_scale, "smoothing": config.network.smoothing,
    }  # fmt: skip
    return {"builder": "build_actor", "arguments": arguments}


def make_vmpo(config: VMPOConfig) -> tuple[Agent, OnPolicyData]:
    """The agent and the data module of ``config``; nothing is started yet.

    Raises:
        ValueError: if the environment is unknown or the agent cannot act in it.
    """
    info = env_info(config.task, **config.env_options())
    description = actor_critic_description(config, info)
    loss = VMPOLoss(build_policy(**description["arguments"]), **asdict(config.loss))
    agent = Agent(
        loss,
        loss.policy,
        optimizer=partial(_vmpo_optimizer, loss, config),
        total_frames=config.train.total_frames,
        schedule=config.optim.schedule,
        clip_grad_norm=config.optim.clip_grad_norm,
        after_update=lambda updates: loss.update_values(),
        description={"policy": description, **config.description()},
    )
    data = OnPolicyData(
        partial(rollout_collector, config, loss.policy),
        total_frames=config.train.total_frames,
        frame_skip=info.frame_skip,
        minibatches=config.train.minibatches,
        epochs=config.train.epochs,
        seed=config.train.seed,
    )
    return agent, data


def _vmpo_optimizer(loss: VMPOLoss, config: VMPOConfig, parameters: Iterable[Tensor]) -> Optimizer:
    groups = [{"params": group} for group in loss.param_groups().values()]
    return torch.optim.Adam(groups, lr=config.optim.lr, eps=config.optim.eps)
