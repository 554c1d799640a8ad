"""Prioritised sampling against probabilities kept by hand, and the names of items against what lies under them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tensordict import TensorDict

from offtrace.modules.replay import DamagedReplay, Prioritized, Replay, Uniform
from tests.modules import test_replay_frames as frames
from tests.modules.test_replay import Stream, starts_of

SHAPES = [(1, False), (4, False), (4, True)]


class ByHand:
    """Priorities by the first observation of an item, of all starts that a replay has."""

    def __init__(self, replay: Replay, epsilon: float) -> None:
        self.replay, self.epsilon, self.largest = replay, epsilon, 1.0
        self.priorities: dict[tuple[float, ...], float] = {}

    def follow(self) -> int:
        """After an insertion; returns how many starts went."""
        starts, before = starts_of(self.replay), self.priorities
        self.priorities = {start: before.get(start, self.largest) for start in starts}
        return len(before.keys() - self.priorities.keys())

    def update(self, batch: TensorDict, priority: torch.Tensor) -> int:
        """Returns how many items were still there."""
        there = 0
        for start, value in zip(first(batch), priority.tolist(), strict=True):
            if start in self.priorities:
                self.priorities[start] = value + self.epsilon
                self.largest = max(self.largest, value + self.epsilon)
                there += 1
        return there

    def probabilities(self, alpha: float) -> dict[tuple[float, ...], float]:
        powers = {start: priority**alpha for start, priority in self.priorities.items()}
        total = sum(powers.values())
        return {start: power / total for start, power in powers.items()}


def first(batch: TensorDict) -> list[tuple[float, ...]]:
    observation = batch["observation"] if batch.ndim == 1 else batch["observation"][:, 0]
    return [tuple(row) for row in observation.tolist()]


def run(replay: Replay, epsilon: float, *, turns: int = 60) -> ByHand:
    """Insertions of two actors over several turns of the rings, with updates by new, old and repeated indices."""
    hand = ByHand(replay, epsilon)
    streams = [Stream(3, seed=worker, longest=12, invalid=0.05, first=3 * worker) for worker in range(2)]
    kept: list[TensorDict] = []
    stale = 0
    torch.manual_seed(0)
    for turn in range(turns):
        replay.extend(streams[turn % 2].rollout(7), worker=turn % 2)
        hand.follow()
        if replay.num_starts < 10:
            continue
        kept.append(replay.sample(16))
        for batch in (kept[-1], kept[len(kept) // 2]):
            priority = torch.rand(16, dtype=torch.float64) * 2
            there = replay.update_priorities(batch["index"], priority)
            assert there == hand.update(batch, priority)
            stale += 16 - there
    assert int(replay._rings.written.min()) > 3 * replay._rings.size
    assert stale > 50
    return hand


@pytest.mark.parametrize("alpha", [0.6, 1.0, 0.0])
@pytest.mark.parametrize(("length", "pad"), SHAPES)
def test_frequencies_and_weights_are_those_of_the_priorities(length: int, pad: bool, alpha: float) -> None:
    """With overwritten slots, ends of episodes, steps that are not valid, padded sequences, and six rings."""
    sampler = Prioritized(alpha=alpha, beta=0.7, epsilon=0.01)
    replay = Replay(150, num_envs=3, num_workers=2, batch_size=50, length=length, pad=pad, seed=1, sampler=sampler)
    hand = run(replay, 0.01)
    expected = hand.probabilities(alpha)
    assert len(expected) == replay.num_starts > 20
    counts = dict.fromkeys(expected, 0)
    for turn in range(600):
        sampler.beta = (0.7, 0.0, 1.0)[turn % 3]
        batch = replay.sample()
        for start in first(batch):
            counts[start] += 1
        wanted = np.array([(len(expected) * expected[start]) ** -sampler.beta for start in first(batch)])
        weight = batch["weight"] if batch.ndim == 1 else batch["weight"][:, 0]
        np.testing.assert_allclose(weight.numpy(), wanted.astype(np.float32), rtol=2e-7)
        assert weight.dtype == torch.float32
    found, probability = np.array(list(counts.values())), np.array([expected[start] for start in counts])
    assert found.sum() == 30_000
    assert chisquare(found, 30_000 * probability / probability.sum()).pvalue > 1e-3
    if alpha:
        assert chisquare(found).pvalue < 1e-9


@pytest.mark.parametrize("sampler", [Uniform, Prioritized])
@pytest.mark.parametrize(("length", "pad"), SHAPES)
def test_an_index_names_one_item_for_ever(sampler: Any, length: int, pad: bool) -> None:
    """What lies under an index is always the same, whatever the rings hold; all steps of a sample have one."""
    replay = Replay(60, num_envs=2, num_workers=2, batch_size=40, length=length, pad=pad, sampler=sampler())
    streams = [Stream(2, seed=worker, first=2 * worker) for worker in range(2)]
    names: dict[int, tuple[float, ...]] = {}
    for turn in range(60):
        replay.extend(streams[turn % 2].rollout(5), worker=turn % 2)
        if not replay.num_starts:
            continue
        batch = replay.sample()
        index = batch["index"]
        assert index.shape == batch.shape
        assert index.dtype == torch.int64
        if length > 1:
            assert (index == index[:, :1]).all()
            assert index.stride(1) == 0
            index = index[:, 0]
        for name, start in zip(index.tolist(), first(batch), strict=True):
            assert names.setdefault(name, start) == start
        there = set(replay._rings.items(replay._rings.starts).tolist())
        slots, held = replay._rings.slots_of(np.array(list(names)))
        assert [name in there for name in names] == held.tolist()
        assert [names[name] for name, yes in zip(names, held, strict=True) if yes] == [
            tuple(row) for row in replay._storage.leaves["observation",][torch.from_numpy(slots[held])].tolist()
        ]
    assert len(set(names.values())) == len(names) > 100


def test_an_item_whose_older_frames_are_lost_is_gone() -> None:
    """Where a slot holds one frame of a stack, the oldest slots of a ring are no items any more."""
    replay = Replay(40, num_envs=2, batch_size=30, frame_stack=3, sampler=Prioritized())
    stream = frames.Stream(2, 3, padding="noise")
    names: set[int] = set()
    lost = 0
    for _ in range(40):
        replay.extend(stream.rollout(4))
        batch = replay.sample()
        names |= set(batch["index"].tolist())
        assert replay.update_priorities(batch["index"], torch.rand(30)) == 30
        index = np.array(sorted(names))
        slots, held = replay._rings.slots_of(index)
        there = set(replay._rings.items(replay._rings.starts).tolist())
        assert [name in there for name in index.tolist()] == held.tolist()
        lost += int((replay._rings.items(slots) == index)[~held].sum())
    assert lost > 0  # of slots that still hold the item's own frame


def filled(**numbers: Any) -> Replay:
    replay = Replay(100, **{"num_envs": 2, "batch_size": 4, "sampler": Prioritized(epsilon=0.0), **numbers})
    replay.extend(Stream(2).rollout(20))
    return replay


def test_a_priority_of_zero_is_never_sampled() -> None:
    replay = filled()
    batch = replay.sample(400)
    names = batch["index"].unique()
    assert len(names) == replay.num_starts == 40
    replay.update_priorities(names[:39], torch.zeros(39))
    assert (replay.sample(5000)["index"] == names[39]).all()
    assert replay.sample()["weight"].tolist() == pytest.approx([40**-0.4] * 4)
    replay.update_priorities(names, torch.zeros(40))
    with pytest.raises(ValueError, match=r"priorities, to the power alpha 0.6, add up to 0.0; it must be above 0"):
        replay.sample()
    replay.update_priorities(names[3:4], torch.ones(1))
    assert (replay.sample(100)["index"] == names[3]).all()


def test_new_items_have_the_largest_priority_so_far() -> None:
    sampler = Prioritized(alpha=1.0, beta=1.0, epsilon=0.5)
    stream = Stream(2)
    replay = Replay(200, num_envs=2, batch_size=4, sampler=sampler)
    replay.extend(stream.rollout(20))
    assert (replay.sample(100)["weight"] == 1).all()  # all alike
    old = replay.sample(400)["index"].unique()
    replay.update_priorities(old[:2], torch.tensor([7.5, 0.0]))  # and epsilon
    replay.update_priorities(old[:1], torch.tensor([1.5]))  # the largest so far stays
    replay.extend(stream.rollout(20))
    powers = {**dict.fromkeys(old.tolist(), 1.0), int(old[0]): 2.0, int(old[1]): 0.5}
    total = 40 * 8.0 + sum(powers.values())
    batch = replay.sample(3000)
    assert len(batch["index"].unique()) > 60
    for name, weight in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True):
        assert 80 * powers.get(name, 8.0) / total == pytest.approx(1 / weight, rel=1e-6)


def test_what_was_overwritten_is_passed_over() -> None:
    stream = Stream(2)
    replay = Replay(40, num_envs=2, batch_size=8, sampler=Prioritized())
    replay.extend(stream.rollout(12))
    batch = replay.sample(300)
    index = batch["index"].unique()
    replay.extend(stream.rollout(10))  # over some of them
    rings = replay._rings
    slots, there = rings.slots_of(index.numpy())
    assert 0 < there.sum() < len(there)
    before = replay.sampler._tree.leaves.copy()  # type: ignore[attr-defined]
    assert replay.update_priorities(index, torch.full((len(index),), 9.0)) == there.sum()
    after = replay.sampler._tree.leaves  # type: ignore[attr-defined]
    changed = np.flatnonzero(before != after)
    assert sorted(changed) == sorted(slots[there])
    for _ in range(8):
        replay.extend(stream.rollout(10))
    before = after.copy()
    assert replay.update_priorities(index, torch.full((len(index),), 5.0)) == 0
    np.testing.assert_array_equal(before, after)
    assert set(np.flatnonzero(after)) == set(rings.starts)


def test_sequences_take_a_priority_a_step_or_one() -> None:
    one, two = (filled(length=3, pad=True, seed=5) for _ in range(2))
    first_, second = one.sample(20), two.sample(20)
    assert torch.equal(first_["index"], second["index"])
    priority = torch.rand(20)
    assert one.update_priorities(first_["index"], priority.unsqueeze(1).expand(20, 3)) == 20
    assert two.update_priorities(second["index"][:, 0], priority) == 20
    for _ in range(3):
        assert (one.sample() == two.sample()).all()


@pytest.mark.parametrize("storage", ["tensor", "memmap"])
@pytest.mark.parametrize(("length", "pad"), SHAPES)
def test_after_a_load_everything_goes_on_as_without_it(storage: Any, length: int, pad: bool, tmp_path: Path) -> None:
    """Samples, updates by indices from before the load, insertions with the largest priority, and beta."""
    numbers: dict[str, Any] = {"num_envs": 3, "num_workers": 2, "batch_size": 8, "length": length, "pad": pad}
    path = tmp_path / "live" if storage == "memmap" else None
    replay = Replay(150, storage=storage, path=path, sampler=Prioritized(epsilon=0.01), **numbers)
    run(replay, 0.01)
    replay.sampler.beta = 0.9  # type: ignore[attr-defined]
    batch = replay.sample()
    replay.dump(tmp_path / "replay")
    other = Replay(150, seed=99, sampler=Prioritized(epsilon=0.01), **numbers)
    other.load(tmp_path / "replay")
    stream = Stream(3, seed=7)
    for turn in range(30):
        priority = torch.rand(8) * turn
        assert replay.update_priorities(batch["index"], priority) == other.update_priorities(batch["index"], priority)
        batch, same = replay.sample(), other.sample()
        assert (batch == same).all()
        rollout = stream.rollout(5)
        assert replay.extend(rollout, worker=turn % 2) == other.extend(rollout, worker=turn % 2)
    assert replay.sampler._tree.total == other.sampler._tree.total  # type: ignore[attr-defined]


def test_folders_of_another_sampler_or_format_are_refused(tmp_path: Path) -> None:
    filled().dump(tmp_path / "prioritized")
    filled(sampler=None).dump(tmp_path / "uniform")
    for sampler, name, words in (
        (None, "prioritized", r"has sampler prioritized\(alpha=0.6, epsilon=0.0\), this one has uniform"),
        (Prioritized(), "uniform", r"has sampler uniform, this one has prioritized\(alpha=0.6, epsilon=1e-06\)"),
        (Prioritized(alpha=0.5, epsilon=0.0), "prioritized", r"epsilon=0.0\), this one has prioritized\(alpha=0.5"),
    ):
        replay, twin = filled(sampler=sampler, seed=3), filled(sampler=type(sampler)() if sampler else None, seed=3)
        with pytest.raises(ValueError, match=words):
            replay.load(tmp_path / name)
        assert (replay.sample()["index"] == twin.sample()["index"]).all()
    filled(sampler=Prioritized(epsilon=0.0, beta=1.0)).load(tmp_path / "prioritized")  # beta is no setting
    file = tmp_path / "uniform" / "replay.json"
    text = file.read_text().split("\n")[1].replace('"format": 2', '"format": 1')
    assert json.loads(text)["format"] == 1
    file.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
    with pytest.raises(DamagedReplay, match=r"has format 1; this version reads 2 alone"):
        filled(sampler=None).load(tmp_path / "uniform")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index, priority: (index, priority.neg()), r"priority\[0\] is -1.0; it must be at least 0 and finite"),
        (lambda index, priority: (index, priority.where(priority.cumsum(0) != 3, torch.nan)), r"\[2\] is nan"),
        (lambda index, priority: (index, priority.where(priority.cumsum(0) % 2 != 0, torch.inf)), r"\[1\] is inf"),
        (lambda index, priority: (index, priority[:3]), r"3 priorities for 4 indices; there must be one of each"),
        (lambda index, priority: (index + 10**9, priority), r"index\[0\] is 100\d+, which this replay has not given"),
        (lambda index, priority: (index - 10**9, priority), r"index\[0\] is -9\d+, which this replay has not given"),
        (lambda index, priority: (index, priority.view(2, 2, 1)), r"shape \[2, 2, 1\]; it must be \[B\], or"),
    ],
)  # fmt: skip
def test_updates_that_are_refused(change: Any, words: str) -> None:
    replay, twin = filled(), filled()
    batch = replay.sample()
    twin.sample()
    with pytest.raises(ValueError, match=words):
        replay.update_priorities(*change(batch["index"], torch.ones(4)))
    assert (replay.sample(50) == twin.sample(50)).all()


def test_a_priority_whose_power_is_not_finite_changes_nothing() -> None:
    replay, twin = (filled(sampler=Prioritized(alpha=2.0)) for _ in range(2))
    index = replay.sample()["index"]
    twin.sample()
    with pytest.raises(ValueError, match=r"a priority is 1e\+200; to the power alpha, 2.0, it must be finite"):
        replay.update_priorities(index, torch.full((4,), 1e200, dtype=torch.float64))
    assert (replay.sample(50) == twin.sample(50)).all()


def test_other_mistakes() -> None:
    for name in ("alpha", "epsilon"):
        for value in (-0.1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=rf"{name} is {value}; it must be at least 0 and finite"):
                Prioritized(**{name: value})
    for value in (-0.1, 1.1, float("nan")):  # from above 1 it would fall, and not rise
        with pytest.raises(ValueError, match=rf"beta is {value}; it must be between 0 and 1"):
            Prioritized(beta=value)
    for sampler in (Uniform(), Prioritized()):
        filled(sampler=sampler)
        with pytest.raises(ValueError, match=r"belongs to a replay already; give each replay a sampler of its own"):
            filled(sampler=sampler)
    uniform = filled(sampler=None)
    with pytest.raises(ValueError, match=r"samples uniformly and has no priorities; give it sampler=Prioritized\(\)"):
        uniform.update_priorities(uniform.sample()["index"], torch.ones(4))
    assert "weight" not in uniform.sample().keys()  # noqa: SIM118 - a TensorDict
    for name in ("index", "weight"):
        rollout = Stream(2).rollout(5)
        rollout[name] = torch.zeros(2, 5)
        with pytest.raises(ValueError, match=f"the rollout has '{name}', a name that the replay gives its samples"):
            Replay(100, num_envs=2, batch_size=4).extend(rollout)


def test_the_memory_of_a_slot_counts_the_sampler() -> None:
    assert filled().bytes_per_slot == filled(sampler=None).bytes_per_slot + 1
    tree = filled(num_envs=2).sampler._tree  # type: ignore[attr-defined]
    assert sum(level.nbytes for level in tree._levels) <= 9 * len(tree.leaves) + 16 * 8 * len(tree._levels)
