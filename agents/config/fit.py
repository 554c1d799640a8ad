"""How actors and learner share a machine where nobody has said it; docs/how_it_works.md has the rules as a table."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from offtrace.agents.config.base import Config, ConfigError, count
from offtrace.agents.config.machine import Machine

FEW = 4
"""Cores of a learner from which on there are other ways to share them than the preset's."""
ACTORS = 32
"""Most actor processes: one process takes in the rollouts of all."""
GAMES = 32
"""Environments of an actor that asks a server, so that a request is worth its cost."""
UNROLLS = 128
"""Most unrolls in a batch, over all learners: from larger ones the frames of a run make too few updates."""
MEGABYTES = {"shallow": 0.2, "resnet": 3.0}
"""What a step of a minibatch takes of a GPU's memory, for the backward pass."""


class Fit(NamedTuple):
    """What was chosen.

    Attributes:
        values: by flag, such as ``collector.num_workers``; others stay as they are.
        why: in a few words.
    """

    values: dict[str, Any]
    why: str


def fit(config: Config, given: Collection[str], machine: Machine) -> str:
    """Changes ``config`` to what fits the machine, except for what is given.

    Args:
        config: a preset with the user's flags; need not be right.
        given: flags that the user has set, such as ``env.num_envs``.
        machine: which shall run it.

    Returns:
        The machine, why, and what, in a line.
    """
    found = Fit({}, "as the preset says")
    try:
        for part in (config.env, config.network, config.collector, config.train):
            part.check("")
        found = choose(config, given, machine)
    except ConfigError:
        pass  # whoever checks the whole configuration tells it
    for flag, value in found.values.items():
        if flag not in given:
            group, name = flag.split(".")
            setattr(getattr(config, group), name, value)
    why = found.why + (", but for what is given" if found.values.keys() & {*given} else "")
    gpus = f"{count(machine.gpus, 'GPU')} of {machine.gpu_memory:.0f} GB" if machine.gpus else "no GPU"
    return f"{count(machine.cores, 'core')}, {gpus}: {why} ({_acting(config)})"


def _acting(config: Config) -> str:
    collector = config.collector
    actors = count(collector.num_workers, "actor") if collector.num_workers else "the learner's process"
    told = [f"{actors} of {count(config.env.num_envs, 'environment')}"]
    if collector.emulator_threads > 1:
        told.append(f"{collector.emulator_threads} emulator threads")
    if collector.acting == "server" or collector.device != "cpu":
        told.append(f"{collector.acting} on {collector.device}")
    unrolls = getattr(config.train, "unrolls", 0)
    return ", ".join([*told, *([f"{unrolls} unrolls in a batch"] if unrolls else [])])


def choose(config: Config, given: Collection[str], machine: Machine) -> Fit:
    """What :func:`fit` sets, by the machine, the task, the network and what is given.

    The groups of ``config`` are right, each by itself.
    """
    env, collector = config.env, config.collector
    cores = max(1, machine.cores // config.train.devices)
    if machine.cores == 1 and collector.num_workers == 1 and "collector.acting" not in given:
        return Fit({"collector.num_workers": 0}, "one core, on which acting and learning take turns")
    if not collector.num_workers:
        threads = min(cores, env.num_envs) if cores >= FEW and env.is_atari else 1
        return Fit({"collector.emulator_threads": threads}, "acting and learning take turns")
    if not config.actors_fit_machine:
        return Fit({}, "as the preset says, because more actors would change what is learnt from")
    if not env.shows_images and config.network.encoder not in MEGABYTES:
        return Fit({}, "as the preset says, because one actor is enough for vectors")
    if cores < FEW and machine.gpus and config.train.accelerator != "cpu" and config.network.encoder == "resnet":
        return Fit({"collector.device": "cuda"}, f"fewer than {FEW} cores a learner, and a GPU for the ResNet")
    if cores < FEW:
        return Fit({}, f"as the preset says for fewer than {FEW} cores a learner")
    return _spread(config, given, machine, cores)


def _spread(config: Any, given: Collection[str], machine: Machine, cores: int) -> Fit:
    """Actors of images beside a learner, on :data:`FEW` cores or more."""
    collector, train = config.collector, config.train
    gpu = bool(machine.gpus) and train.accelerator != "cpu"
    acting, device = collector.acting, collector.device
    if "collector.acting" not in given:
        acting = "server" if gpu and (device != "cpu" or "collector.device" not in given) else "copies"
    if "collector.device" not in given:
        device = "cuda" if gpu and acting == "server" else "cpu"
    copies_on_gpu = acting == "copies" and device != "cpu"

    if gpu:
        room = cores - 2
        why = "all cores but two " + ("act" if device == "cpu" else "step environments, and the GPU acts")
    elif train.epochs == 1:
        room, why = cores * 3 // 4, "three quarters of the cores act, the others learn"
    else:  # to learn from a step four times takes a core about as long as to make it
        room, why = cores // 2, "half of the cores act, the others learn"
    if acting == "server" and not gpu:
        room -= 1

    workers, threads = collector.num_workers, collector.emulator_threads
    if "collector.emulator_threads" not in given:
        pair = workers if "collector.num_workers" in given else 2  # one acts while the games of the other are stepped
        threads = max(1, room // pair) if copies_on_gpu and config.env.is_atari else 1
    if "collector.num_workers" not in given:
        workers = max(1, min(room // threads, ACTORS))
    times = threads if copies_on_gpu else GAMES // config.env.num_envs if acting == "server" else 1
    envs, unrolls = _batch(config, given, workers, times, machine.gpu_memory if gpu else math.inf)
    return Fit(
        {
            "env.num_envs": envs,
            "train.unrolls": unrolls,
            "collector.num_workers": workers,
            "collector.emulator_threads": threads,
            "collector.acting": acting,
            "collector.device": device,
        },
        why,
    )


def _batch(config: Any, given: Collection[str], workers: int, times: int, memory: float) -> tuple[int, int]:
    """Environments of each of ``workers`` actors, up to ``times`` the preset's, and unrolls in a batch."""
    train, envs, unrolls = config.train, config.env.num_envs, config.train.unrolls
    step = MEGABYTES["resnet" if config.network.encoder == "resnet" else "shallow"]
    room = memory / 2 * 1e3 / step / config.collector.unroll * train.minibatches  # unrolls
    most = max(1, min(UNROLLS // train.devices, int(min(room, UNROLLS))))
    if "train.unrolls" in given and unrolls:
        if "env.num_envs" not in given:  # the nearest number that gives as many, where the actors can
            divisors = [number for number in range(1, unrolls + 1) if not unrolls % number]
            envs = min((x for x in divisors if x * workers >= unrolls), key=lambda x: abs(x - envs))
        return envs, unrolls
    if train.minibatches * train.epochs == 1:  # the published form: the batch keeps its size
        unrolls, half = envs, math.gcd(envs, 16)
        if "env.num_envs" not in given and half * workers >= envs:
            envs = half
    else:
        if "env.num_envs" not in given:  # all actors have no more than four batches, or the data gets old
            envs *= max(1, min(times, most // envs, 4 * most // (envs * workers)))
        unrolls = envs * max(1, min(math.ceil(workers / 2), most // envs))
    return envs, unrolls if unrolls > envs else 0
