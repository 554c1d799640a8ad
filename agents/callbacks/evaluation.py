"""Evaluations while training runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchrl.envs import EnvBase

from offtrace.agents.agent import Agent, random_state, set_random_state
from offtrace.agents.callbacks.checkpoints import Checkpoints
from offtrace.agents.callbacks.stopping import GracefulStop
from offtrace.agents.runs.evaluation import EvaluationMode, EvaluationResult, evaluate


class Evaluation(pl.Callback):
    """Plays whole episodes every so many frames, on rank 0, in the learner's process.

    Args:
        make_env: builds the evaluation environment, once.
        every: environment frames between evaluations.
        episodes: number in one evaluation.
        mode: ``"sample"`` or ``"greedy"``.
        final: also at the end of training.
        on_result: called with the frames and the result.

    Attributes:
        scores: ``(frames, mean score)`` of every evaluation, kept across a resume; of one number of frames two, where
            a run ended before its last frame and the weights had changed in between.
        last: the newest result of this process; None before the first.
        seconds: spent evaluating.
    """

    def __init__(
        self,
        make_env: Callable[[], EnvBase],
        *,
        every: int,
        episodes: int,
        mode: EvaluationMode = "sample",
        final: bool = True,
        on_result: Callable[[int, EvaluationResult], None] | None = None,
    ) -> None:
        self.make_env = make_env
        self.every = every
        self.episodes = episodes
        self.mode: EvaluationMode = mode
        self.final = final
        self.on_result = on_result
        self.scores: list[tuple[int, float]] = []
        self.last: EvaluationResult | None = None
        self.seconds = 0.0
        self._env: EnvBase | None = None
        self._next = every
        self._scored_at = (0, 0)  # frames and updates

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Sets the next evaluation behind the frames already trained."""
        self._close()  # of a fit that an exception ended
        self._next = (agent.frames // self.every + 1) * self.every

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluates when it is time; behind the last frames, of which updates may be left, it is the final one's."""
        if agent.frames >= self._next:
            self._next = (agent.frames // self.every + 1) * self.every
            if not (self.final and agent.frames >= agent.total_frames):
                self._run(trainer, agent)

    def on_train_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """The final score, unless that of these weights was just measured or the run was stopped."""
        stopped = any(isinstance(callback, GracefulStop) and callback.signal for callback in trainer.callbacks)
        if self.final and not stopped and self._scored_at != (agent.frames, agent.updates):
            self._run(trainer, agent)

    def teardown(self, trainer: pl.Trainer, agent: Agent, stage: str) -> None:
        """Closes the environments, when all is saved."""
        self._close()

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"scores": [[frames, score] for frames, score in self.scores], "scored_at": [*self._scored_at]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the scores back."""
        self.scores = [(int(frames), float(score)) for frames, score in state_dict["scores"]]
        frames, updates = state_dict.get("scored_at", (0, 0))
        self._scored_at = int(frames), int(updates)

    @property
    def best(self) -> float:
        """The best mean score so far; minus infinity before the first."""
        return max((score for _, score in self.scores), default=float("-inf"))

    def _run(self, trainer: pl.Trainer, agent: Agent) -> None:
        if not trainer.is_global_zero:
            return
        start = time.perf_counter()
        training, state = agent.policy.training, random_state()
        agent.policy.eval()
        try:
            if self._env is None:
                self._env = self.make_env()
            result = evaluate(agent.policy, self._env, self.episodes, mode=self.mode)
        finally:
            # sampled actions, and tasks of one's own, draw from the generators of the training
            set_random_state(state)
            agent.policy.train(training)
        self.seconds += time.perf_counter() - start
        if not result.returns:
            rank_zero_warn(
                f"no score at {agent.frames:,} frames: the simulator failed in each of {self.episodes} episodes of the "
                "evaluation"
            )
            return
        self._scored_at = agent.frames, agent.updates
        self.scores.append((agent.frames, result.mean))
        self.last = result
        metrics = {"eval/return": result.mean, "eval/return_std": result.std, "eval/length": result.mean_length}
        if result.action_change is not None:
            metrics["eval/action_change"] = result.action_change
        if result.dropped:
            metrics["eval/dropped_episodes"] = result.dropped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=agent.frames)
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                callback.on_score(trainer, agent, result.mean, best=self.best)
        if self.on_result is not None:
            self.on_result(agent.frames, result)
