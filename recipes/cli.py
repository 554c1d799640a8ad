"""Command lines of the recipes: flags from the configuration's fields, errors in one sentence, no torch."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from offtrace.agents.config import Config, ConfigError, fit, may_have_gpu, this_machine
from offtrace.agents.runs.folders import RunError, config_text, discard, new_run, read_config
from offtrace.agents.runs.missing import no_checkpoint
from offtrace.agents.runs.ranks import by_lightning, by_torchrun, check_launch, from_first, rank, tell_refusal
from offtrace.modules.envs.names import environment_module
from offtrace.modules.fork_server import start_fork_server
from offtrace.modules.naming import nearest
from offtrace.recipes.flags import check_flags, import_from_here, numbers, read_file, sentence, types_of_keys

MAY_CHANGE = (
    "train.total_frames", "train.devices", "train.num_nodes", "train.accelerator", "train.log_every",
    "train.checkpoint_every", "collector.address", "collector.device", "replay.device",
)  # fmt: skip
"""Flags that a resumed run may be given; everything else is what the run began with. The last three are of the machine:
a Ray cluster may have another head, and the next machine may have no GPU."""

_FOLDER = "OFFTRACE_RUN_FOLDER"
_SEEN = 30.0  # seconds after which a shared file system shows what another node has written
_PACKAGE = Path(__file__).resolve().parents[1]
_format_warning = warnings.formatwarning

Presets = dict[str, Callable[[], Config]]


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: the configuration.
        resume: the checkpoint to go on from.
        fitted: how it was fitted to the machine, in a line; empty of a run that goes on, which is not.
    """

    config: Config
    resume: Path | None
    fitted: str


def run_recipe(argv: list[str] | None = None, *, presets: Presets, description: str) -> int:
    """A whole recipe: parse, check, make the run's folder, train, draw. Returns the exit code.

    0: trained to the end; 2: the command line, configuration or checkpoint is wrong, told in one sentence; 1: training
    failed, the last checkpoint is kept; 128 + n: stopped by signal n, likewise.
    """
    argv = sys.argv[1:] if argv is None else argv
    prepare_process()
    made: list[Path] = []
    signals = _Signals()
    try:
        config, resume, fitted = parse(argv, presets=presets, description=description)
        check(config)
        if resume is None:
            folder = _folder(config, argv, made)
            config = read_config(folder, type(config))  # what the first learner chose holds for all
        else:
            folder = resume.parent.parent
        if not rank():
            task, frames = config.task, f"{config.train.total_frames:,} frames"
            print(f"{task}, {frames}, seed {config.train.seed}: {folder}", file=sys.stderr)
            if fitted:
                print(fitted, file=sys.stderr)
        code = run_in(folder, config, resume)
        return 128 + signals.came if code and signals.came else code
    except (ConfigError, RunError) as error:
        return _refuse(str(error))
    except BaseException as error:
        signals.restore()
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signals.came
        if not number:
            raise
        for new in made:  # before training took the signals over: nothing to save yet
            discard(new)
        print("terminated" if number == signal.SIGTERM else "interrupted", file=sys.stderr)
        return _stopped_by(number)
    finally:
        warnings.formatwarning = _format_warning
        signals.restore()


def prepare_process() -> None:
    """What a process that trains needs before it imports torch: short waits, warnings of one line, own modules."""
    # GNU OpenMP's threads wait for each other in a loop for milliseconds. Where something else has one of their cores,
    # that is where the time goes: SAC then learns half as fast as with this bound, and no slower where nothing has.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    warnings.formatwarning = _one_warning
    import_from_here()


def run_in(folder: Path, config: Config, resume: Path | None) -> int:
    """Trains in the folder of a run, which has its ``config.yaml``, and tells the end; the code of :func:`run_recipe`.

    Args:
        folder: of the run.
        config: checked.
        resume: a checkpoint to go on from.
    """
    if config.collector.num_workers and config.collector.backend == "processes":
        # it imports for the actors while this process does for the learner
        start_fork_server(environment_module(config.task))
    from offtrace.agents.runs.run import RunFailed, RunRefused, lines, run  # torch and Lightning for what runs only

    # Python's last collection would go through all objects of these libraries, for 1.4 s of a core: a run that failed
    # on a machine under load was there for ten seconds after it had said so
    atexit.register(gc.freeze)
    try:
        summary = run(config, folder, resume)
    except RunRefused as error:
        return _refuse(str(error))
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not rank():  # of several learners the first sums up
        print("\n".join(lines(config, summary, folder)))
    return _stopped_by(summary.signal) if summary.signal else 0


