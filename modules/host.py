"""What the host may look at without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether the host may ask what ``tensor`` holds: it lies on the CPU, and no compiler is following.

    On a device a read waits for all that was asked for before, and a captured graph cannot have one.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
