"""IMPALA, a V-trace actor-critic (Espeholt et al. 2018, arXiv 1802.01561): from a configuration to agent and data."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential

from offtrace.agents.acting import rollout_collector
from offtrace.agents.agent import Agent
from offtrace.agents.config import ConfigError, ImpalaConfig, OnPolicyConfig
from offtrace.agents.data import OnPolicyData
from offtrace.agents.optim import make_optimizer
from offtrace.modules.envs import EnvInfo, env_info
from offtrace.modules.losses import ImpalaLoss, QActorCriticLoss
from offtrace.modules.networks import build_policy


def make_impala(config: ImpalaConfig) -> tuple[Agent, OnPolicyData]:
    """The agent and the data module of ``config``; nothing is started yet.

    The network is initialised from torch's global generator, so seed it first.

    Raises:
        ValueError: if the environment is unknown or the agent cannot act in it.
    """
    info = env_info(config.task, **config.env_options())
    if config.loss.estimator == "retrace" and info.num_actions is None:
        raise ConfigError(
            f"loss.estimator is retrace, which needs discrete actions; those of {config.task} are continuous: it must "
            "be another, such as vtrace"
        )
    description = actor_critic_description(config, info)
    policy = build_policy(**description["arguments"])
    loss = make_loss(config, policy)
    agent = Agent(
        loss,
        policy,
        optimizer=make_optimizer(config.optim.name, lr=config.optim.lr, eps=config.optim.eps, decay=config.optim.decay),
        total_frames=config.train.total_frames,
        schedule=config.optim.schedule,
        clip_grad_norm=config.optim.clip_grad_norm,
        description={"policy": description, **config.description()},
    )
    data = OnPolicyData(
        partial(rollout_collector, config, policy),
        total_frames=config.train.total_frames,
        frame_skip=info.frame_skip,
        minibatches=config.train.minibatches,
        epochs=config.train.epochs,
        seed=config.train.seed,
    )
    return agent, data


def make_loss(config: ImpalaConfig, policy: ProbabilisticTensorDictSequential) -> ImpalaLoss | QActorCriticLoss:
    """The loss of the estimator in ``config``.

    Raises:
        ValueError: if the estimator has not got a clip that is set.
    """
    options = asdict(config.loss)
    if config.loss.estimator != "retrace":
        return ImpalaLoss(policy, **options)
    options["trace"] = options.pop("estimator")
    for name in ("rho_clip", "c_clip", "leak"):
        value = options.pop(name)
        if value != 1:
            raise ConfigError(f"loss.{name} is {value:g}; loss.estimator retrace has none: it must be 1")
    return QActorCriticLoss(policy, **options)


def actor_critic_description(config: OnPolicyConfig, info: EnvInfo) -> dict[str, Any]:
    """Plain values from which :func:`offtrace.modules.networks.build_policy` builds the policy again.

    Raises:
        ConfigError: when the network cannot read what the task shows.
    """
    if config.network.encoder in ("shallow", "resnet") and len(info.observation_shape) != 3:
        raise ConfigError(
            f"network.encoder is {config.network.encoder}, and {config.task} shows observations of shape "
            f"{list(info.observation_shape)}; it must be mlp"
        )
    arguments = {
        "network": config.network.encoder,
        "observation_shape": list(info.observation_shape),
        "num_actions": info.num_actions,
        "action_dim": info.action_dim,
        "hidden": config.network.hidden,
        "recurrent": config.network.recurrent or None,
        "masked": info.masked,
        "critic": "q" if getattr(config.loss, "estimator", "") == "retrace" else "v",
        "channels_last": _channels_last(config),
        "popart": getattr(config.network, "popart", False),
    }
    return {"builder": "build_policy", "arguments": arguments}


def _channels_last(config: OnPolicyConfig) -> bool:
    if config.network.channels_last is not None:
        return config.network.channels_last
    return config.train.accelerator != "cpu" and torch.cuda.is_available()
