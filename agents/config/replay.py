"""The replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtrace.agents.config.base import Checks, ConfigError, Group


def check_place(at: str, storage: str, device: str) -> None:
    """Refuse files on a GPU.

    Raises:
        ConfigError: one sentence.
    """
    if storage == "memmap" and device == "cuda":
        raise ConfigError(f"{at}.device is cuda, and {at}.storage is memmap; files lie on no GPU: it must be cpu")


@dataclass
class ReplayConfig(Group):
    """The replay."""

    capacity: int = 1_000_000
    """Steps it holds."""
    batch_size: int = 256
    """Steps learnt from in one update: transitions, n-step windows, or batch_size / length sequences for a trace
    (padding behind the end of an episode included)."""
    length: int = 8
    """Steps of a sequence for estimators with a trace; n_step takes sequences of its own n."""
    samples_per_insert: float = 256.0
    """Steps learnt from per collected step: divided by batch_size, the updates per step."""
    min_size: int = 1_000
    """Steps collected before the first update."""
    storage: Literal["tensor", "memmap"] = "tensor"
    """In memory, or in files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """In whose memory: the machine's, or that of the learner's GPU."""
    sampler: Literal["uniform", "prioritized", "lazy"] = "uniform"
    """Every step alike, or in proportion to its temporal difference error: prioritized gives new steps the largest so
    far (Schaul et al. 2016), lazy the mean of their neighbours (Reactor)."""
    alpha: float = 0.6
    """Of prioritized and lazy: power of the priorities."""
    beta: float = 0.4
    """Of prioritized and lazy: power of the importance weights at the start; it grows to 1 over the training."""
    epsilon: float = 0.1
    """Of lazy: share of the samples for which every step is alike."""

    # a sequence begins at every step: n-step windows and priorities are of the step that begins one
    overlap = True

    # a group of an algorithm that has recurrent networks makes fields of them
    burn_in = 0
    whole_episodes = False

    @property
    def prioritized(self) -> bool:
        """Whether sampling follows priorities."""
        return self.sampler != "uniform"

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(1, "capacity", "batch_size", "length")
        checks.at_least(0, "min_size", "alpha")
        checks.positive("samples_per_insert")
        checks.fraction("beta", "epsilon")
        check_place(at, self.storage, self.device)
        if self.capacity < max(self.batch_size, self.min_size):
            raise ConfigError(
                f"{at}.capacity is {self.capacity}; it must hold {at}.batch_size, {self.batch_size}, and "
                f"{at}.min_size, {self.min_size}"
            )


@dataclass
class RecurrentReplayConfig(ReplayConfig):
    """The replay."""

    burn_in: int = 0
    """Recurrent networks only: steps in front of a replayed sequence that the network is run over, from the stored
    state, to renew the state (R2D2); 0: the stored state."""
    whole_episodes: bool = False
    """Recurrent networks only: replayed rows go through whole episodes from their start, a sequence in each batch, and
    the state is computed anew (LASER)."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(0, "burn_in")
        if self.whole_episodes and self.prioritized:
            raise ConfigError(
                f"{at}.sampler is {self.sampler}; with {at}.whole_episodes rows go on where they were, and have no "
                "priorities: it must be uniform"
            )
