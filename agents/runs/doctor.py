"""What a machine has for offtrace, and whether it works: checks, each of which says what it found, or raises."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from offtrace.agents.config import available_cores, count, fit, may_have_gpu, this_machine
from offtrace.agents.impala import atari_config, control_config
from offtrace.agents.runs.folders import commit_of
from offtrace.agents.runs.isolated import Check, Missing
from offtrace.modules.envs.names import atari_name
from offtrace.modules.envs.suite import has_dm_control
from offtrace.modules.machine import memory_limit

BACKENDS: dict[str, dict[str, Any]] = {
    "actor processes": {"num_workers": 1},
    "inference server": {"num_workers": 1, "server": True},
    "in process": {"num_workers": 0},
}
"""How actors run, as arguments of ``make_collector``; Ray's are asked for by themselves."""
SMALL, ATARI, CONTROL = "CartPole-v1", "pong", "cartpole-swingup"
PARTS = ("torch", "torchrl", "lightning")
"""Packages that have a line of their own."""
_TOP = Path(__file__).resolve().parents[2]
_SHARED = Path("/dev/shm")
_LEAST_MEMORY, _LEAST_DISK, _LEAST_SHARED = 2e9, 1e9, 256e6  # bytes
_LEAST_FILES = 1024
_SECONDS = 0.5  # in which steps are counted
_STEP, _LONG = 20.0, 60.0  # seconds for a step of a task, and for an actor to come up; twice as many for Ray's


def checks_of(task: str | None, folder: Path, address: str | None) -> list[list[Check]]:
    """All checks, in groups that run at the same time.

    Args:
        task: one to act in as well.
        folder: where runs go.
        address: of a Ray cluster, as ``make_collector`` takes it: empty is one of this machine; None: none is wanted.
    """
    has_control = has_dm_control()
    machine = [
        Check("offtrace", offtrace),
        *(Check(name, partial(package, name)) for name in PARTS),
        Check("other packages", others),
        Check("cores", cores),
        Check("memory", memory, needed=False),
        Check("folder of runs", partial(room, folder, _LEAST_DISK, "make room, or begin runs in another folder")),
        Check("temporary files", temporary, needed=False),
        Check("/dev/shm", shared_memory, needed=False),
        Check("open files", open_files, needed=False),
        Check("GPU", gpu, needed=may_have_gpu()),
        Check("several learners", communication, needed=False),
        Check("Triton", triton, needed=False),
        Check("rendering", partial(rendering, os.environ.get("MUJOCO_GL")), needed=False),
    ]
    actors = [Check(name, partial(acts, SMALL, **options), limit=_LONG) for name, options in BACKENDS.items()]
    actors.append(Check("Atari", partial(acts, ATARI, num_workers=0)))
    actors.append(Check("dm_control", control, needed=has_control))
    if task is not None:
        actors.append(Check(f"--task {task}", partial(acts, task, num_workers=1), limit=_LONG))
    wanted = address is not None
    ray = [Check("Ray", partial(ray_actor, address), needed=wanted, limit=2 * _LONG)]
    return [machine, actors, ray, [Check("flags that fit", partial(fits, task))]]


def offtrace() -> str:
    """Versions of this package, Python and the system."""
    commit = commit_of(Path(__file__).resolve().parent)
    known = f" (commit {commit})" if commit else ""
    version = importlib.metadata.version("offtrace")
    return f"{version}{known}, Python {platform.python_version()}, {platform.platform(terse=True)}"


def package(name: str) -> str:
    """The version of a package that offtrace requires; raises where it is missing, or not one of those required."""
    from packaging.version import Version

    wanted = _requirements()[name]
    repair = f"pip install '{name}{wanted.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(f"not installed: {repair}") from error
    if not wanted.specifier.contains(version, prereleases=True):
        raise ValueError(f"{version}; it must be {wanted.specifier}: {repair}")
    differs = _tested(name, version) not in (version, Version(version).public)
    return f"{version}; constraints.txt has {_tested(name, version)}, which was tested" if differs else version


def _tested(name: str, otherwise: str) -> str:
    """The version in ``constraints.txt`` of a checkout, or ``otherwise``."""
    file = _TOP / "constraints.txt"
    pins = [line.partition("==") for line in file.read_text().splitlines()] if file.is_file() else []
    return next((version.partition(";")[0].strip() for known, _, version in pins if known == name), otherwise)


