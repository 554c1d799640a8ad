"""Fresh rollouts: each is dealt to minibatches, learnt from in one or several passes, and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.agents.data.acting import ActingData, Learner, books_of, check_sizes, make_room
from offtrace.modules.keys import FINALS, NEXT, POLICY_VERSION, WORKER

if TYPE_CHECKING:
    from offtrace.modules.collectors import Collector

Deal = Literal["environments", "steps"]
RolloutHook = Callable[[TensorDictBase], dict[str, Tensor] | None]
"""Sees a whole rollout, may write into it, and may return scalars for the log."""


class Dealer:
    """Deals the rows of a rollout to minibatches, anew in every pass.

    The order is a function of (seed, rank, rollout, epoch) alone: a resumed run deals as the uninterrupted one would,
    and no rank has state of its own to save.

    Args:
        minibatches: parts of a rollout; must divide its rows.
        epochs: passes over a rollout.
        seed: of the order.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, minibatches: int, epochs: int, seed: int) -> None:
        check_sizes(minibatches=minibatches, epochs=epochs)
        self.minibatches, self.epochs, self.seed = minibatches, epochs, seed

    def __len__(self) -> int:
        """Batches of a rollout."""
        return self.minibatches * self.epochs

    def order(self, size: int, rank: int, rollout: int, epoch: int = 0) -> Tensor:
        """A permutation of ``size`` rows, int64."""
        word = np.random.SeedSequence([self.seed, rank, rollout, epoch]).generate_state(1)[0]
        return torch.randperm(size, generator=torch.Generator().manual_seed(int(word)))

    def deal(
        self, rollout: TensorDictBase, books: TensorDictBase, rank: int, number: int, *, dealt: bool
    ) -> Iterator[tuple[TensorDictBase, TensorDictBase, bool]]:
        """The batches of a rollout; with each its books, and whether it is the last.

        Args:
            rollout: ``[R, ...]``; its rows are dealt.
            books: of the rollout, as :func:`books_of`; they are dealt as its rows are.
            rank: of the learner.
            number: of the rollout.
            dealt: whether it comes in the order of its first epoch.
        """
        size = rollout.shape[0]
        for epoch in range(self.epochs):
            if epoch or not dealt:
                order = self.order(size, rank, number, epoch)
                rollout, books = _take(rollout, order), _take(books, order)
            parts = zip(*(x.split(size // self.minibatches) for x in (rollout, books)), strict=True)
            for place, (part, its_books) in enumerate(parts, start=epoch * self.minibatches + 1):
                if part.ndim == 2:
                    make_room(part, its_books)
                yield part, its_books, place == len(self)

    def check(self, rows: int, what: str) -> None:
        """Refuses minibatches that do not divide ``rows``; ``what`` says what they are."""
        if rows % self.minibatches:
            raise ValueError(f"minibatches is {self.minibatches}; it must divide the {rows} {what} of a rollout")


class RolloutData(ActingData):
    """Batches from rollouts ``[N, T]``, each rollout used ``epochs`` times and then let go.

    Every rank owns a collector, built by ``collector_fn(rank, frames)`` when training begins, so that it starts from
    the weights a checkpoint brought back. In every epoch a rollout is dealt to the minibatches anew, see
    :class:`Dealer`: whole environments, ``[N / minibatches, T]``, or single steps, ``[N T / minibatches]``.

    On a GPU a rollout is copied once, into pinned memory, and crosses once, without waiting.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        total_frames: environment frames, over all ranks, after which the data ends. The last rollout is whole.
        frame_skip: environment frames per agent step.
        minibatches: parts of a rollout; must divide what is dealt.
        epochs: passes over a rollout.
        seed: of the order.
        deal: what is dealt, ``"environments"`` or ``"steps"``.
        on_rollout: called once with every rollout ``[N, T]`` on the learner's device before it is dealt, its
            environments in any order. What must not change between passes it writes into it; scalars that it returns,
            by their names, are logged.

    Raises:
        ValueError: a size is below 1, or ``deal`` is neither of the two.

    Attributes:
        frames, collector, episodes: as of :class:`ActingData`.
        rollouts: rollouts taken so far on this rank.
    """

    def __init__(
        self,
        collector_fn: Callable[[int, int], Collector],
        *,
        total_frames: int,
        frame_skip: int = 1,
        minibatches: int = 1,
        epochs: int = 1,
        seed: int = 0,
        deal: Deal = "environments",
        on_rollout: RolloutHook | None = None,
    ) -> None:
        super().__init__(collector_fn, total_frames=total_frames, frame_skip=frame_skip)
        if deal not in ("environments", "steps"):
            raise ValueError(f"deal is {deal!r}; it must be 'environments' or 'steps'")
        self.dealer = Dealer(minibatches, epochs, seed)
        self.deals_steps = deal == "steps"
        self.on_rollout = on_rollout
        self.rollouts = 0
        self._diagnostics: dict[str, Tensor] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """For the log: what ``on_rollout`` returned of the newest rollout."""
        return {f"rollout/{name}": float(value) for name, value in self._diagnostics.items()}

    def environments(self, rollout: TensorDictBase, of_actor: int) -> Tensor:
        """Which environment each row is of, int64 ``[N]``, counted through all actors; for ``on_rollout``.

        Args:
            rollout: the one that ``on_rollout`` sees.
            of_actor: environments of an actor.
        """
        order = None if self.collector is None else self.collector.order
        rows = torch.arange(len(rollout)) if order is None else order(len(rollout))
        worker = rollout[WORKER][:, 0]
        return worker * of_actor + (rows % of_actor).to(worker.device)

    def stream(self, collector: Collector, learner: Learner) -> RolloutStream:
        """As :meth:`ActingData.stream`.

        Raises:
            ValueError: the minibatches do not divide what is dealt.
        """
        if self.deals_steps:
            self.dealer.check(collector.frames_per_batch, "steps")
        else:
            self.dealer.check(collector.num_envs, "environments")
        collector.pin_memory = learner.device.type == "cuda"
        return RolloutStream(self, collector, learner)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`ActingData`, and the rollouts taken."""
        return {**super().state_dict(), "rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        super().load_state_dict(state_dict)
        self.rollouts = int(state_dict["rollouts"])


class RolloutStream:
    """The batches of one run, in order. Its length is the number of batches of the whole run, resumed or not.

    The length matters: Lightning fetches one batch ahead, one more batch of policy lag, from what has none.
    """

    def __init__(self, data: RolloutData, collector: Collector, learner: Learner) -> None:
        self._data = data
        self._collector = collector
        self._learner = learner
        self._frames_per_rollout = collector.frames_per_batch * data.frame_skip * learner.ranks

    def __len__(self) -> int:
        return math.ceil(self._data.total_frames / self._frames_per_rollout) * len(self._data.dealer)

    def __iter__(self) -> Iterator[TensorDictBase]:
        data = self._data
        while data.frames < data.total_frames:
            rank = self._learner.rank
            for part, books, last in data.dealer.deal(*self._next(), rank, data.rollouts, dealt=not data.deals_steps):
                data._versions = books.get((NEXT, POLICY_VERSION), None)
                if last:
                    # Counted when its last part is handed out: after that update a checkpoint holds whole rollouts,
                    # and in the middle of one it does not claim what was not learned yet.
                    data.frames += self._frames_per_rollout
                    data.rollouts += 1
                yield part

    def _next(self) -> tuple[TensorDictBase, TensorDictBase]:
        """A rollout and its books, as they are dealt: environments in their first order, or steps in a row."""
        data = self._data
        if not data.deals_steps:
            # The first order is applied by the copy that takes the rollout out of the actors' memory.
            self._collector.order = lambda size: data.dealer.order(size, self._learner.rank, data.rollouts)
        packed = self._collector.take()
        data.episodes.note(packed)
        rollout, books = packed.unpack(self._learner.device), books_of(packed)
        if data.on_rollout is not None:
            make_room(rollout, books)
            data._diagnostics = data.on_rollout(rollout) or {}
            rollout.pop(FINALS, None)
        return (rollout.flatten(0, 1), books.flatten(0, 1)) if data.deals_steps else (rollout, books)


def _take(rollout: TensorDictBase, order: Tensor) -> TensorDictBase:
    order = order.to(next(iter(rollout.values(True, True)), order).device, non_blocking=True)
    # index_select moves whole rows; indexing a TensorDict moves elements, four times slower for images
    return rollout.apply(lambda tensor: tensor.index_select(0, order))
