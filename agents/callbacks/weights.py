"""What happens between updates: weights to the actors, evaluation, checkpoints."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tensordict import TensorDict
from torchrl.envs import EnvBase

from offtrace.agents.agent import Agent
from offtrace.agents.evaluation import EvaluationMode, EvaluationResult, evaluate
from offtrace.agents.stopping import GracefulStop
from offtrace.modules.replay import DamagedReplay


class WeightSync(pl.Callback):
    """Gives the actors the learner's weights, and measures how old the data is.

    Args:
        every: updates between two pushes.
        lag: forced age in updates: what is pushed are the weights of at least ``lag`` updates ago. 0 pushes the newest.
            A study tool: with 0 the lag is what the pipeline makes it.

    Attributes:
        lag_mean, lag_max: age in updates of the last batch's behaviour weights, counted from the update the weights
            were copied at to the update that trains on them.
    """

    def __init__(self, every: int = 1, lag: int = 0) -> None:
        if every < 1 or lag < 0:
            raise ValueError(f"every must be at least 1 and lag at least 0, got {every} and {lag}")
        self.every = every
        self.lag = lag
        self.lag_mean = 0.0
        self.lag_max = 0
        self._old: deque[tuple[int, TensorDict]] = deque()
        self._copied_at: list[int] = []
        self._pushes = 0
        self._start = 0
        self._first_version = 0

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Notes that the collector starts with the learner's present weights."""
        self._copied_at = [agent.updates]
        self._start = agent.updates  # a resumed run begins a rollout, wherever in one it was stopped
        self._pushes = 0
        self._first_version = trainer.datamodule.collector.version
        self._old.clear()
        self._remember(agent)

    def on_train_batch_start(self, trainer: pl.Trainer, agent: Agent, batch: Any, batch_idx: int) -> None:
        """Reads the batch's versions."""
        versions, steps = trainer.datamodule.behaviour_versions(batch).to("cpu", torch.int64).unique(return_counts=True)
        copied = torch.tensor([self._copied_at[version - self._first_version] for version in versions.tolist()])
        self.lag_mean = agent.updates - float((copied * steps).sum() / steps.sum())
        self.lag_max = agent.updates - int(copied.min())

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pushes, every ``every`` updates."""
        self._remember(agent)
        pushes = (agent.updates - self._start) // self.every
        if pushes == self._pushes:
            return
        self._pushes = pushes
        updates, weights = (agent.updates, agent.policy_weights()) if not self.lag else self._old[0]
        self._copied_at.append(updates)
        trainer.datamodule.collector.update_policy(weights)

    def _remember(self, agent: Agent) -> None:
        if not self.lag:
            return
        self._old.append((agent.updates, agent.policy_weights().clone()))
        while len(self._old) > 1 and self._old[1][0] <= agent.updates - self.lag:
            self._old.popleft()


class Evaluation(pl.Callback):
    """Plays whole games every so many frames, on rank 0, in the learner's process.

    Args:
        make_env: builds the evaluation environment, once.
        every: environment frames between evaluations.
        episodes: games of one evaluation.
        mode: ``"sample"`` or ``"greedy"``.
        final: also at the end of training.
        on_result: called with the frames and the result.

    Attributes:
        scores: ``(frames, mean score)`` of every evaluation, kept across a resume.
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

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Sets the next evaluation behind the frames already trained."""
        self._next = (agent.frames // self.every + 1) * self.every

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluates when it is time."""
        if agent.frames >= self._next:
            self._next += self.every
            self._run(trainer, agent)

    def on_train_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """The final score, unless it was just measured or the run was stopped."""
        stopped = any(isinstance(callback, GracefulStop) and callback.signal for callback in trainer.callbacks)
        if self.final and not stopped and (not self.scores or self.scores[-1][0] != agent.frames):
            self._run(trainer, agent)
        if self._env is not None:
            self._env.close()
            self._env = None

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"scores": [[frames, score] for frames, score in self.scores]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the scores back."""
        self.scores = [(int(frames), float(score)) for frames, score in state_dict["scores"]]

    @property
    def best(self) -> float:
        """The best mean score so far; minus infinity before the first."""
        return max((score for _, score in self.scores), default=float("-inf"))

    def _run(self, trainer: pl.Trainer, agent: Agent) -> None:
        if not trainer.is_global_zero:
            return
        start = time.perf_counter()
        if self._env is None:
            self._env = self.make_env()
        training = agent.policy.training
        agent.policy.eval()
        # sampled games draw from the generators of the training, which evaluating must not change
        with torch.random.fork_rng(devices=[agent.device] if agent.device.type == "cuda" else []):
            result = evaluate(agent.policy, self._env, self.episodes, mode=self.mode)
        agent.policy.train(training)
        self.seconds += time.perf_counter() - start
        if not result.returns:
            rank_zero_warn(
                f"no score at {agent.frames:,} frames: the simulator failed in each of {self.episodes} evaluation games"
            )
            return
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


class Checkpoints(pl.Callback):
    """``last.ckpt`` every so many frames, at the end and when anything stops the run; ``best.ckpt`` after a best score.

    Files appear whole or not at all, and never hold weights that are not finite. Rank 0 writes. Where each rank has a
    replay to save they agree on whether all could; else nobody waits for anybody, so that a failure on one rank cannot
    hang the others.

    Args:
        folder: where the files go.
        every: environment frames between two writings of ``last.ckpt``.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every
        self._next = every
        self._began = False

    def on_train_start(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Sets the next checkpoint behind the frames already trained."""
        self._began = True
        self._next = (agent.frames // self.every + 1) * self.every

    def on_train_batch_end(self, trainer: pl.Trainer, agent: Agent, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes ``last.ckpt`` when it is time."""
        if agent.frames >= self._next:
            self._next += self.every
            self.save(trainer, agent, "last.ckpt")

    def on_train_end(self, trainer: pl.Trainer, agent: Agent) -> None:
        """Writes the final ``last.ckpt``."""
        self.save(trainer, agent, "last.ckpt")

    def on_exception(self, trainer: pl.Trainer, agent: Agent, exception: BaseException) -> None:
        """Keeps what was learned, whatever ended the run.

        Of several ranks with a replay each, one alone cannot: a checkpoint names the replays that all of them wrote.
        """
        alone = trainer.world_size > 1 and hasattr(trainer.datamodule, "save")
        if agent.updates and self._began and not alone:  # before that, what was read is not all in place
            self.save(trainer, agent, "last.ckpt")

    def on_score(self, trainer: pl.Trainer, agent: Agent, score: float, *, best: float) -> None:
        """Writes ``best.ckpt`` when ``score`` is the best."""
        if score >= best:
            self.save(trainer, agent, "best.ckpt")

    def save(self, trainer: pl.Trainer, agent: Agent, name: str) -> None:
        """Writes one file, through a temporary one beside it; with ``last.ckpt``, what the data module has to save."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in agent.parameters()):
            return
        replayed = name == "last.ckpt" and hasattr(trainer.datamodule, "save") and self._save_replay(trainer)
        if trainer.is_global_zero:
            self._write(trainer, name)
        if replayed:
            trainer.datamodule.prune(trainer.global_rank)

    def _save_replay(self, trainer: pl.Trainer) -> bool:
        """Whether it was written; of several ranks, by all of them."""
        name = None
        try:
            name = trainer.datamodule.save(trainer.global_rank)
        except (OSError, DamagedReplay) as error:
            warnings.warn(f"the replay was not saved: {error}", RuntimeWarning, stacklevel=2)
        if not trainer.strategy.reduce_boolean_decision(name is not None, all=True):
            return False
        trainer.datamodule.saved = name
        return True

    def _write(self, trainer: pl.Trainer, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        # Trainer.save_checkpoint would wait for all ranks, which a failing rank never reaches.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            torch.save(checkpoint, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(self.folder / name)
