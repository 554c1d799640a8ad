"""Scores: whole games, evenly dealt, and normalised as published."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from offtrace.agents.atari_scores import RANDOM_HUMAN, human_normalised
from offtrace.agents.evaluation import evaluate
from offtrace.agents.media import plot_curve, read_curves, save_gif
from offtrace.modules.envs import make_env
from offtrace.modules.networks import build_policy
from tests.agents.published_scores import IMPALA


@pytest.mark.parametrize(("column", "median"), [(0, 0.932), (1, 1.918)])
def test_published_medians_come_out(column: int, median: float) -> None:
    scores = [human_normalised(game, row[column]) for game, row in IMPALA.items()]
    assert len(scores) == len(RANDOM_HUMAN) == 57
    assert all(score is not None for score in scores)
    assert statistics.median(score for score in scores if score is not None) == pytest.approx(median, abs=5e-4)


def test_only_atari_is_normalised() -> None:
    assert human_normalised("CartPole-v1", 500) is None
    assert human_normalised("ALE/Pong-v5", 14.6) == pytest.approx(1.0)


def test_games_are_dealt_evenly_and_counted_whole() -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    result = evaluate(policy, make_env("CartPole-v1", 4, seed=1), 8)
    assert len(result.returns) == len(result.lengths) == 8
    assert result.returns == [float(length) for length in result.lengths]  # CartPole gives 1 a step
    assert result.mean == pytest.approx(np.mean(result.returns))
    assert result.std == pytest.approx(np.std(result.returns, ddof=1))


def test_modes() -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    greedy = [evaluate(policy, make_env("CartPole-v1", 2, seed=1), 2, mode="greedy").returns for _ in range(2)]
    assert greedy[0] == greedy[1]
    torch.manual_seed(0)
    sampled = [evaluate(policy, make_env("CartPole-v1", 6, seed=1), 6).returns for _ in range(2)]
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize(
    ("episodes", "mode", "words"), [(3, "sample", "positive multiple of the 2"), (2, "best", "mode must")]
)
def test_bad_arguments(episodes: int, mode: str, words: str) -> None:
    policy = build_policy(network="mlp", observation_shape=[4], num_actions=2)
    with pytest.raises(ValueError, match=words):
        evaluate(policy, make_env("CartPole-v1", 2), episodes, mode=mode)  # type: ignore[arg-type]


def test_curve_and_gif(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("eval/return,step,train/return\n,1000,1.5\n2.5,2000,\n,3000,2.0\n")
    assert read_curves(metrics) == ([(1000, 1.5), (3000, 2.0)], [(2000, 2.5)])
    plot_curve({"seed 0": metrics}, tmp_path / "curve.png", title="x", goal=2.0)
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    frames = [np.full((8, 8), value, np.uint8) for value in range(0, 250, 10)]
    save_gif(frames, tmp_path / "g.gif", scale=3, limit=10)
    gif = Image.open(tmp_path / "g.gif")
    assert gif.size == (24, 24)
    assert 1 < gif.n_frames <= 10  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "none.gif")