def others() -> str:
    """All other packages that offtrace requires; raises on the first that is missing, or not as required."""
    names = [name for name in _requirements() if name not in PARTS]
    for name in names:
        try:
            package(name)
        except (Missing, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return f"{count(len(names), 'package')} as required"


def _requirements() -> dict[str, Any]:
    """What offtrace requires on this Python, by name: as it stands in a checkout, or as it was installed."""
    from packaging.requirements import Requirement

    project = _TOP / "pyproject.toml"
    lines = importlib.metadata.requires("offtrace") or []
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    found = [Requirement(line) for line in lines]
    return {wanted.name: wanted for wanted in found if not wanted.marker or wanted.marker.evaluate({"extra": ""})}


def cores() -> str:
    """Cores that this process may use."""
    return f"{available_cores()} of {os.cpu_count()}, by affinity and control groups"


def memory() -> str:
    """Memory that this process may have."""
    limit = memory_limit()
    found = f"{limit / 1e9:.1f} GB, by the machine and control groups"
    if limit < _LEAST_MEMORY:
        raise ValueError(f"{found}; take few actors (collector.num_workers) and a small replay (replay.capacity)")
    return found


def room(folder: Path, least: float, repair: str) -> str:
    """Free space of the disk where ``folder`` is or would be made; raises where less than ``least`` can be written."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        repair = repair if place.is_dir() else "it must be a folder"
        raise ValueError(f"{place} cannot be written ({error.strerror}); {repair}") from error
    usage = shutil.disk_usage(place)
    found = f"{folder.absolute()}, {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if usage.free < least:
        raise ValueError(f"{found}, which is little; {repair}")
    return found


def temporary() -> str:
    """The folder of temporary files, among them the sockets of actors."""
    folder, wanted = Path(tempfile.gettempdir()), os.environ.get("TMPDIR")
    if wanted and Path(wanted).absolute() != folder:
        raise ValueError(f"TMPDIR is {wanted}, which cannot be written, and {folder} is used; set it to another folder")
    return room(folder, _LEAST_SHARED, "make room, or set TMPDIR to another folder")


def shared_memory() -> str:
    """Room for what actors share with the learner."""
    if not _SHARED.is_dir():
        raise Missing("not there; temporary files serve, which are slower")
    return room(_SHARED, _LEAST_SHARED, "give it more for rollouts of images (docker: --shm-size=1g)")


def open_files() -> str:
    """The limit of open files, of which each actor takes some."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _LEAST_FILES:
        raise ValueError(f"at most {soft}, which is little for many actors: ulimit -n 4096")
    return f"at most {soft}" if soft >= 0 else "no limit"


def gpu() -> str:
    """GPUs by name, memory and driver, each of which multiplies two matrices."""
    if not may_have_gpu():
        raise Missing("no driver shows itself; everything runs on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"a driver is there, and nvidia-smi tells no GPU ({error}); install it, or the driver"
        ) from error
    import torch

    found = f"{'; '.join(told.splitlines())}; torch is built for CUDA {torch.version.cuda}, and uses"
    if not torch.cuda.is_available():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(f"{found} none (CUDA_VISIBLE_DEVICES is {shown}); install a torch that fits the driver")
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        if (ones @ ones).sum().item() != 256**3:
            raise ValueError(f"{found} cuda:{index}, which multiplies wrongly; take another one")
    return f"{found} {count(torch.cuda.device_count(), 'GPU')}"


def communication() -> str:
    """What sums gradients: gloo, and NCCL where there is a GPU for it. One learner makes a sum of its own."""
    import torch
    import torch.distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda"))[: 1 + nccl]:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1, device=device))
        dist.destroy_process_group()
    return "gloo and NCCL work" if nccl else "gloo works; there is no GPU for NCCL"


def triton() -> str:
    """Whether there is what compiles the fused kernels of returns."""
    if importlib.util.find_spec("triton") is None:
        raise Missing("not installed; it makes returns on a GPU faster: pip install triton")
    import offtrace.modules.returns.triton_kernels  # noqa: F401

    return importlib.metadata.version("triton")


def rendering(given: str | None) -> str:
    """A picture by MuJoCo, with ``MUJOCO_GL`` as it is ``given``."""
    has_control = has_dm_control()
    try:
        from offtrace.modules.envs.make import make_env  # with TorchRL, which imports what MUJOCO_GL names

        env = make_env(CONTROL if has_control else "InvertedPendulum-v5", 1, pictures=not has_control)
        env.reset()
        picture = env.render()
        env.close()
        if picture.max() == picture.min():
            raise ValueError("the picture is empty")
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"MUJOCO_GL is {given or 'not set'}: {first}; for pixels and recorded episodes install libegl1 or "
            "libosmesa6, and set MUJOCO_GL to egl or osmesa; to do without, unset it"
        ) from error
    used = given or f"not set, {os.environ.get('MUJOCO_GL', 'glfw')} is used"
    return f"MUJOCO_GL is {used}: a picture of {picture.shape[1]} x {picture.shape[0]}"


