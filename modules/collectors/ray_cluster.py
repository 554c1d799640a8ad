"""The connection of this process to a Ray cluster, or a cluster of this machine for this process alone."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from offtrace.modules.fork_server import environment, signals_blocked

_CONNECT_TIMEOUT = 5.0
_ROOM_TIMEOUT = 10.0  # seconds in which actors that were ended give their CPUs back
_POLL = 0.1
_TRIES = 3  # Ray waits for its own processes for so long as they need where nothing else runs
_LONGEST = 500  # characters of Ray's own words in a sentence

_links = contextlib.ExitStack()  # what the last of those who use it undoes
_users = 0
_token = secrets.token_hex(32)  # of clusters of our own; Ray asks for it once a process


def check_ray(address: str = "") -> None:
    """Look whether Ray is there, and the address of a form that it can be given.

    Raises:
        ValueError: one sentence.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("backend is ray, and Ray is not installed: pip install 'offtrace[ray]'")
    host, _, port = address.rpartition(":")
    if address not in ("", "auto") and not (host and port.isdecimal() and "/" not in host):
        raise ValueError(
            f"address is {address!r}; it must be host:port of a Ray cluster's head, as ray start prints it, auto for "
            "the cluster that this machine is a node of, or empty for one of this process alone"
        )


@contextlib.contextmanager
def ray_connection(address: str = "", cpus: int = 1) -> Iterator[None]:
    """Connects this process to a Ray cluster, or starts one of this machine; for all collectors that are made inside.

    A cluster that is started here listens on 127.0.0.1, wants a token that only its own processes have, ends with the
    context, and leaves nothing. Where the process is connected already, that connection serves, and whoever made it
    ends it.

    Args:
        address: as of :class:`RayOptions`.
        cpus: of a cluster that is started: a number that Ray counts with, not cores.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or it is of another version.
    """
    global _users
    check_ray(address)
    import ray

    if not ray.is_initialized():
        try:
            if address:
                _join(address)
            else:
                _start(cpus)
        except BaseException:
            _links.close()
            raise
    elif address not in ("", "auto", found := ray.get_runtime_context().gcs_address):
        raise ValueError(f"address is {address}, and this process is connected to the Ray cluster at {found} already")
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            _links.close()


def _start(cpus: int) -> None:
    """A cluster of this machine.

    Raises:
        ValueError: it does not start.
    """
    from ray._private import ray_constants

    # not in /tmp/ray, which is everybody's; the sockets in it have long names already
    folder = tempfile.mkdtemp(prefix="ray-")
    _links.callback(shutil.rmtree, folder, ignore_errors=True)
    # what Ray has for systems whose firewalls ask about every listener: it listens on 127.0.0.1. Its processes read it
    # from the environment, and this one did so when Ray was imported, as TorchRL does
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_TOKEN": _token, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        environment(**own, RAY_worker_niceness="0"),  # no lower priority than the learner's, which waits for them
        mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
    ):
        for tries_left in reversed(range(_TRIES)):
            try:
                _init(
                    "a Ray cluster of this machine did not start",
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _temp_dir=folder,
                )
                return
            except ValueError:
                if not tries_left:
                    raise


def _join(address: str) -> None:
    """The cluster that runs.

    Raises:
        ValueError: it cannot be reached, or is of another version.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"address is {address}, where nobody listens ({error}); it must be that of a Ray cluster's head"
            ) from error
    _init(f"address is {address}, and the Ray cluster there cannot be used", address=address)


def _init(failed: str, **options: Any) -> None:
    import ray

    before, mode = signal.getsignal(signal.SIGTERM), os.environ.get("RAY_AUTH_MODE")
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Ray's processes are of this one's group, and what ends the group is the learner's to decide
        with signals_blocked():
            ray.init(log_to_driver=False, configure_logging=False, **options)
    except Exception as error:
        raise ValueError(f"{failed}: {' '.join(str(error).split())[:_LONGEST]}") from error
    finally:
        logger.setLevel(level)
        if mode is None:  # which Ray sets
            os.environ.pop("RAY_AUTH_MODE", None)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    _links.callback(ray.shutdown)


def cluster_size() -> tuple[int, float, float]:
    """Nodes, CPUs and GPUs of the cluster that this process is connected to, as Ray counts them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return len(nodes), sum(node.get("CPU", 0.0) for node in nodes), sum(node.get("GPU", 0.0) for node in nodes)


def check_room(number: int, cpus: int) -> None:
    """Look whether the cluster has CPUs for ``number`` actors of ``cpus`` each, which would wait for them for ever.

    Raises:
        ValueError: it has not, or others use them.
    """
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    wanted = f"{number} actors of {cpus} CPU each"
    if sum(int(there // cpus) for there in nodes) < number:
        raise ValueError(
            f"{wanted} (num_workers, threads_per_worker) are more than the {len(nodes)} nodes of the Ray cluster have "
            f"room for, with {sum(nodes):g} CPUs together: ask for fewer, or add nodes"
        )
    limit = time.monotonic() + _ROOM_TIMEOUT
    while (free := ray.available_resources().get("CPU", 0.0)) < number * cpus:
        if time.monotonic() > limit:
            raise ValueError(
                f"{wanted} find no room: of the {sum(nodes):g} CPUs of the Ray cluster {free:g} are free, the others "
                "are in use; ask for fewer actors, or wait"
            )
        time.sleep(_POLL)
