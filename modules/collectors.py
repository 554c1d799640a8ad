"""Rollouts from environments, in the learner's process or from actor processes: nothing dropped, lag bounded."""

from __future__ import annotations

import atexit
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from offtrace.modules.actors import ActorCollector, Link, actor_seed, initialise_process, named_tensors
from offtrace.modules.envs import EnvironmentFailure
from offtrace.modules.keys import NEXT, POLICY_VERSION, VALID
from offtrace.modules.processes import RoundRobinCollector, describe
from offtrace.modules.recycling import Recycler

__all__ = ["RolloutCollector", "lag_bound", "make_collector"]

# Never True at the root of a rollout, or a copy of what ("next", key) holds.
_EXCLUDED = ("done", "terminated", "truncated", "episode_reward", "episode_length", "episode_end", "collector")


def lag_bound(num_workers: int, updates_per_rollout: int, push_interval: int = 1) -> int:
    """Largest policy lag, in learner updates, that a sample can have when it is used.

    Let the learner make U updates on each rollout and push its weights every P updates. Rollouts are taken from the W
    workers in turn, and a worker begins its next rollout when its last one is taken. From then until that next rollout
    is taken the learner works on one rollout of every worker, W U updates; the last update on it sees U - 1 more. The
    weights pushed last were at most P - 1 updates old when the rollout began. So

        lag <= W U + (U - 1) + (P - 1).

    In process (W = 0) the rollout begins when it is asked for, and the formula holds with W = 0.
    """
    return num_workers * updates_per_rollout + (updates_per_rollout - 1) + (push_interval - 1)


