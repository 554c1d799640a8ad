"""From a configuration, a loss and a policy to agent and data: what every algorithm's file calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from offtrace.agents.agent import Agent, Update
from offtrace.agents.config import (
    Config,
    ConfigError,
    MixedConfig,
    OffPolicyConfig,
    ReplayConfig,
    RolloutConfig,
    SeparateNetworksConfig,
)
from offtrace.agents.config.off_policy import check_budget
from offtrace.agents.config.optim import AdamConfig
from offtrace.agents.config.resources import check_memory, check_rings
from offtrace.agents.data import Learner, MixedData, ReplayData, RolloutData
from offtrace.agents.data.acting import rollout_collector
from offtrace.agents.data.rollouts import RolloutHook
from offtrace.agents.data.store import ReplayHook
from offtrace.agents.optim import OptimizerFactory, make_optimizer
from offtrace.agents.runs.folders import RUNS
from offtrace.modules.envs import EnvInfo, env_info
from offtrace.modules.keys import OBSERVATION, VALID
from offtrace.modules.losses import burn_in
from offtrace.modules.networks import (
    Critic,
    DiscreteCritic,
    Policy,
    StateValue,
    build_critic,
    build_value,
    share_normalizer,
)
from offtrace.modules.networks.normalise import of_all_ranks
from offtrace.modules.replay import LazyPrioritized, Prioritized, Replay, Sampler, Uniform


def read_task(config: Config) -> EnvInfo:
    """What the task of ``config``, which is validated, shows and takes.

    Raises:
        ConfigError: when the agent cannot act in the task, or the network cannot read it.
        ValueError: when the task is unknown or cannot be made.
    """
    info = env_info(config.task, **config.env_options())
    config.check_actions(info.kind)
    encoder = config.network.encoder
    if isinstance(info.observation_shape, dict):
        if ":" not in encoder:
            raise ConfigError(
                f"network.encoder is {encoder}, and env.flatten false leaves the observations of {config.task} a "
                "dictionary; it must be package.module:function, an own network that reads them"
            )
    else:
        config.network.check_reads(config.task, len(info.observation_shape) == 3)
    return info


def network_arguments(config: Config, info: EnvInfo) -> dict[str, Any]:
    """What policy and critics are both built from, as plain values."""
    shape = info.observation_shape
    images = not isinstance(shape, dict) and len(shape) == 3
    encoder = config.network.encoder
    arguments = {
        "network": ("shallow" if images else config.network.vector_encoder) if encoder == "auto" else encoder,
        "observation_shape": {k: list(v) for k, v in shape.items()} if isinstance(shape, dict) else list(shape),
        "num_actions": info.num_actions,
        "action_dim": info.action_dim,
        "masked": info.masked,
        "activation": config.network.activation,
        "normalize": config.network.normalize and not images,
        "channels_last": _channels_last(config),
    }
    return arguments


def policy_spec(config: Config, info: EnvInfo, **more: Any) -> dict[str, Any]:
    """Plain values from which :func:`offtrace.modules.networks.build_policy` builds the policy again.

    Args:
        config: its group ``network`` says the sizes.
        info: of the task.
        more: further arguments of the builder: head, critic and their options.
    """
    head_options = dict(more.pop("head_options", {}))
    if config.network.init_scale is not None:
        if info.action_dim is None:
            raise ConfigError(
                f"network.init_scale is {config.network.init_scale}; the actions of {config.task} are discrete: it "
                "must be null"
            )
        head_options["init_scale"] = config.network.init_scale
    arguments = {
        **network_arguments(config, info),
        "hidden": config.network.hidden,
        "recurrent": config.network.recurrent or None,
        "head_options": head_options,
        **more,
    }
    if isinstance(config.network, SeparateNetworksConfig):
        for name in ("smoothing", "noise_correlation"):
            value = getattr(config.network, name)
            if value and info.num_actions is not None:
                raise ConfigError(f"network.{name} is {value}; {config.task} has discrete actions: it must be 0")
            if value is not None:
                arguments[name] = value
    return {"builder": "build_policy", "arguments": arguments}


def critics_of(config: Config, info: EnvInfo, policy: Policy, **more: Any) -> Critic | DiscreteCritic:
    """The critics that the group ``network`` of ``config`` describes; they normalise observations as ``policy`` does.

    Raises:
        ConfigError: on distributions over the values of discrete actions.
    """
    network: Any = config.network
    if more.get("atoms") and info.num_actions is not None:
        raise ConfigError(
            f"network.atoms is {more['atoms']}, which needs continuous actions; those of {config.task} are discrete: "
            "it must be 0"
        )
    arguments = network_arguments(config, info)
    del arguments["masked"]
    critics = build_critic(**arguments, hidden=network.critic_hidden, critics=network.critics, **more)
    if arguments["normalize"]:
        share_normalizer(policy.network, critics)
    return critics


def value_of(config: Config, info: EnvInfo, policy: Policy) -> StateValue:
    """A state value with a network of its own, of the critics' sizes; it normalises observations as ``policy`` does."""
    network: Any = config.network
    arguments = network_arguments(config, info)
    for name in ("num_actions", "action_dim", "masked"):
        del arguments[name]
    value = build_value(**arguments, hidden=network.critic_hidden)
    if arguments["normalize"]:
        share_normalizer(policy.network, value)
    return value


