"""Which entries of a rollout a replay stores, its flags, and the words for what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.modules.keys import (
    ACTION,
    ACTION_NOISE,
    ACTION_VALUE,
    DONE,
    EPISODE_END,
    EPISODE_LENGTH,
    EPISODE_REWARD,
    INDEX,
    IS_INIT,
    NEXT,
    OBSERVATION,
    POLICY_VERSION,
    REWARD,
    SMOOTHED_ACTION,
    TERMINATED,
    TRUNCATED,
    VALID,
    VALUE,
    VALUE_LOGITS,
    WEIGHT,
    WORKER,
)

Key = tuple[str, ...]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.bool,
    )
}  # fmt: skip
"""What a replay can hold."""

# Bookkeeping of episodes and collectors, flags, of which one byte a step is kept, what a critic said while acting, and
# states that only acting reads.
_LEFT_OUT = {
    DONE, TERMINATED, TRUNCATED, IS_INIT, VALID, EPISODE_REWARD, EPISODE_LENGTH, EPISODE_END, WORKER, "collector",
    "_reset", ACTION_VALUE, VALUE, VALUE_LOGITS, ACTION_NOISE, SMOOTHED_ACTION,
}  # fmt: skip


def entries_of(data: TensorDictBase) -> dict[Key, Tensor]:
    """All tensors by their whole key."""
    return {(key,) if isinstance(key, str) else tuple(key): tensor for key, tensor in data.items(True, True)}


def nested(flat: Mapping[Key, Any]) -> dict[str, Any]:
    """Dicts in dicts, from values by their whole key."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        level = out
        for name in key[:-1]:
            level = level.setdefault(name, {})
        level[key[-1]] = value
    return out


def choose(entries: Mapping[Key, Tensor]) -> tuple[list[Key], dict[Key, tuple[tuple[int, ...], torch.dtype]]]:
    """What is stored of rollouts ``[N, T]`` like this one.

    Returns:
        The entries of the state, which are there under ``"next"`` as well and stored once; and shape and type of one
        step of each stored entry.

    Raises:
        ValueError: an entry is missing that no replay can do without, or has a name that a replay gives its samples.
    """
    for name in (INDEX, WEIGHT):
        if (name,) in entries:
            raise ValueError(f"the rollout has {name!r}, a name that the replay gives its samples; call it otherwise")
    for required in ((ACTION,), (NEXT, REWARD), (NEXT, TERMINATED)):
        if required not in entries:
            raise ValueError(f"the rollout lacks {_say(required)}, which a replay needs")
    state = [key for key in entries if _stored(key) and (NEXT, *key) in entries and _stored((NEXT, *key))]
    if not any(key[0] == OBSERVATION for key in state):
        raise ValueError(f"the rollout lacks {OBSERVATION!r}, at its root or under {NEXT!r}; a replay needs both")
    kept = {key: x for key, x in entries.items() if _kept(key, state)}
    for key, x in kept.items():
        if x.dtype not in DTYPES.values():
            raise ValueError(f"{_say(key)} is {x.dtype} in the rollout; a replay holds {', '.join(DTYPES)}")
    return state, {key: (tuple(x.shape[2:]), x.dtype) for key, x in kept.items()}


def check(entries: Mapping[Key, Tensor], state: list[Key], leaves: Mapping[Key, Tensor]) -> None:
    """Refuses a rollout whose entries are not those of the first one.

    Raises:
        ValueError: naming the entry.
    """
    if (NEXT, TERMINATED) not in entries:
        raise ValueError(f"the rollout lacks {_say((NEXT, TERMINATED))}, which a replay needs")
    for key, leaf in leaves.items():
        for one in (key, (NEXT, *key)) if key in state else (key,):
            if one not in entries:
                raise ValueError(f"the rollout lacks {_say(one)}, which the replay stores")
            found = entries[one]
            if found.shape[2:] != leaf.shape[1:] or found.dtype != leaf.dtype:
                raise ValueError(
                    f"{_say(one)} is {found.dtype} {list(found.shape[2:])} in the rollout, but {leaf.dtype} "
                    f"{list(leaf.shape[1:])} in the replay"
                )
    for key in entries:
        if key not in leaves and _kept(key, state):
            raise ValueError(f"the rollout has {_say(key)}, which the first one did not have")


def _stored(key: Key) -> bool:
    return key[0] not in _LEFT_OUT and not (key[0] == NEXT and (key[1] in _LEFT_OUT or key[1] == POLICY_VERSION))


def _kept(key: Key, state: list[Key]) -> bool:
    return _stored(key) and not (key[0] == NEXT and key[1:] in state)


def _say(key: Key) -> str:
    return repr(key[0] if len(key) == 1 else key)


def flags_of(entries: dict[Key, Tensor], envs: int, steps: int) -> dict[str, np.ndarray]:
    """The flags of a rollout, bool ``[N, T]`` each."""

    def flag(*keys: Key) -> np.ndarray:
        found = next((entries[key] for key in keys if key in entries), None)
        return np.zeros((envs, steps), bool) if found is None else found.reshape(envs, steps).cpu().numpy()

    terminated = flag((NEXT, TERMINATED))
    truncated = flag((NEXT, TRUNCATED)) if (NEXT, TRUNCATED) in entries else flag((NEXT, DONE)) & ~terminated
    given = (NEXT, VALID) in entries or (VALID,) in entries
    valid = flag((NEXT, VALID), (VALID,)) if given else np.ones((envs, steps), bool)
    return {"valid": valid, "terminated": terminated, "truncated": truncated, "init": flag((IS_INIT,))}
