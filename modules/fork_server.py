"""The process from which actor processes are forked: it has imported the libraries once, for all of them.

A process started afresh spends seconds of a core on imports. A fork of this server is there in a hundredth of a second,
and takes nothing from the learner: no thread, no lock, no GPU. The server is one of our own, beside the one that
multiprocessing has for everybody: what it imports and which signals it blocks is nobody else's matter. A process forked
from it does not run the learner's main script, as those of multiprocessing do: what it runs must be importable, or
pickled by value.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, popen_forkserver, process, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from typing import Any

_ALWAYS = ("offtrace.modules.collectors.actors", "offtrace.modules.networks.policy")
_IF_USED = tuple(f"offtrace.modules.envs.{name}" for name in ("atari", "control", "gym"))
_preloaded: set[str] = set()
_PATIENCE = 300.0  # seconds for a process to be forked, of which imports in front of it may take most


class _ForkServer(forkserver.ForkServer):
    """Starts as it must, whoever finds that it does not run or has died."""

    def ensure_running(self) -> None:
        # its start lets through the signals that are blocked below
        resource_tracker.ensure_running()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        # the libraries that it imports may ask for GPUs, and a process that has met one cannot be forked
        with environment(PYTHONPATH=path, CUDA_VISIBLE_DEVICES=""), signals_blocked():
            super().ensure_running()

    def kill(self) -> None:
        """Where it hangs; the next process is forked from another one. Those that run go on."""
        server: Any = self  # to type checkers a fork server has no process
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


_server = _ForkServer()


def start_fork_server(*modules: str) -> None:
    """Start it, if it does not run yet, and come back at once: it imports while the caller goes on.

    Where it dies, another one is started for the next process that is wanted.

    Args:
        modules: further ones that it imports, and one that takes its place. One that is not there is passed over. Those
            of environments that this process has imported, it imports too.

    Raises:
        OSError: it cannot be started.
    """
    _preloaded.update(modules, (name for name in _IF_USED if name in sys.modules))
    _server.set_forkserver_preload([*_ALWAYS, *sorted(_preloaded)])
    _server.ensure_running()


class ForkedProcess(process.BaseProcess):
    """As ``multiprocessing.Process``, from our server.

    SIGINT and SIGTERM, which the learner handles for all, are blocked when ``target`` is called; it must let them
    through. Arguments are pickled, and pipes and shared memory among them handed over.

    Raises:
        OSError: in ``start``, the server has died just now, hangs or cannot be reached.
    """

    _start_method = "forkserver"

    def __init__(self, target: Callable[..., None], name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(target=target, name=name, args=arguments)

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Popen(popen_forkserver.Popen):
    """As that of multiprocessing, from our server, and without the main script."""

    finalizer: Any
    _fds: list[int]

    def _launch(self, process_obj: process.BaseProcess) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        for key in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(key, None)
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, buffer)
            reduction.dump(process_obj, buffer)
        finally:
            set_spawning_popen(None)
        try:
            self.sentinel, write = _server.connect_to_new_process(self._fds)
            ours = os.dup(write)  # by its end the process knows that of the learner
            self.finalizer = util.Finalize(self, _close, (ours, self.sentinel))
            with open(write, "wb", closefd=True) as file:
                file.write(buffer.getbuffer())
            if not wait([self.sentinel], _PATIENCE):
                _server.kill()
                raise TimeoutError(f"it has forked nothing for {_PATIENCE:.0f} s")
            self.pid = forkserver.read_signed(self.sentinel)
        except (OSError, EOFError) as error:
            raise OSError(
                f"the fork server, from which actor processes are made, has ended or cannot be reached: {error}"
            ) from error


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """What is started in it has these environment variables, or has them not where a value is None."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started in it has SIGINT and SIGTERM blocked: the learner alone handles those."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
