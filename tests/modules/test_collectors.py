"""The collectors: nothing lost, nothing shared, lag bounded, failures found, and nothing left behind.

The environment's observations carry (environment, step, seed), so that a lost or repeated step shows. The policy writes
its only weight beside each action; the tests set the weight to the number of the push, so that weight and version in
the batch must agree at every single step.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from offtrace.modules import fork_server
from offtrace.modules.collectors import RolloutCollector, lag_bound, make_collector, processes, ray_connection, restarts
from offtrace.modules.collectors.actors import actor_seed
from offtrace.modules.collectors.buffer_pool import BufferPool
from offtrace.modules.collectors.ray_backend import RayBackend
from offtrace.modules.collectors.server import ServerOptions
from offtrace.modules.envs import EnvironmentFailure, make_env
from offtrace.modules.keys import RECURRENT_C, RECURRENT_H
from offtrace.modules.networks import build_policy
from tests.marks import needs_ray

ENVS, STEPS = 4, 5
WAYS: dict[str, dict[str, Any]] = {"copies": {}, "server": {"server": ServerOptions()}, "ray": {"backend": "ray"}}
"""How actors act: each with a copy of the policy, or all through one server, or on Ray. All keep one contract."""
EVERY_WAY = [pytest.param(way, marks=needs_ray if way == "ray" else ()) for way in WAYS]
WORKERS = 2


ENDS: dict[str, BaseException] = {
    "reset": ConnectionResetError("the simulator's peer is gone"),
    "eof": EOFError("no more input"),
    "exit": SystemExit("no licence"),
    "lines": ValueError("two\n  lines"),
}


class StampEnv(EnvBase):
    """Endless; observations float64 [N, 3]: environment, step, seed. May raise, hang, end or be slow at a step.

    With ``once`` only where the seed is that of actor 0 of run 0, and so not where that was replaced.
    """

    def __init__(
        self, seed: int, envs: int = ENVS, fail: str = "", at: int = 7, delay: float = 0.0, once: bool = False
    ) -> None:
        super().__init__(device="cpu", batch_size=[envs])
        flags = {k: Binary(1, (envs, 1), dtype=torch.bool) for k in ("done", "terminated", "truncated")}
        self.observation_spec = Composite(
            observation=Unbounded((envs, 3), dtype=torch.float64),
            is_init=Binary(1, (envs, 1), dtype=torch.bool),
            shape=(envs,),
        )
        self.action_spec = Categorical(1000, shape=(envs,))
        self.reward_spec = Unbounded((envs, 1))
        self.done_spec = Composite(**flags, shape=(envs,))
        self.seed_value, self.at, self.delay, self.step_number = seed, at, delay, 0
        self.fail = "" if once and seed != actor_seed(0, 0, 0) else fail

    def _observe(self) -> dict[str, Tensor]:
        (n,) = self.batch_size
        columns = [torch.arange(n), torch.full((n,), self.step_number), torch.full((n,), self.seed_value)]
        no = torch.zeros(n, 1, dtype=torch.bool)
        flags = dict.fromkeys(("done", "terminated", "truncated", "is_init"), no)
        return {"observation": torch.stack(columns, -1).double(), **flags}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        return TensorDict(self._observe(), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.step_number += 1
        time.sleep(self.delay)
        if self.step_number == self.at and self.fail == "raise":
            raise ValueError("the gripper fell off")
        if self.step_number == self.at and self.fail == "hang":
            time.sleep(1000)
        if self.step_number == self.at and self.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step_number == self.at and self.fail in ENDS:
            raise ENDS[self.fail]
        reward = torch.ones(*self.batch_size, 1)
        return TensorDict({**self._observe(), "reward": reward}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        pass


class WeightPolicy(TensorDictModuleBase):
    """Random actions; writes its only weight as "weight" [N]."""

    in_keys: list[str] = ["observation"]  # noqa: RUF012
    out_keys: list[str] = ["action", "weight"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict["action"] = torch.randint(1000, tensordict.shape)
        tensordict["weight"] = self.weight.expand(tensordict.shape).clone()
        return tensordict


def make(workers: int, *, policy: nn.Module | None = None, env: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    env_fn = partial(StampEnv, **(env or {}))
    if kwargs.get("backend") == "ray":
        cluster_of_the_tests()
    return make_collector(
        env_fn, policy or WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=workers, **kwargs
    )


_cluster = contextlib.ExitStack()


def cluster_of_the_tests() -> None:
    """Connects this process to one Ray cluster for all tests of this file that need one."""
    import ray

    if not ray.is_initialized():
        _cluster.enter_context(ray_connection(cpus=3))


@pytest.fixture(scope="module", autouse=True)
def _end_of_the_cluster() -> Iterator[None]:
    with _cluster:
        yield


def push(collector: RolloutCollector, policy: WeightPolicy) -> None:
    """Raise the learner's weight by one, as an optimiser would, and publish."""
    with torch.no_grad():
        policy.weight += 1
    collector.update_policy(policy)


