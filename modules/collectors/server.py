"""One policy for many actors, in a process of its own: the requests that have arrived are one batch.

What the paper calls dynamic batching (Espeholt et al. 2018, arXiv 1802.01561, section 5.1). Actor processes step their
environments and wait for nothing but their own actions; the server has the newest weights before every batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from offtrace.modules.collectors.memory import Key, Layout, Mailbox, SharedBlock
from offtrace.modules.collectors.weights import SharedWeights, named_tensors

_POLL = 0.1  # seconds between two signs of life


class ServerOptions(NamedTuple):
    """How requests become batches.

    Attributes:
        batch: environments at which a batch is full; 0: all actors.
        wait: seconds from a batch's first request after which it is not waited for more; 0: what is there is a batch.
        seed: of the server's generators.
    """

    batch: int = 0
    wait: float = 0.001
    seed: int = 0


class ServerGone(Exception):
    """There is nobody to ask."""


class LearnerGone(Exception):
    """There is nobody to act for."""


class Request(NamedTuple):
    """Inputs lie in the actor's block; ``layout`` says how where that is new, and the block follows."""

    layout: Layout | None


class Reply(NamedTuple):
    """Outputs lie in the server's block for the actor, likewise; ``version`` of the weights that made them."""

    version: int
    layout: Layout | None


class RemotePolicy:
    """Asks the server: what an actor calls in place of a policy.

    Args:
        pipe: to the server.
        in_keys: what the policy reads to act. One that is missing is left out.
    """

    def __init__(self, pipe: Connection, in_keys: list[Any]) -> None:
        self._pipe = pipe
        self._in_keys = in_keys
        self._mailbox = Mailbox()
        self._answers: Mapping[Key, Tensor] = {}

    def __call__(self, tensordict: TensorDictBase) -> int:
        """Adds to ``tensordict`` [N] what the policy writes; the version of the weights.

        Raises:
            ServerGone: which the learner tells.
        """
        found = {key: tensordict.get(key, None) for key in self._in_keys}
        inputs: dict[Key, Tensor] = {key: tensor for key, tensor in found.items() if tensor is not None}
        try:
            block = self._mailbox.put(inputs)
            self._pipe.send(Request(None if block is None else self._mailbox.layout))
            if block is not None:
                block.send(self._pipe)
                block.close()
            reply: Reply = self._pipe.recv()
            if reply.layout is not None:
                self._answers = SharedBlock.receive(self._pipe).views(reply.layout)
        except (EOFError, OSError):
            raise ServerGone from None
        for key, tensor in self._answers.items():
            tensordict.set(key, tensor.clone())
        return reply.version


def adopt(server: Connection, actor: Connection) -> None:
    """Gives the server at the other end of ``server`` its end of the pipe to an actor.

    Raises:
        OSError: it is gone.
    """
    reduction.send_handle(server, actor.fileno(), None)


class _Client:
    """An actor, as the server sees it."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.inputs: Mapping[Key, Tensor] = {}
        self._mailbox = Mailbox()

    @property
    def rows(self) -> int:
        """Its environments."""
        return len(next(iter(self.inputs.values())))

    def read(self) -> None:
        """Takes in a request."""
        request: Request = self.pipe.recv()
        if request.layout is not None:
            self.inputs = SharedBlock.receive(self.pipe).views(request.layout)

    def answer(self, outputs: Mapping[Key, Tensor], version: int) -> None:
        """Gives the outputs for its rows."""
        block = self._mailbox.put(outputs)
        self.pipe.send(Reply(version, None if block is None else self._mailbox.layout))
        if block is not None:
            block.send(self.pipe)
            block.close()


class Server:
    """Answers until it is told to stop.

    Args:
        policy: on its device.
        shared: the newest weights; the server's sign of life is the last of its books.
        learner: the pipe through which those to the actors come, as :func:`adopt` sends them.
        options: how requests become batches.
    """

    def __init__(self, policy: Any, shared: SharedWeights, learner: Connection, options: ServerOptions) -> None:
        self._policy = policy.requires_grad_(False)
        self._shared = shared
        self._tensors = named_tensors(policy)
        self._device = next(iter(self._tensors.values())).device
        self._learner = learner
        self._clients: list[_Client] = []
        self._options = options
        self._loaded = -1
        self._state, self._beats, self._steps = shared.state.numpy(), shared.beats.numpy(), shared.steps.numpy()

    @torch.no_grad()
    def serve(self) -> None:
        """One batch after the other.

        Raises:
            LearnerGone: it has closed its pipe.
        """
        pending: list[_Client] = []
        with set_exploration_type(ExplorationType.RANDOM):
            while not self._state[1]:
                pending = self._gather(pending)
                batch, pending = self._cut(pending)
                if batch:
                    self._answer(batch)

    def _gather(self, pending: list[_Client]) -> list[_Client]:
        """Wait for requests until a batch is full, everybody has asked, or the first has waited long enough."""
        limit = time.monotonic() + self._options.wait
        while True:
            now = self._beats[-1] = time.monotonic()
            quiet = {client.pipe: client for client in self._clients if client not in pending}
            rows = sum(client.rows for client in pending)
            full = self._options.batch and rows >= self._options.batch
            if self._state[1] or (pending and (full or not quiet or now >= limit)):
                return pending
            for pipe in wait([self._learner, *quiet], limit - now if pending else _POLL):
                if pipe is self._learner:
                    self._adopt()
                    continue
                client = quiet[pipe]  # type: ignore[index]
                try:
                    client.read()
                except (EOFError, OSError):  # it is gone
                    self._clients.remove(client)
                    continue
                if not pending:
                    limit = time.monotonic() + self._options.wait
                pending.append(client)

    def _adopt(self) -> None:
        """Takes new actors in; one that has died ends its pipe."""
        try:
            while self._learner.poll():
                self._clients.append(_Client(Connection(reduction.recv_handle(self._learner))))
        except (EOFError, OSError):
            raise LearnerGone from None

    def _cut(self, pending: list[_Client]) -> tuple[list[_Client], list[_Client]]:
        """The requests of the next batch, in the order of their arrival, and the others."""
        if not self._options.batch:
            return pending, []
        rows, number = 0, 0
        for client in pending:
            if number and rows + client.rows > self._options.batch:
                break
            rows, number = rows + client.rows, number + 1
        return pending[:number], pending[number:]

    def _answer(self, clients: list[_Client]) -> None:
        if self._state[0] != self._loaded:
            self._loaded = self._shared.load_into(self._tensors)
        self._steps[-1] += 1
        rows = [client.rows for client in clients]
        inputs = {
            key: torch.cat([client.inputs[key] for client in clients]).to(self._device, non_blocking=True)
            for key in clients[0].inputs
        }
        out = self._policy(TensorDict(dict(inputs), [sum(rows)]))
        found: dict[Key, Tensor] = {key: out.get(key).to("cpu") for key in self._policy.out_keys}
        parts = {key: tensor.split(rows) for key, tensor in found.items()}
        for place, client in enumerate(clients):
            try:
                client.answer({key: split[place] for key, split in parts.items()}, self._loaded)
            except OSError:
                self._clients.remove(client)
