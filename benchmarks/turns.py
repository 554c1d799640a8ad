"""Two ways to make gradient updates, in turns in one process: the recipes' own and a bare loop."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from offtrace.agents import Agent

UPDATES_PER_STEP = 8  # the recipes' default


def arguments(description: str | None, *, only_eager: bool = False) -> argparse.Namespace:
    """The options of a benchmark; sets the number of OpenMP's threads, for which torch must not be imported yet.

    With ``only_eager`` there is no choice of a device or of another form of the shipped update.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--updates", type=int, default=24, help="in a turn")
    parser.set_defaults(compile=False, capture=False, device="cpu")
    if not only_eager:
        parser.add_argument("--compile", action="store_true", help="the shipped loss; the bare loop stays eager")
        parser.add_argument("--device", help="cpu (default) or cuda; of the networks and of both replays")
        parser.add_argument("--capture", action="store_true", help="the shipped update as one CUDA graph")
    args = parser.parse_args()
    if args.capture and args.device == "cpu":
        parser.error("--capture needs a GPU: --device cuda")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the recipes
    return args


def compare(
    args: argparse.Namespace, agent: Agent, sample: Callable[[], TensorDictBase], bare: Callable[[], None]
) -> None:
    """Prints both speeds and their ratio.

    The shipped updates run under Lightning's loop in steps of eight, as in the recipes: sampling, loss, backward,
    norms, Adam, targets, metrics. Acting and insertion are left out.
    """
    import lightning.pytorch as pl
    import torch

    from offtrace.agents.data.replay import Batches

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    steps = max(1, args.updates // UPDATES_PER_STEP)
    pairs: list[list[tuple[float, float]]] = []

    def clock() -> tuple[float, float]:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def since(start: tuple[float, float]) -> tuple[float, float]:
        return tuple((b - a) / (steps * UPDATES_PER_STEP) for a, b in zip(start, clock(), strict=True))  # type: ignore[return-value]

    class Stream:  # Lightning would take a list for several loaders
        def __len__(self) -> int:
            return steps * (args.pairs + 2)

        def __iter__(self) -> Iterator[Batches]:
            return (Batches(sample, UPDATES_PER_STEP) for _ in range(len(self)))

    class Data(pl.LightningDataModule):
        frames = 0

        def train_dataloader(self) -> Any:
            return Stream()

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    class Turns(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.start = clock()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % steps == 0:
                shipped, start = since(self.start), clock()
                for _ in range(steps * UPDATES_PER_STEP):
                    bare()
                pairs.append([since(start), shipped])
                self.start = clock()

    trainer = pl.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Turns()],
    )  # fmt: skip
    trainer.fit(agent, Data())
    pairs = pairs[2:]  # what is built at the first calls is no part of the figures
    where = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores, {args.threads} threads"
    print(f"{where}, Python {platform.python_version()}, torch {torch.__version__}; {' '.join(sys.argv)}")
    for index, name in enumerate(("bare", "shipped")):
        wall, processor = (statistics.median(pair[index][kind] for pair in pairs) for kind in (0, 1))
        print(f"{name}: {1 / wall:.0f} updates/s, {1e3 * wall:.2f} ms, {1e3 * processor:.2f} ms of processor time")
    ratios = [statistics.median(pair[0][kind] / pair[1][kind] for pair in pairs) for kind in (0, 1)]
    print(f"ratio {ratios[0]:.3f} (wall), {ratios[1]:.3f} (processor), {len(pairs)} pairs")
