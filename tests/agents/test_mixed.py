"""MixedData: what is fresh and replayed in each batch, counted apart, resumed exactly, the same on all ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from offtrace.agents.agent import Agent
from offtrace.agents.callbacks import Checkpoints, WeightSync
from offtrace.agents.data import Learner, MixedData, ReplayData
from offtrace.agents.optim import make_optimizer
from offtrace.modules.collectors import PackedRollout, make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.losses import ImpalaLoss
from offtrace.modules.networks import build_policy
from offtrace.modules.replay import Prioritized, Replay
from tests.agents.renewal import NewEnvironments

ENVS, STEPS = 4, 6
ROLLOUT = ENVS * STEPS


class Collector:
    """Numbers every step of the run in "observation"; episodes end nowhere, or where it is said."""

    num_envs, frames_per_batch, restarts = ENVS, ROLLOUT, 0

    def __init__(self, rank: int = 0, frames: int = 0, *, end: int | None = None, valid: bool = False) -> None:
        self.taken, self.version, self.end, self.valid = frames // ROLLOUT, 0, end, valid
        self.order: Any = None
        self.pin_memory = False

    def __next__(self) -> TensorDictBase:
        assert self.order is None, "a replay needs environments in their own order"
        step = torch.arange(STEPS).expand(ENVS, STEPS) + self.taken * STEPS
        number = (step + 1000 * torch.arange(ENVS)[:, None]).float()[..., None]
        done = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
        if self.end is not None:
            done[:, self.end] = True
        version = torch.full((ENVS, STEPS), self.taken)
        self.taken += 1
        rollout = TensorDict(
            {
                "observation": number,
                "action": torch.zeros(ENVS, STEPS, dtype=torch.long),
                "action_log_prob": torch.zeros(ENVS, STEPS),
                "policy_version": version,
                "worker": torch.zeros(ENVS, STEPS, dtype=torch.long),
                "next": {
                    "observation": number + 1,
                    "reward": number,
                    "terminated": done.clone(),
                    "truncated": torch.zeros_like(done),
                    "done": done,
                    "policy_version": version,
                    "episode_end": done,
                    "episode_reward": number,
                },
            },
            [ENVS, STEPS],
        )
        if self.valid:
            rollout["valid"] = torch.ones(ENVS, STEPS, 1, dtype=torch.bool)
            rollout["valid"][:, 0] = False
        return rollout

    def take(self) -> PackedRollout:
        rollout = next(self)
        return PackedRollout(dict(rollout.items(True, True)), rollout.shape, 1)

    def shutdown(self) -> None:
        """Nothing to end."""


def replay(learner: Learner, path: Path | None, **options: Any) -> Replay:
    options = {"capacity": 1000, "num_envs": ENVS, "batch_size": 2, "length": STEPS, "pad": True, **options}
    options.setdefault("overlap", not options["pad"])
    return Replay(seed=3 + learner.rank, **options)


def mixed(rollouts: int = 6, collector: Callable[..., Any] = Collector, **options: Any) -> MixedData:
    options = {"min_size": 2 * ROLLOUT, "minibatches": 2, **options}
    replay_fn = options.pop("replay_fn", replay)
    return MixedData(collector, replay_fn, total_frames=rollouts * ROLLOUT, **options)


def everything(data: MixedData) -> list[TensorDictBase]:
    return [batch for batch in data.train_dataloader()]  # noqa: C416 - list() would make room for an endless stream


def numbers(rows: TensorDictBase) -> list[int]:
    return rows["observation"].flatten().int().tolist()


def test_of_every_batch_a_share_is_replayed() -> None:
    data = mixed(share=0.5, epochs=2)
    stream = data.train_dataloader()
    found = list(stream)
    per_rollout = 2 * 2
    assert len(found) == len(stream) == 6 * per_rollout
    for place, batch in enumerate(found):
        rollout = place // per_rollout
        if rollout < 2:
            assert batch.shape == (2, STEPS)
            continue
        assert batch.shape == (4, STEPS)
        fresh, old = batch[:2], batch[2:]
        assert all(number % 1000 // STEPS == rollout for number in numbers(fresh))
        assert batch["valid"].all()
        assert (fresh["index"] == -1).all()
        assert (old["index"] >= 0).all()
        assert all(number % 1000 < rollout * STEPS for number in numbers(old)), "from what was inserted before"
        assert (old["observation"].diff(dim=1) == 1).all(), "sequences in order"
        assert torch.equal(old["next", "observation"], old["observation"] + 1)
        assert torch.equal(old["policy_version"], (old["observation"].squeeze(-1) % 1000 // STEPS).long())
    for rollout in range(6):  # each fresh row once in each of two epochs
        batches = [batch[:2] for batch in found[rollout * per_rollout : (rollout + 1) * per_rollout]]
        for epoch in (batches[:2], batches[2:]):
            rows = sorted(int(number) // 1000 for batch in epoch for number in batch["observation"][:, 0, 0])
            assert rows == [0, 1, 2, 3]
    assert data.frames == 6 * ROLLOUT
    assert data.replayed_frames == 4 * per_rollout * 2 * STEPS
    assert data.metrics["replay/steps"] == 6.0 * ROLLOUT
    assert data.metrics["replay/replayed_frames"] == float(data.replayed_frames)


def test_padding_and_failed_steps_are_told_and_entries_are_those_of_both() -> None:
    data = mixed(share=0.5, collector=partial(Collector, end=2, valid=True))
    *_, batch = data.train_dataloader()
    assert ("next", "policy_version") not in batch.keys(True)
    assert "worker" not in batch
    fresh, old = batch[:2], batch[2:]
    assert torch.equal(fresh["valid"][..., 0], torch.tensor([False] + [True] * 5).expand(2, STEPS))
    lengths = old["valid"].sum(1).flatten()
    assert ((lengths >= 1) & (lengths <= STEPS)).all()
    assert not old["valid"].all(), "episodes are shorter than sequences"


def test_the_age_of_what_is_replayed_is_told() -> None:
    """Versions between the newest weights and those that acted, over the steps that are no padding."""
    data = mixed(share=0.5, collector=partial(Collector, end=2))
    data._version = 9  # of a run that went before
    assert data.metrics == {"replay/steps": 0.0, "replay/replayed_frames": 0.0}
    seen = 0
    for batch in data.train_dataloader():
        assert data.collector is not None
        if "index" not in batch:
            assert "replay/age" not in data.metrics
            continue
        old = batch[2:]
        ages = data.collector.version - old["policy_version"][old["valid"].squeeze(-1)]
        assert data.metrics["replay/age"] == pytest.approx(float(ages.double().mean()))
        assert data.metrics["replay/age_max"] == ages.max() > 0
        assert "replay/priority_ess" not in data.metrics
        data.collector.version += 3
        seen += 1
    assert seen == 4 * 2


def test_how_unequal_priorities_are_is_told() -> None:
    """The effective sample size of the importance weights, (sum w)^2 / (n sum w^2), one a row."""
    data = mixed(share=0.5, replay_fn=partial(replay, sampler=Prioritized(alpha=1.0, beta=0.7, epsilon=0.0)))
    sizes = []
    for batch in data.train_dataloader():
        if "weight" in batch:
            weight = batch["weight"][2:, 0].double()
            sizes.append(data.metrics["replay/priority_ess"])
            assert sizes[-1] == pytest.approx(float(weight.sum() ** 2 / (2 * weight.square().sum())), abs=1e-6)
            batch["td_error"] = 1.0 + 9.0 * torch.rand(4, 1).expand(4, STEPS)
            data.feedback(batch)
    assert sizes[0] == pytest.approx(1)
    assert min(sizes) < 0.99


@pytest.mark.parametrize(("share", "rows"), [(0.2, 1), (1 / 3, 2), (0.333, 2), (0.5, 4), (0.75, 12)])
def test_a_share_is_a_whole_number_of_rows(share: float, rows: int) -> None:
    assert mixed(share=share).replayed_rows(4) == rows


@pytest.mark.parametrize(
    ("form", "later"), [({"ratio": 4.0}, "4 batches for each fresh one are"), ({"share": 0.5}, "50% of a batch is")]
)
def test_it_says_when_the_replay_joins(form: dict[str, float], later: str) -> None:
    """Frames then come several times as slowly, which looked like a fault."""
    data = mixed(min_size=2 * ROLLOUT, **form)
    opening = f"learning from {2 * ROLLOUT} fresh steps alone; then {later} replayed, and frames come more slowly"
    assert data.opening == opening
    everything(data)
    assert data.opening == ""


def replayed_behind(data: MixedData) -> list[int]:
    """How many replayed batches follow each fresh one."""
    counts: list[int] = []
    for batch in data.train_dataloader():
        assert batch.shape == (2, STEPS)
        if "index" in batch:
            counts[-1] += 1
        else:
            counts.append(0)
    return counts


def test_whole_batches_are_replayed_poisson_many() -> None:
    """Mean and variance are both the ratio, within four standard errors."""
    ratio, data = 1.5, mixed(200, ratio=1.5, frame_skip=2)
    data.total_frames *= 2
    counts = replayed_behind(data)
    assert data.frames == 200 * ROLLOUT * 2
    assert data.replayed_frames == sum(counts) * 2 * STEPS * 2
    assert len(counts) == 200 * 2
    assert counts[:3] == [0, 0, 0], "the second rollout fills the replay with its last batch"
    drawn = np.array(counts[3:])
    assert abs(drawn.mean() - ratio) < 4 * math.sqrt(ratio / len(drawn))
    assert abs(drawn.var() - ratio) < 4 * math.sqrt((ratio + 2 * ratio**2) / len(drawn))


def test_how_many_are_replayed_follows_from_the_seed() -> None:
    same, again, other = (replayed_behind(mixed(20, ratio=1.5, seed=seed)) for seed in (1, 1, 2))
    assert same == again
    assert same != other


def test_every_rank_has_the_same_number_of_batches_and_other_rows() -> None:
    found = []
    for rank in (0, 1):
        data = mixed(8, ratio=2.0)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        found.append(everything(data))
        assert data.frames == 8 * ROLLOUT
    assert len(found[0]) == len(found[1])
    assert ["index" in batch for batch in found[0]] == ["index" in batch for batch in found[1]]
    assert any(not torch.equal(a["observation"], b["observation"]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", [{"share": 0.5}, {"ratio": 2.0}])
def test_a_stream_goes_on_as_it_would_have(form: dict[str, float], tmp_path: Path) -> None:
    """Stopped where replayed batches are owed, where there are any."""
    whole = everything(mixed(8, **form))
    first = mixed(8, **form)
    first.folder = tmp_path
    found = []
    for batch in first.train_dataloader():
        found.append(batch)
        if first.rollouts == 4 and (first.owed or "share" in form):
            break
    first.saved = first.save(0)
    state = first.state_dict()
    first.shutdown()
    second = mixed(8, **form)
    second.folder = tmp_path
    second.load_state_dict(state)
    found += everything(second)
    assert second.frames == 8 * ROLLOUT
    assert len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert (one == other).all()


def test_a_lost_replay_is_filled_again(tmp_path: Path) -> None:
    first = mixed(8, ratio=2.0)
    first.folder = tmp_path / "replay"
    for _ in first.train_dataloader():
        if first.rollouts == 4 and first.owed:
            break
    first.saved = first.save(0)
    second = mixed(8, ratio=2.0)
    second.folder = tmp_path / "elsewhere"
    second.load_state_dict(first.state_dict())
    with pytest.warns(RuntimeWarning, match="elsewhere is gone: the run goes on with an empty replay"):
        stream = second.train_dataloader()
    kinds = ["index" in batch for batch in stream]
    assert kinds[:3] == [False] * 3
    assert any(kinds)


def test_priorities_of_replayed_rows_come_back_and_beta_grows() -> None:
    data = mixed(share=0.5, replay_fn=partial(replay, sampler=Prioritized(alpha=1.0, beta=0.4, epsilon=0.0)))
    given, seen = [], []
    for batch in data.train_dataloader():
        if "index" not in batch:
            data.feedback(batch)  # all of it is fresh
            continue
        assert data.replay is not None
        assert (batch["weight"][:2] == 1).all()
        update = data.replay.update_priorities
        data.replay.update_priorities = lambda index, priority: given.append((index, priority))  # type: ignore[assignment, method-assign, return-value]
        batch["td_error"] = torch.arange(4.0)[:, None].expand(4, STEPS)
        data.feedback(batch)
        data.replay.update_priorities = update  # type: ignore[method-assign]
        seen.append(data.replay.sampler.beta)  # type: ignore[attr-defined]
        index, priority = given.pop()
        assert torch.equal(index, batch["index"][2:])
        assert priority[:, 0].tolist() == [2.0, 3.0]
        update(index, priority)
        if data.rollouts == 6:
            break
    assert seen == pytest.approx([0.4 + 0.6 * done / 6 for done in (2, 2, 3, 3, 4, 4, 5, 5)])
    with pytest.raises(ValueError, match="the loss wrote no 'td_error' into the batch"):
        data.feedback(TensorDict({"index": torch.zeros(2)}, [2]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "share is None and ratio is None; exactly one of them must be given"),
        ({"share": 0.5, "ratio": 1.0}, "share is 0.5 and ratio is 1.0; exactly one"),
        ({"share": 1.0}, "share is 1.0; it must be above 0 and below 1"),
        ({"ratio": 0.0}, "ratio is 0.0; it must be above 0 and finite"),
        ({"share": 0.5, "min_size": -1}, "min_size is -1; it must be at least 0"),
        ({"share": 0.5, "minibatches": 3}, "minibatches is 3; it must divide the 4 environments"),
        ({"share": 0.4, "minibatches": 4}, "share is 0.4; a batch of 1 fresh rows would have 0.67 .* share .* is 0.5"),
        ({"share": 0.5, "min_size": 2000}, "min_size is 2000, but the replay holds 1000 steps"),
        (
            {"share": 0.5, "replay_fn": partial(replay, length=3)},
            "sequences of 3 steps, padded, without overlap; of rollouts of 6 steps",
        ),
        ({"share": 0.5, "replay_fn": partial(replay, pad=False)}, "sequences of 6 steps, not padded"),
        ({"share": 0.5, "replay_fn": partial(replay, overlap=True)}, "sequences of 6 steps, padded, with overlap"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixed(**options).train_dataloader()


def test_what_is_replayed_goes_through_the_hook_first() -> None:
    """On its way to the batch; the steps in front go away there, and are not counted."""
    seen = []

    def cut(batch: TensorDictBase) -> TensorDictBase:
        assert batch.shape == (2, 3 + STEPS)
        assert batch["valid"][:, 3:].any(1).all()
        seen.append(batch)
        return batch[:, 3:].clone()

    for form in ({"share": 0.5}, {"ratio": 2.0}):
        seen.clear()
        data = mixed(replay_fn=partial(replay, burn_in=3), on_replayed=cut, **form)
        old = [batch[-2:] for batch in data.train_dataloader() if "index" in batch]
        assert len(old) == len(seen) > 0
        for batch, whole in zip(old, seen, strict=True):
            assert torch.equal(batch["observation"], whole["observation"][:, 3:])
        assert data.replayed_frames == len(old) * 2 * STEPS
    words = "gives 3 steps in front of each sequence, and there is no on_replayed that takes them away"
    with pytest.raises(ValueError, match=words):
        mixed(share=0.5, replay_fn=partial(replay, burn_in=3)).train_dataloader()


class Remembering(Collector):
    """Its steps have a recurrent state, 1 while acting, and begin episodes with the first of every second rollout."""

    def __next__(self) -> TensorDictBase:
        first = self.taken % 2 == 0
        rollout = super().__next__()
        rollout["is_init"] = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
        rollout["is_init"][:, 0] = first
        rollout["memory"] = torch.ones(ENVS, STEPS, 1)
        rollout["next", "memory"] = torch.ones(ENVS, STEPS, 1)
        return rollout


def test_of_whole_episodes_the_renewed_state_is_kept() -> None:
    """The second half of an episode comes behind the first, whose state is that of the last time."""
    fronts = []

    def renew(batch: TensorDictBase) -> TensorDictBase:
        there = batch["valid"][:, 0, 0]
        fronts.extend(batch["memory"][there, 0, 0].tolist())
        assert (batch["memory"][:, STEPS] >= 1).all()
        rest = batch[:, STEPS:].clone()
        rest["memory"][:, 0] = 5.0
        return rest

    replay_fn = partial(replay, whole_episodes=True)
    data = mixed(20, share=0.5, collector=Remembering, replay_fn=replay_fn, on_replayed=renew)
    for batch in data.train_dataloader():
        if "index" in batch:
            assert (batch["memory"][2:, 0] == 5.0).all()
    assert len(fronts) > 5
    assert set(fronts) == {5.0}


def test_replayed_samples_go_through_the_hook_first() -> None:
    """Where there are no fresh rows in a batch."""
    seen = []

    def cut(batch: TensorDictBase) -> TensorDictBase:
        seen.append(batch)
        return batch[:, 3:].clone()

    data = ReplayData(
        Collector, partial(replay, burn_in=3), total_frames=6 * ROLLOUT, batch_size=2 * STEPS, samples_per_insert=1.0,
        min_size=2 * ROLLOUT, on_replayed=cut,
    )  # fmt: skip
    found = [batch for batches in data.train_dataloader() for batch in data.updates(batches)]
    assert len(found) == len(seen) == 4 * ROLLOUT // (2 * STEPS)
    for batch, whole in zip(found, seen, strict=True):
        assert batch.shape == (2, STEPS)
        assert torch.equal(batch["observation"], whole["observation"][:, 3:])


# With an agent


def fit(
    folder: Path, form: dict[str, float], *, rollouts: int, stop: int, renew: int = 0, resume: Path | None = None
) -> tuple[Agent, MixedData]:
    pl.seed_everything(3 if resume is None else 99, verbose=False)  # a resumed run takes nothing from its own seed
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2, action_dim=None, hidden=[16])

    def collector(rank: int, frames: int) -> Any:
        env = partial(make_env, "CartPole-v1", ENVS)
        return make_collector(env, policy, frames_per_batch=ROLLOUT, num_workers=0, seed=5, start=frames, rank=rank)

    optimizer = make_optimizer("adam", lr=1e-3, eps=1e-5)
    agent = Agent(ImpalaLoss(policy, gamma=0.99), policy, optimizer=optimizer, total_frames=rollouts * ROLLOUT)
    data = mixed(rollouts, collector=collector, **form)
    data.folder = (folder if resume is None else resume.parent) / "replay"
    callbacks = [WeightSync(1 if "ratio" in form else 2), Checkpoints(folder, every=10**9), StopAfter(stop)]
    if renew:
        callbacks.append(NewEnvironments(data, renew * ROLLOUT))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(agent, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return agent, data


class StopAfter(pl.Callback):
    """Ends the run where the next thing would be a rollout."""

    def __init__(self, rollouts: int) -> None:
        self.rollouts = rollouts

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        data = trainer.datamodule
        if data.rollouts >= self.rollouts and not data.owed:
            trainer.should_stop = True


@pytest.mark.parametrize("form", [{"share": 0.5}, {"ratio": 1.0}])
def test_k_and_k_updates_are_2k(form: dict[str, float], tmp_path: Path) -> None:
    """Both arms get new environments after k rollouts. Bit for bit: weights, samples to come, counters."""
    k = 5
    half, _ = fit(tmp_path / "a", form, rollouts=2 * k, stop=k)
    resumed, resumed_data = fit(tmp_path / "b", form, rollouts=2 * k, stop=2 * k, resume=tmp_path / "a" / "last.ckpt")
    whole, data = fit(tmp_path / "c", form, rollouts=2 * k, stop=2 * k, renew=k)
    assert data.frames == resumed_data.frames == 2 * k * ROLLOUT
    assert data.replayed_frames == resumed_data.replayed_frames > 0
    assert resumed.updates == whole.updates > half.updates
    assert any(not torch.equal(half.state_dict()[name], value) for name, value in whole.state_dict().items())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert data.replay is not None
    assert resumed_data.replay is not None
    assert (data.replay.sample() == resumed_data.replay.sample()).all()


@pytest.mark.slow
def test_two_ranks_stay_bit_identical(tmp_path: Path) -> None:
    """Two gloo ranks, each with its own environments and replay."""
    script = Path(__file__).with_name("mixed_ddp_script.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=240)
    for name in ("share", "ratio", "episodes"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        for key in ("frames", "replayed_frames", "updates"):
            assert first[key] == second[key] > 0
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), key
        assert not torch.equal(first["observation"], second["observation"]), "each rank collects for itself"