def _stopped_by(number: int) -> int:
    """The exit code. Where one that it started has another than 0, Lightning kills the first learner, which saves."""
    return 0 if by_lightning() else 128 + number


def _one_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, without the place in the code, where the warning is of this package and so for the user."""
    place = Path(filename).resolve()
    own = any(place.is_relative_to(_PACKAGE / part) for part in ("agents", "modules", "recipes"))
    return f"warning: {message}\n" if own else _format_warning(message, category, filename, lineno, line)


class _Terminated(BaseException):
    """SIGTERM before training took the signals over."""


class _Signals:
    """Before training takes them over, Ctrl-C and SIGTERM end the program without a trace.

    What they raise may be lost, as in a callback of the import system, which prints and forgets it, or become an error
    of what was being imported: so it is raised again every second until :meth:`restore`. A learner that Lightning
    started goes on, since the first one waits for it where no signal is heard, and then ends both.

    Attributes:
        came: the first signal's number, 0 while none came.
    """

    def __init__(self) -> None:
        self.came = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._raise)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
                if signal.getsignal(number) is not signal.SIG_IGN
            }

    def restore(self) -> None:
        """Have the handlers of before again."""
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if by_lightning():
            return
        self.came = self.came or number
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise _Terminated if self.came == signal.SIGTERM else KeyboardInterrupt


def _folder(config: Config, argv: list[str], made: list[Path]) -> Path:
    """The run's folder; where this learner is the one that makes it, ``made`` has it as soon as it is there."""
    # Lightning starts the other ranks with this command line again: they join the folder of the first
    if "LOCAL_RANK" in os.environ and _FOLDER in os.environ and not by_torchrun():
        return Path(os.environ[_FOLDER])
    name, words = json.loads(from_first(lambda: json.dumps([str(new_run(config, made)), argv])))
    if words != argv:
        raise RunError(
            f"the first learner was started with {' '.join(words)!r}, and this one with {' '.join(argv)!r}: give all "
            "learners the same command line"
        )
    folder = Path(name)
    limit = time.monotonic() + _SEEN
    while not (folder / "config.yaml").is_file():
        if time.monotonic() > limit:
            raise RunError(
                f"the run folder of the first learner, {folder}, is not there in {Path.cwd()} on "
                f"{socket.gethostname()}: learners on several nodes need the same working directory, on a file system "
                "that all of them share"
            )
        time.sleep(0.1)
    os.environ[_FOLDER] = str(folder)
    return folder


def _refuse(message: str) -> int:
    tell_refusal(message)
    return fail(message)


def fail(message: str) -> int:
    """Prints one sentence and returns the exit code of a wrong command line."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def run_command(
    argv: Sequence[str] | None,
    parse: Callable[[list[str]], argparse.Namespace],
    do: Callable[[argparse.Namespace], int],
    interrupted: str = "interrupted",
) -> int:
    """``do`` what ``parse`` finds on the command line, by default the process's.

    Args:
        argv: the command line.
        parse: checks it.
        do: returns the exit code.
        interrupted: is told where Ctrl-C ends it.

    Returns:
        the exit code of ``do``; 2 for what either refuses, told in a sentence; 130 when interrupted.
    """
    try:
        return do(parse(list(sys.argv[1:] if argv is None else argv)))
    except (ConfigError, RunError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def parse(argv: list[str], *, presets: Presets, description: str) -> Command:
    """What a command line asks for; a new run's configuration fits this machine where nothing else is said.

    Raises:
        ConfigError: an unknown flag or key (with the nearest known), a value of a wrong type, an unreadable file.
        RunError: ``--resume`` names what is no run.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    preset = _value_of("--preset", argv) or "default"
    if preset not in presets:
        raise ConfigError(f"--preset is {preset!r}; it must be one of {', '.join(presets)}{nearest(preset, presets)}")
    resume = _value_of("--resume", argv)
    base = presets[preset]()
    kind = type(base)
    parser = _parser(base, presets, description)
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    source = _value_of("--config", argv)
    if resume:
        _check_resumed(argv, read_config(Path(resume), kind))
        source = str(Path(resume) / "config.yaml")
    types_of = types_of_keys(kind)
    content = read_file(Path(source), types_of, base.algorithm) if source is not None else {}
    argv = numbers(argv, types_of)
    words = _words(argv, content)
    config: Config = _build(kind, _parsed(parser, words, argv, source, types_of))
    # a run that goes on is what it was, and what it was began with what fitted then
    fitted = "" if resume else fit(config, _given(parser, words), this_machine())
    if any(word.startswith("--print_config") for word in argv):
        print(config_text(config), end="")
        raise SystemExit(0)
    if not resume:
        return Command(config, None, fitted)
    checkpoint = Path(resume) / "checkpoints" / "last.ckpt"
    if checkpoint.with_name("previous.ckpt").is_file():  # which serves where the last one is damaged
        return Command(config, checkpoint, fitted)
    if not checkpoint.is_file():
        raise RunError(f"{resume} has no checkpoints/last.ckpt to go on from")
    return Command(config, checkpoint_file(checkpoint), fitted)


