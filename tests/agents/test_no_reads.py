"""No update of any agent makes the host wait for what the device holds."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from offtrace.agents.agent import Agent, TrainingDivergedError
from offtrace.agents.callbacks import WeightSync
from offtrace.agents.data.acting import ActingData, Learner
from offtrace.agents.data.store import StoringData
from offtrace.modules import host
from tests.no_reads import HostRead, NoReads
from tests.recipes.recipes import parse

SMALL = ["--collector.num_workers=0", "--train.total_frames=96", "--collector.unroll=8", "--network.hidden=[8,8]"]
ROLLOUTS = [*SMALL, "--env.num_envs=4"]
DEALT = [*ROLLOUTS, "--train.minibatches=2"]
STORED = [*SMALL, "--env.num_envs=2", "--replay.capacity=400"]
REPLAYED = [*STORED, "--replay.batch_size=16", "--replay.min_size=24", "--replay.samples_per_insert=8"]
MIXED = [*STORED, "--replay.min_size=16"]
SHARED = ["--replay.share=0.5", "--replay.capacity=400", "--replay.min_size=32"]
CRITIC, PENDULUM, CARTPOLE = "--network.critic_hidden=[8,8]", "--env.task=Pendulum-v1", "--env.task=CartPole-v1"

FAMILIES = {
    "impala": ("impala_control", DEALT),
    "impala, LSTM": ("impala_control", [*DEALT, "--network.recurrent=8"]),
    "impala, continuous": ("impala_control", ["--preset=pendulum", *DEALT]),
    "laser": ("impala_control", ["--preset=laser", *DEALT, *SHARED]),
    "v-mpo": ("vmpo_control", [*DEALT, "--network.popart=false", "--network.normalize=false"]),
    "v-mpo, popart": ("vmpo_control", DEALT),
    "ppo": ("ppo", [*DEALT, "--train.epochs=4"]),
    "a2c": ("a2c", DEALT),
    "q-actor-critic": ("q_actor_critic", DEALT),
    "sac": ("sac_control", [PENDULUM, *REPLAYED, CRITIC]),
    "sac, discrete": ("sac_control", ["--preset=discrete", *REPLAYED, CRITIC]),
    "mpo": ("mpo_control", [PENDULUM, *REPLAYED, CRITIC]),
    "mpo, discrete": ("mpo_control", [CARTPOLE, *REPLAYED, CRITIC]),
    "dqn": ("dqn", REPLAYED),
    "dqn, prioritized": ("dqn", [*REPLAYED, "--replay.sampler=prioritized"]),
    "acer": ("acer_control", MIXED),
    "acer, continuous": ("acer_control", [PENDULUM, *MIXED, CRITIC]),
    "reactor": ("reactor_control", [*REPLAYED, "--replay.length=4", "--replay.sampler=uniform"]),
    "reactor, lazy": ("reactor_control", [*REPLAYED, "--replay.length=4", "--replay.sampler=lazy"]),
}  # fmt: skip


COMPARED = ("impala", "laser", "v-mpo, popart", "ppo", "sac", "dqn", "acer")


def train(
    recipe: str, argv: list[str], *callbacks: pl.Callback, accelerator: str = "cpu", capture: Any = "none"
) -> Agent:
    config = parse(recipe, *argv)
    config.validate()
    torch.manual_seed(0)
    agent, data = config.build()
    agent._capture = capture  # a configuration has it on a GPU alone
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WeightSync(1), *callbacks],
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that must not be asked."""
    monkeypatch.setattr(host, "readable", lambda tensor: False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, device: None) -> set[tuple[str, str]]:
    """What every update but the first of a run reads: that one may look at what a user gave."""
    found: set[tuple[str, str]] = set()
    update: Any = Agent._update

    def watched(agent: Agent, batch: Any) -> None:
        states = agent.optimizers().optimizer.state.values()
        if not states:
            return update(agent, batch)
        counts = [state["step"] for state in states if "step" in state]  # a GPU's Adam has them on the host
        with NoReads(*counts, found=found):
            return update(agent, batch)

    settle: Any = Agent.settle

    def on_host(agent: Agent) -> None:
        """With copies alone: ``test_priorities_come_one_update_later``."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            settle(agent)

    monkeypatch.setattr(Agent, "_update", watched)
    monkeypatch.setattr(Agent, "settle", on_host)
    return found


def marked(*families: str) -> list[Any]:
    """One of rollouts and one of a replay are for the fast tests."""
    return [pytest.param(x, marks=() if x in ("impala", "sac") else pytest.mark.slow) for x in families]


@pytest.mark.parametrize("family", marked(*FAMILIES))
def test_an_update_reads_nothing(family: str, reads: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """And that changes no number."""
    unread = train(*FAMILIES[family])
    assert unread.updates > 2
    assert unread._guard is not None
    assert reads == set()
    if family not in COMPARED:
        return
    monkeypatch.undo()
    read = train(*FAMILIES[family])
    assert read._guard is None
    # sequences of a replay on a device have room for a final observation, needed or not: other shapes, other kernels
    near = {"rtol": 1e-5, "atol": 1e-5} if family in ("laser", "acer") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(read.state_dict(), unread.state_dict(), **near)
    torch.testing.assert_close(read.pop_metrics(), unread.pop_metrics(), **near, equal_nan=True)


@pytest.mark.usefixtures("device")
def test_priorities_come_one_update_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As copies; those of the last update before the replay is saved; those of an undone update never."""
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    arrived: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    update: Any = Agent._update
    feedback: Any = StoringData.feedback

    def watched(agent: Agent, batch: Any) -> None:
        if agent.updates == 9:
            batch["next", "reward"][:] = torch.nan
        update(agent, batch)
        written.append((batch["index"].clone(), batch["td_error"].clone()))
        batch["index"].zero_()  # as the next replay of a graph does
        batch["td_error"].zero_()

    def noted(data: StoringData, batch: Any) -> None:
        arrived.append((len(written), batch["index"], batch["td_error"]))
        feedback(data, batch)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
            if len(written) == 6:
                agent.settle()

    monkeypatch.setattr(Agent, "_update", watched)
    monkeypatch.setattr(StoringData, "feedback", noted)
    recipe, argv = FAMILIES["dqn, prioritized"]
    with pytest.raises(TrainingDivergedError, match="at update 9"):
        train(recipe, [*argv, "--train.updates_per_step=1"], Save())
    assert [when for when, _, _ in arrived] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for (index, priority), (_, told, value) in zip(written, arrived, strict=False):
        assert torch.equal(index, told)
        assert torch.equal(priority, value)


