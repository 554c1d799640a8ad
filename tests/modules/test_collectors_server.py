"""The inference server: what is one batch, and that acting through it is acting."""

from __future__ import annotations

import multiprocessing
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from offtrace.modules.collectors import make_collector
from offtrace.modules.collectors.server import RemotePolicy, Request, Server, ServerOptions, adopt
from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import make_env
from offtrace.modules.networks import build_policy
from tests.modules.test_collectors import WeightPolicy

ROWS = 3


class Echo(WeightPolicy):
    """Gives back what it reads."""

    out_keys: list[str] = ["seen"]  # noqa: RUF012

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("seen", tensordict["observation"].clone())


def served(requests: int, options: ServerOptions, actors: int = 4) -> tuple[Server, list[Any]]:
    """A server of ``actors`` of which the first ``requests`` have asked, each with its number as observation."""
    policy = WeightPolicy()
    pipes = [multiprocessing.Pipe() for _ in range(actors)]
    ours, theirs = multiprocessing.Pipe()
    server = Server(policy, SharedWeights(policy, actors + 1), theirs, options)
    for _, end in pipes:
        adopt(ours, end)
    server.learner_end = ours  # type: ignore[attr-defined]  # kept open
    server._adopt()
    for number in range(requests):
        _ask(pipes[number][0], number)
    return server, pipes


def _ask(pipe: Any, number: int) -> None:
    """The first half of what an actor does."""
    remote = RemotePolicy(pipe, ["observation"])
    block = remote._mailbox.put({"observation": torch.full((ROWS, 2), float(number))})
    pipe.send(Request(remote._mailbox.layout))
    assert block is not None
    block.send(pipe)


@pytest.mark.parametrize(
    ("asked", "batch", "sizes"),
    [(4, 0, [4]), (4, 2 * ROWS, [2, 2]), (3, 2 * ROWS, [2, 1]), (3, ROWS - 1, [1, 1, 1]), (4, 2 * ROWS + 1, [2, 2])],
)
def test_what_has_arrived_is_a_batch_up_to_its_size(asked: int, batch: int, sizes: list[int]) -> None:
    server, _ = served(asked, ServerOptions(batch, wait=0.01))
    found, pending = [], []  # type: ignore[var-annotated]
    while sum(found) < asked:
        ready, pending = server._cut(server._gather(pending))
        found.append(len(ready))
        server._answer(ready)
    assert found == sizes


def test_a_batch_waits_for_the_others_so_long_and_no_longer() -> None:
    server, _ = served(1, ServerOptions(wait=0.3))
    start = time.monotonic()
    assert len(server._gather([])) == 1
    assert 0.3 <= time.monotonic() - start < 5.0
    server, _ = served(4, ServerOptions(wait=1000.0))
    assert len(server._gather([])) == 4, "when all have asked there is nobody to wait for"


def test_an_actor_that_is_gone_is_forgotten() -> None:
    server, pipes = served(2, ServerOptions(wait=0.01))
    pipes[3][0].close()
    assert len(server._gather([])) == 2
    assert len(server._clients) == 3


def test_each_actor_gets_the_answer_to_what_it_asked() -> None:
    server, pipes = served(0, ServerOptions(wait=0.05))
    server._policy = Echo()
    server._shared.publish({"weight": torch.tensor(7.0)})
    found: dict[int, list[Any]] = {number: [] for number in range(4)}

    def act(number: int) -> None:
        remote = RemotePolicy(pipes[number][0], ["observation", "missing"])
        for step in range(5):
            td = TensorDict({"observation": torch.full((ROWS, 2), 10.0 * number + step)}, [ROWS])
            found[number].append((remote(td), td["seen"]))
        pipes[number][0].close()

    threads = [threading.Thread(target=act, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    serving = threading.Thread(target=server.serve)
    serving.start()
    for thread in threads:
        thread.join()
    server._shared.stop()
    serving.join()
    for number, answers in found.items():
        assert [version for version, _ in answers] == [1] * 5
        for step, (_, seen) in enumerate(answers):
            assert torch.equal(seen, torch.full((ROWS, 2), 10.0 * number + step)), "an answer is kept, or another's"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recurrent": 8}])
def test_log_probabilities_are_those_of_the_policy(options: dict[str, Any]) -> None:
    """With fixed weights: of every action that was taken, whoever computed it, and the recurrent state goes along."""
    torch.manual_seed(1)
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2, **options)
    env = partial(make_env, "CartPole-v1", ROWS, last_step=bool(options))
    for way in ({}, {"server": ServerOptions(batch=ROWS)}, {"server": ServerOptions(wait=0.05)}):
        with make_collector(env, policy, frames_per_batch=ROWS * 30, num_workers=2, **way) as collector:  # type: ignore[arg-type]
            for _ in range(4):
                rollout = next(collector)
                with torch.no_grad():
                    again = policy.get_dist(rollout.select(*policy.in_keys).flatten())
                found = again.log_prob(rollout["action"].flatten())
                torch.testing.assert_close(rollout["action_log_prob"].flatten(), found, rtol=0, atol=1e-6)
                if options:
                    state, after = rollout["recurrent_h"], rollout["next", "recurrent_h"]
                    going_on = ~rollout["next", "done"][:, :-1]
                    torch.testing.assert_close(state[:, 1:] * going_on, after[:, :-1] * going_on)
                    assert bool((after != 0).any())
