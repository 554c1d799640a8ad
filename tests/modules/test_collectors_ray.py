"""Ray: how its cluster is joined or started, and what is refused; the contract is in test_collectors.py."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from offtrace.modules.collectors import RayOptions, ServerOptions, make_collector, ray_backend, ray_cluster
from offtrace.modules.collectors.ray_backend import RayBackend, RaySeat, Sent
from offtrace.modules.collectors.restarts import Restarts
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure
from tests.marks import needs_ray
from tests.modules.test_collectors import ENVS, STEPS, StampEnv, WeightPolicy


def refused(**kwargs: Any) -> str:
    """The sentence."""
    arguments: dict[str, Any] = {"frames_per_batch": ENVS * STEPS, "num_workers": 1, "backend": "ray", **kwargs}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the tests look
        make_collector(arguments.pop("env_fn", StampEnv), WeightPolicy(), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert refused() == "backend is ray, and Ray is not installed: pip install 'offtrace[ray]'"


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_workers": 0}, "num_workers is 0, and backend is ray; it must be at least 1"),
        (
            {"server": ServerOptions()},
            "backend is ray, whose actors have a copy of the policy each; server must be None",
        ),
        ({"device": "cuda:0"}, "device is cuda:0; Ray actors act on the CPU: it must be cpu"),
        ({"backend": "rya"}, "backend is 'rya'; it must be processes or ray"),
        ({"backend": "processes", "ray": RayOptions(near=True)}, "and backend is processes: it must be ray, or leave"),
        ({"ray": RayOptions("ray://head:10001")}, "address is 'ray://head:10001'; it must be host:port"),
        ({"ray": RayOptions("head")}, "address is 'head'; it must be host:port"),
        ({"env_fn": partial(StampEnv, fail=threading.Lock())}, "does not pickle, which actor processes need"),
    ],
)
def test_what_ray_actors_cannot_be_is_refused(arguments: dict[str, Any], words: str) -> None:
    assert words in refused(**arguments)


@needs_ray
def test_more_actors_than_a_machine_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "available_cores", lambda: 2)
    told = refused(num_workers=9)
    assert told.startswith("9 CPUs (num_workers times threads_per_worker) are asked for in a Ray cluster of this")
    assert "which has 2 cores; it must be at most 8, or address" in told


@needs_ray
def test_an_address_where_nobody_listens_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert refused(ray=RayOptions(address)).startswith(f"address is {address}, where nobody listens (")


@needs_ray
def test_what_listens_and_is_no_ray_head_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a dashboard: Ray itself asks it for twelve minutes, and hears no Ctrl-C meanwhile."""
    monkeypatch.setattr(ray_cluster, "_ANSWER_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = refused(ray=RayOptions(address))
    assert told.startswith(
        f"address is {address}, where something listens, but no Ray head answers within 1 s (asked at "
    )
    assert f":{address.split(':')[1]}); it must be the address that ray start --head printed" in told


@needs_ray
@pytest.mark.parametrize(
    ("nodes", "free", "words"),
    [
        ([2.0, 2.0], [2.0, 2.0], None),
        ([2.0, 1.0], [2.0, 1.0], "has room for, which is 1, on 2 nodes of 1 to 2 CPUs: ask for fewer, or add nodes"),
        ([2.0, 2.0], [2.0, 1.0], "find no room: the Ray cluster has it for 2, but for no more than 1 now, because the"),
    ],
)
def test_room_for_an_actor_is_on_one_node(
    nodes: list[float], free: list[float], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three free CPUs on two nodes are no room for two actors of two."""
    import ray
    from ray._private import state

    monkeypatch.setattr(ray_cluster, "_ROOM_TIMEOUT", 0.2)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes])
    monkeypatch.setattr(
        state, "available_resources_per_node", lambda: {str(n): {"CPU": cpus} for n, cpus in enumerate(free)}
    )
    if words is None:
        ray_cluster.check_room(2, 2)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        ray_cluster.check_room(2, 2)


@needs_ray
def test_that_no_cluster_runs_here_is_said_without_flags_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setattr(ray_cluster, "_ask", lambda address: None)
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(set))  # whatever else runs here
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = refused(ray=RayOptions("auto"))
    assert told.startswith("address is auto, and this machine is no node of a Ray cluster; ray start makes it one")
    assert "--address" not in told


@needs_ray
def test_a_cluster_of_another_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.3\n    Python: 3.10.1\nThis")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_cluster, "_ask", lambda address: None)
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = refused(ray=RayOptions(address))
    assert told.startswith(f"address is {address}, and the Ray cluster there cannot be used: Version mismatch: ")
    assert "Ray: 2.9.3 Python: 3.10.1" in told
    assert signal.getsignal(signal.SIGTERM) is before


_SCRIPT = """
import os, signal, socket, subprocess, sys, tempfile
import psutil, ray
from ray import _raylet
from offtrace.modules.collectors import RayOptions, make_collector
from tests.modules.test_collectors import ENVS, STEPS, WeightPolicy

sys.path.insert(0, sys.argv[1])
from mine import Mine

def make(workers, options=None):
    return make_collector(
        Mine, WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=workers, backend="ray", ray=options
    )

def told(action):
    try:
        action()
    except (ValueError, RuntimeError) as error:
        print(error)

if __name__ == "__main__":
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="of an earlier cluster", SECRET="hunter2")
    assert _raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    before = {*os.environ, "RAY_CLIENT_MODE"}  # which Ray sets for itself
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    collector = make(1, RayOptions(near=True))
    next(collector)
    head = ray.get_runtime_context().gcs_address
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    names = {p: " ".join(p.cmdline()) for p in processes[1:]}
    sockets = [c for p in processes for c in p.net_connections() if c.status == "LISTEN"]
    print("listening", *sorted({c.laddr.ip for c in sockets}))
    print("handlers", handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
    print("variables", *(name for name in os.environ if name.startswith("RAY_") and name not in before))
    print("secrets", b"hunter2" in ray.get(collector.backend._spec))
    temporary = tempfile.gettempdir()
    print("modes", *(oct(os.stat(f"{temporary}/{x}").st_mode & 0o777) for x in os.listdir(temporary) if "ray-" in x))
    script = f"from ray._raylet import GcsClient; GcsClient(address='{head}').internal_kv_keys(b'', namespace=None)"
    stranger = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    print("stranger", stranger.stderr.strip().splitlines()[-1][:120])
    for arguments in ((2,), (1, RayOptions("auto", learners=2)), (1, RayOptions("127.0.0.1:1"))):
        told(lambda: make(*arguments))
    ray.shutdown()
    told(lambda: next(collector))
    collector.shutdown()
    print("again", ray.is_initialized())
    print("left", [name for p, name in names.items() if p.is_running()], os.listdir(temporary))
"""


def learner(folder: Path, script: str, *argv: str, **kwargs: Any) -> subprocess.Popen[str]:
    """A process that runs ``script``."""
    (folder / "learner.py").write_text(script)
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, str(folder / "learner.py"), *argv],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@needs_ray
@pytest.mark.slow
def test_a_learner_that_is_killed_leaves_no_process_and_no_folder(tmp_path: Path, sockets: None) -> None:
    script = "import sys\nfrom offtrace.modules.collectors import ray_connection\nwith ray_connection():\n"
    with learner(
        tmp_path, f"{script}    print('up', flush=True)\n    sys.stdin.read()", stdin=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        processes = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, left = psutil.wait_procs(processes, timeout=20)  # Ray's own agents look for their cluster for a minute
    assert not left
    assert not list(Path(os.environ["TMPDIR"]).glob("ray*"))


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_our_own_is_private_and_leaves_nothing(tmp_path: Path, sockets: None) -> None:
    folder = os.environ["TMPDIR"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").write_text(
        "from tests.modules.test_collectors import StampEnv\n\n\nclass Mine(StampEnv):\n    pass\n"
    )
    with learner(tmp_path, _SCRIPT, str(own), stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    found = dict(line.partition(" ")[::2] for line in out.splitlines())
    assert set(found["listening"].split()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert found["handlers"] == "True"
    assert found["variables"] == ""
    assert found["secrets"] == "False"
    assert found["modes"] == "0o700"
    assert "Auth" in found["stranger"]
    assert (
        "2 actors (num_workers), of 1 CPU each (threads_per_worker), are more than the Ray cluster has room for" in out
    )
    assert "2 actors of each of 2 learners (num_workers), of 1 CPU each (threads_per_worker), are more" in out
    assert "address is 127.0.0.1:1, and this process is connected to the Ray cluster at 127.0.0.1:" in out
    assert "the connection to the Ray cluster was ended, and the collector was not before it" in out
    assert found["again"] == "False"
    assert found["left"].startswith("[] ")
    assert not list(Path(folder).glob("ray*"))
    assert not [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])]


@needs_ray
def test_a_head_that_has_gone_is_told_before_ray_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray_backend, "_HEAD_EVERY", 0.01)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        connection = ray_backend.Connection()
        for _ in range(2 * ray_backend._HEAD_TRIES):
            connection.check()
            time.sleep(0.02)
    for _ in range(ray_backend._HEAD_TRIES - 1):
        connection.check()
        time.sleep(0.02)
    with pytest.raises(EnvironmentFailure, match=f"the head of the Ray cluster, {address}, has gone"):
        connection.check()


@needs_ray
def test_a_rollout_whose_copy_was_interrupted_comes_again() -> None:
    """Its actor has been asked for the next one by then."""
    backend = object.__new__(RayBackend)
    backend._seats, backend._turn = [RaySeat(0, SharedWeights(WeightPolicy(), 1))], 0
    backend._taken = Sent({("a",): np.arange(2.0)}, torch.Size([1, 2]))

    def interrupted(entries: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.take(interrupted)
    entries, shape, worker = backend.take(dict)
    assert entries["a",].tolist() == [0.0, 1.0]
    assert (shape, worker) == ((1, 2), 0)
    assert backend._taken is None


@needs_ray
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
def test_a_rollout_that_waits_is_delivered_once() -> None:
    """And does not make the faults of those that come after its actor each the first."""
    backend = object.__new__(RayBackend)
    backend._restarts = Restarts(1000)
    seat = RaySeat(0, SharedWeights(WeightPolicy(), 1))
    backend._restarts.delivered(seat.what)
    seat.rollout = Sent({}, torch.Size([1, 1]))

    def fail() -> None:
        raise EnvironmentFailure("it fails")

    with pytest.raises(EnvironmentFailure, match="5 new ones in a row delivered nothing"):  # noqa: PT012
        for _ in range(100):
            backend._watched(seat, fail)
            backend._watched(seat, lambda: None)  # the next one comes up
