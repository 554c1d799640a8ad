"""Lazy priorities against their definition, slot by slot, over thousands of changes; and in a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from offtrace.modules.replay import LazyPrioritized, Replay, neighbour_tree, samplers
from offtrace.modules.replay.neighbour_tree import NeighbourTree
from tests.modules.test_replay import Stream
from tests.modules.test_replay_priorities import SHAPES, first
from tests.modules.test_returns_mutations import mutant

SIZES = [1, 7, 16, 17, 256, 300, 5000]


class ByHand:
    """The definition: items with a priority, or None, by their slots."""

    def __init__(self, size: int, power: float) -> None:
        self.size, self.power = size, power
        self.items: dict[int, float | None] = {}

    def priority(self, slot: int) -> float:
        found = self.items[slot]
        if found is not None:
            return found
        block = 16
        while True:
            begin = slot // block * block
            known = [self.items.get(other) for other in range(begin, min(begin + block, self.size))]
            values = [value for value in known if value is not None]
            if values:
                return sum(values) / len(values)
            if block >= self.size:
                return 1.0
            block *= 16

    def weights(self) -> dict[int, float]:
        return {slot: float(self.priority(slot) ** self.power) for slot in sorted(self.items)}


def change(rng: np.random.Generator, tree: Any, hand: ByHand) -> None:
    """One of the three operations, of slots for which it is allowed."""
    begin, number = rng.integers(hand.size), int(rng.integers(1, 30))
    window = np.arange(begin, min(hand.size, begin + number))
    if rng.random() < 0.3:
        window = np.unique(rng.integers(hand.size, size=number))
    there = np.array([slot in hand.items for slot in window])
    kind = rng.random()
    if kind < 0.35 and not there.all():
        tree.add(window[~there])
        hand.items |= {int(slot): None for slot in window[~there]}
    elif kind < 0.55 and there.any():
        tree.remove(window[there])
        for slot in window[there]:
            del hand.items[int(slot)]
    elif there.any():
        slots = rng.permutation(np.repeat(window[there], 2))[: int(rng.integers(1, 8))]
        priority = np.where(rng.random(len(slots)) < 0.1, 0.0, 10 ** rng.uniform(-3, 3, size=len(slots)))
        tree.set(slots, priority)
        hand.items |= dict(zip(slots.tolist(), priority.tolist(), strict=True))


def error_of(tree: Any, hand: ByHand) -> float:
    """Worst relative difference of count, total, and the weight of every single item, which stand in slot order."""
    weights = hand.weights()
    if tree.count != len(weights):
        return np.inf
    total = sum(weights.values())
    worst = abs(tree.total - total) / max(total, 1e-300) if total else float(tree.total)
    if weights:
        slots, found = tree.find(np.arange(len(weights)) + 0.5, np.ones(len(weights), bool))
        if slots.tolist() != list(weights):
            return np.inf
        expected = np.array(list(weights.values()))
        worst = max(worst, float((np.abs(found - expected) / np.maximum(expected, 1e-300)).max()))
        # and where the cumulative sums say, away from their edges
        sums = np.cumsum(expected)
        if total:
            inner = (sums - 0.5 * expected)[expected > 1e-9 * total]
            slots, _ = tree.find(inner, np.zeros(len(inner), bool))
            if slots.tolist() != np.array(list(weights))[expected > 1e-9 * total].tolist():
                return np.inf
    return worst


def tree_error(module: dict[str, Any], sizes: list[int] = SIZES, turns: int = 60) -> float:
    worst = 0.0
    for size in sizes:
        for power in (1.0, 0.6, 0.0):
            rng = np.random.default_rng(size)
            tree, hand = module["NeighbourTree"](size, power), ByHand(size, power)
            for turn in range(turns):
                change(rng, tree, hand)
                if turn % 3 == 0:
                    worst = max(worst, error_of(tree, hand))
    return worst


def test_weights_are_those_of_the_definition() -> None:
    assert tree_error(vars(neighbour_tree)) < 1e-12


MUTATIONS = {
    "the next larger block": ("mean = np.where(own < 0, mean, own)", "pass"),
    "a block inside counts for nothing": ("mean = np.where(own < 0, mean, own)", "mean = np.abs(own)"),
    "sum for mean": ("priority / np.maximum(known, 1.0)", "priority"),
    "mean of all items": ("priority / np.maximum(known, 1.0)", "priority / np.maximum(items, 1.0)"),
    "the items without weigh nothing": ("* -mean[:, None]", "* 0"),
    "one item of a block": ("np.minimum(weight, 0.0) * -mean[:, None]", "(weight < 0) * mean[:, None]"),
    "no power of the mean": ("self._power == 1", "self._power == 1 or priority.ndim == 1"),
    "free slots have the power of 0": ("np.where(kinds == _KNOWN, ", "np.where(kinds != _WAITING, "),
    "known ones do not count": ("(self._kinds.take(nodes, 0) != _FREE)", "(self._kinds.take(nodes, 0) == _WAITING)"),
    "what went stays": ("self._set(slots, _FREE, 0.0)", "pass"),
    "what went stays known": ("self._set(slots, _FREE, 0.0)", "self._set(slots, _WAITING, 0.0)"),
    "new ones are known": ("self._set(slots, _WAITING, 0.0)", "self._set(slots, _KNOWN, 1.0)"),
    "nothing above the first sums": ("slots = slots // _FAN\n", "slots = slots // _FAN\n            if level: break\n"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    with np.errstate(all="ignore"):
        try:
            error = tree_error(mutant(neighbour_tree, *MUTATIONS[mutation]), [7, 300], 60)
        except IndexError:
            return
    assert error > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_built_from_saved_items_is_the_same_tree(size: int) -> None:
    """To the last bit, after changes of 24 orders of magnitude: it does not drift."""
    rng = np.random.default_rng(size)
    tree, hand = NeighbourTree(size, 0.7), ByHand(size, 0.7)
    for _ in range(300):
        change(rng, tree, hand)
    slots = np.array(sorted(hand.items))
    anew = NeighbourTree(size, 0.7)
    anew.add(np.arange(size)[::2])  # which fill forgets
    anew.fill(slots, tree.kinds[slots], tree.priorities[slots])
    assert (anew.total, anew.count) == (tree.total, tree.count)
    mass, uniform = rng.random(500), rng.random(500) < 0.3
    mass *= np.where(uniform, tree.count, tree.total)
    for one, other in zip(tree.find(mass, uniform), anew.find(mass, uniform), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_change_that_was_broken_off_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between an item and its sums."""
    tree, hand = NeighbourTree(1000, 1.0), ByHand(1000, 1.0)
    tree.add(np.arange(1000))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_sum_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tree.set(np.array([3, 500]), np.array([2.0, 7.0]))
    hand.items = {**dict.fromkeys(range(1000)), 3: 2.0, 500: 7.0}
    assert error_of(tree, hand) < 1e-12


