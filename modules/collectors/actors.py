"""The acting side of the collectors: what runs where the environment is.

An actor looks at the version of the weights before each policy call and copies them out when it changed. So a policy
call never mixes two sets of weights, and the version written beside an action is that of the weights that chose it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

import cloudpickle
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector

from offtrace.modules.collectors.frames import FRAMES, Packer
from offtrace.modules.collectors.memory import Layout, Mailbox, SharedBlock
from offtrace.modules.collectors.server import LearnerGone, RemotePolicy, Server, ServerGone, ServerOptions
from offtrace.modules.collectors.weights import SharedWeights, named_tensors
from offtrace.modules.keys import POLICY_VERSION

_MESSAGE_LIMIT = 16_000  # characters of a traceback


def actor_seed(seed: int, rank: int, worker: int, start: int = 0, restart: int = 0) -> int:
    """Seed of one actor: the same for equal arguments, unrelated for different ones.

    ``restart``: which of those that took the place of the first one; 0: that one.

    A hash and not a sum, so that the environments of run seed 0 are not those of run seed 1 moved by one place.
    The result leaves room below 2**31 for a number per environment.
    """
    place = [seed, rank, worker, start, *([restart] if restart else [])]
    word = np.random.SeedSequence(place).generate_state(1)[0]
    return int(word) % (2**31 - 2**17)


class Leave(BaseException):
    """The learner wants no more, or is gone."""


class Actor(TensorDictModuleBase):
    """A policy that fetches the newest weights before it acts, stamps its version and shows that it is alive.

    With ``remote`` a server has the weights and acts; ``policy`` then says what is read and written.

    Adds ``"policy_version"`` (int64 ``[*B]``) to what the policy writes.
    """

    def __init__(
        self, policy: TensorDictModuleBase, shared: SharedWeights, worker: int, remote: RemotePolicy | None = None
    ) -> None:
        super().__init__()
        self.policy = policy
        self._remote = remote
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
            raise Leave
        self._steps[self._worker] += 1
        self._beats[self._worker] = time.monotonic()
        if self._remote is not None:
            try:
                version = self._remote(tensordict)
            except ServerGone:
                raise Leave from None
            return tensordict.set(POLICY_VERSION, torch.full(tensordict.shape, version, dtype=torch.int64))
        if self._state[0] != self._loaded:
            self._loaded = self._shared.load_into(self._tensors)
            self._stamp = torch.empty(0, dtype=torch.int64)
        if self._stamp.shape != tensordict.shape:
            self._stamp = torch.full(tensordict.shape, self._loaded, dtype=torch.int64)
        out = self.policy(tensordict)
        out.set(POLICY_VERSION, self._stamp)
        return out


class ActorSpec(NamedTuple):
    """What the actors of a collector are made of.

    Attributes:
        env_fn: called as ``env_fn(seed=...)``; gives an environment of batch size ``[N]``.
        policy: on the CPU, the actors' own.
        seed_of: gives the seed of an actor, by its number and that of its restart: of its environments, and in a
            process of its own also of torch, numpy and random.
        frames_per_batch: N T, the size of a rollout.
        frame_stack: frames in an observation, of which each travels once; 1: observations travel whole.
        device: where the policy runs.
        threads: torch threads of an actor process.
        server: None: every actor has a copy of the policy; else one server acts for all.
        environ: the learner's environment variables, for its processes.
    """

    env_fn: Callable[..., Any]
    policy: nn.Module
    seed_of: Callable[[int, int], int]
    frames_per_batch: int
    frame_stack: int
    device: str | torch.device
    threads: int
    server: ServerOptions | None = None
    environ: dict[str, str] = {}  # noqa: RUF012  of a NamedTuple

    def make(
        self, shared: SharedWeights, worker: int, restart: int = 0, remote: RemotePolicy | None = None
    ) -> Collector:
        """TorchRL's collector with an :class:`Actor` for a policy.

        Raises:
            ValueError: the environments do not divide a rollout.
        """
        device = self.device if remote is None else "cpu"
        policy = self.policy.to(device).requires_grad_(False)
        collector = Collector(
            self.env_fn,
            Actor(policy, shared, worker, remote),
            create_env_kwargs={"seed": self.seed_of(worker, restart)},
            frames_per_batch=self.frames_per_batch,
            total_frames=-1,
            policy_device=device,
            env_device="cpu",
            storing_device="cpu",
            trust_policy=True,
            no_cuda_sync=torch.device(device).type == "cpu",
            use_buffers=True,
            auto_register_policy_transforms=True,
            track_traj_ids=False,
            return_same_td=True,
        )
        if self.frames_per_batch % collector.n_env:
            raise ValueError(
                f"frames_per_batch is {self.frames_per_batch}; it must be a multiple of the {collector.n_env} "
                "environments"
            )
        shared.num_envs = collector.n_env
        shared.steps[worker] = 0  # TorchRL has tried the policy once
        return collector


def pickled(spec: ActorSpec) -> bytes:
    """``spec`` for another process.

    Raises:
        ValueError: it does not pickle.
    """
    try:
        return cloudpickle.dumps(spec)
    except Exception as error:
        raise ValueError(
            f"the environment's maker or the policy does not pickle, which actor processes need: {error}; leave out "
            "what cannot be copied (open files, locks, windows), or collect in this process with num_workers=0"
        ) from error


class Up(NamedTuple):
    """An actor is there."""


class Rollout(NamedTuple):
    """A rollout lies in the actor's block; ``layout`` says how where that is new, and the block follows.

    ``shape`` is [N, T].
    """

    shape: torch.Size
    layout: Layout | None


class Failed(NamedTuple):
    """A process ends with this error, said in one line, and its traceback."""

    reason: str
    traceback: str


def run_actor(
    worker: int,
    restart: int,
    pipe: Connection,
    shared: SharedWeights,
    spec: SharedBlock,
    server: Connection | None = None,
) -> None:
    """An actor process: one rollout for every message that comes through ``pipe``, until it is closed.

    Args:
        worker: number of the actor.
        restart: how many had its place before.
        pipe: answers go back through it, :class:`Up`, :class:`Rollout` or :class:`Failed`.
        shared: the weights.
        spec: the pickled :class:`ActorSpec`.
        server: the actor's pipe to the server, where there is one.
    """
    collector = None
    try:
        made = _begin(spec)
        seed_everything(made.seed_of(worker, restart))
        policy = cast("Any", made.policy)
        remote = None if server is None else RemotePolicy(server, getattr(policy, "acting_keys", list(policy.in_keys)))
        collector = made.make(shared, worker, restart, remote)
        # iter() would close the environments before the learner is told of an error
        rollouts, outbox = collector.iterator(), _Outbox(pipe, made.frame_stack)
        _send(pipe, Up())
        while True:
            _wait_for(pipe)
            outbox.put(next(rollouts))
    except Leave:
        pass
    except BaseException as error:  # SystemExit too: an environment may want to end the process
        _report(pipe, error)
    finally:
        if collector is not None:
            shut_down(collector)


def shut_down(collector: Any) -> None:
    """Closes the environments of TorchRL's collector; one that raises then is told by a RuntimeWarning."""
    try:
        collector.shutdown()
    except Exception as error:
        warnings.warn(
            f"an environment raised {type(error).__name__} when it was closed: {error}", RuntimeWarning, stacklevel=2
        )


