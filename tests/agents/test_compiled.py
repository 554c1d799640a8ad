"""Compiled and captured updates: one graph for all batches of a kind, and the numbers of eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from offtrace.agents import agent as agents
from offtrace.agents.agent import Agent
from tests.agents.test_no_reads import FAMILIES, train


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts what the losses of a run were compiled to; nothing but tracing is done."""
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(agents, "compile_loss", lambda loss: torch.compile(loss, backend=counter, fullgraph=True))
    return counter


LONG = "--train.total_frames=1600"
KINDS = {
    "impala, continuous": 1,
    "sac": 1,
    "laser": 2,
    "acer": 2,
    "reactor": 1,
    "v-mpo": 1,
    "ppo": 1,
    "impala, LSTM": 1,
}
"""Of batches: fresh rows alone, and with replayed ones or replayed alone."""


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_all_batches_of_a_kind_are_one_graph(family: str, counter: CompileCounter) -> None:
    recipe, argv = FAMILIES[family]
    more = [LONG] if family == "impala, continuous" else []  # episodes of 200 steps are cut off inside of some unrolls
    eager = train(recipe, [*argv, *more])
    compiled = train(recipe, [*argv, *more, "--train.compile=true"])
    assert counter.frame_count == KINDS[family]
    assert compiled.eager_updates == 0
    assert compiled.updates == eager.updates > 2
    if family != "sac":  # where Adam makes whole steps of gradients that are rounding alone
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-4)


def test_a_batch_that_needs_more_room_runs_eagerly_and_is_counted(
    counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    update: Any = Agent._update

    def twice(agent: Agent, batch: Any) -> None:
        if agent.updates == 2:
            batch = batch.clone()
            batch["next", "done"][0] = False
            batch["next", "terminated"][0] = False
            batch["next", "done"][0, [1, 3]] = True
            batch["finals"] = torch.empty(*batch.shape, 2, 0)
        update(agent, batch)

    monkeypatch.setattr(Agent, "_update", twice)
    recipe, argv = FAMILIES["impala"]
    agent = train(recipe, [*argv, "--train.compile=true"])
    assert agent.eager_updates == 1
    assert counter.frame_count == 1
    assert agent.updates > 3
    assert torch.isfinite(torch.tensor(agent.pop_metrics()["loss_value"]))
