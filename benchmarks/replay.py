"""Replay against TorchRL's ReplayBuffer: insertion, sampling, memory; alternating, in one process.

    python benchmarks/replay.py                       transitions of 17 numbers, and sequences of 5 and 20; the trees
    python benchmarks/replay.py --pixels              transitions of images 9x84x84, in memory-mapped files

Both hold what a tanh-Gaussian policy of 6 actions writes: observation, action, log-probability, loc, scale, pre-tanh
sample, reward and flags. TorchRL's buffer stores the rollout as a collector gives it, with the successors, and samples
sequences by its SliceSampler from the ends of the episodes. "by priority" is our replay with ``Prioritized()``. The
samplers alone draw 64 sequences out of so many starts; of the lazy one a tenth has a priority. Of
images there is one more column: our replay with ``frame_stack=3``, which stores each of the frames 3x84x84 once. Times
are medians, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers import RandomSampler, SliceSampler

from offtrace.modules.replay import LazyPrioritized, Prioritized, Replay
from offtrace.modules.replay.sum_tree import SumTree

ENVS, EPISODE, ACTIONS, FRAMES = 8, 1000, 6, 3


class Rollouts:
    """Rollouts ``[8, T]`` of episodes of 1000 steps."""

    def __init__(self, pixels: bool) -> None:
        self.pixels = pixels
        self.step = 0
        self.seen = self._new(FRAMES if pixels else 1)

    def _new(self, steps: int) -> torch.Tensor:
        if self.pixels:
            return torch.randint(256, (ENVS, steps, 3, 84, 84), dtype=torch.uint8)
        return torch.rand(ENVS, steps, 17)

    def next(self, steps: int) -> TensorDict:
        states = torch.cat([self.seen, self._new(steps)], 1)
        self.seen = states[:, -self.seen.shape[1] :]
        if self.pixels:
            states = torch.cat([states[:, index : index + steps + 1] for index in range(FRAMES)], 2)
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
    """Fills all until the ring has turned over, then measures in turns."""
    kind: Any = "memmap" if pixels else "tensor"

    def ours(name: str, frames: int, sampler: Prioritized | None = None) -> Replay:
        return Replay(
            capacity, num_envs=ENVS, batch_size=batch, length=length, pad=length > 1, storage=kind,
            path=f"{folder}/{name}" if pixels else None, frame_stack=frames,
            sampler=sampler,
        )  # fmt: skip

    contenders: dict[str, Any] = {"ours": ours("whole", 1), "by priority": ours("priority", 1, Prioritized())}
    if pixels:
        contenders["frames once"] = ours("frames", FRAMES)
    contenders["TorchRL"] = Theirs(capacity, batch, length, pixels)
    rollouts = Rollouts(pixels)
    chunk = 250 if not pixels else 25
    while contenders["ours"].inserted < 1.1 * capacity:
        rollout = rollouts.next(chunk)
        for one in contenders.values():
            one.extend(rollout)
    rows: dict[str, dict[str, list[float]]] = {}
    for row, steps in (("insert 8 x 1", 1), (f"insert 8 x {chunk}", chunk)):
        rows[row] = {name: [] for name in contenders}
        for _ in range(max(rounds // steps, 20)):
            rollout = rollouts.next(steps)
            for name, one in contenders.items():
                median(lambda one=one, rollout=rollout: one.extend(rollout), rows[row][name])  # type: ignore[misc]
    rows[f"sample {batch}"] = times = {name: [] for name in contenders}
    for _ in range(rounds if not pixels else 30):
        for name, one in contenders.items():
            median(one.sample, times[name])
    rows["update"] = {"by priority": (times := [])}
    for _ in range(rounds if not pixels else 30):
        index, priority = contenders["by priority"].sample()["index"], torch.rand(batch)
        median(
            lambda index=index, priority=priority: contenders["by priority"].update_priorities(index, priority), times
        )  # type: ignore[misc]
    print(f"length {length}, {'images' if pixels else '17 numbers'}, {capacity} steps")
    for row, measured in rows.items():
        found = (f"{name} {statistics.median(values):9.0f} us" for name, values in measured.items())
        print(f"  {row:14} {', '.join(found)}")
    sizes = {name: one.bytes() if name == "TorchRL" else one.bytes_per_slot for name, one in contenders.items()}
    print(f"  {'bytes a step':14} {', '.join(f'{name} {size:9.0f}   ' for name, size in sizes.items())}")


def sum_tree(size: int, rounds: int) -> None:
    """64 numbers found and changed at random places, and 2000 new ones, 250 in each of 8 rings."""
    rng, tree = np.random.default_rng(0), SumTree(size)
    tree.fill(rng.random(size))
    times: dict[str, list[float]] = {"find 64": [], "change 64": [], "change 8 x 250": []}
    for _ in range(rounds):
        mass, value = rng.random(64) * tree.total, rng.random(64)
        median(lambda mass=mass: tree.find(mass), times["find 64"])  # type: ignore[misc]
        index = tree.find(mass)[0]
        median(lambda index=index, value=value: tree.set(index, value), times["change 64"])  # type: ignore[misc]
        index = (np.arange(8)[:, None] * (size // 8) + rng.integers(size // 8 - 250) + np.arange(250)).ravel()
        median(lambda index=index: tree.set(index, 1.0), times["change 8 x 250"])  # type: ignore[misc]
    found = (f"{name} {statistics.median(values):.0f} us" for name, values in times.items())
    print(f"sum tree of {size} numbers: {', '.join(found)}")


def samplers(size: int, rounds: int) -> None:
    """Both prioritised samplers: 64 draws, their 64 updates, and 8 x 16 new starts."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for sampler in (Prioritized(), LazyPrioritized()):
        sampler.bind(size)
        sampler.add(np.arange(size))
        known = rng.choice(size, size // 10, replace=False)
        sampler.update(known, rng.random(len(known)))
        times: dict[str, list[float]] = {"draw 64": [], "update 64": [], "renew 8 x 16": []}
        for _ in range(rounds):
            median(lambda sampler=sampler: sampler.draw(64, generator), times["draw 64"])  # type: ignore[misc]
            slots, value = sampler.draw(64, generator)[0], rng.random(64)
            update = lambda sampler=sampler, slots=slots, value=value: sampler.update(slots, value)  # noqa: E731
            median(update, times["update 64"])
            slots = (np.arange(8)[:, None] * (size // 8) + rng.integers(size // 8 - 16) + np.arange(16)).ravel()
            median(
                lambda sampler=sampler, slots=slots: (sampler.remove(slots), sampler.add(slots)), times["renew 8 x 16"]
            )  # type: ignore[misc]
        found = (f"{name} {statistics.median(values):.0f} us" for name, values in times.items())
        print(f"{sampler} of {size} starts: {', '.join(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--pixels", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in () if args.pixels else (50_000, 1_000_000):
        sum_tree(size, args.rounds)
        samplers(size, args.rounds)
    for length in (1,) if args.pixels else (1, 5, 20):
        with tempfile.TemporaryDirectory() as folder:
            compare(
                min(args.capacity, 4000) if args.pixels else args.capacity, args.batch, length, pixels=args.pixels,
                rounds=args.rounds, folder=folder,
            )  # fmt: skip


if __name__ == "__main__":
    main()
