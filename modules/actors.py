"""The acting side of the collectors: what runs where the environment is, and the memory it shares with the learner.

The weights travel through one shared buffer guarded by a lock. The learner copies its parameters in and raises the
version; an actor looks at the version before each policy call and copies the weights out when it changed. So a policy
call never mixes two sets of weights, and the version written beside an action is that of the weights that chose it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.collectors import Collector

from offtrace.modules.keys import POLICY_VERSION

_LOCK_TIMEOUT = 30.0
_MESSAGE_LIMIT = 16_000  # characters; a pipe takes 64 KiB without a reader


def actor_seed(seed: int, rank: int, worker: int, start: int = 0) -> int:
    """Seed of one actor: the same for equal arguments, unrelated for different ones.

    A hash and not a sum, so that the environments of run seed 0 are not those of run seed 1 moved by one place.
    The result leaves room below 2**31 for a number per environment.
    """
    word = np.random.SeedSequence([seed, rank, worker, start]).generate_state(1)[0]
    return int(word) % (2**31 - 2**17)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, detached, sharing memory with the module."""
    found = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    found.update({name: b.detach() for name, b in module.named_buffers(remove_duplicate=False)})
    return found


class Link:
    """Memory shared by the learner and its actors: weights, version, heartbeats, error messages, and the stop flag.

    Args:
        policy: gives names, shapes and first values of the weights.
        workers: number of actor processes; 0 for one actor in the learner's own process.
        context: the multiprocessing context the processes are started with.
    """

    def __init__(self, policy: nn.Module, workers: int, context: Any) -> None:
        self.weights = {name: t.to("cpu", copy=True) for name, t in named_tensors(policy).items()}
        self.state = torch.zeros(3, dtype=torch.int64)  # version, stop, environments of one actor
        self.steps = torch.zeros(max(workers, 1), dtype=torch.int64)
        self.beats = torch.zeros(max(workers, 1), dtype=torch.float64)  # time.monotonic() of the last step, seconds
        self.lock: Any = threading.Lock()
        self.errors: list[Any] = []
        if workers:
            for tensor in (*self.weights.values(), self.state, self.steps, self.beats):
                tensor.share_memory_()
            self.lock = context.Lock()
            self.errors = [context.SimpleQueue() for _ in range(workers)]
        self.parent = os.getpid()

    @property
    def version(self) -> int:
        """Number of weight updates published so far."""
        return int(self.state[0])

    @version.setter
    def version(self, value: int) -> None:
        self.state[0] = value

    @property
    def num_envs(self) -> int:
        """Environments of one actor, known once it is up."""
        return int(self.state[2])

    @num_envs.setter
    def num_envs(self, value: int) -> None:
        self.state[2] = value

    def stop(self) -> None:
        """Ask the actors to leave at their next step."""
        self.state[1] = 1

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy new weights in and return the new version. Every policy call that begins afterwards uses them.

        Raises:
            KeyError: when a weight is missing or unknown.
            RuntimeError: when an actor died while it held the lock.
        """
        if tensors.keys() != self.weights.keys():
            odd = sorted(tensors.keys() ^ self.weights.keys())
            raise KeyError(f"the weights do not fit the policy of the actors: {odd[:5]} are on one side only.")
        self._acquire()
        try:
            for name, buffer in self.weights.items():
                buffer.copy_(tensors[name])
            self.state[0] += 1
            return int(self.state[0])
        finally:
            self.lock.release()

    def load_into(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy the newest weights into ``tensors`` and return their version."""
        self._acquire()
        try:
            for name, buffer in self.weights.items():
                tensors[name].copy_(buffer)
            return int(self.state[0])
        finally:
            self.lock.release()

    def release(self) -> None:
        """Let go of lock and queues, whose names stay in the file system as long as somebody holds them."""
        self.lock, self.errors = threading.Lock(), []

    def report(self, worker: int, message: str) -> None:
        """Leave an error message for the learner."""
        if self.errors:
            self.errors[worker].put(message[-_MESSAGE_LIMIT:])

    def errors_of(self, worker: int) -> str | None:
        """First message that the actor left, or None."""
        if self.errors and not self.errors[worker].empty():
            return str(self.errors[worker].get())
        return None

    def _acquire(self) -> None:
        if not self.lock.acquire(timeout=_LOCK_TIMEOUT):
            raise RuntimeError(f"the lock on the actors' weights was not free within {_LOCK_TIMEOUT:.0f} s.")


