"""The sum tree against direct cumulative sums: exact where sums are, never a zero, no drift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offtrace.modules.replay.sum_tree import SumTree

SIZES = [1, 7, 16, 17, 256, 257, 5000]


@pytest.mark.parametrize("size", SIZES)
def test_against_a_direct_cumulative_sum(size: int) -> None:
    """Whole numbers, whose sums are exact: thousands of changes, with repeated and neighbouring indices and zeros."""
    rng = np.random.default_rng(size)
    tree, numbers = SumTree(size), np.zeros(size)
    for turn in range(3000):
        index = rng.integers(size, size=rng.integers(1, 40))
        if turn % 3 == 0:
            index = np.arange(index[0], min(size, index[0] + 60))
        value = rng.integers(0, 5, size=len(index)).astype(float)
        tree.set(index, value)
        numbers[index] = value
        sums = np.cumsum(numbers)
        assert tree.total == sums[-1]
        if turn % 10 == 0 and tree.total:
            mass = np.concatenate([[0.0], rng.random(30) * tree.total, sums[sums < tree.total][:30]])
            found, values = tree.find(mass)
            np.testing.assert_array_equal(found, np.searchsorted(sums, mass, side="right"))
            np.testing.assert_array_equal(values, numbers[found])
    np.testing.assert_array_equal(tree.leaves, numbers)


@pytest.mark.parametrize("size", SIZES)
def test_it_does_not_drift(size: int) -> None:
    """Numbers of 24 orders of magnitude: the tree after thousands of changes is the one that is built anew."""
    rng = np.random.default_rng(size)
    tree, anew = SumTree(size), SumTree(size)
    for _ in range(3000):
        tree.set(rng.integers(size, size=20), 10 ** rng.uniform(-12, 12, size=20))
    anew.fill(tree.leaves.copy())
    assert tree.total == anew.total
    assert tree.total == pytest.approx(tree.leaves.sum(), rel=1e-13)
    mass = rng.random(500) * tree.total
    for one, other in zip(tree.find(mass), anew.find(mass), strict=True):
        np.testing.assert_array_equal(one, other)
    tree.set(np.arange(size), 0.0)
    assert tree.total == 0.0


@pytest.mark.parametrize("size", SIZES)
def test_a_zero_is_never_found(size: int) -> None:
    """Nor a leaf that is not there, whatever rounding does at the ends of the sums."""
    rng = np.random.default_rng(size)
    tree = SumTree(size)
    for _ in range(200):
        numbers = np.where(rng.random(size) < 0.9, 0.0, 10 ** rng.uniform(-300, 3, size=size))
        numbers[rng.integers(size)] = rng.choice([5e-324, 0.1, 1e300])
        tree.fill(numbers)
        sums = np.cumsum(numbers)
        edges = np.concatenate([np.nextafter(sums, 0), sums, np.nextafter(sums, np.inf), [0.0, tree.total]])
        found, values = tree.find(np.clip(edges, 0.0, tree.total))
        assert found.max() < size
        assert (values > 0).all()
        np.testing.assert_array_equal(values, numbers[found])


def test_a_change_that_was_broken_off_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between a number and its sums."""
    tree = SumTree(1000)
    tree.fill(np.ones(1000))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_sum_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tree.set(np.array([400]), 6.0)
    assert tree.find(np.array([420.0]))[0] == [415]
    assert tree.total == 1005.0
