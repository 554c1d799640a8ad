"""What a learner needs of its data, and the data modules' common ground: the actors, and the episodes that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from offtrace.agents.config import ConfigError
from offtrace.modules.collectors import RayOptions, ServerOptions, actor_seed, make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.keys import (
    DONE,
    EPISODE_END,
    EPISODE_REWARD,
    FINALS,
    NEXT,
    POLICY_VERSION,
    TERMINATED,
    VALID,
)
from offtrace.modules.losses.unroll import room

if TYPE_CHECKING:
    from offtrace.agents.config import Config
    from offtrace.modules.collectors import Collector, PackedRollout


BOOKS: tuple[Any, ...] = ((NEXT, DONE), (NEXT, TERMINATED), VALID, POLICY_VERSION, (NEXT, POLICY_VERSION))
"""What the host must know of a rollout: ends, mask and versions."""


def books_of(rollout: PackedRollout) -> TensorDict:
    """The :data:`BOOKS` of a rollout [N, T], which still lies on the host."""
    found = {key: entry for key in BOOKS if (entry := rollout.get(key)) is not None}
    return TensorDict(found, rollout.shape)


def make_room(batch: TensorDictBase, books: TensorDictBase) -> None:
    """Writes :data:`offtrace.modules.keys.FINALS` into a batch [B, T] on any device, as its ``books`` say.

    Without the entry the loss would have to count truncated steps on the device, and wait for the number.
    """
    flags = [books.get(key, None) for key in BOOKS[:3]]
    done, terminated, valid = (None if flag is None else flag.reshape(batch.shape) for flag in flags)
    if done is None or terminated is None:
        return
    ends = done & ~terminated
    number = room((ends if valid is None else ends & valid)[:, :-1])
    batch[FINALS] = torch.empty(*batch.shape, number, 0, device=batch[NEXT, DONE].device)


class EpisodeMeter:
    """Whole episodes that ended in the rollouts.

    Attributes:
        count: how many.
        returns: raw returns of the last 100.
        dropped: episodes that a failing simulator ended; they are not among the others.
    """

    def __init__(self) -> None:
        self.count = 0
        self.returns: deque[float] = deque(maxlen=100)
        self.dropped = 0

    def note(self, rollout: PackedRollout) -> None:
        """Adds the episodes that ended in a rollout, where the environment tells of episodes."""
        valid = rollout.get(VALID)
        if valid is not None:  # each step that is no data ends an episode
            self.dropped += int((~valid).sum())
        ends, found = (rollout.get((NEXT, name)) for name in (EPISODE_END, EPISODE_REWARD))
        if ends is None or found is None:
            return
        returns = found[ends].tolist()
        self.count += len(returns)
        self.returns.extend(returns)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"count": self.count, "returns": list(self.returns), "dropped": self.dropped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.count, self.dropped = int(state_dict["count"]), int(state_dict["dropped"])
        self.returns.extend(state_dict["returns"])


class Learner(NamedTuple):
    """One of several learners: its rank, the number of ranks, and its device."""

    rank: int
    ranks: int
    device: torch.device


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1.

    Raises:
        ValueError: naming the first.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


class ActingData(LightningDataModule):
    """A data module that owns a collector while training runs: what agent and callbacks know of any of them.

    Args:
        collector_fn: gives the collector of a rank for a run that begins or goes on at so many frames.
        total_frames: environment frames, over all ranks, after which the data ends.
        frame_skip: environment frames per agent step.

    Raises:
        ValueError: a size is below 1.

    Attributes:
        frames: environment frames taken so far, over all ranks.
        collector: the collector while training runs, else None.
        episodes: those that ended in this rank's rollouts, since training began.
        saves: whether there is more to save than a checkpoint holds.
        reads_priorities: whether :meth:`feedback` waits for what the loss wrote.
        folder: where :meth:`save` writes, one folder a rank; None: nothing is saved.
        saved: the name under which lies there what a checkpoint may count on; None before the first.
    """

    saves: ClassVar[bool] = False
    reads_priorities: bool = False
    folder: Path | None = None
    saved: str | None = None

    def __init__(
        self, collector_fn: Callable[[int, int], Collector], *, total_frames: int, frame_skip: int = 1
    ) -> None:
        super().__init__()
        check_sizes(total_frames=total_frames, frame_skip=frame_skip)
        self.collector_fn = collector_fn
        self.total_frames = total_frames
        self.frame_skip = frame_skip
        self.collector: Collector | None = None
        self.frames = 0
        self.episodes = EpisodeMeter()
        self._version = self._restarts = 0
        self._versions: Tensor | None = None

    @property
    def restarts(self) -> int:
        """Actors of this rank that took the place of one that failed, in this process's part of the run."""
        return self._restarts + (0 if self.collector is None else self.collector.restarts)

    @property
    def learner(self) -> Learner:
        """The learner that the data belongs to; without a trainer the only one, on the CPU."""
        if self.trainer is None:
            return Learner(0, 1, torch.device("cpu"))
        return Learner(self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.root_device)

    @property
    def metrics(self) -> dict[str, float]:
        """More for the log."""
        return {}

    @property
    def opening(self) -> str:
        """What the run does first where that is not what it does later, for the screen; empty: it is."""
        return ""

    def train_dataloader(self) -> Iterable[Any]:
        """Start the collector and give the stream of batches.

        Raises:
            ValueError: what the data module was made with does not fit the rollouts.
            DamagedReplay: the replay of a resumed run cannot be read.
        """
        self.shutdown()
        learner = self.learner
        self.collector = collector = self.collector_fn(learner.rank, self.frames)
        try:
            stream = self.stream(collector, learner)
        except BaseException:
            self.shutdown()
            raise
        collector.version = self._version
        return stream

    def stream(self, collector: Collector, learner: Learner) -> Iterable[Any]:
        """The batches of a run, from rollouts of ``collector``, in order.

        Raises:
            ValueError, DamagedReplay: as :meth:`train_dataloader`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define stream")

    @property
    def behaviour_versions(self) -> Tensor:
        """Versions of the weights that acted in the last batch, int64, on the host.

        Of replayed data they are those of the newest rollout: they say how old the actors' weights are, not the replay.
        """
        # a resumed run may owe updates before its first rollout
        return torch.tensor([self._version]) if self._versions is None else self._versions

    def updates(self, batch: Any) -> Iterable[TensorDictBase]:
        """The batches of one ``training_step``, each of which is one update."""
        return (batch,)

    def feedback(self, batch: TensorDictBase) -> None:
        """Called after the update on ``batch``, into which the loss may have written."""

    def save(self, rank: int) -> str | None:
        """Write what the checkpoint that is about to be written cannot hold.

        Returns:
            The name that :attr:`saved` becomes when every rank has written its own; None where there is nothing.

        Raises:
            OSError, DamagedReplay: it cannot be written. The checkpoint then names the one before, and is still worth
                having.
        """
        return None

    def prune(self, rank: int) -> None:
        """Delete what no checkpoint needs, once the one that names the newest is written."""

    def resume(self, checkpoint: dict[str, Any], frames: int) -> None:
        """Called with a checkpoint that was written at so many frames, before it is restored."""
        # Progress is the count of frames. Lightning's own would make it skip batches of a stream that already continues
        # where it stopped.
        checkpoint.pop("loops", None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The streams move batches themselves, without waiting."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Counters, equal on all ranks, and the episodes of the rank that writes."""
        version = self._version if self.collector is None else self.collector.version
        return {"frames": self.frames, "version": version, "episodes": self.episodes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        self.frames, self._version = int(state_dict["frames"]), int(state_dict["version"])
        self.episodes.load_state_dict(state_dict["episodes"])
        if self.collector is not None:
            self.collector.version = self._version

    def teardown(self, stage: str) -> None:
        """End the actors."""
        self.shutdown()

    def on_exception(self, exception: BaseException) -> None:
        """End the actors; else the interpreter would wait for them at its exit."""
        self.shutdown()

    def shutdown(self) -> None:
        """End the actors, if any run."""
        if self.collector is not None:
            collector, self.collector = self.collector, None
            self._version = collector.version
            self._restarts += collector.restarts
            collector.shutdown()


class PlainData:
    """Data that is none of these modules, such as a dataloader, as agent and callbacks see it.

    Args:
        module: the trainer's data module, or None.
        ranks: number of learners.

    Attributes:
        episodes, restarts, saves, reads_priorities: as of :class:`ActingData`; there are none, and nothing is saved or
            read.
    """

    restarts: ClassVar[int] = 0
    saves: ClassVar[bool] = False
    reads_priorities: bool = False
    saved: str | None = None

    def __init__(self, module: Any, ranks: int) -> None:
        self.episodes = EpisodeMeter()
        self._counted = module if hasattr(module, "frames") else None
        self._ranks = ranks
        self._learnt = 0

    @property
    def frames(self) -> int:
        """The data module's count of frames, or else the elements of the batches so far, over all ranks."""
        return self._learnt if self._counted is None else int(self._counted.frames)

    @property
    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    @property
    def opening(self) -> str:
        """Not known."""
        return ""

    def updates(self, batch: Any) -> Iterable[TensorDictBase]:
        """A TensorDict is one update, any other iterable one for each of what it holds."""
        return (batch,) if isinstance(batch, TensorDictBase) else batch

    def feedback(self, batch: TensorDictBase) -> None:
        """Counts."""
        self._learnt += batch.numel() * self._ranks

    def save(self, rank: int) -> str | None:
        """Nothing."""
        return None

    def prune(self, rank: int) -> None:
        """Nothing."""

    def resume(self, checkpoint: dict[str, Any], frames: int) -> None:
        """Continues the count; where to go on in the data is Lightning's to know."""
        self._learnt = frames


def rollout_collector(config: Config, frame_stack: int, policy: nn.Module, rank: int, frames: int) -> Collector:
    """The collector of ``rank`` for a run of ``config`` that begins or goes on at ``frames``.

    ``frame_stack``: frames in an observation of the task.

    Raises:
        ConfigError: there is no such cluster, or no room in it, or no such device.
        EnvironmentFailure: an actor did not come up.
    """
    threads = config.collector.emulator_threads
    env_fn = partial(make_env, config.task, config.env.num_envs, num_threads=threads, **config.env_options())
    try:
        return make_collector(
            env_fn,
            policy,
            frames_per_batch=config.env.num_envs * config.collector.unroll,
            num_workers=config.collector.num_workers,
            seed=config.train.seed,
            start=frames,
            rank=rank,
            step_timeout=config.collector.step_timeout,
            max_restarts=config.collector.max_restarts,
            threads_per_worker=config.collector.threads,
            device=_device(config, rank),
            frame_stack=frame_stack,
            rollouts_per_batch=config.rollouts_per_batch,
            server=_server(config, rank, frames),
            backend=config.collector.backend,
            ray=_ray(config),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _ray(config: Config) -> RayOptions | None:
    collector = config.collector
    if collector.backend != "ray":
        return None
    return RayOptions(collector.address, collector.placement == "near", config.train.learners)


def _device(config: Config, rank: int) -> str:
    """Where the actors of ``rank`` have their policy: each learner's on its own GPU, where each has one."""
    device, train = config.collector.device, config.train
    # the ranks of a machine are consecutive
    return (
        f"cuda:{rank % train.devices}"
        if device == "cuda" and train.devices > 1 and train.accelerator != "cpu"
        else device
    )


def _server(config: Config, rank: int, frames: int) -> ServerOptions | None:
    collector = config.collector
    if collector.acting == "copies":
        return None
    # behind the actors' own
    seed = actor_seed(config.train.seed, rank, collector.num_workers, frames)
    return ServerOptions(collector.server_batch, collector.server_wait, seed)
