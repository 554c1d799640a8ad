"""Replay against TorchRL's ReplayBuffer: insertion, sampling, memory; alternating, in one process.

    python benchmarks/replay.py                       transitions of 17 numbers, and sequences of 5 and 20
    python benchmarks/replay.py --pixels              transitions of images 9x84x84, in memory-mapped files

Both hold what a tanh-Gaussian policy of 6 actions writes: observation, action, log-probability, loc, scale, pre-tanh
sample, reward and flags. TorchRL's buffer stores the rollout as a collector gives it, with the successors, and samples
sequences by its SliceSampler from the ends of the episodes. Times are medians, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers import RandomSampler, SliceSampler

from offtrace.modules.replay import Replay

ENVS, EPISODE, ACTIONS = 8, 1000, 6


class Rollouts:
    """Rollouts ``[8, T]`` of episodes of 1000 steps."""

    def __init__(self, pixels: bool) -> None:
        self.pixels = pixels
        self.step = 0
        self.last = self._observation(1)[:, 0]

    def _observation(self, steps: int) -> torch.Tensor:
        if self.pixels:
            return torch.randint(256, (ENVS, steps, 9, 84, 84), dtype=torch.uint8)
        return torch.rand(ENVS, steps, 17)

    def next(self, steps: int) -> TensorDict:
        states = torch.cat([self.last[:, None], self._observation(steps)], 1)
        self.last = states[:, -1]
        count = torch.arange(self.step, self.step + steps).expand(ENVS, steps).unsqueeze(-1)
        self.step += steps
        over = count % EPISODE == EPISODE - 1
        policy = {name: torch.rand(ENVS, steps, ACTIONS) for name in ("action", "loc", "scale", "pre_tanh")}
        following = {
            "observation": states[:, 1:].contiguous(), "reward": torch.rand(ENVS, steps, 1), "truncated": over,
            "terminated": torch.zeros_like(over), "done": over.clone(),
        }  # fmt: skip
        root = {
            "observation": states[:, :-1].contiguous(), "is_init": count % EPISODE == 0,
            "action_log_prob": torch.rand(ENVS, steps), **policy,
        }  # fmt: skip
        return TensorDict({**root, "next": following}, [ENVS, steps])


class Theirs:
    """TorchRL's buffer, with transitions or with slices of episodes."""

    def __init__(self, capacity: int, batch: int, length: int, memmap: bool) -> None:
        storage: Any = LazyMemmapStorage if memmap else LazyTensorStorage
        sampler = RandomSampler()
        if length > 1:
            sampler = SliceSampler(slice_len=length, end_key=("next", "done"), cache_values=True, strict_length=False)
        self.length = length
        # with two dimensions it keeps the environments apart, [capacity / N, N]
        self.buffer = ReplayBuffer(
            storage=storage(capacity, ndim=1 if length == 1 else 2), sampler=sampler, batch_size=batch * length,
        )  # fmt: skip

    def extend(self, rollout: TensorDict) -> None:
        self.buffer.extend(rollout.reshape(-1) if self.length == 1 else rollout)

    def sample(self) -> Any:
        return self.buffer.sample()

    def bytes(self) -> float:
        storage = self.buffer.storage._storage
        return sum(x[0].numel() * x.element_size() for x in storage.values(True, True)) / (
            1 if self.length == 1 else ENVS
        )


def median(call: Callable[[], Any], times: list[float]) -> None:
    start = time.perf_counter()
    call()
    times.append(1e6 * (time.perf_counter() - start))


def compare(capacity: int, batch: int, length: int, *, pixels: bool, rounds: int, folder: str) -> None:
    """Fills both until the ring has turned over, then measures in turns."""
    kind: Any = "memmap" if pixels else "tensor"
    ours = Replay(
        capacity, num_envs=ENVS, batch_size=batch, length=length, pad=length > 1, storage=kind,
        path=folder if pixels else None,
    )  # fmt: skip
    theirs = Theirs(capacity, batch, length, pixels)
    rollouts = Rollouts(pixels)
    chunk = 250 if not pixels else 25
    while ours.inserted < 1.1 * capacity:
        rollout = rollouts.next(chunk)
        ours.extend(rollout)
        theirs.extend(rollout)
    rows = {}
    for name, steps in (("insert 8 x 1", 1), (f"insert 8 x {chunk}", chunk)):
        one, two = [], []  # type: list[float], list[float]
        for _ in range(max(rounds // steps, 20)):
            rollout = rollouts.next(steps)
            median(lambda rollout=rollout: ours.extend(rollout), one)  # type: ignore[misc]
            median(lambda rollout=rollout: theirs.extend(rollout), two)  # type: ignore[misc]
        rows[name] = one, two
    one, two = [], []
    for _ in range(rounds if not pixels else 30):
        median(ours.sample, one)
        median(theirs.sample, two)
    rows[f"sample {batch}"] = one, two
    print(f"length {length}, {'images' if pixels else '17 numbers'}, {capacity} steps")
    for name, (mine, other) in rows.items():
        print(f"  {name:14} {statistics.median(mine):9.0f} us, TorchRL {statistics.median(other):9.0f} us")
    print(f"  {'memory':14} {ours.bytes_per_slot:9.0f} bytes a step, TorchRL {theirs.bytes():.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--pixels", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for length in (1,) if args.pixels else (1, 5, 20):
        with tempfile.TemporaryDirectory() as folder:
            compare(
                min(args.capacity, 4000) if args.pixels else args.capacity, args.batch, length, pixels=args.pixels,
                rounds=args.rounds, folder=folder,
            )  # fmt: skip


if __name__ == "__main__":
    main()
