"""From an environment and a policy to a collector."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torchrl.envs import EnvBase

from offtrace.modules.collectors.actors import ActorSpec, actor_seed
from offtrace.modules.collectors.local import LocalBackend
from offtrace.modules.collectors.processes import ProcessBackend
from offtrace.modules.collectors.protocol import Backend, Collector
from offtrace.modules.collectors.ray_backend import RayBackend, RayOptions
from offtrace.modules.collectors.ray_cluster import check_ray
from offtrace.modules.collectors.restarts import MAX_RESTARTS, Restarts
from offtrace.modules.collectors.rollouts import RolloutCollector
from offtrace.modules.collectors.server import ServerOptions
from offtrace.modules.collectors.weights import SharedWeights


def lag_bound(num_workers: int, updates: int, push_interval: int = 1, rollouts_per_batch: int = 1) -> int:
    """Largest policy lag, in learner updates, that a sample can have when it is used.

    Let the learner make U updates on R rollouts that it takes together, and push its weights every P updates. Rollouts
    are taken from the W workers in turn, and a worker begins its next rollout when its last one is taken. Its next one
    is the W-th behind that, and so at most ceil(W / R) takings away: from its beginning until it is taken the learner
    makes at most so many times U updates. The last update on it sees U - 1 more. The weights pushed last were at most
    P - 1 updates old when the rollout began. So

        lag <= ceil(W / R) U + (U - 1) + (P - 1).

    In process (W = 0) the rollout begins when it is asked for, and the formula holds with W = 0.
    """
    return math.ceil(num_workers / rollouts_per_batch) * updates + (updates - 1) + (push_interval - 1)


def make_collector(
    env_fn: Callable[..., EnvBase],
    policy: Any,
    *,
    frames_per_batch: int,
    num_workers: int = 1,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    step_timeout: float = 60.0,
    max_restarts: int = MAX_RESTARTS,
    threads_per_worker: int = 1,
    device: str | torch.device = "cpu",
    frame_stack: int = 1,
    rollouts_per_batch: int = 1,
    server: ServerOptions | None = None,
    backend: Literal["processes", "ray"] = "processes",
    ray: RayOptions | None = None,
) -> Collector:
    """Collector of rollouts ``[N, T]``: in process, in processes of this machine, or on a Ray cluster.

    Args:
        env_fn: called as ``env_fn(seed=...)`` where it acts; gives an environment of batch size ``[N]``. Must pickle.
        policy: a TensorDict policy; the actors get a copy.
        frames_per_batch: N T agent steps, the size of one rollout of one actor.
        num_workers: actor processes. 0: collect in this process, when asked; nothing runs beside the learner then, and
            actions are drawn from the generators of this process, which are left as they are.
        seed, rank, start: the seed of worker w is ``actor_seed(seed, rank, w, start)``. A resumed run gives its frames
            as ``start``, so that it does not meet the start states and the noise of its beginning again. An actor
            that takes the place of one that failed gets a new seed.
        step_timeout: seconds that one step (a reset included) may take in an actor process. Not applied in process.
        max_restarts: most actor processes that may take the place of one that died, hung or raised; see
            :class:`~offtrace.modules.collectors.restarts.Restarts`. Each is told of in a warning. 0: the first such
            fault is raised. In process every error is raised, because nothing there can be replaced.
        threads_per_worker: torch threads of an actor process. Two processes of one thread do more than one of two.
        device: where the actors run their copy of the policy; rollouts are always on the CPU.
        frame_stack: frames that an observation stacks along its first dimension, the newest last, each the one before
            moved by one frame within an episode. Then each frame travels once, a fifth or less of the bytes, and the
            learner puts the stacks together again. 1: observations travel whole.
        rollouts_per_batch: R, rollouts of different actors that are taken together and come as one ``[R N, T]``; at
            most the number of actors.
        server: None: every actor has a copy of the policy. Else one process acts for all actors, on ``device``, and
            makes one batch of the requests that have arrived.
        backend: where the actors run: ``processes`` of this machine, or ``ray``, actors of a Ray cluster, which needs
            ``offtrace[ray]``. Their rollouts each have one version, that of the newest weights when they began; they
            act on the CPU, have the environment variables of their node, and every node must have this package and
            what ``env_fn`` imports.
        ray: which cluster, and where in it; None: one of this machine, for this process alone.

    Raises:
        ValueError: a size is not positive or larger than the actors allow, frames_per_batch does not divide by N, the
            device is not there, what actor processes need does not pickle, Ray is not installed, its cluster cannot be
            reached or has too few CPUs, or an option does not fit the backend.
        EnvironmentFailure: an actor process did not come up; its own message is in the text.
    """
    for name, value, least in (
        ("frames_per_batch", frames_per_batch, 1),
        ("num_workers", num_workers, 0),
        ("max_restarts", max_restarts, 0),
        ("threads_per_worker", threads_per_worker, 1),
        ("frame_stack", frame_stack, 1),
        ("rollouts_per_batch", rollouts_per_batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if rollouts_per_batch > max(1, num_workers):
        raise ValueError(
            f"rollouts_per_batch is {rollouts_per_batch}; they come from different actors, so it must be at most "
            f"{max(1, num_workers)}, their number"
        )
    if server is not None and not num_workers:
        raise ValueError("num_workers is 0; an inference server acts for actor processes: it must be at least 1")
    if backend not in ("processes", "ray"):
        raise ValueError(f"backend is {backend!r}; it must be processes or ray")
    if backend == "ray":
        _check_ray(num_workers, device, server, ray)
    elif ray is not None:
        raise ValueError(f"ray is {ray}, and backend is {backend}: it must be ray, or leave these options out")
    if step_timeout <= 0:
        raise ValueError(f"step_timeout is {step_timeout}; it must be above 0 seconds")
    where = torch.device(device)
    if where.type == "cuda" and (where.index or 0) >= (gpus := torch.cuda.device_count()):
        raise ValueError(f"device is {device}; torch can use {gpus} GPUs here: it must be cpu, or one of those")
    actor = copy.deepcopy(policy).to("cpu")
    shared = SharedWeights(actor, max(num_workers, 1) + (server is not None))
    seed_of = partial(_seed_of, seed, rank, start)
    spec = ActorSpec(
        env_fn, actor, seed_of, frames_per_batch, frame_stack, device, threads_per_worker, server, dict(os.environ)
    )
    runs: Backend
    if num_workers == 0:
        runs = LocalBackend(spec, shared)
    else:
        made = partial(RayBackend, options=ray or RayOptions()) if backend == "ray" else ProcessBackend
        runs = made(spec, shared, num_workers=num_workers, step_timeout=step_timeout, restarts=Restarts(max_restarts))
    return RolloutCollector(
        runs, frames_per_batch=frames_per_batch, frame_stack=frame_stack, rollouts_per_batch=rollouts_per_batch
    )


def _check_ray(
    num_workers: int, device: str | torch.device, server: ServerOptions | None, options: RayOptions | None
) -> None:
    check_ray((options or RayOptions()).address)
    if server is not None:
        raise ValueError("backend is ray, whose actors have a copy of the policy each; server must be None")
    if not num_workers:
        raise ValueError("num_workers is 0, and backend is ray; it must be at least 1")
    if torch.device(device).type != "cpu":
        raise ValueError(f"device is {device}; Ray actors act on the CPU: it must be cpu")


def _seed_of(seed: int, rank: int, start: int, worker: int, restart: int) -> int:
    return actor_seed(seed, rank, worker, start, restart)