def acts(task: str, **options: Any) -> str:
    """Starts a collector, and counts the steps of its one actor, with the default policy of the task's observations.

    Args:
        task: as ``make_env`` takes it.
        options: of ``make_collector``; ``server=True`` is a server with its defaults.
    """
    from offtrace.modules.fork_server import start_fork_server

    if options["num_workers"]:
        start_fork_server()  # it imports while this process does
    import torch

    from offtrace.modules.collectors.make import make_collector
    from offtrace.modules.collectors.server import ServerOptions
    from offtrace.modules.envs.make import env_info, make_env
    from offtrace.modules.networks import build_policy

    torch.set_num_threads(1)
    info = env_info(task)
    policy = build_policy(
        network="shallow" if len(info.observation_shape) == 3 else "mlp", observation_shape=info.observation_shape,
        num_actions=info.num_actions, action_dim=info.action_dim, masked=info.masked,
    )  # fmt: skip
    if options.get("server"):
        options["server"] = ServerOptions()
    env_fn = partial(make_env, task, 8, rescale_actions=True)
    options |= {"frames_per_batch": 8 * 16, "frame_stack": info.frame_stack}
    options |= {"max_restarts": 0, "step_timeout": _STEP}
    start = time.perf_counter()
    with make_collector(env_fn, policy, **options) as collector:
        rollouts = iter(collector)
        next(rollouts)
        first, steps = time.perf_counter(), 0
        while (passed := time.perf_counter() - first) < _SECONDS or not steps:
            steps += next(rollouts).numel()
    return f"{task}: the first rollout after {first - start:.1f} s, then {steps / passed:,.0f} steps/s"


def control() -> str:
    """As :func:`acts`, in a task of dm_control."""
    if not has_dm_control():
        raise Missing("not installed: it comes with Python 3.11 and 3.12; MuJoCo tasks of Gymnasium do without")
    return acts(CONTROL, num_workers=0)


def ray_actor(address: str | None) -> str:
    """The version of Ray; where it is wanted, what the cluster has, and as :func:`acts` of an actor in it."""
    if importlib.util.find_spec("ray") is None:
        raise Missing("not installed; actors on several machines need it: pip install 'offtrace[ray]'")
    version = importlib.metadata.version("ray")
    if address is None:
        return f"{version}; --ray starts it, --address joins a cluster"
    from offtrace.modules.collectors.ray_cluster import cluster_size, ray_connection

    with ray_connection(address):
        nodes, cpus, gpus = cluster_size()
        where = f"{count(nodes, 'node')}, CPUs {cpus:g}, GPUs {gpus:g}" if address else "a cluster of this machine"
        told = acts(SMALL, num_workers=1, backend="ray")  # by this connection
    return f"{version}, {where}; {told}"


def fits(task: str | None) -> str:
    """What IMPALA's recipe for the task chooses on this machine, and why."""
    recipe, preset = "impala_control.py", control_config
    if task is None or atari_name(task) is not None:
        recipe, preset = "impala_atari.py", atari_config
    config, usual = preset(), asdict(preset())
    config.env.task = usual["env"]["task"] = task or config.env.task
    why = fit(config, (), this_machine())
    chosen = ((f"{group}.{name}", value) for group, own in asdict(config).items() for name, value in own.items()
              if value != usual[group][name])  # fmt: skip
    flags = " ".join(f"--{name} {value}" for name, value in chosen)
    return f"{recipe} takes {flags or 'its preset'}; {why}"