def run_server(restart: int, pipe: Connection, shared: SharedWeights, spec: SharedBlock) -> None:
    """The process of the server.

    Args:
        restart: how many had its place before.
        pipe: to the learner; :class:`Up` or :class:`Failed` go through it, and pipes to the actors come.
        shared: the weights.
        spec: the pickled :class:`ActorSpec`.
    """
    try:
        made = _begin(spec)
        assert made.server is not None
        seed = made.server.seed
        seed_everything(actor_seed(seed, 0, 0, 0, restart) if restart else seed)
        server = Server(made.policy.to(made.device), shared, pipe, made.server)
        _send(pipe, Up())
        server.serve()
    except (Leave, LearnerGone):
        pass
    except BaseException as error:
        _report(pipe, error)


def _begin(spec: SharedBlock) -> ActorSpec:
    """What every process of ours does first; the spec."""
    _initialise_process()
    made: ActorSpec = cloudpickle.loads(spec.whole.numpy().tobytes())
    spec.close()
    spec.whole = torch.empty(0, dtype=torch.uint8)  # nobody needs it again
    os.environ.clear()  # the server has those of when it was started
    os.environ.update(made.environ)
    torch.set_num_threads(made.threads)
    return made


def _wait_for(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        raise Leave from None


def _send(pipe: Connection, message: Any) -> None:
    try:
        pipe.send(message)
    except OSError:
        raise Leave from None


def _report(pipe: Connection, error: BaseException) -> None:
    """Tell the learner of the error with which this process ends."""
    with contextlib.suppress(Leave):
        _send(pipe, told(error))


def told(error: BaseException) -> Failed:
    """The error with which an actor ends, as the learner is told of it."""
    reason = " ".join("".join(traceback.format_exception_only(error)).split())
    return Failed(reason, "".join(traceback.format_exception(error))[-_MESSAGE_LIMIT:])


class _Outbox:
    """Puts rollouts where the learner sees them."""

    def __init__(self, pipe: Connection, frame_stack: int) -> None:
        self._pipe = pipe
        self._packer = Packer(frame_stack)
        self._mailbox = Mailbox()

    def put(self, rollout: TensorDictBase) -> None:
        block = self._mailbox.put(self._packer.pack(rollout, self._mailbox.views.get(FRAMES)))
        _send(self._pipe, Rollout(rollout.shape, None if block is None else self._mailbox.layout))
        if block is not None:
            block.send(self._pipe)
            block.close()


def seed_everything(seed: int) -> None:
    """Of this process: torch, numpy, random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _initialise_process() -> None:
    """Deaf to what the learner handles, and gone when the learner is gone."""
    learner = multiprocessing.parent_process()
    assert learner is not None

    def watch() -> None:
        wait([learner.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="learner-watch").start()
    leave_signals_to_the_learner()


def leave_signals_to_the_learner() -> None:
    """Be deaf to what ends a whole group of processes, of which the learner decides; called in the main thread."""
    # a handler that does nothing, and no blocked or ignored signal: those would be inherited by programs that an
    # environment starts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    let_signals_through()


def let_signals_through() -> None:
    """Those that this thread has blocked, and so would have the programs that it starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
