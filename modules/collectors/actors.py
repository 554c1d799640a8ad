"""The acting side of the collectors: what runs where the environment is.

An actor looks at the version of the weights before each policy call and copies them out when it changed. So a policy
call never mixes two sets of weights, and the version written beside an action is that of the weights that chose it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector

from offtrace.modules.collectors.weights import SharedWeights, named_tensors
from offtrace.modules.keys import POLICY_VERSION


def actor_seed(seed: int, rank: int, worker: int, start: int = 0) -> int:
    """Seed of one actor: the same for equal arguments, unrelated for different ones.

    A hash and not a sum, so that the environments of run seed 0 are not those of run seed 1 moved by one place.
    The result leaves room below 2**31 for a number per environment.
    """
    word = np.random.SeedSequence([seed, rank, worker, start]).generate_state(1)[0]
    return int(word) % (2**31 - 2**17)


class Actor(TensorDictModuleBase):
    """A policy that fetches the newest weights before it acts, stamps its version and shows that it is alive.

    Adds ``"policy_version"`` (int64 ``[*B]``) to what the policy writes.
    """

    def __init__(self, policy: TensorDictModuleBase, shared: SharedWeights, worker: int) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys = list(policy.in_keys)
        self.out_keys = [*policy.out_keys, POLICY_VERSION]
        self._shared = shared
        self._tensors = named_tensors(policy)
        self._worker = worker
        # numpy views of the shared memory: a read costs 0.1 us, through torch 1 to 3 us
        self._state, self._steps, self._beats = shared.state.numpy(), shared.steps.numpy(), shared.beats.numpy()
        self._loaded = -1  # version of the weights in the policy
        self._stamp = torch.empty(0, dtype=torch.int64)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act on ``tensordict`` [*B]."""
        if self._state[1]:
            raise SystemExit(0)
        self._steps[self._worker] += 1
        self._beats[self._worker] = time.monotonic()
        if self._state[0] != self._loaded:
            self._loaded = self._shared.load_into(self._tensors)
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
        shared: the shared memory.
        policy_bytes: the pickled policy. Pickled by value, so no tensor of it is shared with anybody.
        seeds: of each worker; in a process of its own they also seed torch, numpy and random.
        device: where the policy runs.
    """

    def __init__(
        self,
        create_env_fn: Callable[..., Any],
        *,
        shared: SharedWeights,
        policy_bytes: bytes,
        seeds: list[int],
        device: str | torch.device,
        **kwargs: Any,
    ) -> None:
        self._shared = shared
        worker = kwargs.pop("worker_idx", None)
        self._worker = worker or 0
        for name in ("policy", "policy_factory", "policy_device", "env_device", "storing_device", "traj_pool"):
            kwargs.pop(name, None)
        try:
            if shared.errors:
                _seed_everything(seeds[self._worker])
            policy = cloudpickle.loads(policy_bytes).to(device)
            super().__init__(
                create_env_fn,
                Actor(policy.requires_grad_(False), shared, self._worker),
                worker_idx=worker,
                policy_device=device,
                env_device="cpu",
                storing_device="cpu",
                track_traj_ids=False,
                **kwargs,
            )
            self._check_frames(kwargs["frames_per_batch"])
            shared.num_envs = self.n_env
            shared.steps[self._worker] = 0  # TorchRL has tried the policy once
        except Exception:
            shared.report(self._worker, traceback.format_exc())
            raise

    def _check_frames(self, frames: int) -> None:
        if frames % self.n_env:
            raise ValueError(f"frames_per_batch is {frames}; it must be a multiple of the {self.n_env} environments")

    def rollout(self) -> TensorDictBase:
        """One rollout [N, T]; an error is left for the learner before it ends the process."""
        try:
            return super().rollout()
        except Exception:
            if not self._shared.errors:
                raise
            self._shared.report(self._worker, traceback.format_exc())
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
