"""How actors and learner share a machine where nobody has said it; docs/how_it_works.md has the rules as a table."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from offtrace.agents.config.base import Config, ConfigError, check_group, count
from offtrace.modules.machine import Machine

FEW = 4
"""Cores of a learner from which on there are other ways to share them than the preset's."""
ACTORS = 32
"""Most actor processes: one process takes in the rollouts of all."""
GAMES = 4
"""Fewest environments of an actor: with fewer, what a step costs beside them is most of it."""
UNROLLS = 32
"""Most unrolls in a batch, over all learners, where the preset has not more itself: twice those of the default one, so
a run makes half as many updates. Larger batches would make too few of its frames."""
_CHOSEN = (
    "env.num_envs", "train.unrolls", "collector.num_workers", "collector.emulator_threads", "collector.acting",
    "collector.device",
)  # fmt: skip
IMAGES = ("shallow", "resnet")
"""Encoders of images."""


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
            check_group(part, "")
        found = choose(config, given, machine)
    except ConfigError:
        pass  # whoever checks the whole configuration tells it
    for flag, value in found.values.items():
        if flag not in given:
            group, name = flag.split(".")
            setattr(getattr(config, group), name, value)
    why = found.why + (", but for what is given" if {*_CHOSEN, *found.values} & {*given} else "")
    gpus = count(machine.gpus, "GPU") if machine.gpus else "no GPU"
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
    ray = collector.backend == "ray"
    if machine.cores == 1 and collector.num_workers == 1 and "collector.acting" not in given and not ray:
        return Fit({"collector.num_workers": 0}, "one core, on which acting and learning take turns")
    if not collector.num_workers:
        threads = min(cores, env.num_envs) if cores >= FEW and env.is_atari else 1
        return Fit({"collector.emulator_threads": threads}, "acting and learning take turns")
    if not config.actors_fit_machine:
        return Fit({}, "as the preset says, because more actors would change what is learnt from")
    if not env.shows_images and config.network.encoder not in IMAGES:
        return Fit({}, "as the preset says, because one actor is enough for vectors")
    if collector.address:
        if "collector.num_workers" not in given:
            return Fit(
                {}, "as the preset says, because only --collector.num_workers says what of the cluster is for it"
            )
        return _spread(config, given, machine, cores)
    resnet_on_gpu = machine.gpus and config.train.accelerator != "cpu" and config.network.encoder == "resnet"
    if cores < FEW and resnet_on_gpu and not ray:
        return Fit(
            {"collector.device": "cuda"}, f"a learner has fewer than {FEW} cores, and the GPU acts with the ResNet"
        )
    if cores < FEW:
        return Fit({}, f"as the preset says, because a learner has fewer than {FEW} cores")
    return _spread(config, given, machine, cores)


def _spread(config: Any, given: Collection[str], machine: Machine, cores: int) -> Fit:
    """Actors of images beside a learner, on :data:`FEW` cores or more."""
    collector, train = config.collector, config.train
    gpu = bool(machine.gpus) and train.accelerator != "cpu"
    acting, device = collector.acting, collector.device
    if collector.backend == "ray":  # whose actors have copies of the policy, on CPU cores
        given = {*given, "collector.acting", "collector.device"}
    if "collector.acting" not in given:
        acting = "server" if gpu and (device != "cpu" or "collector.device" not in given) else "copies"
    if "collector.device" not in given:
        device = "cuda" if gpu and acting == "server" else "cpu"
    copies_on_gpu = acting == "copies" and device != "cpu"

    if gpu:
        room, which = cores - 2, "all cores but two"
    elif train.epochs == 1:
        room, which = cores * 3 // 4, "three quarters of the cores"
    else:  # to learn from a step four times takes a core about as long as to make it
        room, which = cores // 2, "half of the cores"
    if acting == "server" and not gpu:
        room -= 1

    workers, threads = collector.num_workers, collector.emulator_threads
    if "collector.emulator_threads" not in given:
        pair = workers if "collector.num_workers" in given else 2  # one acts while the games of the other are stepped
        threads = max(1, room // pair) if copies_on_gpu and config.env.is_atari else 1
    most, ahead = max(config.env.num_envs, UNROLLS // train.learners), _ahead(config, gpu=gpu)
    if "collector.num_workers" not in given:
        limit = min(ACTORS, ahead * most // GAMES)
        workers = max(1, min(room // threads, limit))
        which = which if room // threads <= limit else "as many cores as leave the data young"
    why = which + (" act" if device == "cpu" else " step environments, and the GPU acts")
    why += "" if gpu else ", the others learn"
    if collector.address:
        why = "as many actors of the Ray cluster as are given, and batches that keep their data young"
    envs, unrolls = _batch(config, given, workers, ahead, most if workers * threads > 2 else config.env.num_envs)
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


def _ahead(config: Any, *, gpu: bool) -> int:
    """Batches that all actors together may have under way, because each makes their data U updates older.

    Two have a mean lag of 2.5 U where the learner is slower than the actors. Where they need not wait for it, they get
    new weights within a rollout: four have 3 U then.
    """
    updates = config.train.minibatches * config.train.epochs
    return max(2, 8 // updates) * (2 if gpu and config.network.encoder != "resnet" else 1)


def _batch(config: Any, given: Collection[str], workers: int, ahead: int, batch: int) -> tuple[int, int]:
    """Environments of each actor, and ``train.unrolls``: a ``batch`` of the rollouts of as many actors as must be."""
    envs, unrolls = config.env.num_envs, config.train.unrolls
    together = 1
    while workers > ahead * together:
        together *= 2
    if "env.num_envs" not in given:
        if "train.unrolls" in given:
            batch, together = (unrolls, together) if unrolls else (envs, 1)
        while batch % together:
            together -= 1
        envs = batch // together
    return envs, envs * together if together > 1 else 0
