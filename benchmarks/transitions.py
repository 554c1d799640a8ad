"""The replayed data of the update benchmarks: the same random transitions, plain and as a rollout of the collector."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

OBS, ACT = 17, 6


def transitions(size: int = 100_000) -> dict[str, Tensor]:
    """Random transitions, one after the other, with an end after every thousandth."""
    observation = torch.randn(size + 1, OBS)
    done = torch.arange(1, size + 1) % 1000 == 0
    return {
        "observation": observation[:-1].contiguous(),
        "next": observation[1:].contiguous(),
        "action": torch.randn(size, ACT).tanh(),
        "reward": torch.rand(size),
        "terminated": done & (torch.arange(size) % 2000 < 1000),
        "done": done,
    }


def as_rollout(stored: dict[str, Tensor], actor: Any) -> TensorDict:
    """``[1, size]``, with all that the acting policy stores."""
    size = len(stored["reward"])
    columns = {name: stored[name].view(1, size, 1) for name in ("reward", "terminated", "done")}
    columns["truncated"] = columns["done"] & ~columns["terminated"]
    steps = {"observation": stored["observation"].unsqueeze(0), "action": stored["action"].unsqueeze(0)}
    with torch.no_grad():
        steps |= {name: actor(TensorDict(steps, [1, size]))[name].clone() for name in ("loc", "scale")}
    steps["pre_tanh"] = steps["action"].clamp(-0.999, 0.999).atanh()
    steps["action_log_prob"] = torch.zeros(1, size)
    steps["is_init"] = torch.cat([torch.ones(1, 1, 1, dtype=torch.bool), columns["done"][:, :-1]], 1)
    return TensorDict({**steps, "next": {"observation": stored["next"].unsqueeze(0), **columns}}, [1, size])
