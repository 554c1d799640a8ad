"""What SAC and MPO share: networks from a configuration, collector, replay, optimiser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.common import LossModule

from offtrace.agents.acting import rollout_collector
from offtrace.agents.config_base import ConfigError
from offtrace.agents.optim import OptimizerFactory
from offtrace.agents.replay_data import ReplayData
from offtrace.agents.replayed_config import ReplayedConfig
from offtrace.agents.runs import RUNS
from offtrace.modules.envs import EnvInfo, env_info
from offtrace.modules.keys import OBSERVATION, VALID
from offtrace.modules.networks import ControlPolicy
from offtrace.modules.replay import Replay


def task_info(config: ReplayedConfig) -> EnvInfo:
    """Shapes of the task.

    Raises:
        ConfigError: when the network cannot read what the task shows, or the target does not fit its actions.
    """
    info = env_info(config.task, **config.env_options())
    images = len(info.observation_shape) == 3
    if images != (config.network.encoder == "shallow"):
        raise ConfigError(
            f"network.encoder is {config.network.encoder}, and {config.task} shows observations of shape "
            f"{list(info.observation_shape)}; it must be {'shallow' if images else 'mlp or layernorm_mlp'}"
        )
    if info.masked:
        raise ConfigError(f"{config.task} has illegal actions, which {config.family} does not know of; use IMPALA")
    if info.num_actions is None and config.loss.target == "tree_backup":
        config.refuse_tree_backup()
    _check_memory(config, info)
    _check_rings(config, info)
    if info.num_actions is not None and config.network.smoothing:
        raise ConfigError(f"network.smoothing is {config.network.smoothing}; {config.task} has discrete actions")
    return info


def bytes_per_step(config: ReplayedConfig, info: EnvInfo) -> int:
    """What a step takes in the replay: what environment and policy write, 8 bytes of version and 9 of bookkeeping."""
    images = len(info.observation_shape) == 3
    observation = info.observation_size // info.frame_stack * (1 if images else 4)  # of a stack one frame is stored
    size = info.action_dim or 0
    if info.num_actions is not None:
        numbers = 2 + info.num_actions  # an index of 8 bytes, and logits
    elif config.family == "sac":
        numbers = 4 * size  # action, mean, scale, and the sample before the tanh
    else:
        numbers = 2 * size + (size**2 if config.loss.covariance == "full" else size)
    return observation + 4 * (numbers + 2) + 17  # two: log-probability and reward


def _check_memory(config: ReplayedConfig, info: EnvInfo) -> None:
    """What memory or disk cannot hold is refused before it is asked for: an hour later it would end the run."""
    in_files = config.replay.storage == "memmap"
    if in_files:
        folder = RUNS if RUNS.exists() else Path()
        place, room = "the disk has {:.1f} free", shutil.disk_usage(folder).free
    elif hasattr(os, "sysconf"):
        place, room = "this machine has {:.1f}", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    learners, step = config.train.devices, bytes_per_step(config, info)
    step *= 4 if in_files else 1  # two saved ones are kept while a third is written
    needed = config.replay.capacity * step * learners
    if needed > room:
        each = f"steps of {step} bytes" + (", those saved included," if in_files else "")
        each += f" for each of {learners} learners" if learners > 1 else ""
        raise ConfigError(
            f"replay.capacity is {config.replay.capacity}; {each} take {needed / 1e9:.1f} GB, and "
            f"{place.format(room / 1e9)}: it must be below {room // step // learners}"
            + ("" if in_files else ", or replay.storage memmap")
        )


def _check_rings(config: ReplayedConfig, info: EnvInfo) -> None:
    """Where frames are stored once, each episode takes slots for the older frames of its first observation."""
    rings, unroll = config.env.num_envs * max(1, config.collector.num_workers), config.collector.unroll
    # every step of a rollout may be an episode
    least = rings * ((info.frame_stack + 1) * unroll + config.sample_length)
    if info.frame_stack > 1 and config.replay.capacity < least:
        raise ConfigError(
            f"replay.capacity is {config.replay.capacity}; for {rings} environments that stack {info.frame_stack} "
            f"frames and a collector.unroll of {unroll} it must be at least {least}"
        )


def network_options(config: ReplayedConfig, info: EnvInfo) -> dict[str, Any]:
    """What actor and critic are both built from."""
    return {
        "network": config.network.encoder,
        "observation_shape": list(info.observation_shape),
        "action_dim": info.action_dim,
        "num_actions": info.num_actions,
        "normalize": config.network.normalize,
    }


def group_optimizer(loss: LossModule, rates: dict[str, float]) -> OptimizerFactory:
    """Adam with a learning rate for each of the loss's parameter groups."""

    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        groups = loss.param_groups()
        wanted = [{"params": group, "lr": rates[name]} for name, group in groups.items()]
        return torch.optim.Adam(wanted, fused=True)

    return make


def make_data(config: ReplayedConfig, policy: ControlPolicy, info: EnvInfo) -> ReplayData:
    """The data module of ``config``."""
    replay = config.replay
    return ReplayData(
        partial(rollout_collector, config, policy),
        partial(_replay, config, info),
        total_frames=config.train.total_frames,
        batch_size=replay.batch_size,
        samples_per_insert=replay.samples_per_insert,
        min_size=replay.min_size,
        frame_skip=info.frame_skip,
        updates_per_step=config.train.updates_per_step,
        on_rollout=normalizer_update(policy) if config.network.normalize else None,
    )


def normalizer_update(policy: ControlPolicy) -> Callable[[TensorDictBase], None]:
    """Feeds the observations of a rollout to the policy's normaliser; those of all ranks, so that it stays the same."""
    normalizer = policy.actor.normalizer
    assert normalizer is not None

    def update(rollout: TensorDictBase) -> None:
        observations = rollout[OBSERVATION].flatten(0, 1).to(normalizer.mean.device)
        valid = rollout.get(VALID, None)
        valid = torch.ones(len(observations), 1, dtype=torch.bool) if valid is None else valid.flatten(0, 1)
        valid = valid.to(observations.device)
        if torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            everybody = [torch.empty_like(observations) for _ in range(ranks)]
            known = [torch.empty_like(valid) for _ in range(ranks)]
            torch.distributed.all_gather(everybody, observations.contiguous())
            torch.distributed.all_gather(known, valid.contiguous())
            observations, valid = torch.cat(everybody), torch.cat(known)
        normalizer.update(observations, valid)

    return update


def _replay(config: ReplayedConfig, info: EnvInfo, rank: int, path: Path | None) -> Replay:
    return Replay(
        config.replay.capacity,
        num_envs=config.env.num_envs,
        num_workers=max(1, config.collector.num_workers),
        batch_size=config.samples,
        length=config.sample_length,
        pad=config.sample_length > 1,
        storage=config.replay.storage,
        path=path if config.replay.storage == "memmap" else None,
        seed=config.train.seed + 7919 * rank,
        frame_stack=info.frame_stack,
    )
