"""What a recipe does once its configuration is right: train, draw, sum up."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from offtrace.agents.checkpoint import CHECKPOINT_KEY, CheckpointError, load_policy, read_checkpoint
from offtrace.agents.config_base import Config, ConfigError
from offtrace.agents.evaluation import EvaluationResult, evaluate
from offtrace.agents.media import Recorder, plot_curve
from offtrace.agents.replay_data import check_saved
from offtrace.agents.runs import discard, write_config
from offtrace.agents.training import DESCRIPTIONS, REPLAY, Summary, evaluation_env, train
from offtrace.modules.envs import EnvironmentFailure, env_info
from offtrace.modules.replay import DamagedReplay
from offtrace.recipes.cli import fail
from offtrace.recipes.flags import count


def run(config: Config, folder: Path, resume: Path | None) -> int:
    """Trains in ``folder``, then draws curve and game.

    Returns:
        the exit code, as :func:`offtrace.recipes.cli.run_recipe`.
    """
    try:
        prepare(config, folder, resume)
        summary = train(config, folder, resume)
    except (ConfigError, CheckpointError) as error:
        if resume is None:
            discard(folder)
        return fail(_one_line(error))
    except DamagedReplay as error:
        return fail(f"{_one_line(error)}; remove {folder / REPLAY} to go on with an empty one")
    except Exception as error:
        # the task or the network was refused, or this machine cannot render its images, and nothing had begun
        if isinstance(error, (ValueError, EnvironmentFailure)) and resume is None and discard(folder):
            return fail(_one_line(error))
        return _stopped(error, folder)
    if int(os.environ.get("LOCAL_RANK", 0)):  # only the first of several learners draws and sums up
        return 128 + summary.signal if summary.signal else 0
    if summary.signal and resume is None and not _last(folder).exists():
        shutil.rmtree(folder)
        print(f"stopped by {_name(summary.signal)} before the first update; nothing is kept")
        return 128 + summary.signal
    label = f"seed {config.train.seed}"
    curve = folder / "curve.png"
    if summary.updates:
        _safely("the learning curve", lambda: plot_curve({label: folder / "metrics.csv"}, curve, title=config.task))
    if not summary.signal and config.train.record:
        print("recording one game; --train.record false leaves it out", file=sys.stderr)
        _safely("the recorded game", lambda: _record(config, folder))
    if summary.evaluation is not None:
        print(_evaluation_line(config.task, summary.evaluation))
    print(_line(summary, folder))
    return 128 + summary.signal if summary.signal else 0


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
    saved = checkpoint[CHECKPOINT_KEY]["policy"]["arguments"]
    info = env_info(config.task, **config.env_options())
    for name, own in DESCRIPTIONS[config.family](config, info)["arguments"].items():
        if name != "channels_last" and saved.get(name, own) != own:  # that one is of the machine
            raise CheckpointError(
                f"{resume} is of another network: its {name} is {saved.get(name)}, the run's is {own}"
            )
    frames = int(checkpoint[CHECKPOINT_KEY]["frames"])
    if frames >= config.train.total_frames:
        raise ConfigError(
            f"{folder} has trained {frames:,} of {config.train.total_frames:,} frames; "
            "give more by --train.total_frames to go on"
        )
    if not int(os.environ.get("LOCAL_RANK", 0)):
        check_saved(checkpoint, folder / REPLAY)
        for files in folder.glob(f"{REPLAY}.live*"):  # of a process that was killed
            shutil.rmtree(files, ignore_errors=True)
        try:
            write_config(config, folder, resumed=True)
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be written: {error.strerror}") from error


def _stopped(error: Exception, folder: Path) -> int:
    print(f"error: training stopped: {_one_line(error)}", file=sys.stderr)
    text = "".join(traceback.format_exception(error))
    last = _last(folder)
    kept = f"the last checkpoint is kept: {last}; " if last.exists() else ""
    try:
        (folder / "error.txt").write_text(text)
    except OSError:  # a full disk may be what ended the run
        print(f"{kept}the whole error:\n{text}", file=sys.stderr)
    else:
        print(f"{kept}the whole error is in {folder / 'error.txt'}", file=sys.stderr)
    return 1


def _line(summary: Summary, folder: Path) -> str:
    scores = "no evaluation yet"
    if summary.last_score is not None:
        scores = f"score {summary.last_score:.1f} (best {summary.best_score:.1f})"
    dropped = f"{summary.dropped_episodes} episodes dropped, " if summary.dropped_episodes else ""
    speed = f"{summary.frames_per_second:,.0f} frames/s and {summary.updates_per_second:,.0f} updates/s"
    done = f"{scores} after {summary.frames:,} frames, {dropped}{speed}"
    if summary.signal:
        return f"stopped by {_name(summary.signal)}; {done}; go on with --resume {folder}"
    return f"{done}: {folder}"


def _name(number: int) -> str:
    return signal.Signals(number).name


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _evaluation_line(task: str, result: EvaluationResult) -> str:
    change = "" if result.action_change is None else f", action change {result.action_change:.3f}"
    games = count(len(result.returns), "whole game") + (f", {result.spread}" if len(result.returns) > 1 else "")
    games += f", {result.dropped} dropped" if result.dropped else ""
    return (
        f"{task}, {result.mode} actions: mean {result.mean:.1f} over {games}, length {result.mean_length:.0f}{change}"
    )


def _record(config: Config, folder: Path) -> None:
    best = _last(folder).with_name("best.ckpt")
    record_game(config, best if best.exists() else _last(folder), folder / "game.gif")


def record_game(config: Config, checkpoint: Path, out: Path) -> None:
    """Plays one evaluation game of a checkpoint and writes it as a GIF.

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


def _safely(what: str, action: Callable[[], None]) -> None:
    # a picture that fails must not make a finished run look failed
    try:
        action()
    except (Exception, KeyboardInterrupt) as error:
        print(f"{what} was not made: {_one_line(error)}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