def _is_worker(process: psutil.Process) -> bool:
    """A fork of the fork server has its command line, and the server itself is no worker."""
    try:
        parent = process.parent()
        return parent is not None and all("forkserver" in " ".join(p.cmdline()) for p in (process, parent))
    except psutil.NoSuchProcess:  # it has ended meanwhile, or ended before and nobody has asked how
        return False


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if _is_worker(p)}


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def zombies() -> list[int]:
    return [p.pid for p in psutil.Process().children() if ended(p.pid) and psutil.pid_exists(p.pid)]


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Whether it came true. The limit is for what hangs: a loaded machine is slow, and no test measures that."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def shared_memory() -> set[str]:
    """What this process maps of shared memory, and names there that tell of it; learner and actors make none.

    But for the object store of a Ray cluster, which is there as long as the cluster.
    """
    folder = Path("/dev/shm")
    paths = (m for m in psutil.Process().memory_maps(grouped=False) if "plasma" not in m.path)
    mapped = {f"{m.addr} {m.path}" for m in paths if str(folder) in m.path}
    names = (p.name for p in folder.iterdir()) if folder.exists() else ()
    return mapped | {name for name in names if str(os.getpid()) in name}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    processes, memory, dead = children(), shared_memory(), set(zombies())
    yield
    assert wait_until(lambda: children() <= processes, 20.0)
    assert wait_until(lambda: shared_memory() <= memory, 20.0)
    assert set(zombies()) <= dead, "an actor process was not waited for"


# In process


def test_layout_and_versions_in_process() -> None:
    policy = WeightPolicy()
    with make(0, policy=policy) as collector:
        assert collector.num_envs == ENVS
        for version in range(3):
            rollout = next(collector)
            assert rollout.shape == (ENVS, STEPS)
            assert (rollout["policy_version"] == version).all()
            assert (rollout["next", "policy_version"] == version).all()
            assert (rollout["weight"] == version).all()
            assert torch.equal(rollout["worker"], torch.zeros(ENVS, STEPS, dtype=torch.int64))
            expected = torch.arange(version * STEPS, (version + 1) * STEPS).double().expand(ENVS, STEPS)
            torch.testing.assert_close(rollout["observation"][..., 1], expected)
            torch.testing.assert_close(rollout["next", "observation"][..., 1], expected + 1)
            assert "done" not in rollout
            assert ("next", "done") in rollout.keys(True)
            push(collector, policy)
        assert collector.version == 3


@pytest.mark.parametrize("source", ["module", "tensordict", "state_dict"])
def test_weights_are_copied_from_every_form(source: str) -> None:
    policy = WeightPolicy()
    forms: dict[str, Callable[[], Any]] = {
        "module": lambda: policy,
        "tensordict": lambda: TensorDict.from_module(policy).data,
        "state_dict": policy.state_dict,
    }
    with make(0, policy=policy) as collector:
        with torch.no_grad():
            policy.weight.fill_(5.0)
        assert (next(collector)["weight"] == 0).all(), "the actor saw the learner's parameter without a push"
        collector.update_policy(forms[source]())
        with torch.no_grad():
            policy.weight.fill_(7.0)
        assert (next(collector)["weight"] == 5).all()
        with pytest.raises(KeyError, match="do not fit"):
            collector.update_policy({"wieght": torch.zeros(())})
        with pytest.raises(ValueError, match=r"the weight 'weight' has shape \[3\]; that of the actors has \[\]"):
            collector.update_policy({"weight": torch.zeros(3)})


@pytest.mark.parametrize("source", ["module", "tensordict", "state_dict"])
def test_so_are_those_of_a_network_with_buffers_that_are_not_persistent(source: str) -> None:
    policy = build_policy(observation_shape=[3], action_dim=1, head="full_gaussian", critic=None)
    forms: dict[str, Callable[[], Any]] = {
        "module": lambda: policy,
        "tensordict": lambda: TensorDict.from_module(policy).data,
        "state_dict": policy.state_dict,
    }
    with make_collector(partial(make_env, "Pendulum-v1", 2), policy, frames_per_batch=8, num_workers=0) as collector:
        assert collector.update_policy(forms[source]()) == 1


def test_rollouts_are_never_aliased() -> None:
    with make(0) as collector:
        first = next(collector)
        kept = first.clone()
        second = next(collector)
        assert (first == kept).all()
        assert first["observation"].data_ptr() != second["observation"].data_ptr()


def test_large_memory_is_used_again_only_when_nobody_holds_it() -> None:
    source = torch.zeros(1 << 20, dtype=torch.uint8)
    pool = BufferPool()
    one = pool.empty_like(source)
    address = one.data_ptr()
    view = one[5:9].view(2, 2)
    del one
    two = pool.empty_like(source)
    assert two.data_ptr() != address, "a view still uses it"
    array = view.numpy()
    del view
    assert pool.empty_like(source).data_ptr() != address, "an array still uses it"
    del array
    assert pool.empty_like(source).data_ptr() == address


def test_order_is_applied_to_every_entry() -> None:
    order = torch.tensor([2, 0, 3, 1])
    with make(0) as collector:
        collector.order = lambda size: order[:size]
        rollout = next(collector)
        for key in ("observation", ("next", "observation")):
            torch.testing.assert_close(rollout[key][:, 0, 0], order.double())


def test_an_error_in_process_names_its_cause() -> None:
    collector = make(0, env={"fail": "raise"})
    next(collector)
    words = (
        r"collection in the learner's process, where nothing can be replaced, failed at step \d+: .*the gripper fell"
    )
    with pytest.raises(EnvironmentFailure, match=words):
        next(collector)
    with pytest.raises(RuntimeError, match="shut down"):
        next(collector)


