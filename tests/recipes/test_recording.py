"""Recorded episode and reference scores."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict

from offtrace.agents.runs.atari_scores import RANDOM_HUMAN, human_normalised
from offtrace.agents.runs.evaluation import EvaluationResult
from offtrace.agents.runs.recording import Recorder, save_gif
from offtrace.modules.envs import GymEnv, make_env
from offtrace.modules.keys import EPISODE_END, NEXT, OBSERVATION, VALID
from offtrace.recipes.evaluate import report
from tests.agents.published_scores import IMPALA


@pytest.mark.parametrize("shape", [(84, 84), (50, 30, 3)])
def test_a_gif_shows_the_frames(tmp_path: Path, shape: tuple[int, ...]) -> None:
    frames = [np.full(shape, 40 * index, np.uint8) for index in range(5)]
    save_gif(frames, tmp_path / "episode.gif", fps=10, scale=2)
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size == (2 * shape[1], 2 * shape[0])
        assert gif.info["duration"] == 100
        for index in range(5):
            gif.seek(index)
            assert abs(int(np.asarray(gif.convert("L"))[3, 3]) - 40 * index) <= 2


def test_a_long_episode_is_thinned_evenly(tmp_path: Path) -> None:
    frames = [np.full((8, 8), index % 251, np.uint8) for index in range(250)]
    save_gif(frames, tmp_path / "episode.gif", limit=100)
    with Image.open(tmp_path / "episode.gif") as gif:
        assert 80 <= gif.n_frames <= 100
        gif.seek(1)
        assert abs(int(np.asarray(gif.convert("L"))[0, 0]) - 3) <= 1


def test_a_gif_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame, got none"):
        save_gif([], tmp_path / "episode.gif")


def step(value: int, over: bool, shape: tuple[int, ...] = (4, 8, 8)) -> TensorDict:
    """Environment 0 shows ``value`` in its newest frame; everything else is noise."""
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    images[0, -1] = value
    end = torch.tensor([[over], [not over]])
    return TensorDict({OBSERVATION: images, NEXT: TensorDict({EPISODE_END: end}, [2])}, [2])


def test_the_recorder_keeps_the_first_episode_of_the_first_environment() -> None:
    recorder = Recorder(make_env("pong", 2))
    for value, over in ((1, False), (2, False), (3, True), (4, False), (5, True)):
        recorder(step(value, over))
    assert [int(frame[0, 0]) for frame in recorder.frames] == [1, 2, 3]
    assert recorder.frames[0].shape == (8, 8)


class Coloured(gymnasium.Env[Any, Any]):
    """Shows one image all the time."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        self.observation_space, self.shown = space, space.sample()

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return self.shown, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.shown, 0.0, False, False, {}


def test_an_episode_that_a_simulator_broke_off_is_over() -> None:
    """It has no end of its own; what follows is another episode."""
    recorder = Recorder(make_env("pong", 2))
    for value, valid in ((1, True), (2, False), (3, True)):
        recorder(step(value, False).set((NEXT, VALID), torch.tensor([[valid], [not valid]])))
    assert [int(frame[0, 0]) for frame in recorder.frames] == [1, 2]


def test_the_recorder_keeps_the_colours_of_an_observation() -> None:
    seen = gymnasium.spaces.Box(0, 255, (9, 6, 3), np.uint8)
    env = GymEnv(lambda: Coloured(seen), 2)
    recorder = Recorder(env)
    recorder(env.step(env.reset().set("action", torch.zeros(2, dtype=torch.int64))))
    np.testing.assert_array_equal(recorder.frames[0], env._envs[0].shown)


def test_the_recorder_wants_pictures() -> None:
    with pytest.raises(ValueError, match="CartPole-v1 has no pictures: it does not render, and its observations"):
        Recorder(make_env("CartPole-v1", 2))


@pytest.mark.parametrize("name", ["CartPole-v1", "cartpole-swingup"])
def test_the_recorder_takes_every_fourth_picture_and_the_last(name: str, tmp_path: Path) -> None:
    """The last one shows where the episode ended, though the environment has begun another one by then."""
    env = make_env(name, 2, pictures=True, **({} if name == "CartPole-v1" else {"time_limit": 0.1}))
    recorder = Recorder(env)
    state, steps = env.reset(), 0
    while not state["is_init"][0] or not steps:
        state["action"] = torch.ones(2, dtype=torch.int64) if name == "CartPole-v1" else torch.ones(2, 1)
        step, state = env.step_and_maybe_reset(state)
        recorder(step)
        steps += 1
    assert len(recorder.frames) == (steps - 1) // 4 + 1 + ((steps - 1) % 4 != 0)
    assert recorder.frames[0].shape[-1] == 3
    shown = len(recorder.frames)
    assert (recorder.frames[-1] != recorder.frames[0]).any()
    recorder(step)
    assert len(recorder.frames) == shown, "one episode only"
    recorder.save(tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == shown
        assert gif.info["duration"] == 40


@pytest.mark.parametrize(("column", "median", "mean"), [(0, 0.932, 7.074), (1, 1.918, 15.925)])
def test_reference_scores_reproduce_the_published_medians(column: int, median: float, mean: float) -> None:
    """IMPALA shallow and deep, 57 games: every random and human score enters."""
    assert RANDOM_HUMAN.keys() == IMPALA.keys()
    assert len(IMPALA) == 57
    normalised = [human_normalised(game, scores[column]) for game, scores in IMPALA.items()]
    values = [value for value in normalised if value is not None]
    assert statistics.median(values) == pytest.approx(median, abs=5e-4)
    # the median hangs on one game, the mean on all; the table of published scores gives these to the digit
    assert statistics.mean(values) == pytest.approx(mean, abs=5e-4)


def test_human_normalised_score() -> None:
    assert human_normalised("pong", -20.7) == 0
    assert human_normalised("ALE/Pong-v5", 14.6) == pytest.approx(1)
    assert human_normalised("CartPole-v1", 500) is None
    assert human_normalised("adventure", 1) is None, "an Atari game without published scores"


def test_the_report_of_an_evaluation() -> None:
    lines = report(EvaluationResult([1.0, 2.0, 4.0, 9.0], [10, 10, 20, 20], "greedy"), "pong", "classic")
    assert lines[0] == "pong, classic protocol, greedy actions, 4 whole episodes, raw scores"
    assert lines[1] == "mean 4.00, standard error 1.78, std 3.56 between episodes"
    assert lines[2] == "median 3, min 1, max 9"
    assert lines[3] == "mean length 15 agent steps"
    assert lines[4].startswith("human-normalised score 70.0 %")
    assert len(report(EvaluationResult([5.0], [3], "sample"), "CartPole-v1", "classic")) == 4
