"""Reading checkpoints without Lightning."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential

from offtrace.modules.networks import build_actor, build_policy

CHECKPOINT_KEY = "offtrace"

_BUILDERS: dict[str, Callable[..., ProbabilisticTensorDictSequential]] = {
    "build_actor": build_actor,
    "build_policy": build_policy,
}


# all that torch.load lets out for files that are no checkpoint
_NOT_A_CHECKPOINT = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message is one sentence that names the file and the reason."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at ``path``, on the CPU, read with ``weights_only=True``.

    Raises:
        CheckpointError: if there is no such file, it is truncated, holds anything but plain values and tensors, or was
            not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise RuntimeError(f"{bad} does not have its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_A_CHECKPOINT as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint written by offtrace")
    return checkpoint


def load_policy(path: str | Path, *, device: str | torch.device = "cpu") -> ProbabilisticTensorDictSequential:
    """The trained policy of a checkpoint: a TensorDict module that reads observations and writes actions.

    It acts by sampling, or by its mode under ``set_exploration_type(ExplorationType.DETERMINISTIC)``; Lightning is not
    needed.

    Args:
        path: a checkpoint written by a recipe, such as ``runs/<name>/checkpoints/best.ckpt``.
        device: where its parameters go.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or if the weights do not fit the network the checkpoint describes.
    """
    checkpoint = read_checkpoint(path)
    description = checkpoint[CHECKPOINT_KEY].get("policy")
    if description is None:
        raise CheckpointError(f"{path} does not describe its policy's network")
    policy = _BUILDERS[description["builder"]](**description["arguments"])
    prefix = "policy."
    weights = {
        name[len(prefix) :]: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds the weights of another network: {str(error).splitlines()[-1].strip()}"
        ) from error
    return policy.to(device).eval()
