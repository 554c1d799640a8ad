"""A run from a right configuration to its summary: train, draw the curve, record an episode."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offtrace.agents.config import Config, ConfigError
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, CheckpointError, load_policy, read_checkpoint, usable
from offtrace.agents.runs.curves import plot_curves, read_curves
from offtrace.agents.runs.evaluation import EvaluationResult, evaluate
from offtrace.agents.runs.folders import RunError, discard, write_config
from offtrace.agents.runs.ranks import rank
from offtrace.agents.runs.recording import Recorder
from offtrace.agents.runs.training import REPLAY, Summary, evaluation_env, train
from offtrace.modules.envs import EnvironmentFailure, env_info
from offtrace.modules.replay import DamagedReplay
from offtrace.modules.replay.files import read_folder

_PEER_GONE = re.compile(r"gloo.*Connection (closed|reset) by peer|NCCL.*remote process exited")
"""What gloo and NCCL say where another learner has ended; an actor that ends says only a part of it."""


class RunRefused(ValueError):
    """What was asked for cannot be run, and nothing had begun; the message is one sentence."""


class RunFailed(RuntimeError):
    """Training failed; the message says why, what is kept, and where the whole error is."""


def run(config: Config, folder: Path, resume: Path | None = None) -> Summary:
    """Trains in ``folder``, then draws the curve and records an episode. Only the first of all learners draws.

    Args:
        config: validated.
        folder: of the run, with its ``config.yaml``. That of a new run is removed where the run is refused, and where
            it was stopped before the first update.
        resume: a checkpoint to continue from; where it is damaged, the one before it is used.

    Returns:
        What the run ended with, by itself or by a signal.

    Raises:
        RunRefused: before anything began.
        RunFailed: after that; the last checkpoint is kept.
    """
    try:
        resume = None if resume is None else usable(resume)
        prepare(config, folder, resume)
        summary = train(config, folder, resume)
    except (ConfigError, CheckpointError, RunError) as error:
        if resume is None:
            discard(folder, loggers=True)
        raise RunRefused(one_line(error)) from error
    except DamagedReplay as error:
        ways = f"remove {folder / REPLAY} to go on with an empty one"
        if resume == _last(folder) and resume.with_name("previous.ckpt").is_file():
            ways += f", or {resume} to go on from the checkpoint before, which has a replay of its own"
        raise RunRefused(f"{one_line(error)}; {ways}") from error
    except Exception as error:
        # the task or the network was refused, or this machine cannot render its images, and nothing had begun
        if isinstance(error, (ValueError, EnvironmentFailure)) and resume is None and discard(folder):
            raise RunRefused(one_line(error)) from error
        raise RunFailed(_kept(error, folder)) from error
    if rank():
        return summary
    if summary.signal and resume is None and not summary.updates and not _last(folder).exists():
        shutil.rmtree(folder)
        return summary
    try:
        _draw(config, summary, folder)
    except KeyboardInterrupt:
        print("interrupted; the curve and the recorded episode may be missing", file=sys.stderr)
        return replace(summary, signal=signal.SIGINT)
    return summary


def _draw(config: Config, summary: Summary, folder: Path) -> None:
    if summary.updates:
        _safely("the learning curve", lambda: _draw_curve(config, folder))
    if not summary.signal and config.train.record:
        print("recording one episode; --train.record false leaves it out", file=sys.stderr)
        best = _last(folder).with_name("best.ckpt")
        checkpoint = best if best.exists() else _last(folder)
        _safely("the recorded episode", lambda: record_episode(config, checkpoint, folder / "episode.gif"))


def _draw_curve(config: Config, folder: Path) -> None:
    curves = {f"seed {config.train.seed}": [read_curves(folder / "metrics.csv")]}
    plot_curves(curves, folder / "curve.png", title=config.task)


def prepare(config: Config, folder: Path, resume: Path | None) -> None:
    """The checks that need torch, before any process starts; for a resumed run also its folder.

    Raises:
        ConfigError: if the machine lacks what is asked for, or the frames are trained already.
        CheckpointError: if the checkpoint cannot be read, or is of another network.
        DamagedReplay: if the replay that it names cannot be.
    """
    config.check_devices(torch.cuda.device_count())
    if resume is None:
        return
    load_policy(resume)
    checkpoint = read_checkpoint(resume)
    _check_network(config, checkpoint[CHECKPOINT_KEY]["policy"], resume)
    frames = int(checkpoint[CHECKPOINT_KEY]["frames"])
    if frames >= config.train.total_frames:
        raise ConfigError(
            f"{folder} has trained {frames:,} of {config.train.total_frames:,} frames; "
            "give more by --train.total_frames to go on"
        )
    if not rank():
        print(f"going on from {frames:,} frames", file=sys.stderr)
        check_saved(checkpoint, folder / REPLAY, config.train.learners)
        for files in folder.glob(f"{REPLAY}.live*"):  # of a process that was killed
            shutil.rmtree(files, ignore_errors=True)
        try:
            write_config(config, folder, resumed=True)
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be written: {error.strerror}") from error


def _check_network(config: Config, saved: dict[str, Any], resume: Path) -> None:
    spec = config.policy_spec(env_info(config.task, **config.env_options()))
    if saved["builder"] != spec["builder"]:
        raise CheckpointError(
            f"{resume} is of another network: its builder is {saved['builder']}, the run's is {spec['builder']}"
        )
    for name, own in spec["arguments"].items():
        if name != "channels_last" and saved["arguments"].get(name, own) != own:  # that one is of the machine
            raise CheckpointError(
                f"{resume} is of another network: its {name} is {saved['arguments'].get(name)}, the run's is {own}"
            )


def check_saved(checkpoint: dict[str, Any], folder: Path, learners: int) -> None:
    """Reads the replays in ``folder`` that ``checkpoint`` names, one of each learner, and forgets them again.

    Raises:
        DamagedReplay: one of them cannot be read, or is not there.
    """
    if not folder.exists():
        return
    # Lightning keeps a data module's state by the name of its class, which may be one of the user's
    names = {x["replay"] for x in checkpoint.values() if isinstance(x, dict) and isinstance(x.get("replay"), str)}
    for saved in sorted(names):
        for number in range(learners):
            read_folder(folder / f"rank{number}" / saved)


def record_episode(config: Config, checkpoint: Path, out: Path) -> None:
    """Plays one evaluation episode of a checkpoint and writes it as a GIF.

    Raises:
        ValueError: if the task has no pictures.
        EnvironmentFailure: if this machine cannot render.
    """
    policy = load_policy(checkpoint)
    env = evaluation_env(config, 1, policy, pictures=True)
    try:
        recorder = Recorder(env)
        evaluate(policy, env, 1, mode=config.train.eval_mode, observer=recorder)
    finally:
        env.close()
    recorder.save(out)


def lines(config: Config, summary: Summary, folder: Path) -> list[str]:
    """In words: the last evaluation, and the run."""
    if summary.signal and not folder.exists():
        return [f"stopped by {_name(summary.signal)} before the first update; nothing is kept"]
    found = [] if summary.evaluation is None else [_evaluation_line(config.task, summary.evaluation)]
    return [*found, _line(config, summary, folder)]


def _line(config: Config, summary: Summary, folder: Path) -> str:
    scores = "no evaluation yet"
    if summary.last_score is not None:
        scores = f"score {summary.last_score:.1f} (best {summary.best_score:.1f})"
    dropped = f"{summary.dropped_episodes} episodes dropped, " if summary.dropped_episodes else ""
    replaced = f"restarts {summary.restarts}, " if summary.restarts else ""
    speed = f"{summary.frames_per_second:,.0f} frames/s and {summary.updates_per_second:,.0f} updates/s"
    done = f"{scores} after {summary.frames:,} frames, {dropped}{replaced}{speed}"
    if not summary.signal:
        return f"{done}: {folder}"
    left = summary.frames < config.train.total_frames
    return f"stopped by {_name(summary.signal)}; {done}" + (
        f"; go on with --resume {folder}" if left else f": {folder}"
    )


def _evaluation_line(task: str, result: EvaluationResult) -> str:
    number = len(result.returns)
    change = "" if result.action_change is None else f", action change {result.action_change:.3f}"
    episodes = f"{number} whole episodes, {result.spread}" if number > 1 else "1 whole episode"
    dropped = f", {result.dropped} dropped" if result.dropped else ""
    return (
        f"{task}, {result.mode} actions: mean {result.mean:.1f} over {episodes}{dropped}, "
        f"length {result.mean_length:.0f}{change}"
    )


def _kept(error: Exception, folder: Path) -> str:
    """Why training stopped and what is kept; writes the whole error into the folder."""
    text = "".join(traceback.format_exception(error))
    last = _last(folder)
    kept = f"the last checkpoint is kept: {last}; " if last.exists() else ""
    # each learner has its own: the one that failed writes first, and the others that it is gone
    path = folder / (f"error.rank{rank()}.txt" if rank() else "error.txt")
    try:
        path.write_text(text)
    except OSError:  # a full disk may be what ended the run
        where = f"the whole error:\n{text}"
    else:
        where = f"the whole error is in {path}"
    told = one_line(error)
    if _PEER_GONE.search(text):
        told = f"another learner has ended; what it said, and {folder / 'error*.txt'}, tell why"
    return f"training stopped: {told}\n{kept}{where}"


def _safely(what: str, action: Callable[[], None]) -> None:
    # a picture that fails must not make a finished run look failed
    try:
        action()
    except Exception as error:
        print(f"{what} was not made: {one_line(error)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"