class Actor(TensorDictModuleBase):
    """A policy that fetches the newest weights before it acts, stamps its version and shows that it is alive.

    Adds ``"policy_version"`` (int64 ``[*B]``) to what the policy writes.
    """

    def __init__(self, policy: TensorDictModuleBase, link: Link, worker: int) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys = list(policy.in_keys)
        self.out_keys = [*policy.out_keys, POLICY_VERSION]
        self._link = link
        self._tensors = named_tensors(policy)
        self._worker = worker
        # numpy views of the shared memory: a read costs 0.1 us, through torch 1 to 3 us
        self._state, self._steps, self._beats = link.state.numpy(), link.steps.numpy(), link.beats.numpy()
        self._loaded = -1  # version of the weights in the policy
        self._stamp = torch.empty(0, dtype=torch.int64)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act on ``tensordict`` [*B]."""
        if self._state[1]:
            raise SystemExit(0)
        self._steps[self._worker] += 1
        self._beats[self._worker] = time.monotonic()
        if self._state[0] != self._loaded:
            self._loaded = self._link.load_into(self._tensors)
            self._stamp = torch.empty(0, dtype=torch.int64)
        if self._stamp.shape != tensordict.shape:
            self._stamp = torch.full(tensordict.shape, self._loaded, dtype=torch.int64)
        out = self.policy(tensordict)
        out.set(POLICY_VERSION, self._stamp)
        return out


class ActorCollector(Collector):
    """TorchRL's collector with an :class:`Actor` for a policy, in an actor process or in the learner's own.

    A class of its own because the process runner of TorchRL passes neither ``track_traj_ids`` on nor the error of a
    worker back.

    Args:
        link: the shared memory.
        policy_bytes: the pickled policy. Pickled by value, so no tensor of it is shared with anybody.
        seeds: of each worker; in a process of its own they also seed torch, numpy and random.
        device: where the policy runs.
    """

    def __init__(
        self,
        create_env_fn: Callable[..., Any],
        *,
        link: Link,
        policy_bytes: bytes,
        seeds: list[int],
        device: str | torch.device,
        **kwargs: Any,
    ) -> None:
        self._link = link
        worker = kwargs.pop("worker_idx", None)
        self._worker = worker or 0
        for name in ("policy", "policy_factory", "policy_device", "env_device", "storing_device", "traj_pool"):
            kwargs.pop(name, None)
        try:
            if link.errors:
                _seed_everything(seeds[self._worker])
            policy = cloudpickle.loads(policy_bytes).to(device)
            super().__init__(
                create_env_fn,
                Actor(policy.requires_grad_(False), link, self._worker),
                worker_idx=worker,
                policy_device=device,
                env_device="cpu",
                storing_device="cpu",
                track_traj_ids=False,
                **kwargs,
            )
            self._check_frames(kwargs["frames_per_batch"])
            link.num_envs = self.n_env
            link.steps[self._worker] = 0  # TorchRL has tried the policy once
        except Exception:
            link.report(self._worker, traceback.format_exc())
            raise

    def _check_frames(self, frames: int) -> None:
        if frames % self.n_env:
            raise ValueError(f"frames_per_batch is {frames}; it must be a multiple of the {self.n_env} environments.")

    def rollout(self) -> TensorDictBase:
        """One rollout [N, T]; an error is left for the learner before it ends the process."""
        try:
            return super().rollout()
        except Exception:
            if not self._link.errors:
                raise
            self._link.report(self._worker, traceback.format_exc())
            raise SystemExit(1) from None  # the learner tells the user; a second traceback here would only confuse


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def initialise_process(parent: int) -> None:
    """First call in an actor process: deaf to what the learner handles, and gone when the learner is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
