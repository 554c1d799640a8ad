"""What a replay takes of the machine, once the task's shapes are known."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from offtrace.agents.config.base import ConfigError, count
from offtrace.agents.config.mixed import MixedConfig
from offtrace.agents.config.off_policy import OffPolicyConfig
from offtrace.agents.config.replay import ReplayConfig

if TYPE_CHECKING:
    from offtrace.modules.envs import EnvInfo


def bytes_per_step(config: OffPolicyConfig | MixedConfig, info: EnvInfo) -> int:
    """What a step takes in the replay: what environment and policy write, 8 bytes of version and the bookkeeping."""
    shapes = info.observation_shape
    several = list(shapes.values()) if isinstance(shapes, dict) else [shapes]
    observation = sum(math.prod(shape) * (1 if len(shape) == 3 else 4) for shape in several) // info.frame_stack
    mask = info.num_actions or 0 if info.masked else 0
    sampler = config.replay.sampler if isinstance(config.replay, ReplayConfig) else "uniform"
    books = {"uniform": 17, "prioritized": 18, "lazy": 21}[sampler]
    return observation + mask + 4 * (config.floats_per_step(info) + 2) + books  # two: log-probability and reward


def check_memory(config: OffPolicyConfig | MixedConfig, info: EnvInfo, runs: Path, *, gpu: int | None) -> None:
    """Refuse what memory or disk cannot hold before it is asked for: an hour later it would end the run.

    Args:
        config: with a replay.
        info: of the task.
        runs: folder of the runs, whose disk files would lie on.
        gpu: bytes of the GPU's memory; None where the learner has none.

    Raises:
        ConfigError: one sentence.
    """
    if config.replay.device == "cuda":
        return _check_gpu(config.replay.capacity, bytes_per_step(config, info), gpu)
    in_files = config.replay.storage == "memmap"
    if in_files:
        folder = runs if runs.exists() else Path()
        place, room = "the disk has {:.1f} free", shutil.disk_usage(folder).free
    elif hasattr(os, "sysconf"):
        place, room = "this machine has {:.1f}", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return None
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
    return None


def _check_gpu(capacity: int, step: int, gpu: int | None) -> None:
    """Refuse a replay of steps of ``step`` bytes that the learner's GPU, of ``gpu`` bytes, does not hold."""
    if gpu is None:
        raise ConfigError("replay.device is cuda, and the learner has no GPU that torch can use: it must be cpu")
    needed, room = capacity * step, gpu * 4 // 5  # the rest is for networks and what an update computes
    if needed > room:
        raise ConfigError(
            f"replay.capacity is {capacity}; steps of {step} bytes take {needed / 1e9:.1f} GB, and four fifths "
            f"of the GPU's memory are {room / 1e9:.1f}: it must be at most {room // step}, or replay.device cpu"
        )


def check_rings(config: OffPolicyConfig | MixedConfig, info: EnvInfo) -> None:
    """Refuse a replay too small for frames that are stored once: an episode takes slots for its first older frames.

    Raises:
        ConfigError: one sentence.
    """
    rings, unroll = config.env.num_envs * max(1, config.collector.num_workers), config.collector.unroll
    # every step of a rollout may be an episode
    least = rings * ((info.frame_stack + 1) * unroll + config.samples.length)
    if info.frame_stack > 1 and config.replay.capacity < least:
        raise ConfigError(
            f"replay.capacity is {config.replay.capacity}; for {count(rings, 'environment')} with stacks of "
            f"{info.frame_stack} frames and a collector.unroll of {unroll} it must be at least {least}"
        )
