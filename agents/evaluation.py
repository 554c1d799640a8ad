"""Scores of a policy over whole games."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from offtrace.modules.keys import EPISODE_END, EPISODE_LENGTH, EPISODE_REWARD, NEXT

EvaluationMode = Literal["sample", "greedy"]


@dataclass(frozen=True)
class EvaluationResult:
    """Raw returns and lengths (agent steps) of the games played, in the order of environment, then of play."""

    returns: list[float]
    lengths: list[int]
    mode: EvaluationMode

    @property
    def mean(self) -> float:
        """Mean raw return."""
        return sum(self.returns) / len(self.returns)

    @property
    def std(self) -> float:
        """Standard deviation of the raw return between games (n - 1); 0 for one game."""
        return float(torch.tensor(self.returns, dtype=torch.float64).std()) if len(self.returns) > 1 else 0.0


@torch.no_grad()
def evaluate(
    policy: TensorDictModuleBase,
    env: EnvBase,
    episodes: int,
    *,
    mode: EvaluationMode = "sample",
    max_steps: int = 1_000_000,
    observer: Callable[[TensorDictBase], None] | None = None,
) -> EvaluationResult:
    """Plays ``episodes`` whole games and returns their raw scores.

    Every environment of the batch plays the same number of games, fixed beforehand: taking the first games that finish
    would prefer short ones. The policy is used as it is (training mode, device, random state untouched); with
    ``mode="sample"`` actions come from torch's global generator.

    Args:
        policy: writes ``"action"`` from what ``env`` gives.
        env: batched ``[N]``, in its evaluation form, with the ``episode_*`` entries of :mod:`offtrace.modules.envs`.
        episodes: number of games, a multiple of ``N``.
        mode: ``"sample"`` draws from the policy, ``"greedy"`` takes its mode.
        max_steps: environment steps after which the evaluation is given up.
        observer: called with every step's TensorDict ``[N]``.

    Raises:
        ValueError: if ``episodes`` is not a positive multiple of the number of environments, or ``mode`` is unknown.
        RuntimeError: if the games do not end within ``max_steps``.
    """
    number = env.batch_size[0]
    if episodes < 1 or episodes % number:
        raise ValueError(f"episodes must be a positive multiple of the {number} environments, got {episodes}")
    if mode not in ("sample", "greedy"):
        raise ValueError(f"mode must be 'sample' or 'greedy', got {mode!r}")
    exploration = ExplorationType.RANDOM if mode == "sample" else ExplorationType.DETERMINISTIC
    device = next(policy.parameters()).device
    quota = episodes // number
    returns: list[list[float]] = [[] for _ in range(number)]
    lengths: list[list[int]] = [[] for _ in range(number)]
    with set_exploration_type(exploration):
        step = env.reset()
        for _ in range(max_steps):
            step = policy(step.to(device)).to(env.device)
            step, following = env.step_and_maybe_reset(step)
            if observer is not None:
                observer(step)
            for index in step[NEXT, EPISODE_END].view(-1).nonzero().flatten().tolist():
                if len(returns[index]) < quota:
                    returns[index].append(float(step[NEXT, EPISODE_REWARD].view(-1)[index]))
                    lengths[index].append(int(step[NEXT, EPISODE_LENGTH].view(-1)[index]))
            if all(len(games) == quota for games in returns):
                flat = [score for games in returns for score in games]
                return EvaluationResult(flat, [steps for games in lengths for steps in games], mode)
            step = following
    raise RuntimeError(f"the {episodes} evaluation games did not end within {max_steps} steps of {number} environments")
