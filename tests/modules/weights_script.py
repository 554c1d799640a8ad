"""Run by test_losses_sampled.py: one of two gloo ranks evaluates a loss on its half of a batch with weights.

python -m tests.modules.weights_script FOLDER RANK, in the root of the repository
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss, td = torch.load(folder / "case.pt", weights_only=False)
    half = len(td) // 2
    torch.save(loss(td[rank * half : (rank + 1) * half])["loss_q"].detach(), folder / f"loss{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
