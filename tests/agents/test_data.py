"""RolloutData: every sample in every epoch once, counted, in an order that a resumed run repeats, and an end to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from offtrace.agents.data import PlainData, RolloutData, acting
from offtrace.agents.data.rollouts import Dealer
from offtrace.agents.impala import atari_config
from offtrace.modules.collectors import PackedRollout

ENVS, STEPS = 6, 5


class Collector:
    """Stands in for a collector: "sample" [N, T] numbers every sample of the run."""

    num_envs, frames_per_batch, restarts = ENVS, ENVS * STEPS, 0

    def __init__(self, rank: int = 0, frames: int = 0, first: int = 0) -> None:
        self.rank, self.taken, self.version, self.closed = rank, first, 0, False
        self.order: Any = None
        self.pin_memory = False

    def __next__(self) -> TensorDictBase:
        assert not self.closed
        sample = torch.arange(ENVS * STEPS).view(ENVS, STEPS) + self.taken * ENVS * STEPS
        self.taken += 1
        return TensorDict({"sample": sample if self.order is None else sample[self.order(ENVS)]}, [ENVS, STEPS])

    def take(self) -> PackedRollout:
        rollout = next(self)
        return PackedRollout(dict(rollout.items(True, True)), rollout.shape, 1)

    def shutdown(self) -> None:
        self.closed = True


class Learner(pl.LightningModule):
    """Notes what it is given, and how many rollouts had been taken then. May fail at a batch."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[TensorDictBase] = []
        self.taken: list[int] = []
        self.fail_at, self.error = fail_at, error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        if batch_idx == self.fail_at:
            raise self.error("the learner failed")
        self.batches.append(batch)
        self.taken.append(self.trainer.datamodule.collector.taken)
        self.optimizers().step()  # type: ignore[union-attr, operator]


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **{**quiet, "enable_checkpointing": False, **kwargs})


def batches(data: RolloutData) -> Iterator[TensorDictBase]:
    return iter(data.train_dataloader())


def test_the_order_is_what_it_always_was() -> None:
    """A resumed run of an earlier version deals as it would have."""
    assert Dealer(1, 1, seed=7).order(6, rank=1, rollout=2, epoch=3).tolist() == [4, 2, 3, 1, 0, 5]


def samples(batch: TensorDictBase) -> list[int]:
    return sorted(batch["sample"].flatten().tolist())


