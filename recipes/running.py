"""What a recipe does once its configuration is right: train, draw, sum up."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase

from offtrace.agents.checkpoint import CheckpointError, load_policy
from offtrace.agents.config import ConfigError, ImpalaConfig
from offtrace.agents.evaluation import evaluate
from offtrace.agents.media import plot_curve, save_gif
from offtrace.agents.training import Summary, evaluation_env, train
from offtrace.modules.envs import EnvironmentFailure
from offtrace.recipes.cli import fail


def run(config: ImpalaConfig, folder: Path, resume: Path | None) -> int:
    """Trains in ``folder``, then draws curve and game. Returns the exit code as :func:`offtrace.recipes.cli.run_recipe`."""
    print(
        f"{config.env.game}, {config.train.total_frames:,} frames, seed {config.train.seed}: {folder}", file=sys.stderr
    )
    try:
        summary = train(config, folder, resume)
    except (ConfigError, CheckpointError, ValueError) as error:
        return fail(_one_line(error))
    except (EnvironmentFailure, RuntimeError) as error:
        print(f"error: training stopped: {_one_line(error)}", file=sys.stderr)
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
        last = folder / "checkpoints" / "last.ckpt"
        if last.exists():
            print(f"the last checkpoint is kept: {last}; the whole error is in {folder / 'error.txt'}", file=sys.stderr)
        return 1
    if summary is None:  # a rank that neither evaluates nor writes
        return 0
    _safely(
        "the learning curve",
        lambda: plot_curve(
            {f"seed {config.train.seed}": folder / "metrics.csv"}, folder / "curve.png", title=config.env.game
        ),
    )
    if not summary.signal:
        _safely("the recorded game", lambda: _record(config, folder))
    print(_line(summary, folder))
    return 128 + summary.signal if summary.signal else 0


def _line(summary: Summary, folder: Path) -> str:
    scores = "no evaluation yet"
    if summary.last_score is not None:
        scores = f"score {summary.last_score:.1f} (best {summary.best_score:.1f})"
    stopped = f"stopped by signal {summary.signal}, go on with --resume {folder}; " if summary.signal else ""
    return f"{stopped}{scores} after {summary.frames:,} frames at {summary.frames_per_second:,.0f} frames/s: {folder}"


def _record(config: ImpalaConfig, folder: Path) -> None:
    best, last = folder / "checkpoints" / "best.ckpt", folder / "checkpoints" / "last.ckpt"
    record_game(config, best if best.exists() else last, folder / "game.gif")


def record_game(config: ImpalaConfig, checkpoint: Path, out: Path) -> None:
    """Plays one evaluation game of a checkpoint and writes it as a GIF.

    Raises:
        ValueError: if the observations are no images.
    """
    env = evaluation_env(config, 1)
    frames: list[Any] = []

    def keep(step: TensorDictBase) -> None:
        frame = step["observation"][0]
        if frame.ndim != 3:
            raise ValueError("the task's observations are no images")
        frames.append(frame[-1].numpy().copy())

    try:
        evaluate(load_policy(checkpoint), env, 1, mode=config.train.eval_mode, observer=keep)
    finally:
        env.close()
    save_gif(frames, out)


def _safely(what: str, action: Callable[[], None]) -> None:
    # a picture that fails must not make a finished run look failed
    try:
        action()
    except Exception as error:
        print(f"{what} was not made: {_one_line(error)}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