@pytest.mark.cuda
def test_copies_are_what_was_there_when_they_were_asked_for() -> None:
    """Behind much work, and before the memory is written again."""
    x = torch.randn(2000, 2000, device="cuda")
    for _ in range(50):
        x = x @ x / 2000**0.5
    expected = x.clone()
    with NoReads():
        copies = host.Copies(x[0], x[1:2])
        x.zero_()
    first, second = copies.read()
    assert first.is_pinned()
    assert torch.equal(first, expected[0].cpu())
    assert torch.equal(second, expected[1:2].cpu())


def everything(agent: Agent) -> dict[str, Any]:
    """Weights, targets and the optimiser's state, copied."""
    return copy.deepcopy({"weights": agent.state_dict(), "optimizer": agent.optimizers().optimizer.state_dict()})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("impala", Agent.on_train_end),
        ("sac", Agent.pop_metrics),
        pytest.param("v-mpo, popart", lambda agent: agent.on_save_checkpoint({}), marks=pytest.mark.slow),
        pytest.param("mpo", Agent.pop_metrics, marks=pytest.mark.slow),
        pytest.param("acer", Agent.on_train_end, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_moves_nothing(family: str, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes with the next log line or checkpoint, or at the end."""
    update: Any = Agent._update
    kept: list[Any] = []

    def poisoned(agent: Agent, batch: Any) -> None:
        if agent.updates == 3:
            kept.extend((agent, everything(agent)))
            batch["next", "reward"][0, ...] = torch.inf
        update(agent, batch)
        if agent.updates == 5 and told is not Agent.on_train_end:
            told(agent)

    monkeypatch.setattr(Agent, "_update", poisoned)
    with pytest.raises(TrainingDivergedError, match=r"norm was (nan|inf) at update 3, \d+ updates before"):
        train(*FAMILIES[family])
    agent, before = kept
    assert agent.updates == 3
    agent.check_guard()  # tells once
    after = everything(agent)
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name]), name
    for number, state in before["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["optimizer"]["state"][number][name]), (number, name)


@pytest.mark.parametrize("family", ["impala, continuous", "laser", "acer"])
def test_the_host_knows_of_a_batch_what_it_needs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the device "meta" holds nothing: whoever asks it fails."""
    monkeypatch.setattr(ActingData, "learner", Learner(0, 1, torch.device("meta")))
    recipe, argv = FAMILIES[family]
    agent, data = parse(recipe, *argv).build()
    sync, trainer = WeightSync(1), SimpleNamespace(datamodule=data)
    batches = 0
    try:
        stream = data.train_dataloader()
        sync.setup(trainer, agent, "fit")
        sync.on_train_start(trainer, agent)
        for batch in stream:
            assert {tensor.device.type for tensor in batch.values(True, True)} == {"meta"}
            assert batch["finals"].shape == (*batch.shape, batch["finals"].shape[2], 0)
            sync.on_train_batch_start(trainer, agent, batch, 0)
            assert sync.lag_max == 0
            batches += 1
    finally:
        data.shutdown()
    assert batches > 5


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x.tolist(), lambda x: x.cpu(), lambda x: torch.equal(x, x), lambda x: x.unique(),
        lambda x: x.masked_select(x > 0), lambda x: x.masked_fill_(x > 0, torch.tensor(1.0)),
        lambda x: x.__setitem__(x > 0, x[:1]), lambda x: float(x[0]), lambda x: x.detach().numpy(),
    ],
)  # fmt: skip
def test_the_mode_finds_reads(read: Any) -> None:
    x = torch.tensor([-1.0, 2.0])
    with pytest.raises(HostRead), NoReads():
        read(x)
    with NoReads(x[0]):
        torch.where(x > 0, x, 0).sum()