def loss_options(loss: type[LossModule], group: Any, *ignored: str) -> dict[str, Any]:
    """The fields of ``group`` that are arguments of ``loss``.

    Args:
        loss: the class.
        group: a configuration's ``loss``.
        ignored: fields that are no arguments.

    Raises:
        ConfigError: when a field that the loss has not got was changed.
    """
    known = inspect.signature(loss).parameters
    found = {}
    for field in fields(group):
        value = getattr(group, field.name)
        if field.name in known:
            found[field.name] = value
        elif field.name not in ignored and value != field.default:
            raise ConfigError(
                f"loss.{field.name} is {value}; {loss.__name__} has no such argument: it must be {field.default}"
            )
    return found


def rollout_agent(
    config: RolloutConfig,
    info: EnvInfo,
    loss: LossModule,
    policy: nn.Module,
    spec: dict[str, Any],
    *,
    optimizer: OptimizerFactory | None = None,
    update: Update | None = None,
    after_update: Callable[[int], None] | None = None,
    on_rollout: RolloutHook | None = None,
) -> tuple[Agent, RolloutData]:
    """Agent and data of an algorithm on rollouts.

    Args:
        config: validated.
        info: of the task.
        loss, policy: the loss, and the policy inside it.
        spec: of the policy.
        optimizer: in place of the one that the group ``optim`` says.
        update: in place of one gradient step.
        after_update: called with the number of updates after each.
        on_rollout: sees each whole rollout once, before it is dealt; the scalars that it returns are logged.
    """
    agent = _agent(config, loss, policy, spec, optimizer=optimizer, update=update, after_update=after_update)
    hooks = [hook for hook in (_normalizer_update(config, policy), on_rollout) if hook is not None]
    data = RolloutData(
        partial(rollout_collector, config, info.frame_stack, policy),
        total_frames=config.train.total_frames,
        frame_skip=info.frame_skip,
        minibatches=config.train.minibatches,
        epochs=config.train.epochs,
        seed=config.train.seed,
        deal="steps" if config.deals_steps else "environments",
        on_rollout=_in_turn(hooks),
    )
    return agent, data


def mixed_agent(
    config: MixedConfig,
    info: EnvInfo,
    loss: LossModule,
    policy: nn.Module,
    spec: dict[str, Any],
    *,
    optimizer: OptimizerFactory | None = None,
    after_update: Callable[[int], None] | None = None,
) -> tuple[Agent, MixedData | RolloutData]:
    """Agent and data of an algorithm on fresh rollouts and replayed ones; arguments as of :func:`rollout_agent`.

    Raises:
        ConfigError: when the replay does not fit the machine, or the task.
    """
    if not config.replay.form:
        return rollout_agent(config, info, loss, policy, spec, optimizer=optimizer, after_update=after_update)
    check_memory(config, info, RUNS, gpu=_gpu_memory(config))
    check_rings(config, info)
    agent = _agent(config, loss, policy, spec, optimizer=optimizer, after_update=after_update)
    data = MixedData(
        partial(rollout_collector, config, info.frame_stack, policy),
        partial(_replay, config, info),
        total_frames=config.train.total_frames,
        min_size=config.replay.min_size,
        **config.replay.form,
        frame_skip=info.frame_skip,
        minibatches=config.train.minibatches,
        epochs=config.train.epochs,
        seed=config.train.seed,
        on_rollout=_normalizer_update(config, policy),
        on_replayed=_state_renewal(config, policy),
    )
    return agent, data


def replay_agent(
    config: OffPolicyConfig,
    info: EnvInfo,
    loss: LossModule,
    policy: nn.Module,
    spec: dict[str, Any],
    *,
    optimizer: OptimizerFactory | None = None,
    after_update: Callable[[int], None] | None = None,
) -> tuple[Agent, ReplayData]:
    """Agent and data of an algorithm on replayed data; arguments as of :func:`rollout_agent`.

    Raises:
        ConfigError: when the replay does not fit the machine, or the task.
    """
    check_memory(config, info, RUNS, gpu=_gpu_memory(config))
    check_rings(config, info)
    check_budget(config, info.frame_skip)
    agent = _agent(config, loss, policy, spec, optimizer=optimizer, after_update=after_update)
    data = ReplayData(
        partial(rollout_collector, config, info.frame_stack, policy),
        partial(_replay, config, info),
        total_frames=config.train.total_frames,
        batch_size=config.replay.batch_size,
        samples_per_insert=config.replay.samples_per_insert,
        min_size=config.replay.min_size,
        frame_skip=info.frame_skip,
        updates_per_step=config.train.updates_per_step,
        on_rollout=_normalizer_update(config, policy),
        on_replayed=_state_renewal(config, policy),
    )
    return agent, data


