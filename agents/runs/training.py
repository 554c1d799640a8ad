"""From a validated configuration to the end of training."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torchrl.envs import EnvBase

from offtrace.agents.callbacks import Checkpoints, Evaluation, GracefulStop, Meters, WeightSync
from offtrace.agents.config import Config, available_cores
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, read_checkpoint, with_policy_transforms
from offtrace.agents.runs.evaluation import EvaluationResult
from offtrace.agents.runs.folders import config_text, keep_metrics
from offtrace.agents.runs.ranks import by_lightning, check_launch, meet, rank
from offtrace.modules.envs import make_env

REPLAY = "replay"
"""Folder of a run in which the replay of a checkpoint lies."""

EVALUATION_SEED = 1_000_000
"""Far from the training environments' seeds."""
LAST_SEED = 2**31 - 2**17
"""An emulator takes 31 bits, and environments count on from their first seed."""


@dataclass(frozen=True)
class Summary:
    """What a run ended with.

    Attributes:
        task, algorithm, seed: what was trained.
        frames: environment frames over all ranks, since the very beginning.
        updates: of the learner, since the very beginning.
        episodes: those that ended in the rollouts of the first rank, since the very beginning.
        dropped_episodes: those that a failing simulator ended, likewise; nothing was learned from their last step.
        restarts: actors of the first rank that took the place of one that failed, in this process's part of the run.
        frames_per_second, updates_per_second: of this process's part of the run, evaluations left out.
        seconds: wall time of this process's part.
        scores: ``(frames, mean score)`` of every evaluation.
        evaluation: the last evaluation of this process's part; None if there was none.
        signal: number of the signal that stopped the run; 0 if it ended by itself.
        first_update_at: seconds since the epoch when the first update was done.
    """

    task: str
    algorithm: str
    seed: int
    frames: int
    updates: int
    episodes: int
    dropped_episodes: int
    restarts: int
    frames_per_second: float
    updates_per_second: float
    seconds: float
    scores: list[tuple[int, float]]
    evaluation: EvaluationResult | None
    signal: int
    first_update_at: float

    @property
    def last_score(self) -> float | None:
        """The last evaluation's mean; ``None`` before the first."""
        return self.scores[-1][1] if self.scores else None

    @property
    def best_score(self) -> float | None:
        """The best evaluation's mean; ``None`` before the first."""
        return max((score for _, score in self.scores), default=None)


def train(config: Config, run_dir: Path, resume: Path | None = None) -> Summary:
    """Trains the agent of ``config`` and leaves logs, checkpoints and ``summary.json`` in ``run_dir``.

    Args:
        config: validated.
        run_dir: exists.
        resume: a checkpoint to continue from.

    Raises:
        ValueError: for what the configuration asks for and this machine lacks; another learner has not come, or with
            another configuration.
        CheckpointError: if ``resume`` cannot be read.
        RuntimeError: if an environment or a worker failed, or training diverged; the last checkpoint is kept.
    """
    start = time.perf_counter()
    check_launch(config.train)
    begun = 0
    if resume is not None:
        begun = int(read_checkpoint(resume)[CHECKPOINT_KEY]["frames"])
        if not rank():
            keep_metrics(run_dir, begun)
    config.check_devices(torch.cuda.device_count())
    _quiet()
    torch.set_num_threads(learner_threads(config))
    pl.seed_everything(config.train.seed, verbose=False)
    agent, data = config.build()
    if data.saves:
        data.folder = run_dir / REPLAY
    sync = WeightSync(config.updates_per_push(), config.forced_lag())
    evaluation = _evaluation(config, agent.policy)
    meters = Meters(config.train.total_frames, config.train.log_every)
    stop = GracefulStop(held=by_lightning())
    # the order is that of the work after an update
    checkpoints = Checkpoints(run_dir / "checkpoints", config.train.checkpoint_every, resume)
    callbacks = [sync, meters, evaluation, checkpoints, stop]
    trainer = make_trainer(config, run_dir, callbacks)
    meet(f"{config_text(config)}at {begun} frames")
    with stop:
        try:
            trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
        except SystemExit:  # Lightning's end of a run that a signal broke off
            if not stop.signal:
                raise
        summary = Summary(
            task=config.task,
            algorithm=config.algorithm,
            seed=config.train.seed,
            frames=data.frames,
            updates=agent.updates,
            episodes=data.episodes.count,
            dropped_episodes=data.episodes.dropped,
            restarts=data.restarts,
            frames_per_second=meters.frames_per_second,
            updates_per_second=meters.updates_per_second,
            seconds=time.perf_counter() - start,
            scores=evaluation.scores,
            evaluation=evaluation.last,
            signal=stop.signal,
            first_update_at=meters.first_update_at,
        )
        if trainer.is_global_zero:
            (run_dir / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _evaluation(config: Config, policy: nn.Module) -> Evaluation:
    return Evaluation(
        partial(evaluation_env, config, config.train.eval_episodes, policy),
        every=config.train.eval_every,
        episodes=config.train.eval_episodes,
        mode=config.train.eval_mode,
        final=config.train.final_eval,
    )


def learner_threads(config: Config) -> int:
    """Torch threads of a learner: the cores that the actors leave over.

    A thread too many costs more than it brings: on two cores, one actor beside a learner of two threads made a quarter
    fewer frames than beside one of a single thread. ``OMP_NUM_THREADS`` limits them, as it does everywhere in torch.
    """
    collector = config.collector
    # an actor's emulator and its policy take turns
    busy = collector.num_workers * max(collector.threads, collector.emulator_threads)
    busy += collector.threads if collector.acting == "server" else 0
    if collector.address and collector.placement == "spread":  # they run where there is room
        busy = 0
    free = max(1, available_cores() // max(1, config.train.devices) - busy)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(free, int(limit)) if limit.isdigit() and int(limit) else free


def precision(config: Config) -> Literal["32-true", "bf16-mixed"]:
    """``config.train.precision``, with ``auto`` decided for this machine.

    Emulated bf16 is slower than float32: five times, on a processor with AVX2 alone.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if config.train.accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def make_trainer(config: Config, run_dir: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """The Lightning trainer of a recipe: own meters and checkpoints, one endless epoch."""
    loggers = [CSVLogger(run_dir, name=None, version="", flush_logs_every_n_steps=1)]
    tensorboard = TensorBoardLogger(run_dir, name=None, version="")
    strategy: Any = "auto"
    if config.train.learners > 1:
        # target networks and meters are buffers; gradients are all that crosses ranks
        # the others wait while the first evaluates; one that has died is noticed at once
        strategy = pl.strategies.DDPStrategy(broadcast_buffers=False, timeout=timedelta(hours=6))
    return pl.Trainer(
        accelerator=config.train.accelerator,
        devices=config.train.devices,
        num_nodes=config.train.num_nodes,
        strategy=strategy,
        precision=precision(config),
        max_epochs=1,
        logger=[*loggers, tensorboard],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1_000_000_000,
    )


def evaluation_env(
    config: Config, episodes: int, policy: nn.Module | None = None, *, pictures: bool = False
) -> EnvBase:
    """The evaluation form of the task, with as many environments as divide ``episodes`` evenly, 16 at the most."""
    number = max(n for n in range(1, 17) if episodes % n == 0)
    seed = (config.train.seed + EVALUATION_SEED) % LAST_SEED
    env = make_env(config.task, number, seed=seed, evaluation=True, pictures=pictures, **config.env_options())
    return env if policy is None else with_policy_transforms(env, policy)


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
