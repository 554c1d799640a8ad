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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

from offtrace.modules.fork_server import environment, signals_blocked
from offtrace.modules.machine import available_cores

_CONNECT_TIMEOUT = 5.0
_ROOM_TIMEOUT = 10.0  # seconds in which actors that were ended give their CPUs back
_END_TIMEOUT = 2.0  # where nobody takes in the dead, those of others stay
_ANSWER_TIMEOUT = 10.0
_POLL = 0.1
_TRIES = 3  # Ray waits for its own processes for so long as they need where nothing else runs
_FEW, _TIMES = 8, 4  # actors that a cluster of our own may have on any machine, and for each core
_LONGEST = 500  # characters of Ray's own words in a sentence
# waits until the learner is gone, then ends what is left of its own cluster, itself included, and removes the folder:
# some of Ray's processes look for a minute for those that went with the learner
_WATCH = 'trap \'\' HUP INT TERM; cat; rm -rf "$0"; sleep 1; rm -rf "$0"; kill -9 0'

# Ray takes the address of a node for that of its loopback
_PROBE = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
address = canonicalize_bootstrap_address(sys.argv[1])
print(address, flush=True)
GcsClient(address=address)
"""

_links = contextlib.ExitStack()  # what the last of those who use it undoes
_users = 0
_joined = ""  # the address that was asked for, which Ray writes in another way
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
    elif address not in ("", "auto", _joined, found := ray.get_runtime_context().gcs_address):
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
    import ray
    from ray._private import ray_constants, utils

    most = max(_FEW, _TIMES * (cores := available_cores()))
    if cpus > most:
        raise ValueError(
            f"{cpus} CPUs (num_workers times threads_per_worker) are asked for in a Ray cluster of this machine, which "
            f"has {cores} cores; it must be at most {most}, or address that of a cluster that has them"
        )

    # not in /tmp/ray, which is everybody's, as Ray makes its folder in this one too; the sockets in it have long names
    folder = tempfile.mkdtemp(prefix="ray-")
    os.mkdir(rays := os.path.join(folder, "r"))
    _links.callback(shutil.rmtree, folder, ignore_errors=True)
    watch = subprocess.Popen(
        ["sh", "-c", _WATCH, folder], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0
    )
    _links.callback(_end_group, watch)
    # what Ray has for systems whose firewalls ask about every listener: it listens on 127.0.0.1. Its processes read it
    # from the environment, and this one did so when Ray was imported, as TorchRL does
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": None,  # then Ray has it that all who connect need the token, in this process too
        "RAY_AUTH_TOKEN": _token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # no lower priority than the learner's, which waits for them
        "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
    }
    with (
        environment(**own),
        mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
        # called in a process of Ray's before it is one. Ray would have it die with the thread that starts it
        mock.patch.object(utils, "set_kill_on_parent_death_linux", partial(os.setpgid, 0, watch.pid)),
    ):
        raylet: Any = ray._raylet
        raylet.AuthenticationTokenLoader.instance().reset_cache()  # the token of a cluster before this one
        for tries_left in reversed(range(_TRIES)):
            try:
                _init(
                    "a Ray cluster of this machine did not start",
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _temp_dir=rays,
                )
                break
            except ValueError:
                if not tries_left:
                    raise
    if not (found := ray.get_runtime_context().gcs_address).startswith("127.0.0.1:"):
        raise ValueError(f"Ray {ray.__version__} does not keep a cluster to this machine: it listens at {found}")


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """Kill a process and its group, and see them gone."""
    with leader:  # its number, which is the group's, is nobody else's before it is waited for
        os.killpg(leader.pid, signal.SIGKILL)
    limit = time.monotonic() + _END_TIMEOUT
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < limit:
            os.killpg(leader.pid, 0)
            time.sleep(_POLL / 10)


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
    _ask(address)
    global _joined
    there = "the one that runs here" if address == "auto" else "the Ray cluster there"
    _init(f"address is {address}, and {there} cannot be used", address=address)
    _joined = address


def _ask(address: str) -> None:
    """Waits for an answer of the head in a process of its own: in this one Ray would ask for minutes, deaf to signals.

    Raises:
        ValueError: none comes. Any other fault is left to ``ray.init``, which has the words for it.
    """
    probe = [sys.executable, "-c", _PROBE, address]
    with subprocess.Popen(probe, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as asking:
        try:
            assert asking.stdout is not None
            place = asking.stdout.readline().decode().strip()
            asking.wait(_ANSWER_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"address is {address}, where something listens, but no Ray head answers within "
                f"{_ANSWER_TIMEOUT:.0f} s (asked at {place}); it must be the address that ray start --head printed, "
                "whose port is 6379 as a rule"
            ) from None
        finally:
            asking.kill()


def _init(failed: str, **options: Any) -> None:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # those that come while it starts are for later: what they raise would leave half a cluster
        with signals_blocked(), environment(RAY_AUTH_MODE=os.environ.get("RAY_AUTH_MODE")):  # which Ray sets
            ray.init(log_to_driver=False, configure_logging=False, **options)
    except Exception as error:
        words = " ".join(str(error).split())[:_LONGEST]
        if words.startswith("Could not find any running Ray instance"):  # and names flags that are not ours
            raise ValueError(
                "address is auto, and this machine is no node of a Ray cluster; ray start makes it one, or address "
                "must be host:port of a cluster's head"
            ) from error
        if words.startswith("Failed to connect"):  # Ray prints that a token was refused, and raises this
            words += "; one that wants a token has it from RAY_AUTH_TOKEN, and RAY_AUTH_MODE is token then"
        raise ValueError(f"{failed}: {words}") from error
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    _links.callback(_shut_down)


def _shut_down() -> None:
    """As ``ray.shutdown``, which would ask each process of a cluster of our own and wait a second for an answer.

    SIGTERM is blocked in them.
    """
    import ray

    if node := ray._private.worker._global_node:
        node.kill_all_processes = partial(_kill, node.kill_all_processes)
    ray.shutdown()


def _kill(processes: Callable[..., None], **_: Any) -> None:
    processes(check_alive=False)


def cluster_size() -> tuple[int, float, float]:
    """Nodes, CPUs and GPUs of the cluster that this process is connected to, as Ray counts them."""
    nodes = _nodes()
    return len(nodes), sum(node.get("CPU", 0.0) for node in nodes), sum(node.get("GPU", 0.0) for node in nodes)


def _nodes() -> list[dict[str, float]]:
    """What each node of the cluster has, by Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(number: int, cpus: int, learners: int = 1) -> None:
    """Look whether the cluster has CPUs for ``number`` actors of ``cpus`` each, which would wait for them for ever.

    Args:
        number: of actors of each learner.
        cpus: of each actor.
        learners: ranks of ``torch.distributed``, all of which must call this; it comes back when all have found room,
            so that none counts as in use what another one of them has just taken.

    Raises:
        ValueError: it has not, or others use them.
    """
    from ray._private.state import available_resources_per_node

    def room(nodes: Iterable[dict[str, float]]) -> int:
        return sum(int(node.get("CPU", 0.0) // cpus) for node in nodes)

    each, number = f" of each of {learners} learners" if learners > 1 else "", number * learners
    wanted = f"{number} actor{'s' * (number > 1)}{each} (num_workers), of {cpus} CPU each (threads_per_worker),"
    if (most := room(nodes := _nodes())) < number:
        there = sorted(node.get("CPU", 0.0) for node in nodes)
        raise ValueError(
            f"{wanted} are more than the Ray cluster has room for, which is {most}, on {len(there)} nodes of "
            f"{there[0]:g} to {there[-1]:g} CPUs: ask for fewer, or add nodes"
        )
    limit = time.monotonic() + _ROOM_TIMEOUT
    while (free := room(available_resources_per_node().values())) < number:
        if time.monotonic() > limit:
            raise ValueError(
                f"{wanted} find no room: the Ray cluster has it for {most}, but for no more than {free} now, because "
                "the other CPUs are in use; ask for fewer actors, or wait"
            )
        time.sleep(_POLL)
    if learners > 1:
        import torch.distributed

        torch.distributed.barrier()