class RolloutCollector:
    """An endless iterator of rollouts that owns its actors. Made by :func:`make_collector`.

    Each rollout is a TensorDict ``[N, T]`` (N environments of one actor, time last) that shares memory with nobody. It
    holds what environment and policy wrote, ``"policy_version"`` and ``("next", "policy_version")``: int64 ``[N, T]``,
    the number of pushes whose weights chose the action of the step. Environments whose simulator may fail give
    ``"valid"``, bool ``[N, T, 1]``: False where it failed in the step.

    Attributes:
        collector: the TorchRL collector.
        order: maps N to a permutation of the environments in which to copy the next rollout out, or None. The copy is
            made anyway, so shuffling here is free.
        pin_memory: copy into page-locked memory, from which a transfer to a GPU need not wait.
    """

    def __init__(self, collector: Any, link: Link, *, num_workers: int, frames_per_batch: int) -> None:
        self.collector = collector
        self.num_workers = num_workers
        self.frames_per_batch = frames_per_batch
        self.order: Callable[[int], Tensor] | None = None
        self.pin_memory = False
        self._link = link
        self._memory = Recycler()
        self._iterator: Iterator[TensorDictBase] | None = None
        self._closed = False
        if num_workers:
            collector.copy_out = self._copy_out
        self._at_exit = partial(_shutdown_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)  # before multiprocessing's own hook, which would wait for the workers

    @property
    def version(self) -> int:
        """Number of weight pushes so far."""
        return self._link.version

    @version.setter
    def version(self, value: int) -> None:
        self._link.version = value

    @property
    def num_envs(self) -> int:
        """N, the environments of one actor."""
        return self._link.num_envs

    def __iter__(self) -> RolloutCollector:
        return self

    def __next__(self) -> TensorDictBase:
        """Next rollout ``[N, T]``.

        Raises:
            EnvironmentFailure: an actor raised, died or hung; its own message is in the text. All actors are ended.
            RuntimeError: after ``shutdown``.
        """
        if self._closed:
            raise RuntimeError("the collector was shut down; make a new one.")
        try:
            if self._iterator is None:
                self._iterator = iter(self.collector)
            rollout = next(self._iterator)
        except EnvironmentFailure:
            self.shutdown()
            raise
        except Exception as error:
            self.shutdown()
            step = int(self._link.steps[0])
            raise EnvironmentFailure(f"collection failed at step {step}: {type(error).__name__}: {error}") from error
        if not self.num_workers:
            rollout = self._copy_out(rollout)
        rollout[NEXT, POLICY_VERSION] = rollout[POLICY_VERSION]
        if (NEXT, VALID) in rollout.keys(True):  # a simulator's word on the step; at the root it was on the one before
            rollout[VALID] = rollout.pop((NEXT, VALID))
        return rollout

    def update_policy(self, policy_or_weights: nn.Module | TensorDictBase | Mapping[str, Tensor]) -> int:
        """Give the actors new weights and return the new version.

        Takes a module of the same structure, ``TensorDict.from_module(module).data`` or a ``state_dict``, on any
        device. The weights are copied; every step that begins after the call uses them.
        """
        if isinstance(policy_or_weights, nn.Module):
            return self._link.publish(named_tensors(policy_or_weights))
        if isinstance(policy_or_weights, TensorDictBase):
            policy_or_weights = policy_or_weights.data.flatten_keys(".").to_dict()
        return self._link.publish(policy_or_weights)

    def shutdown(self) -> None:
        """End all actors: ask, then terminate, then kill, within about 5 seconds. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._link.stop()
        threads = torch.get_num_threads()
        if self.num_workers:
            self.collector.shutdown(raise_on_error=False)
            self.collector.release()
            self._link.release()
        else:
            self.collector.shutdown()
        self._iterator = None
        torch.set_num_threads(threads)  # TorchRL raises it when it shuts down

    def __enter__(self) -> RolloutCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.shutdown()

    def _copy_out(self, rollout: TensorDictBase) -> TensorDictBase:
        order = None if self.order is None else self.order(rollout.shape[0])

        def copied(source: Tensor) -> Tensor:
            if self.pin_memory:  # its allocator recycles by itself, and knows which transfers are under way
                out = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            else:
                out = self._memory.empty_like(source)
            return out.copy_(source) if order is None else torch.index_select(source, 0, order, out=out)

        return rollout.exclude(*_EXCLUDED).apply(copied)


def _shutdown_if_alive(reference: weakref.ref[RolloutCollector]) -> None:
    collector = reference()
    if collector is not None:
        collector.shutdown()


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
    threads_per_worker: int = 1,
    device: str | torch.device = "cpu",
) -> RolloutCollector:
    """Collector of rollouts ``[N, T]``, in process or in N processes.

    Args:
        env_fn: called as ``env_fn(seed=...)`` where it acts; gives an environment of batch size ``[N]``. Must pickle.
        policy: a TensorDict policy; the actors get a copy.
        frames_per_batch: N T agent steps, the size of one rollout of one actor.
        num_workers: actor processes. 0: collect in this process, when asked; nothing runs beside the learner then, and
            actions are drawn from the generators of this process, which are left as they are.
        seed, rank, start: the seed of worker w is ``actor_seed(seed, rank, w, start)``. A resumed run gives its frames
            as ``start``, so that it does not meet the start states and the noise of its beginning again.
        step_timeout: seconds that one step (a reset included) may take in an actor process. Not applied in process.
        threads_per_worker: torch threads of an actor process. Two processes of one thread do more than one of two.
        device: where the actors run their copy of the policy; rollouts are always on the CPU.

    Raises:
        ValueError: a size is not positive or frames_per_batch does not divide by N.
        EnvironmentFailure: an actor process did not come up; its own message is in the text.
    """
    for name, value, least in (
        ("frames_per_batch", frames_per_batch, 1),
        ("num_workers", num_workers, 0),
        ("threads_per_worker", threads_per_worker, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if step_timeout <= 0:
        raise ValueError(f"step_timeout is {step_timeout}; it must be above 0 seconds.")
    actor = copy.deepcopy(policy).to("cpu")
    link = Link(actor, num_workers, torch.multiprocessing.get_context("spawn"))
    seeds = [actor_seed(seed, rank, worker, start) for worker in range(max(num_workers, 1))]
    env_fns = [partial(env_fn, seed=s) for s in seeds]
    special = {"link": link, "policy_bytes": cloudpickle.dumps(actor), "seeds": seeds, "device": device}
    common: dict[str, Any] = {
        "frames_per_batch": frames_per_batch,
        "total_frames": -1,
        "trust_policy": True,
        "no_cuda_sync": torch.device(device).type == "cpu",
        "use_buffers": True,
        "auto_register_policy_transforms": True,
    }
    if num_workers == 0:
        collector: Any = ActorCollector(env_fns[0], return_same_td=True, **special, **common)
        return RolloutCollector(collector, link, num_workers=0, frames_per_batch=frames_per_batch)
    threads = torch.get_num_threads()
    try:
        collector = RoundRobinCollector(
            env_fns,
            collector_class=partial(ActorCollector, **special),
            init_fn=partial(initialise_process, link.parent),
            num_threads=threads,
            num_sub_threads=threads_per_worker,
            link=link,
            step_timeout=step_timeout,
            **common,
        )
    except Exception as error:
        messages = [link.errors_of(worker) for worker in range(num_workers)]
        link.release()
        worker, message = next(((w, m) for w, m in enumerate(messages) if m), (0, None))
        if message is None:
            raise EnvironmentFailure(f"an actor process did not come up: {error}") from error
        raise EnvironmentFailure(describe(link, worker, message, None)) from None
    return RolloutCollector(collector, link, num_workers=num_workers, frames_per_batch=frames_per_batch)
