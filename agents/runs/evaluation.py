"""Scores of a policy over whole episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from offtrace.modules.keys import ACTION, DONE, EPISODE_END, EPISODE_LENGTH, EPISODE_REWARD, NEXT, VALID

EvaluationMode = Literal["sample", "greedy"]


@dataclass(frozen=True)
class EvaluationResult:
    """What was played, in the order of environment, then of play.

    Attributes:
        returns: raw returns.
        lengths: in agent steps.
        mode: how actions were chosen.
        action_change: root mean square, over steps and dimensions, of the change from one executed action of an episode
            to the next, in parts of the action's range: 0 for a constant action, 0.41 for independent uniform ones, 1
            for one that jumps between the bounds at every step; dimensions without a range are left out. None for
            discrete actions, where a bound is infinite, and where no dimension has a range. The plainest measure of
            smoothness; Mysore et al. 2021 (arXiv 2012.06644) weigh the spectrum instead.
        dropped: episodes that a simulator's failure broke off: they took their turn, and count nowhere else.
    """

    returns: list[float]
    lengths: list[int]
    mode: EvaluationMode
    action_change: float | None = None
    dropped: int = 0

    @property
    def mean(self) -> float:
        """Mean raw return; NaN where every episode was dropped."""
        return sum(self.returns) / len(self.returns) if self.returns else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the raw return between episodes (n - 1); 0 for one episode."""
        return float(torch.tensor(self.returns, dtype=torch.float64).std()) if len(self.returns) > 1 else 0.0

    @property
    def spread(self) -> str:
        """In words: the mean's standard error, and the standard deviation between episodes."""
        if len(self.returns) == 1:
            return "a single episode"
        return f"standard error {self.std / len(self.returns) ** 0.5:.2f}, std {self.std:.2f} between episodes"

    @property
    def mean_length(self) -> float:
        """Mean length in agent steps; NaN where every episode was dropped."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else math.nan


class _ActionChange:
    """Sums the squared changes of the executed actions over the episodes that count.

    Args:
        low, high: ``[A]``, the bounds to which the environment clips.
        number: N.
    """

    def __init__(self, low: Tensor, high: Tensor, number: int) -> None:
        self._low, self._high = low, high
        self._moves = low < high
        self._before: Tensor | None = None
        self._begins = torch.ones(number, dtype=torch.bool)
        self._squares = torch.zeros(number, dtype=torch.float64)  # of the episodes under way
        self._changes = torch.zeros(number, dtype=torch.int64)
        self._total, self._count = 0.0, 0

    def note(self, step: TensorDictBase) -> None:
        """Takes in a step ``[N]``."""
        action = torch.clamp(step[ACTION], self._low, self._high) / (self._high - self._low)
        action = action[..., self._moves]
        if self._before is not None:
            squares = (action - self._before).square().mean(-1).double()
            self._squares = torch.where(self._begins, 0.0, self._squares + squares)
            self._changes = torch.where(self._begins, 0, self._changes + 1)
        self._before = action
        self._begins = step[NEXT, DONE].view(-1)  # an episode that a failing simulator ended has no end, only this

    def count(self, index: int) -> None:
        """The episode of environment ``index`` ended with the last step, and counts."""
        self._total += float(self._squares[index])
        self._count += int(self._changes[index])

    @property
    def root_mean_square(self) -> float:
        """Over the episodes counted; 0 if all had a single step."""
        return math.sqrt(self._total / max(1, self._count))


def _action_change(env: EnvBase) -> _ActionChange | None:
    bounds = getattr(env, "action_bounds", None)  # one of ours
    if bounds is None and not hasattr(env, "action_bounds") and isinstance(env.action_spec, Bounded):
        bounds = env.action_spec.space.low[0], env.action_spec.space.high[0]
    if bounds is None or not bool((bounds[0] < bounds[1]).any()):
        return None
    return _ActionChange(bounds[0], bounds[1], env.batch_size[0])


def _check(number: int, episodes: int, mode: str) -> None:
    if episodes < 1 or episodes % number:
        raise ValueError(f"episodes must be a positive multiple of the {number} environments, got {episodes}")
    if mode not in ("sample", "greedy"):
        raise ValueError(f"mode must be 'sample' or 'greedy', got {mode!r}")


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
    """Plays ``episodes`` whole episodes and returns their raw scores.

    Every environment of the batch plays the same number of episodes, fixed beforehand: taking the first ones that
    finish would prefer short ones. An episode that a simulator's failure breaks off takes its turn: a policy that
    always drives it there would be evaluated for ever. The policy is used as it is (training mode, device, random state
    untouched); with ``mode="sample"`` actions come from torch's global generator.

    Args:
        policy: writes ``"action"`` from what ``env`` gives.
        env: batched ``[N]``, in its evaluation form, with the ``episode_*`` entries of :mod:`offtrace.modules.envs`.
        episodes: their number, a multiple of ``N``.
        mode: ``"sample"`` draws from the policy, ``"greedy"`` takes its mode.
        max_steps: environment steps after which the evaluation is given up.
        observer: called with every step's TensorDict ``[N]``.

    Raises:
        ValueError: if ``episodes`` is not a positive multiple of the number of environments, or ``mode`` is unknown.
        RuntimeError: if the episodes do not end within ``max_steps``.
    """
    number = env.batch_size[0]
    _check(number, episodes, mode)
    exploration = ExplorationType.RANDOM if mode == "sample" else ExplorationType.DETERMINISTIC
    device = next(policy.parameters()).device
    quota = episodes // number
    returns: list[list[float]] = [[] for _ in range(number)]
    lengths: list[list[int]] = [[] for _ in range(number)]
    played = [0] * number
    change = _action_change(env)
    with set_exploration_type(exploration):
        step = env.reset()
        for _ in range(max_steps):
            step = policy(step.to(device)).to(env.device)
            step, following = env.step_and_maybe_reset(step)
            if observer is not None:
                observer(step)
            if change is not None:
                change.note(step)
            valid = step.get((NEXT, VALID), None)
            for index in () if valid is None else (~valid).view(-1).nonzero().flatten().tolist():
                played[index] += 1
            for index in step[NEXT, EPISODE_END].view(-1).nonzero().flatten().tolist():
                played[index] += 1
                if played[index] <= quota:
                    returns[index].append(float(step[NEXT, EPISODE_REWARD].view(-1)[index]))
                    lengths[index].append(int(step[NEXT, EPISODE_LENGTH].view(-1)[index]))
                    if change is not None:
                        change.count(index)
            if all(count >= quota for count in played):
                return EvaluationResult(
                    [score for scores in returns for score in scores],
                    [steps for numbers in lengths for steps in numbers],
                    mode,
                    None if change is None else change.root_mean_square,
                    episodes - sum(len(scores) for scores in returns),
                )
            step = following
    raise RuntimeError(
        f"the {episodes} evaluation episodes did not end within {max_steps} steps of {number} environments"
    )