def _agent(
    config: Any,
    loss: LossModule,
    policy: nn.Module,
    spec: dict[str, Any],
    *,
    optimizer: OptimizerFactory | None,
    after_update: Callable[[int], None] | None,
    update: Update | None = None,
) -> Agent:
    """The agent of a configuration whose group ``optim`` says optimiser, schedule and clip."""
    optim, capture = config.optim, config.train.capture
    if capture != "none" and not torch.cuda.is_available():
        raise ConfigError(f"train.capture is {capture}, which needs a GPU, and torch finds none here: it must be none")
    if capture != "none" and update is not None:
        raise ConfigError(
            f"train.capture is {capture}; an update of {config.algorithm} is a search in which the host looks at every "
            "step: it must be none"
        )
    return Agent(
        loss,
        policy,
        optimizer=optimizer or make_optimizer(optim.name, lr=optim.lr, eps=optim.eps, decay=optim.decay),
        total_frames=config.train.total_frames,
        schedule=optim.schedule if isinstance(optim, AdamConfig) else "constant",
        clip_grad_norm=optim.clip_grad_norm,
        update=update,
        after_update=after_update,
        compile=config.train.compile,
        capture=capture,
        checkpoint_facts={"policy": spec, **config.checkpoint_facts()},
    )


def group_optimizer(loss: LossModule, rates: dict[str, float], **options: Any) -> OptimizerFactory:
    """The fused Adam with a learning rate for each of the loss's parameter groups; ``options`` go to all."""

    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        groups = loss.param_groups()
        wanted = [{"params": group, "lr": rates[name]} for name, group in groups.items()]
        return torch.optim.Adam(wanted, fused=True, **options)

    return make


def _normalizer_update(config: Config, policy: Any) -> Callable[[TensorDictBase], None] | None:
    """Feeds the observations of a rollout to the policy's normaliser; those of all ranks, so that it stays the same."""
    normalizer = policy.network.normalizer if config.network.normalize else None
    if normalizer is None:
        return None

    def update(rollout: TensorDictBase) -> None:
        device = next(normalizer.buffers()).device  # Lightning moves it after this
        found = rollout[OBSERVATION]
        valid = rollout.get(VALID, None)
        if valid is None:
            valid = torch.ones(*rollout.batch_size, 1, dtype=torch.bool)
        valid = of_all_ranks(valid.flatten(0, 1).to(device))
        if isinstance(found, TensorDictBase):  # images are not normalised: they need not cross
            vectors = {name: found[name].flatten(0, 1).to(device) for name in normalizer.names}
            normalizer.update({name: of_all_ranks(vector) for name, vector in vectors.items()}, valid)
        else:
            normalizer.update(of_all_ranks(found.flatten(0, 1).to(device)), valid)

    return update


def _state_renewal(config: OffPolicyConfig | MixedConfig, policy: nn.Module) -> ReplayHook | None:
    """Renews the recurrent state of replayed sequences by the steps in front of them, where the configuration asks."""
    steps = config.samples.length if config.replay.whole_episodes else config.replay.burn_in
    return partial(burn_in, policy, steps=steps) if steps else None


def _in_turn(hooks: list[RolloutHook]) -> RolloutHook:
    """Calls one after the other, and returns what all of them do."""

    def call(rollout: TensorDictBase) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for hook in hooks:
            found |= hook(rollout) or {}
        return found

    return call


def _takes_gpu(config: Config) -> bool:
    return config.train.accelerator != "cpu" and torch.cuda.is_available()


def _channels_last(config: Config) -> bool | None:
    given = config.network.channels_last
    return True if given is None and _takes_gpu(config) else given


def _gpu_memory(config: Config) -> int | None:
    """Bytes, of the first GPU; None where the learner takes none."""
    return int(torch.cuda.get_device_properties(0).total_memory) if _takes_gpu(config) else None


def _replay(config: OffPolicyConfig | MixedConfig, info: EnvInfo, learner: Learner, path: Path | None) -> Replay:
    replay, length = config.replay, config.samples.length
    sampler: Sampler = Uniform()
    if isinstance(replay, ReplayConfig) and replay.sampler == "prioritized":
        sampler = Prioritized(replay.alpha, replay.beta)
    elif isinstance(replay, ReplayConfig) and replay.sampler == "lazy":
        sampler = LazyPrioritized(replay.alpha, replay.beta, replay.epsilon)
    return Replay(
        replay.capacity,
        num_envs=config.env.num_envs,
        num_workers=max(1, config.collector.num_workers),
        batch_size=config.sequences_per_batch,
        length=length,
        pad=length > 1,
        overlap=replay.overlap,
        storage=replay.storage,
        path=path if replay.storage == "memmap" else None,
        seed=config.train.seed + 7919 * learner.rank,
        device=learner.device if replay.device == "cuda" else "cpu",
        frame_stack=info.frame_stack,
        sampler=sampler,
        burn_in=replay.burn_in,
        whole_episodes=replay.whole_episodes,
    )