def test_after_an_interrupt_in_process_the_next_rollout_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the broken one stood."""
    with make(0) as collector:
        next(collector)
        step = StampEnv._step

        def interrupted(self: StampEnv, tensordict: TensorDictBase) -> TensorDictBase:
            if self.step_number == 7:
                monkeypatch.undo()
                raise KeyboardInterrupt
            return step(self, tensordict)

        monkeypatch.setattr(StampEnv, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(collector)
        first = next(collector)["observation"][0, :, 1].tolist()
    assert first == [*range(int(first[0]), int(first[0]) + STEPS)]
    assert first[0] in (7, 8)


@pytest.mark.filterwarnings("ignore:an environment raised OSError when it was closed:RuntimeWarning")
def test_an_environment_that_raises_when_it_is_closed_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: StampEnv, **_: Any) -> None:
        self.is_closed = True
        raise OSError("no such socket")

    monkeypatch.setattr(StampEnv, "close", close)
    for fail in ("", "raise"):
        collector = make(0, env={"fail": fail})
        collector.backend._collector.env.is_closed = False
        next(collector)
        if fail:
            with pytest.raises(EnvironmentFailure, match="the gripper fell off"):
                next(collector)
        collector.shutdown()


def _bent() -> Any:
    raise ValueError("the pole is bent")


def test_so_does_one_of_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wraps it has named it already."""
    policy = build_policy(observation_shape=[4], num_actions=2)
    with make_collector(partial(make_env, "CartPole-v1", 2), policy, frames_per_batch=8, num_workers=0) as collector:
        next(collector)
        monkeypatch.setattr(CartPoleEnv, "step", lambda self, action: _bent())
        told = "where nothing can be replaced, failed at step .*: CartPole-v1: environment 0 raised ValueError at step"
        with pytest.raises(EnvironmentFailure, match=told):
            next(collector)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames_per_batch": 0}, "frames_per_batch is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"threads_per_worker": 0}, "threads_per_worker is 0"),
        ({"step_timeout": 0.0}, "step_timeout is 0"),
        ({"rollouts_per_batch": 0}, "rollouts_per_batch is 0"),
        ({"max_restarts": -1}, "max_restarts is -1"),
        ({"server": ServerOptions(), "num_workers": 0}, "num_workers is 0; an inference server acts for actor"),
        ({"rollouts_per_batch": 3, "num_workers": 2}, "rollouts_per_batch is 3; .* at most 2, their number"),
        ({"rollouts_per_batch": 2, "num_workers": 0}, "rollouts_per_batch is 2; .* at most 1, their number"),
        ({"frames_per_batch": ENVS * STEPS + 1, "num_workers": 0}, "multiple of the 4 environments"),
        ({"device": "cuda:99"}, r"device is cuda:99; torch can use \d+ GPUs here: it must be cpu, or one of those"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_collector(StampEnv, WeightPolicy(), **{"frames_per_batch": ENVS * STEPS, **arguments})


def test_seeds_differ_by_seed_rank_and_worker_and_repeat() -> None:
    places = [(s, r, w, 0, k) for s in range(4) for r in range(4) for w in range(4) for k in range(3)]
    seeds = [actor_seed(*place) for place in places]
    assert seeds == [actor_seed(*place) for place in places]
    gaps = torch.tensor(sorted(seeds)).diff()
    assert gaps.min() > 1024, "environment i of one actor would share a seed with environment j of another"
    assert max(seeds) + 1024 < 2**31


def test_lag_bound_in_the_cases_one_can_count_by_hand() -> None:
    assert lag_bound(0, 1) == 0  # collect, update, collect: always on policy
    assert lag_bound(1, 1) == 1  # collected during the update before
    assert lag_bound(1, 4) == 7
    assert lag_bound(2, 3, push_interval=4) == 11
    assert lag_bound(4, 3, rollouts_per_batch=2) == 8
    assert lag_bound(3, 2, rollouts_per_batch=2) == 5  # every other rollout waits two batches
    assert lag_bound(2, 1, rollouts_per_batch=2) == 1


# Two actor processes and a slow learner

UPDATES, ROLLOUTS = 2, 8


def steps_made(collector: RolloutCollector) -> list[int]:
    """By each actor until now."""
    backend: Any = collector.backend
    if isinstance(backend, RayBackend):
        return [seat._ask("beat").result(60)[0] for seat in backend._seats]
    return backend._shared.steps[:WORKERS].tolist()


class SlowRun:
    """What a learner saw that stands still in two of its updates, until all actors have done what they may do."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.rollouts: list[TensorDictBase] = []
        self.lags: list[int] = []
        self.spawned: set[int] = set()
        before, memory = children(), shared_memory()
        policy = WeightPolicy()
        with make(WORKERS, policy=policy, seed=3, env={"delay": 0.005}, **WAYS[way]) as collector:
            self.spawned = set(collector.backend.pids) if way == "ray" else children() - before
            for number in range(ROLLOUTS):
                rollout = next(collector)
                self.rollouts.append(rollout)
                for update in range(UPDATES):
                    if update == 0 and number in (2, 5):
                        self._stand_still(collector)
                    self.lags.append(collector.version - int(rollout["policy_version"].min()))
                    push(collector, policy)
        wait_until(lambda: all(ended(pid) for pid in self.spawned))
        self.left = ({pid for pid in self.spawned | (children() - before) if not ended(pid)}, shared_memory() - memory)

    def _stand_still(self, collector: RolloutCollector) -> None:
        seeds = [int(rollout["observation"][0, 0, 2]) for rollout in self.rollouts]
        allowed = torch.tensor([seeds.count(actor_seed(3, 0, worker)) + 1 for worker in range(WORKERS)]) * STEPS
        assert wait_until(lambda: steps_made(collector) == allowed.tolist())
        time.sleep(0.5)
        assert steps_made(collector) == allowed.tolist()

    def steps(self) -> dict[tuple[int, int], list[int]]:
        """Steps in the order of arrival by (seed, environment)."""
        found: dict[tuple[int, int], list[int]] = {}
        for rollout in self.rollouts:
            for env, step, seed in rollout["observation"].flatten(0, 1).long().tolist():
                found.setdefault((seed, env), []).append(step)
        return found

    def whole(self) -> bool:
        return all(steps == list(range(len(steps))) for steps in self.steps().values())


@pytest.fixture(scope="module", params=EVERY_WAY)
def slow_run(request: pytest.FixtureRequest) -> SlowRun:
    return SlowRun(request.param)


@pytest.mark.slow
def test_every_step_arrives_once(slow_run: SlowRun) -> None:
    assert slow_run.whole()
    assert {len(steps) for steps in slow_run.steps().values()} == {ROLLOUTS // WORKERS * STEPS}


@pytest.mark.slow
def test_lag_stays_below_its_bound_and_is_not_zero(slow_run: SlowRun) -> None:
    assert 0 < max(slow_run.lags) <= lag_bound(WORKERS, UPDATES)


@pytest.mark.slow
def test_the_version_is_that_of_the_weights_that_acted(slow_run: SlowRun) -> None:
    versions = set()
    for rollout in slow_run.rollouts:
        torch.testing.assert_close(rollout["weight"].long(), rollout["policy_version"])
        versions |= set(rollout["policy_version"].unique().tolist())
    assert len(versions) > 2


@pytest.mark.slow
def test_workers_have_their_own_seeds_and_take_turns(slow_run: SlowRun) -> None:
    seeds = [int(rollout["observation"][0, 0, 2]) for rollout in slow_run.rollouts]
    assert seeds == [actor_seed(3, 0, 0), actor_seed(3, 0, 1)] * (ROLLOUTS // WORKERS)
    for rollout, worker in zip(slow_run.rollouts, [0, 1] * (ROLLOUTS // WORKERS), strict=True):
        assert rollout["worker"].dtype == torch.int64
        assert torch.equal(rollout["worker"], torch.full((ENVS, STEPS), worker))
    first, second = slow_run.rollouts[:2]
    assert (first["action"] != second["action"]).any()
    if slow_run.way == "server":  # its one generator serves whoever comes first
        return
    with make(WORKERS, seed=3) as collector:
        for rollout in (first, second):
            torch.testing.assert_close(rollout["action"], next(collector)["action"])


class JoinedRun:
    """Three actors, of which two rollouts come together, and two updates on each batch."""

    def __init__(self) -> None:
        self.rollouts: list[TensorDictBase] = []
        self.lags: list[int] = []
        policy = WeightPolicy()
        order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
        with make(3, policy=policy, seed=3, env={"delay": 0.005}, rollouts_per_batch=2) as collector:
            assert collector.num_envs == 2 * ENVS
            assert collector.frames_per_batch == 2 * ENVS * STEPS
            for number in range(9):
                collector.order = (lambda _: order) if number >= 6 else None
                self.rollouts.append(next(collector))
                for _ in range(UPDATES):
                    self.lags.append(collector.version - int(self.rollouts[-1]["policy_version"].min()))
                    push(collector, policy)
        for rollout in self.rollouts[6:]:  # as they would have come without
            for key, value in rollout.items(True, True):
                rollout[key] = value[order.argsort()]


@pytest.fixture(scope="module")
def joined_run() -> JoinedRun:
    return JoinedRun()


@pytest.mark.slow
def test_rollouts_of_several_actors_come_as_one(joined_run: JoinedRun) -> None:
    """Every step once and in its order, with its actor's number, version and seed, shuffled or not."""
    seen: dict[tuple[int, int], list[int]] = {}
    workers = []
    for rollout in joined_run.rollouts:
        assert rollout.shape == (2 * ENVS, STEPS)
        torch.testing.assert_close(rollout["weight"].long(), rollout["policy_version"])
        for part in rollout.split(ENVS):
            worker = int(part["worker"][0, 0])
            workers.append(worker)
            assert (part["worker"] == worker).all()
            assert (part["observation"][..., 2] == actor_seed(3, 0, worker)).all()
            assert torch.equal(part["observation"][:, 0, 0], torch.arange(ENVS).double())
            torch.testing.assert_close(part["next", "observation"][..., 1], part["observation"][..., 1] + 1)
            for env, step, _ in part["observation"].flatten(0, 1).long().tolist():
                seen.setdefault((worker, env), []).append(step)
    assert workers == [0, 1, 2] * 6
    assert all(steps == list(range(6 * STEPS)) for steps in seen.values())
    assert len(seen) == 3 * ENVS


def test_an_interrupt_between_two_of_several_rollouts_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = make(0)
    collector.rollouts_per_batch = 2
    take, calls = collector.backend.take, 0

    def interrupted(copied: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return take(copied)

    monkeypatch.setattr(collector.backend, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(collector)
    rollout = next(collector)
    assert (
        rollout["observation"][:, :, 1].tolist() == [list(range(STEPS))] * ENVS + [list(range(STEPS, 2 * STEPS))] * ENVS
    )
    collector.shutdown()


@pytest.mark.slow
def test_the_lag_of_joined_rollouts_stays_below_its_bound(joined_run: JoinedRun) -> None:
    assert 0 < max(joined_run.lags) <= lag_bound(3, UPDATES, rollouts_per_batch=2)


@pytest.mark.slow
def test_shutdown_leaves_nothing(slow_run: SlowRun) -> None:
    assert len(slow_run.spawned) == WORKERS + (slow_run.way == "server")
    assert slow_run.left == (set(), set())


# Failures of an actor process


def _no_environment(seed: int) -> EnvBase:
    raise ValueError("there is no game 'pogn'")


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERY_WAY)
def test_an_environment_that_cannot_be_made_is_quoted(way: str) -> None:
    if way == "ray":
        cluster_of_the_tests()
    with pytest.raises(EnvironmentFailure, match=r"actor.* 0 .*failed at step 0: ValueError: there is no game"):
        make_collector(_no_environment, WeightPolicy(), frames_per_batch=ENVS * STEPS, **WAYS[way])


@pytest.mark.parametrize(
    "way",
    [
        "copies",
        pytest.param("server", marks=pytest.mark.slow),
        pytest.param("ray", marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_a_raising_environment_is_quoted(way: str, capfd: pytest.CaptureFixture[str]) -> None:
    collector = make(1, env={"fail": "raise"}, max_restarts=0, **WAYS[way])
    next(collector)
    with pytest.raises(EnvironmentFailure, match=r"(?s)step 7: ValueError: the gripper fell off.*in _step"):
        next(collector)
    assert "Traceback" not in capfd.readouterr().err


class Clinging(StampEnv):
    """Raises at step 7, and takes its time to close."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, fail="raise")
        self.is_closed = False

    def close(self, **_: Any) -> None:
        time.sleep(20)


@pytest.mark.slow
def test_an_error_is_told_before_its_environment_is_closed() -> None:
    collector = make_collector(
        Clinging, WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=1, max_restarts=0, step_timeout=15.0
    )
    next(collector)
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match=r"step 7: ValueError: the gripper fell off"):
        next(collector)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copies", "server"])  # of Ray: test_an_actor_that_fails_is_replaced
def test_a_hanging_environment_is_found(way: str) -> None:
    collector = make(1, env={"fail": "hang"}, step_timeout=5.0, max_restarts=0, **WAYS[way])
    next(collector)
    with pytest.raises(EnvironmentFailure, match=r"actor process 0 .*step 7 hangs") as caught:
        next(collector)
    idle = re.search(r"made no step for (\d+\.\d) s", str(caught.value))
    assert idle is not None
    assert float(idle[1]) >= 5.0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copies", "server"])  # of Ray: test_an_actor_that_fails_is_replaced
def test_a_killed_worker_is_found(way: str) -> None:
    collector = make(1, env={"delay": 0.2}, max_restarts=0, **WAYS[way])
    next(collector)
    os.kill(collector.backend.pids[0], signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match=r"actor process 0 .*signal 9"):  # noqa: PT012
        next(collector)  # may have been on its way already
        next(collector)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("reset", "ConnectionResetError: the simulator's peer is gone"),
        ("eof", "EOFError: no more input"),
        ("exit", "SystemExit: no licence"),
        ("lines", "ValueError: two lines"),
    ],
)
def test_whatever_an_environment_ends_with_is_told(end: str, words: str) -> None:
    """Errors that look like those of a learner who is gone, and a wish to end the process."""
    collector = make(1, env={"fail": end}, max_restarts=0)
    next(collector)
    with pytest.raises(EnvironmentFailure, match=f"actor process 0 failed at step 7: {words}\n"):
        next(collector)


def _of_this_process(seed: int) -> EnvBase:
    """Tells of its process by the error with which it ends."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    program.terminate()
    raise ValueError(f"{os.environ.get('OFFTRACE_TEST')}, {'/of/this/test' in sys.path}, {program.wait(60)}")


@pytest.mark.slow
def test_an_actor_has_the_learners_variables_and_path_and_no_blocked_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of now, not of when the fork server was started; and a program that an environment starts can be terminated."""
    make(1).shutdown()
    monkeypatch.setenv("OFFTRACE_TEST", "42")
    monkeypatch.syspath_prepend("/of/this/test")
    with pytest.raises(EnvironmentFailure, match=r"ValueError: 42, True, -15"):
        make_collector(_of_this_process, WeightPolicy(), frames_per_batch=ENVS * STEPS)


@pytest.mark.slow
def test_processes_of_the_users_own_are_what_they_were() -> None:
    """Those of multiprocessing's fork server, which is not ours."""
    make(1).shutdown()
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(1000,), daemon=True)
    process.start()
    process.terminate()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM


def test_time_in_which_everything_stood_still_does_not_count() -> None:
    """A run that was suspended for longer than step_timeout goes on."""
    beats = torch.zeros(1, dtype=torch.float64)
    child = processes.Child("it", SimpleNamespace(beats=beats), 0)  # type: ignore[arg-type]
    assert [child.wait_for_beat(0.5) for _ in range(3)] == [0.5, 1.0, 1.5]
    beats += 1
    assert child.wait_for_beat(0.5) == 0.5


class FaultyPolicy(WeightPolicy):
    """Raises, hangs, or ends its process, once the learner has pushed."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if float(self.weight) > 0:
            if self.fault == "raise":
                raise ValueError("no such layer")
            if self.fault == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(tensordict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", r"(?s)the inference server failed at step \d+: ValueError: no such layer.*in forward"),
        (
            "hang",
            r"the inference server has answered nothing for \d+\.\d s \(batch \d+ hangs; the limit step_timeout is 5",
        ),
        ("kill", r"the inference server ended by itself at step \d+ \(signal 9\)"),
    ],
)
def test_a_server_that_fails_is_named(fault: str, words: str) -> None:
    """And not the actors, which it takes with it."""
    policy = FaultyPolicy(fault)
    collector = make(2, policy=policy, step_timeout=5.0, max_restarts=0, **WAYS["server"])
    next(collector)
    push(collector, policy)
    with pytest.raises(EnvironmentFailure, match=words):
        collections.deque(collector, maxlen=0)


@pytest.mark.slow
def test_an_actor_that_had_to_be_killed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SHUTDOWN_TIMEOUT", 0.0)
    collector = make(1, env={"delay": 0.2})
    next(collector)
    (pid,) = collector.backend.pids
    collector.shutdown()
    assert not psutil.pid_exists(pid)


# Actors that are replaced


class Watched:
    """A learner that pushes after each rollout, and notes what it is given and when.

    Of the first actor of run 0 and those in its place it knows the seeds, so that what is of which shows.
    """

    def __init__(self, collector: RolloutCollector, policy: WeightPolicy) -> None:
        self.collector, self.policy = collector, policy
        self.parts: list[TensorDictBase] = []  # each of one actor

    def learn(self, batches: int) -> None:
        number = self.collector.rollouts_per_batch
        for _ in range(batches):
            rollout = next(self.collector)
            lag = self.collector.version - int(rollout["policy_version"].min())
            assert lag <= lag_bound(WORKERS if number == 1 else 3, 1, rollouts_per_batch=number)
            self.parts += rollout.split(ENVS)
            push(self.collector, self.policy)

    def seeds(self, worker: int) -> list[int]:
        """Of those that had the place of an actor, in their order."""
        return list(
            dict.fromkeys(int(x["observation"][0, 0, 2]) for x in self.parts if int(x["worker"][0, 0]) == worker)
        )

    def check(self, workers: int) -> None:
        """Rollouts in turn; of every actor each step once and in its order; each with the weights of its version."""
        assert [int(x["worker"][0, 0]) for x in self.parts] == [i % workers for i in range(len(self.parts))]
        seen = collections.defaultdict(list)
        for part in self.parts:
            torch.testing.assert_close(part["weight"].long(), part["policy_version"])
            torch.testing.assert_close(part["next", "observation"][..., 1], part["observation"][..., 1] + 1)
            for env, step, seed in part["observation"].flatten(0, 1).long().tolist():
                seen[int(part["worker"][0, 0]), seed, env].append(step)
        assert all(steps == list(range(len(steps))) for steps in seen.values())
        for worker in range(workers):
            found = self.seeds(worker)
            known = [actor_seed(0, 0, worker, 0, restart) for restart in range(self.collector.restarts + 1)]
            assert found[0] == known[0]
            assert set(found) <= set(known)
            assert sorted(found, key=known.index) == found


@pytest.mark.parametrize(
    ("way", "fault", "told"),
    [
        ("copies", "kill", r"actor process 0 ended by itself at step \d+ \(signal 9\)"),
        pytest.param("copies", "raise", "step 12: ValueError: the gripper fell off", marks=pytest.mark.slow),
        pytest.param("copies", "hang", r"step 12 hangs", marks=pytest.mark.slow),
        pytest.param(
            "server", "kill", r"actor process 0 ended by itself at step 12 \(signal 9\)", marks=pytest.mark.slow
        ),
        pytest.param("server", "raise", "step 12: ValueError: the gripper fell off", marks=pytest.mark.slow),
        pytest.param("ray", "kill", r"Ray actor 0 on 127.0.0.1 ended by itself", marks=[needs_ray, pytest.mark.slow]),
        pytest.param("ray", "hang", r"step 12 hangs", marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_an_actor_that_fails_is_replaced(way: str, fault: str, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    policy = WeightPolicy()
    env = {"fail": fault, "at": 12, "once": True}
    with make(WORKERS, policy=policy, env=env, step_timeout=5.0, **WAYS[way]) as collector:
        watched = Watched(collector, policy)
        with pytest.warns(
            RuntimeWarning, match=f"{told}.*; a new one takes its place, restart 1 of at most 1000$"
        ) as lines:
            watched.learn(12)
        assert len([line for line in lines if line.category is RuntimeWarning]) == 1
        assert collector.restarts == 1
        assert len(collector.backend.pids) == WORKERS
    watched.check(WORKERS)
    assert watched.seeds(0) == [actor_seed(0, 0, 0), actor_seed(0, 0, 0, 0, 1)]
    assert watched.seeds(1) == [actor_seed(0, 0, 1)]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
def test_no_step_is_lost_or_learnt_twice_when_actors_are_killed_at_any_moment(way: str) -> None:
    """Batches of two of three actors; what was under way is gone, all that is before comes once."""
    policy, random = WeightPolicy(), torch.Generator().manual_seed(5)
    with make(3, policy=policy, env={"delay": 0.002}, rollouts_per_batch=2, **WAYS[way]) as collector:
        watched = Watched(collector, policy)
        watched.learn(3)
        kills = 3 if way == "ray" else 6  # a Ray actor takes seconds to start
        for _ in range(kills):
            time.sleep(float(torch.rand((), generator=random)) * 0.03)
            victims = collector.backend.pids
            os.kill(victims[int(torch.randint(len(victims), (), generator=random))], signal.SIGKILL)
            watched.learn(6)
        assert collector.restarts == kills
    watched.check(3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
def test_an_actor_in_another_ones_place_begins_with_a_recurrent_state_of_its_own() -> None:
    policy = build_policy(observation_shape=[4], num_actions=2, recurrent=8, critic=None)
    env_fn = partial(make_env, "CartPole-v1", 2, last_step=True)
    found = collections.defaultdict(list)
    with make_collector(env_fn, policy, frames_per_batch=8, num_workers=1) as collector:
        for number in range(6):
            if number == 3:
                os.kill(collector.backend.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
            rollout = next(collector)
            found[collector.restarts].append(rollout)
    assert set(found) == {0, 1}
    first = found[1][0]
    for key in (RECURRENT_H, RECURRENT_C):
        assert (first[key][:, 0] == 0).all()
        for before, after in zip(found[1], found[1][1:], strict=False):
            goes_on = ~before["next", "done"][:, -1, 0]
            torch.testing.assert_close(after[key][goes_on, 0], before["next", key][goes_on, -1])


@pytest.mark.slow
def test_the_last_restart_is_the_last() -> None:
    """Each delivers one rollout before it fails."""
    collector = make(1, env={"fail": "raise"}, max_restarts=2)
    with (
        pytest.warns(RuntimeWarning, match="restart 2 of at most 2"),
        pytest.raises(
            EnvironmentFailure, match=r"(?s)fell off; it is not replaced, because max_restarts is 2\n.*in _step"
        ),
    ):
        collections.deque(collector, maxlen=0)
    assert collector.restarts == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
@pytest.mark.parametrize("way", EVERY_WAY)
def test_what_fails_in_every_start_ends_it(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(restarts, "_BACK_OFF", 0.01)
    broken = tmp_path / "broken"
    if way == "ray":
        cluster_of_the_tests()
    with make_collector(
        partial(_breaks, path=broken), WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=2, **WAYS[way]
    ) as collector:
        collections.deque((next(collector) for _ in range(4)), maxlen=0)
        broken.touch()
        os.kill(collector.backend.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(
            EnvironmentFailure, match=r"actor.* 1 .*there is no licence; .* 5 new ones in a row delivered"
        ):
            collections.deque(collector, maxlen=0)
        assert collector.restarts == 5


def _breaks(seed: int, path: Path) -> EnvBase:
    if path.exists():
        raise ValueError("there is no licence")
    return StampEnv(seed)


def test_restarts_wait_longer_each_time_until_one_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: clock[0])
    decide, fault = restarts.Restarts(100), EnvironmentFailure("it is broken\n\ntrace")
    with pytest.raises(EnvironmentFailure, match="it is broken\n\ntrace"):
        decide.after("a", fault)  # a fault of set-up
    decide.delivered("a")
    with pytest.warns(RuntimeWarning, match="^it is broken; a new one takes its place, restart 1 of at most 100$"):
        assert decide.after("a", fault) == 0

    def after(name: str, seconds: float) -> float:
        clock[0] += seconds  # which it took to fail, and by which the waiting is shorter
        return decide.after(name, fault)

    with pytest.warns(RuntimeWarning):
        found = [after("a", 0.25), after("a", 0.25), after("b", 0.0), after("a", 4.0), after("a", 0.0)]
    assert found == [0.25, 1.0, 0.0, 0.0, 3.0]
    with pytest.raises(EnvironmentFailure, match=r"it is broken; .* 5 new ones in a row delivered nothing\n\ntrace"):
        decide.after("a", fault)
    decide.delivered("a")
    with pytest.warns(RuntimeWarning):
        assert decide.after("a", fault) == 0
    assert decide.count == 7


@pytest.mark.slow
def test_a_fault_before_the_first_rollout_is_one_of_set_up() -> None:
    collector = make(1, env={"fail": "raise", "at": 3})
    with pytest.raises(EnvironmentFailure, match=r"step 3: ValueError: the gripper fell off\n"):
        next(collector)
    assert collector.restarts == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
def test_actors_survive_the_fork_server_and_are_replaced_without_it() -> None:
    policy = WeightPolicy()
    with make(WORKERS, policy=policy) as collector:
        watched = Watched(collector, policy)
        watched.learn(4)
        old = fork_server._server._forkserver_pid  # type: ignore[attr-defined]
        os.kill(old, signal.SIGKILL)
        watched.learn(10)
        assert collector.restarts == 0, "the actors are well"
        pids = collector.backend.pids
        os.kill(pids[1], signal.SIGKILL)
        watched.learn(10)
        assert collector.restarts == 1
        assert fork_server._server._forkserver_pid != old  # type: ignore[attr-defined]
    watched.check(WORKERS)
    assert wait_until(lambda: all(ended(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a new one takes its place")
def test_a_fork_server_that_hangs_is_ended_and_another_one_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the learner, stopped; the time that it is given is over at once."""
    with make(1) as collector:
        collections.deque((next(collector) for _ in range(2)), maxlen=0)
        old = fork_server._server._forkserver_pid  # type: ignore[attr-defined]
        os.kill(old, signal.SIGSTOP)
        patience = iter([0.0])
        monkeypatch.setattr(fork_server, "wait", lambda pipes, _: wait(pipes, next(patience, None)))
        os.kill(collector.backend.pids[0], signal.SIGKILL)
        with pytest.warns(
            RuntimeWarning, match=r"actor process 0 was not started: the fork server.* forked nothing for"
        ):
            collections.deque((next(collector) for _ in range(4)), maxlen=0)
        assert fork_server._server._forkserver_pid != old  # type: ignore[attr-defined]
        assert collector.restarts == 2


def _late(seed: int, first: int, seconds: float) -> EnvBase:
    if seed != first:
        time.sleep(seconds)
    return StampEnv(seed)


@pytest.mark.slow
def test_an_actor_that_is_up_may_wait_for_others_that_start_for_longer_than_a_step() -> None:
    env_fn = partial(_late, first=actor_seed(0, 0, 0), seconds=8.0)
    with make_collector(
        env_fn, WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=2, step_timeout=3.0
    ) as collector:
        next(collector)


@pytest.mark.slow
def test_actors_that_hang_together_are_found_together() -> None:
    """Not one after the other, each when its turn comes."""
    env = {"fail": "hang", "at": 7}
    with make(3, env=env, step_timeout=3.0) as collector:
        collections.deque((next(collector) for _ in range(3)), maxlen=0)
        with pytest.warns(RuntimeWarning) as lines:
            next(collector)
        told = sorted(str(line.message)[:15] for line in lines if "has made no step" in str(line.message))
        assert told == [f"actor process {worker}" for worker in range(3)]


def _uneven(seed: int) -> EnvBase:
    first = seed == actor_seed(0, 0, 0)
    return StampEnv(seed, fail="kill" if first else "", delay=0.0 if first else 1.0)


@pytest.mark.slow
def test_what_died_is_started_again_before_its_turn_comes() -> None:
    with make_collector(_uneven, WeightPolicy(), frames_per_batch=ENVS * STEPS, num_workers=2) as collector:
        next(collector)
        first, second = collector.backend._actors  # type: ignore[attr-defined]
        assert wait_until(lambda: first.pipe.poll() and second.pipe.poll())
        with pytest.warns(RuntimeWarning, match="actor process 0 ended by itself"):
            assert int(next(collector)["worker"][0, 0]) == 1
        assert first.running


@pytest.mark.slow
def test_a_server_that_dies_is_replaced() -> None:
    policy = WeightPolicy()
    with make(WORKERS, policy=policy, **WAYS["server"]) as collector:
        watched = Watched(collector, policy)
        watched.learn(5)
        os.kill(collector.backend._server.process.pid, signal.SIGKILL)
        with pytest.warns(
            RuntimeWarning, match=r"the inference server ended by itself at step \d+ \(signal 9\); a new one"
        ):
            watched.learn(10)
        assert collector.restarts == 1
    watched.check(WORKERS)


# Ends of the learner's process: (how it ends, its exit code)

_SCRIPT = """
import signal, sys
sys.path.insert(0, {folder!r})
from tests.modules.test_collectors import make
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background of a script ignore
    env = {{"fail": "hang"}} if sys.argv[1] in ("kill", "interrupt twice") else {{"delay": 0.01}}
    print("starting", flush=True)
    collector = make(1, env=env)
    next(collector)
    print("worker", collector.backend.pids[0], flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("the learner failed")
    while True:
        next(collector)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise", "interrupt", "interrupt twice", "interrupt while starting", "kill"])
def test_no_worker_outlives_its_learner(end: str, tmp_path: Path) -> None:
    script = tmp_path / "learner.py"
    script.write_text(_SCRIPT.format(folder=str(Path(__file__).parents[2])))
    with subprocess.Popen(
        [sys.executable, str(script), end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as learner:  # waits for it, whatever fails here
        try:
            worker = _interrupt(learner, end)
            _, errors = learner.communicate(timeout=120)
        finally:
            learner.kill()
    assert learner.returncode not in (0, None)
    assert wait_until(lambda: ended(worker))
    if end not in ("kill", "interrupt twice"):
        assert errors.count("Traceback") == 1, errors


def _interrupt(learner: subprocess.Popen[str], end: str) -> int:
    """Ends a learner in a certain way and returns the process of its actor."""
    assert learner.stdout is not None
    assert learner.stdout.readline() == "starting\n"
    if end == "interrupt while starting":
        root, found = psutil.Process(learner.pid), list[int]()
        assert wait_until(
            lambda: bool(found.extend(p.pid for p in root.children(recursive=True) if _is_worker(p)) or found)
        )
        time.sleep(1.0)  # it imports
        worker = found[0]
    else:
        worker = int(learner.stdout.readline().split()[1])
    if end.startswith("interrupt"):
        os.killpg(learner.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        if end == "interrupt twice":  # it waits for an actor that hangs
            time.sleep(1.0)
            os.killpg(learner.pid, signal.SIGINT)
    elif end == "kill":
        learner.kill()
    return worker