def test_each_epoch_holds_every_sample_once_in_another_order() -> None:
    data = RolloutData(lambda rank, frames: Collector(), total_frames=2 * ENVS * STEPS, minibatches=3, epochs=2)
    found = list(batches(data))
    assert len(found) == len(data.train_dataloader()) == 2 * 2 * 3
    assert all(batch.shape == (ENVS // 3, STEPS) for batch in found)
    epochs = [torch.cat(list(found[i : i + 3])) for i in range(0, 12, 3)]
    for number, epoch in enumerate(epochs):
        first = number // 2 * ENVS * STEPS
        assert samples(epoch) == list(range(first, first + ENVS * STEPS))
        assert (epoch["sample"].diff(dim=-1) == 1).all(), "time was shuffled"
    orders = {tuple((epoch["sample"][:, 0] % (ENVS * STEPS)).tolist()) for epoch in epochs}
    assert len(orders) == 4


def test_single_steps_are_dealt_over_environments_and_time() -> None:
    def data() -> RolloutData:
        total = 2 * ENVS * STEPS
        return RolloutData(lambda *_: Collector(), total_frames=total, minibatches=10, epochs=2, deal="steps")

    found = list(batches(data()))
    assert len(found) == len(data().train_dataloader()) == 2 * 2 * 10
    assert all(batch.shape == (ENVS * STEPS // 10,) for batch in found)
    epochs = [torch.cat(list(found[i : i + 10])) for i in range(0, 40, 10)]
    for number, epoch in enumerate(epochs):
        first = number // 2 * ENVS * STEPS
        assert samples(epoch) == list(range(first, first + ENVS * STEPS))
    orders = {tuple((epoch["sample"] % (ENVS * STEPS)).tolist()) for epoch in epochs}
    assert len(orders) == 4
    for one, other in zip(found, batches(data()), strict=True):
        assert torch.equal(one["sample"], other["sample"])


@pytest.mark.parametrize("deal", ["environments", "steps"])
def test_a_hook_sees_each_whole_rollout_once_and_what_it_writes_is_dealt(deal: Any) -> None:
    seen: list[TensorDictBase] = []

    def prepare(rollout: TensorDictBase) -> dict[str, torch.Tensor]:
        seen.append(rollout)
        rollout["advantage"] = rollout["sample"] * 2 + len(seen)
        return {"ess": torch.tensor(1 / len(seen))}

    data = RolloutData(
        lambda *_: Collector(), total_frames=2 * ENVS * STEPS, minibatches=2, epochs=3, deal=deal, on_rollout=prepare
    )
    for number, batch in enumerate(batches(data)):
        assert len(seen) == number // 6 + 1
        assert torch.equal(batch["advantage"], batch["sample"] * 2 + len(seen))
    assert [rollout.shape for rollout in seen] == [(ENVS, STEPS)] * 2
    assert data.metrics == {"rollout/ess": 0.5}  # what it returned of the newest one


def test_steps_that_do_not_divide_are_refused() -> None:
    data = RolloutData(lambda *_: Collector(), total_frames=10, minibatches=4, deal="steps")
    with pytest.raises(ValueError, match="it must divide the 30 steps of a rollout"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="deal is 'rows'; it must be 'environments' or 'steps'"):
        RolloutData(lambda *_: Collector(), total_frames=10, deal="rows")  # type: ignore[arg-type]


def test_data_that_is_not_ours_is_counted() -> None:
    data = PlainData(None, ranks=2)
    for part in data.updates(TensorDict({}, [3, 4])):
        data.feedback(part)
    assert data.frames == 24
    assert [part.shape for part in data.updates([TensorDict({}, [3]), TensorDict({}, [2])])] == [(3,), (2,)]
    assert PlainData(SimpleNamespace(frames=7), ranks=2).frames == 7
    assert (data.metrics, data.save(0), data.saves) == ({}, None, False)


def test_frames_count_skips_and_ranks_and_the_last_rollout_is_whole() -> None:
    per_rollout = ENVS * STEPS * 4 * 2
    data = RolloutData(Collector, total_frames=per_rollout + 1, frame_skip=4)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=1, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    stream = batches(data)
    next(stream)
    assert data.frames == per_rollout
    assert data.collector is not None
    assert data.collector.rank == 1  # type: ignore[attr-defined]
    next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert data.frames == 2 * per_rollout


def test_the_order_differs_by_rank_and_seed_and_repeats() -> None:
    def order(rank: int, seed: int) -> tuple[int, ...]:
        data = RolloutData(Collector, total_frames=1, seed=seed)
        place = SimpleNamespace(
            global_rank=rank, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        data.trainer = place  # type: ignore[assignment]
        return tuple(next(batches(data))["sample"][:, 0].tolist())

    places = [(r, s) for r in range(2) for s in range(2)]
    assert len({order(*place) for place in places}) == 4
    assert [order(*place) for place in places] == [order(*place) for place in places]


def test_resumed_deals_as_uninterrupted() -> None:
    def data(first: int = 0) -> RolloutData:
        total = 4 * ENVS * STEPS
        return RolloutData(lambda rank, frames: Collector(first=first), total_frames=total, minibatches=2, epochs=2)

    whole = list(batches(data()))
    before = data()
    stream = batches(before)
    found = [next(stream) for _ in range(8)]
    assert before.collector is not None
    before.collector.version = 17
    state = before.state_dict()
    after = data(first=2)
    after.load_state_dict(state)
    found += list(batches(after))
    assert after.frames == 4 * ENVS * STEPS
    assert after.collector is not None
    assert after.collector.version == 17
    assert len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one["sample"], other["sample"])


@pytest.mark.parametrize("name", ["total_frames", "frame_skip", "minibatches", "epochs"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        RolloutData(Collector, **{"total_frames": 10, name: 0})  # type: ignore[arg-type]


def test_minibatches_that_do_not_divide_are_refused_before_collection() -> None:
    collector = Collector()
    data = RolloutData(lambda rank, frames: collector, total_frames=10, minibatches=4)
    with pytest.raises(ValueError, match="it must divide the 6 environments"):
        data.train_dataloader()
    assert collector.closed
    assert collector.taken == 0


# In Lightning's loop


def test_lightning_fetches_no_batch_ahead_and_stops_at_the_count(tmp_path: Path) -> None:
    collector = Collector()
    data = RolloutData(lambda rank, frames: collector, total_frames=4 * ENVS * STEPS, minibatches=2)
    learner = Learner()
    trainer(tmp_path).fit(learner, data)
    assert learner.taken == [1, 1, 2, 2, 3, 3, 4, 4]
    assert data.frames == 4 * ENVS * STEPS
    assert collector.closed
    assert data.collector is None


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, (KeyboardInterrupt, SystemExit))]
)
def test_actors_end_with_the_training_however_it_ends(error: type[BaseException], outcome: Any, tmp_path: Path) -> None:
    collector = Collector()
    data = RolloutData(lambda rank, frames: collector, total_frames=1000)
    with pytest.raises(outcome):
        trainer(tmp_path).fit(Learner(fail_at=2, error=error), data)
    assert collector.closed
    assert data.collector is None


def test_a_checkpoint_continues_the_count(tmp_path: Path) -> None:
    total, path = 6 * ENVS * STEPS, tmp_path / "last.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(path)

    first = RolloutData(lambda rank, frames: Collector(), total_frames=total, minibatches=2)
    whole = Learner()
    trainer(tmp_path, callbacks=[Save()]).fit(whole, first)
    second = RolloutData(lambda rank, frames: Collector(first=2), total_frames=total, minibatches=2)
    rest = Learner()
    resumed = trainer(tmp_path)
    resumed.fit(rest, second, ckpt_path=path, weights_only=True)
    assert second.frames == total
    assert resumed.global_step == 12
    assert len(rest.batches) == 8
    for one, other in zip(rest.batches, whole.batches[4:], strict=True):
        assert torch.equal(one["sample"], other["sample"])


@pytest.mark.parametrize(
    ("device", "devices", "accelerator", "wanted"),
    [
        ("cuda", 1, "auto", "cuda"),
        ("cuda", 2, "auto", "cuda:1"),
        ("cuda:0", 2, "gpu", "cuda:0"),
        ("cuda", 2, "cpu", "cuda"),
        ("cpu", 2, "gpu", "cpu"),
    ],
)
def test_actors_get_their_emulators_threads_and_their_learners_gpu(
    device: str, devices: int, accelerator: Any, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = atari_config()
    config.collector.device, config.collector.emulator_threads = device, 3
    config.train.devices, config.train.accelerator = devices, accelerator
    made: dict[str, Any] = {}
    monkeypatch.setattr(acting, "make_collector", lambda env_fn, policy, **options: made.update(options, env_fn=env_fn))
    acting.rollout_collector(config, 4, torch.nn.Identity(), rank=3, frames=0)  # of the second node
    assert made["device"] == wanted
    assert made["env_fn"].keywords["num_threads"] == 3
