"""Compiled and captured updates: one graph for all batches of a kind, and the numbers of eager ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD

from offtrace.agents import agent as agents
from offtrace.agents.agent import Agent
from offtrace.agents.capture import WARM_UP, CapturedUpdate, NotCapturableError, make_capturable
from offtrace.agents.config import ConfigError
from offtrace.modules import host
from tests.agents.test_no_reads import FAMILIES, everything, marked, train
from tests.no_reads import NoReads
from tests.recipes.recipes import parse


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts what the losses of a run were compiled to; nothing but tracing is done."""
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(agents, "compile_loss", lambda loss: torch.compile(loss, backend=counter, fullgraph=True))
    return counter


KINDS = {
    "impala, continuous": 1, "impala, LSTM": 1, "laser": 2, "v-mpo, popart": 1, "ppo": 1, "q-actor-critic": 1, "mpo": 1,
    "dqn": 1, "acer": 2, "reactor": 1,
}  # fmt: skip
"""Of batches: fresh rows alone, and with replayed ones or replayed alone. SAC's are counted in test_replayed."""


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_all_batches_of_a_kind_are_one_graph(
    family: str, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, argv = FAMILIES[family]
    truncates = family == "impala, continuous"  # episodes of 200 steps, which seven does not divide
    argv = [*argv, "--collector.unroll=7", "--train.total_frames=840", "--train.epochs=1"] if truncates else argv
    rooms: set[int] = set()
    update: Any = Agent._update

    def watched(agent: Agent, batch: Any) -> None:
        if truncates:
            rooms.add(batch["finals"].shape[2])
        update(agent, batch)

    monkeypatch.setattr(Agent, "_update", watched)
    compiled = train(recipe, [*argv, "--train.compile=true"])
    assert counter.frame_count == KINDS[family]
    assert compiled.eager_updates == 0
    assert compiled.updates > 2
    if truncates:
        assert rooms == {0, 1}
        torch.testing.assert_close(compiled.state_dict(), train(recipe, argv).state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("capture", ["none", pytest.param("update", marks=pytest.mark.slow)])
def test_a_batch_that_needs_more_room_runs_eagerly_and_is_counted(
    capture: str, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
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
    agent = train(recipe, [*argv, "--train.compile=true"], capture=capture)
    assert agent.eager_updates == 1
    assert counter.frame_count == 1
    assert agent.updates > 3
    assert torch.isfinite(torch.tensor(agent.pop_metrics()["loss_value"]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that must not be asked."""
    monkeypatch.setattr(host, "readable", lambda tensor: False)


def check_near(captured: Agent, eager: Agent, **near: float) -> None:
    assert captured.updates == eager.updates >= 20
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), **near)
    # a ratio next to a clip may be counted or not
    found, wanted = ({k: v for k, v in x.pop_metrics().items() if "clipped" not in k} for x in (captured, eager))
    torch.testing.assert_close(found, wanted, **near, equal_nan=True)


MORE = {"laser": "--train.total_frames=400", "a2c": "--train.total_frames=800"}
"""Enough for 20 updates."""


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "family", marked("impala", "impala, LSTM", "laser", "v-mpo, popart", "ppo", "sac", "mpo", "dqn", "acer", "reactor")
)
def test_the_form_that_is_captured_has_the_numbers_of_the_eager_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function on the same memory, without the graph; it reads nothing."""
    recipe, argv = FAMILIES[family]
    argv = [*argv, MORE[family]] if family in MORE else argv
    eager = train(recipe, argv)
    found: set[tuple[str, str]] = set()
    update: Any = Agent._update

    def watched(agent: Agent, batch: Any) -> None:
        if agent._captured is None:
            return update(agent, batch)
        with NoReads(found=found):  # Adam's counts too are on the device
            return update(agent, batch)

    monkeypatch.setattr(Agent, "_update", watched)
    captured = train(recipe, argv, capture="update")
    assert captured._captured is not None
    assert captured.eager_updates == 0
    assert found == set()
    assert all(isinstance(group["lr"], torch.Tensor) for group in captured.optimizers().param_groups)
    # SAC's Adam is fused in both; elsewhere a fused Adam and the room for a final observation are other kernels
    exact = family == "sac"
    check_near(captured, eager, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("capture", ["update", "try"])
def test_an_update_that_waits_is_told_and_taken_back(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    update: Any = Agent._update

    def waits(agent: Agent, batch: Any) -> None:
        if agent.updates == 2:
            kept.extend((agent, everything(agent)))
            calls = iter("w")

            def after(updates: int) -> None:
                if next(calls, None):
                    raise RuntimeError("called a synchronizing CUDA operation")

            agent._after_update = after
        update(agent, batch)

    monkeypatch.setattr(Agent, "_update", waits)
    words = (
        r"the update of ImpalaLoss (cannot be captured|runs eagerly), because the host waits .* at .*test_compiled.py"
    )
    if capture == "update":
        with pytest.raises(NotCapturableError, match=words):
            train(*FAMILIES["impala"], capture=capture)
        torch.testing.assert_close(everything(kept[0]), kept[1], rtol=0, atol=0)
        return
    with pytest.warns(RuntimeWarning, match=words):
        agent = train(*FAMILIES["impala"], capture=capture)
    assert agent.updates == 24
    assert agent._captured is not None
    assert agent._captured.refused


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Streams and graphs that note what is done, and do nothing; where the code runs, and how, is in the list."""
    state: list[str] = []

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        state.append(name)
        yield
        state.remove(name)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("side stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: within("captured"))
    monkeypatch.setattr("offtrace.agents.capture._waiting_refused", lambda: within("strict"))
    return state


def test_a_kind_of_batch_is_warmed_up_and_then_captured_once(cuda: list[str]) -> None:
    ran: list[list[str]] = []

    def update(batch: TensorDictBase) -> tuple[TensorDictBase, torch.Tensor]:
        ran.append(list(cuda))
        if cuda == ["captured"] and batch["x"].dtype == torch.int64:
            raise RuntimeError("operation not permitted when stream is capturing")
        batch["priority"] = 2 * batch["x"]
        return TensorDict({"loss_q": batch["x"].sum()}), batch["x"].sum()

    undone: list[bool] = []
    captured = CapturedUpdate(update, lambda: undone.append(True), name="Loss")
    kind = [["side stream"], ["side stream", "strict"], ["side stream", "strict"], ["captured"]]
    for shape, due in ((2, True), (3, True), (3, False)):
        ran.clear()
        for call in range(6):
            batch = TensorDict({"x": torch.full((shape,), float(call))}, [shape])
            captured(batch, due)
            assert batch["priority"].tolist() == [2.0 * min(call, WARM_UP)] * shape
        assert ran == kind
    assert captured.replays == 9
    whole = TensorDict({"x": torch.ones(2, dtype=torch.int64)}, [2])
    for _ in range(WARM_UP):
        captured(whole.clone(), True)
    with pytest.raises(
        NotCapturableError, match=r"of Loss cannot be captured \(operation not permitted .*must be none"
    ):
        captured(whole, True)
    assert not undone


def test_what_cannot_be_captured_is_refused() -> None:
    with pytest.raises(
        NotCapturableError, match="SGD has no form that can be captured: use Adam, RMSprop or RMSpropTF"
    ):
        make_capturable(SGD([torch.nn.Parameter(torch.ones(1))]))
    recipe, argv = FAMILIES["impala"]
    for flag, words in {
        "--train.devices=2": "train.capture is update, which is for one learner, and train.devices is 2",
        "--train.accelerator=cpu": "train.capture is update, which needs a GPU; with train.accelerator cpu",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse(recipe, *argv, "--train.capture=update", flag).validate()


def test_an_agent_that_cannot_capture_says_so() -> None:
    with pytest.raises(NotCapturableError, match="capture is 'try', which needs one learner, on a GPU"):
        train(*FAMILIES["impala"], capture="try")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_told() -> None:
    with pytest.raises(ConfigError, match=r"train.capture is update, which needs a GPU, and torch finds none here"):
        parse(FAMILIES["impala"][0], *FAMILIES["impala"][1], "--train.capture=update").build()


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_has_the_numbers_of_the_updates_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same function on the same memory, without the graph."""
    recipe, argv = FAMILIES[family]
    argv = [*argv, MORE[family]] if family in MORE else argv
    graph = train(recipe, argv, accelerator="gpu", capture="update")
    assert graph._captured is not None
    kinds = len(graph._captured._recordings)
    # the first update makes the optimiser's state
    assert graph._captured.replays >= graph.updates - 1 - WARM_UP * kinds > 0
    monkeypatch.setattr("offtrace.agents.capture.WARM_UP", 10**9)
    one_by_one = train(recipe, argv, accelerator="gpu", capture="update")
    assert one_by_one._captured is not None
    assert one_by_one._captured.replays == 0
    check_near(graph, one_by_one, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
def test_on_a_gpu_an_update_that_waits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = Agent.check_finite
    monkeypatch.setattr(Agent, "check_finite", lambda agent, norm: (norm.item(), step(agent, norm)))
    with pytest.raises(NotCapturableError, match=r"the host waits for the device at .*test_compiled.py"):
        train(*FAMILIES["impala"], accelerator="gpu", capture="update")