def checkpoint_file(path: Path) -> Path:
    """``path``, if the file there has the form of a checkpoint; finds most damage without importing torch.

    Raises:
        RunError: one sentence.
    """
    if not path.is_file():
        raise RunError(no_checkpoint(path))
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is truncated or not a checkpoint")
    return path


def check(config: Config) -> None:
    """Everything that can be found wrong before a process starts or torch is imported.

    Raises:
        ConfigError: one sentence.
    """
    config.validate()
    check_launch(config.train)
    if not may_have_gpu():
        config.check_devices(0)


def _parser(base: Config, presets: Presets, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description, exit_on_error=False, default_env=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file with the keys below.")
    parser.add_argument("--preset", default="default", help=_described(presets))
    parser.add_argument("--resume", default=None, help="Folder of a run to go on with, such as runs/NAME.")
    for group in fields(base):
        kind: Any = type(getattr(base, group.name))
        # jsonargparse looks a name in text up in what only type checkers import, and torch would come with that
        kind.__init__.__annotations__.update(get_type_hints(kind))
        parser.add_class_arguments(kind, group.name)
    parser.set_defaults({group.name: asdict(getattr(base, group.name)) for group in fields(base)})
    return parser


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of a help text."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in super(_HelpFormatter, self)._split_lines(line, width)]


def _described(presets: Presets) -> str:
    """The presets, each with the first paragraph of its docstring, in lines."""
    told = {name: " ".join((make.__doc__ or "").partition("\n\n")[0].split()) for name, make in presets.items()}
    return "\n".join(["Starting point:", *(f"{name}: {text}" if text else name for name, text in told.items())])


class _Quoted(yaml.SafeDumper):
    """Quotes every text: a run named 1e6 is a number to the parser otherwise."""


_Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _words(argv: list[str], content: dict[str, Any]) -> list[str]:
    """The command line as the parser gets it: what a file holds first."""
    words = [word for word in _without("--config", argv) if not word.startswith("--print_config")]
    return ["--config", yaml.dump(content, Dumper=_Quoted), *words] if content else words


def _given(parser: ArgumentParser, words: list[str]) -> set[str]:
    """The flags that file or command line set, which can be parsed."""
    return {str(flag) for flag in parser.parse_args(words, defaults=False).keys()}  # noqa: SIM118  of groups too


def _parsed(
    parser: ArgumentParser, words: list[str], argv: list[str], source: str | None, types_of: dict[str, Any]
) -> dict[str, Any]:
    # argparse's own ways out print usage and exit; everything wrong becomes one sentence instead
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return parser.parse_args(words).as_dict()
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(sentence(noise.getvalue(), types_of)) from error
    except Exception as error:
        raise ConfigError(sentence(str(error), types_of, argv, source)) from error


def _check_resumed(argv: list[str], begun: Config) -> None:
    free = [
        flag
        for flag in MAY_CHANGE
        if hasattr(begun, flag.split(".")[0])
        and (flag not in ("train.devices", "train.num_nodes") or begun.devices_may_change)
    ]
    for word in argv:
        flag = word.split("=")[0].removeprefix("--")
        if word.startswith("--") and flag not in (*free, "resume", "print_config"):
            raise ConfigError(f"--{flag} cannot change in a resumed run; only {', '.join(free)} can")


def _build(kind: Any, values: dict[str, Any]) -> Any:
    arguments = {}
    defaults = kind()
    for field in fields(kind):
        value = values[field.name]
        inner = getattr(defaults, field.name)
        arguments[field.name] = _build(type(inner), value) if is_dataclass(inner) else value
    return kind(**arguments)


def _value_of(flag: str, argv: list[str]) -> str | None:
    """What follows a flag that says where the rest comes from; None where it is not given."""
    found = [word.split("=", 1)[1] for word in argv if word.startswith(f"{flag}=")]
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value")
            found.append(argv[index + 1])
    if len(found) > 1:
        raise ConfigError(f"{flag} is given {len(found)} times, as {' and '.join(found)}; it must be given once")
    if found and not found[0]:
        raise ConfigError(f"{flag} is empty; give it a value, or leave it out")
    return found[0] if found else None


def _without(flag: str, argv: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = not skip and word == flag
    return kept
