"""No update of any agent makes the host wait for what the device holds."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from offtrace.agents.agent import Agent
from offtrace.agents.callbacks import WeightSync
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
    "v-mpo": ("vmpo_control", DEALT),
    "v-mpo, popart": ("vmpo_control", [*DEALT, "--network.popart=true"]),
    "ppo": ("ppo", DEALT),
    "a2c": ("a2c", DEALT),
    "q-actor-critic": ("q_actor_critic", DEALT),
    "sac": ("sac_control", [PENDULUM, *REPLAYED, CRITIC]),
    "sac, discrete": ("sac_control", ["--preset=discrete", *REPLAYED, CRITIC]),
    "mpo": ("mpo_control", [PENDULUM, *REPLAYED, CRITIC]),
    "mpo, discrete": ("mpo_control", [CARTPOLE, *REPLAYED, CRITIC]),
    "dqn": ("dqn", REPLAYED),
    "acer": ("acer_control", MIXED),
    "acer, continuous": ("acer_control", [PENDULUM, *MIXED, CRITIC]),
    "reactor": ("reactor_control", [*REPLAYED, "--replay.length=4", "--replay.sampler=uniform"]),
}  # fmt: skip

KNOWN = {
    ("_local_scalar_dense", "agents/agent.py"),
    ("_local_scalar_dense", "modules/losses/unroll.py"),
    ("_local_scalar_dense", "modules/losses/vmpo.py"),
    ("_local_scalar_dense", "modules/networks/core.py"),
    ("_local_scalar_dense", "modules/returns/distributional.py"),
    ("lift_fresh", "modules/returns/diagnostics.py"),
    ("lift_fresh", "modules/returns/distributional.py"),
}
"""What they still read."""


def train(recipe: str, argv: list[str], *callbacks: pl.Callback) -> Agent:
    config = parse(recipe, *argv)
    config.validate()
    torch.manual_seed(0)
    agent, data = config.build()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WeightSync(1), *callbacks],
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
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

    monkeypatch.setattr(Agent, "_update", watched)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_reads_nothing(family: str, reads: set[tuple[str, str]]) -> None:
    agent = train(*FAMILIES[family])
    assert agent.updates > 2
    assert reads <= KNOWN


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
