"""Reading checkpoints without Lightning."""

from __future__ import annotations

import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules.utils import get_env_transforms_from_module

from offtrace.agents.runs.missing import no_checkpoint
from offtrace.agents.runs.ranks import rank
from offtrace.modules.envs import make_env
from offtrace.modules.naming import imported
from offtrace.modules.networks import build_policy

CHECKPOINT_KEY = "offtrace"

Builder = Callable[..., ProbabilisticTensorDictSequential]

_BUILDERS: dict[str, Builder] = {"build_policy": build_policy}


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
        raise CheckpointError(no_checkpoint(path))
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


def usable(path: Path) -> Path:
    """``path``, or the ``previous.ckpt`` beside it where it is damaged or gone, which a warning tells.

    Raises:
        CheckpointError: neither can be used.
    """
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        before = path.with_name("previous.ckpt")
        if not before.is_file():
            raise
        try:
            frames = int(read_checkpoint(before)[CHECKPOINT_KEY]["frames"])
        except CheckpointError as second:
            raise CheckpointError(f"{error}; and the one before it cannot be used either: {second}") from second
        if not rank():
            warnings.warn(
                f"{error}; the run goes on from {before.name}, and what it had learnt after {frames:,} frames is lost",
                RuntimeWarning,
                stacklevel=2,
            )
        return before
    return path


def builder_of(name: str) -> Builder:
    """The function that a policy's spec names.

    Args:
        name: ``build_policy``, or the import path ``package.module:function`` of an own one.

    Raises:
        ValueError: there is no such function.
    """
    if name in _BUILDERS:
        return _BUILDERS[name]
    if ":" not in name:
        raise ValueError(f"the builder {name!r} is unknown; it must be build_policy, or package.module:function")
    builder: Builder = imported(name, "builder")
    home = getattr(builder, "__module__", None) or "builtins"
    if home.split(".")[0] in sys.stdlib_module_names:  # such as a shell
        raise ValueError(f"the builder {name!r} builds no policy; it must be a function that does")
    return builder


def load_policy(path: str | Path, *, device: str | torch.device = "cpu") -> ProbabilisticTensorDictSequential:
    """The trained policy of a checkpoint: a TensorDict module that reads observations and writes actions.

    It acts by sampling, or by its mode under ``set_exploration_type(ExplorationType.DETERMINISTIC)``; Lightning is not
    needed.

    A checkpoint may name own code, by the import path of the function that builds the policy or its network. That code
    is imported and run: load such a checkpoint only from somebody whose code you would run. :func:`read_checkpoint`
    alone runs nothing.

    Args:
        path: a checkpoint written by a recipe, such as ``runs/<name>/checkpoints/best.ckpt``.
        device: where its parameters go.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or if what builds the policy cannot be imported, or the weights do
            not fit the network that it builds.
    """
    checkpoint = read_checkpoint(path)
    spec = checkpoint[CHECKPOINT_KEY].get("policy")
    if spec is None:
        raise CheckpointError(f"{path} does not describe its policy's network")
    try:
        policy = builder_of(spec["builder"])(**spec["arguments"])
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the policy of {path} cannot be built: {reason}") from error
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


def load_env(path: str | Path, policy: nn.Module, num_envs: int = 1, *, seed: int = 0, **options: Any) -> EnvBase:
    """The task of the checkpoint at ``path``, with the options it was trained with, in the form for evaluations.

    Args:
        path: as of :func:`load_policy`.
        policy: that of the checkpoint: the environments carry the state that it acts with, where it has one.
        num_envs: N.
        seed: environment i has ``seed + i``.
        options: of :func:`offtrace.modules.make_env`, in place of those of the training.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
        ValueError: as :func:`offtrace.modules.make_env`.
    """
    saved = read_checkpoint(path)[CHECKPOINT_KEY]["env"]
    env = make_env(saved["name"], num_envs, seed=seed, evaluation=True, **saved["options"] | options)
    return with_policy_transforms(env, policy)


def with_policy_transforms(env: EnvBase, policy: nn.Module) -> EnvBase:
    """``env``, carrying the state that ``policy`` acts with, where it has one: recurrent, of smoothing or of noise."""
    transform = get_env_transforms_from_module(policy)
    return env if transform is None else env.append_transform(transform)