def test_the_nearest_block_decides() -> None:
    tree = NeighbourTree(600, 1.0)
    tree.add(np.arange(600))
    assert tree.total == 600, "nothing is known: all are alike"
    tree.set(np.array([20, 22, 300]), np.array([3.0, 5.0, 16.0]))
    _, weight = tree.find(np.arange(600) + 0.5, np.ones(600, bool))
    assert weight[20] == 3
    assert weight[22] == 5
    assert (weight[[16, 21, 31]] == 4).all(), "its own 16"
    assert (weight[[0, 15, 32, 255]] == 4).all(), "its own 256"
    assert (weight[[256, 299, 511]] == 16).all()
    assert (weight[[512, 599]] == 8).all(), "the mean of all three"


def test_what_weighs_nothing_is_never_drawn_but_alike() -> None:
    tree = NeighbourTree(300, 1.0)
    tree.add(np.arange(300))
    tree.set(np.arange(40), np.zeros(40))
    tree.set(np.array([7, 299]), np.array([5e-324, 1e300]))
    edges = np.concatenate([[0.0], np.nextafter([tree.total], 0), [tree.total], np.linspace(0, tree.total, 500)])
    _, weight = tree.find(edges, np.zeros(len(edges), bool))
    assert (weight > 0).all()
    slots, _ = tree.find(np.array([0.0, 300.0]), np.ones(2, bool))
    assert slots.tolist() == [0, 299]


def probabilities(hand: ByHand, epsilon: float) -> dict[int, float]:
    weights = hand.weights()
    total = sum(weights.values())
    share = {slot: weight / total if total else 1 / len(weights) for slot, weight in weights.items()}
    return {slot: (1 - epsilon) * p + epsilon / len(weights) for slot, p in share.items()}


def sampler_error(module: dict[str, Any], draws: int = 2000) -> tuple[float, float]:
    """Worst relative error of the importance weights, and the p-value of the counts."""
    rng = np.random.default_rng(5)
    sampler = module["LazyPrioritized"](alpha=0.8, beta=0.7, epsilon=0.25)
    sampler.bind(400)
    hand = ByHand(400, 0.8)
    adapter = type("Adapter", (), {"add": sampler.add, "remove": sampler.remove, "set": sampler.update})()
    for _ in range(120):
        change(rng, adapter, hand)
    expected = probabilities(hand, 0.25)
    assert len(sampler) == len(expected) > 50
    assert sum(value is None for value in hand.items.values()) > 10
    generator = torch.Generator().manual_seed(1)
    worst, counts = 0.0, dict.fromkeys(expected, 0)
    for _ in range(draws // 50):
        slots, weight = sampler.draw(50, generator)
        for slot, found in zip(slots.tolist(), weight.tolist(), strict=True):
            counts[slot] += 1
            worst = max(worst, abs(found / (len(expected) * expected[slot]) ** -0.7 - 1))
    wanted = np.array(list(expected.values()))
    wanted *= draws / wanted.sum()
    order = np.argsort(wanted)
    found, wanted = np.array(list(counts.values()))[order], wanted[order]
    groups = np.unique(np.cumsum(wanted) // 20, return_index=True)[1]  # rare items together
    return worst, float(chisquare(np.add.reduceat(found, groups), np.add.reduceat(wanted, groups)).pvalue)


def test_frequencies_and_importance_weights() -> None:
    worst, value = sampler_error(vars(samplers), 60_000)
    assert worst < 1e-6
    assert value > 1e-3


SAMPLER_MUTATIONS = {
    "never alike": ("uniform = (chance < self.epsilon) | (total == 0)", "uniform = chance < 0"),
    "the other way round": ("(chance < self.epsilon)", "(chance > self.epsilon)"),
    "weights without the mixture": (
        "share = (1 - self.epsilon) * count * weight / total + self.epsilon", "share = count * weight / total",
    ),
    "weights upside down": ("return slots, (share**-self.beta)", "return slots, (share**self.beta)"),
    "one number for both": ("find(place * np", "find(chance * np"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", SAMPLER_MUTATIONS)
def test_every_mutation_of_the_sampler_is_caught(mutation: str) -> None:
    with np.errstate(all="ignore"):
        worst, value = sampler_error(mutant(samplers, *SAMPLER_MUTATIONS[mutation]), 20_000)
    assert worst > 1e-3 or value < 1e-6


@pytest.mark.parametrize(("length", "pad"), SHAPES)
def test_in_a_replay_the_items_are_those_that_are_there(length: int, pad: bool) -> None:
    """Rings that turn several times, ends of episodes, padding: the importance weights are the definition's."""
    sampler = LazyPrioritized(epsilon=0.2)
    replay = Replay(150, num_envs=3, num_workers=2, batch_size=50, length=length, pad=pad, seed=1, sampler=sampler)
    streams = [Stream(3, seed=worker, longest=12, invalid=0.05, first=3 * worker) for worker in range(2)]
    hand, known = ByHand(len(sampler._tree.kinds), 1.0), {}
    torch.manual_seed(0)
    for turn in range(60):
        replay.extend(streams[turn % 2].rollout(7), worker=turn % 2)
        starts = replay._rings.starts
        places, items = replay._rings.sampled(starts), replay._rings.items(starts)
        assert (replay._rings.drawn(places) == starts).all()
        names = dict(zip(places.tolist(), items.tolist(), strict=True))
        # a block of 256 is of one ring and of 256 of its numbers in a row
        blocks = {(place // 256, item % 6, item // 6 - place % 256) for place, item in names.items()}
        assert len(blocks) == len({block for block, *_ in blocks})
        hand.items = {slot: known.get(name) for slot, name in names.items()}
        if replay.num_starts < 10:
            continue
        expected = probabilities(hand, 0.2)
        batch = replay.sample()
        index, weight = (x if length == 1 else x[:, 0] for x in (batch["index"], batch["weight"]))
        slots, there = replay._rings.slots_of(index.numpy())
        assert there.all()
        drawn = replay._rings.sampled(slots).tolist()
        wanted = [1 / (len(expected) * expected[place]) for place in drawn]
        np.testing.assert_allclose(weight.numpy(), wanted, rtol=1e-6)
        priority = torch.rand(50, dtype=torch.float64) * 2
        replay.update_priorities(batch["index"], priority)
        known |= dict(zip(index.tolist(), priority.tolist(), strict=True))
    assert any(value is None for value in hand.items.values())
    assert int(replay._rings.written.min()) > 3 * replay._rings.size


def test_what_is_new_is_judged_by_its_own_neighbours() -> None:
    """All else is known: of one size in this ring, of another in the other one, of a third in the turn before."""
    sampler = LazyPrioritized(epsilon=0.0)
    replay = Replay(600, num_envs=2, batch_size=8, sampler=sampler)
    stream, rings, seen = Stream(2, longest=10**6), replay._rings, 0
    for _ in range(100):
        replay.extend(stream.rollout(7))
        items = rings.items(rings.starts)
        back, ring = rings.written[items % 2] - items // 2, items % 2
        old = back > 7
        priority = torch.from_numpy(3.0 + 2.0 * ring + 100.0 * (back > 256))
        replay.update_priorities(torch.from_numpy(items[old]), priority[old])
        places, weights = sampler._tree.find(np.arange(len(items)) + 0.5, np.ones(len(items), bool))
        found = dict(zip(places.tolist(), weights.tolist(), strict=True))
        new = ~old & ((items // 2) % 256 >= 7)  # but where none before it is in its block
        assert [found[place] for place in rings.sampled(rings.starts[new])] == (3.0 + 2.0 * ring[new]).tolist()
        seen += int(new.sum())
    assert seen > 1000


def test_saved_and_loaded_it_goes_on_alike(tmp_path: Path) -> None:
    def make() -> Replay:
        sampler = LazyPrioritized(beta=0.5, epsilon=0.2)
        return Replay(60, num_envs=2, batch_size=8, length=3, pad=True, seed=4, sampler=sampler)

    stream = Stream(2)
    one, two = make(), make()

    def turn(replay: Replay, progress: float) -> list[tuple[float, ...]]:
        replay.sampler.anneal(progress)
        batch = replay.sample()
        replay.update_priorities(batch["index"], batch["index"].double() * 37 % 11)
        return [*first(batch), tuple(batch["weight"][:, 0].tolist())]

    for step in range(5):
        one.extend(stream.rollout(6))
        turn(one, step / 10)
    one.dump(tmp_path / "replay")
    two.load(tmp_path / "replay")
    for step in range(20):
        rollout = stream.rollout(3)
        one.extend(rollout)
        two.extend(rollout)
        assert turn(one, 0.5 + step / 40) == turn(two, 0.5 + step / 40)
    other = LazyPrioritized(epsilon=0.3)
    with pytest.raises(ValueError, match=r"has sampler lazy\(alpha=1.0, epsilon=0.2\), this one has lazy"):
        Replay(60, num_envs=2, batch_size=8, length=3, pad=True, sampler=other).load(tmp_path / "replay")


def test_where_all_priorities_are_zero_all_are_alike() -> None:
    replay = Replay(100, num_envs=2, batch_size=4, sampler=LazyPrioritized(epsilon=0.0))
    replay.extend(Stream(2).rollout(20))
    names = replay.sample(1000)["index"].unique()
    assert len(names) == replay.num_starts == 40
    replay.update_priorities(names, torch.zeros(40))
    batch = replay.sample(1000)
    assert len(batch["index"].unique()) == 40
    assert (batch["weight"] == 1).all()


def test_bad_numbers_are_named() -> None:
    for options, words in (
        ({"alpha": -1.0}, r"alpha is -1\.0; it must be at least 0 and finite"),
        ({"beta": float("nan")}, "beta is nan; it must be between 0 and 1"),
        ({"beta": 2.0}, r"beta is 2\.0; it must be between 0 and 1"),
        ({"epsilon": 1.5}, r"epsilon is 1\.5; it must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            LazyPrioritized(**options)
    sampler = LazyPrioritized()
    sampler.bind(4)
    with pytest.raises(ValueError, match="the sampler belongs to a replay already"):
        sampler.bind(4)
    sampler.add(np.arange(3))
    with np.errstate(all="ignore"):
        sampler.update(np.arange(2), np.full(2, 1.5e308))
    with pytest.raises(ValueError, match=r"add up to (inf|nan); it must be finite"):
        sampler.draw(1, torch.Generator())
