"""Atari: protocols, episode ends, and the frames against Gymnasium's wrappers."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from torchrl.envs.utils import check_env_specs

from offtrace.modules.envs import AtariEnv, make_env


def play(env: Any, steps: int, seed: int = 0) -> list[Any]:
    """Random actions; the TensorDicts of the steps."""
    generator = torch.Generator().manual_seed(seed)
    actions = int(env.action_spec.space.n)
    state, out = env.reset(), []
    for _ in range(steps):
        state["action"] = torch.randint(actions, env.batch_size, generator=generator)
        step, state = env.step_and_maybe_reset(state)
        out.append(step.clone())
    return out


@pytest.mark.parametrize("options", [{}, {"protocol": "sticky"}, {"evaluation": True, "last_step": True}])
def test_specs(options: dict[str, Any]) -> None:
    env = AtariEnv("pong", 2, **options)
    assert env.batch_size == (2,)
    check_env_specs(env)
    assert int(env.action_spec.space.n) == (18 if options.get("protocol") == "sticky" else 6)
    env.close()


@pytest.mark.parametrize("name", ["pong", "Pong", "ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_names(name: str) -> None:
    env = make_env(name, 1)
    assert env.name == "pong"
    env.close()


def test_the_emulators_threads_change_nothing() -> None:
    """Games stay in their places, whichever thread is done first."""
    alone, together = (AtariEnv("breakout", 5, seed=7, num_threads=threads) for threads in (1, 3))
    for one, other in zip(play(alone, 120), play(together, 120), strict=True):
        assert (one == other).all()
    alone.close()
    together.close()


@pytest.mark.parametrize(
    ("name", "near"), [("pnog", "pong"), ("MsPackman", "ms_pacman"), ("Acrobott-v1", "Acrobot-v1")]
)
def test_unknown_names_are_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown environment '{name}'; did you mean {near}"):
        make_env(name, 1)


def test_one_action_is_four_frames() -> None:
    """TorchRL appends a frame skip of its own to environments with an attribute of that name, unless told not to."""
    env = AtariEnv("pong", 1, seed=3)
    raw = AtariVectorEnv("pong", 1, autoreset_mode=AutoresetMode.SAME_STEP, reward_clipping=False, life_loss_info=True)
    first, _ = raw.reset(seed=3)
    state = env.reset()
    assert np.array_equal(state["observation"].numpy(), first)
    for action in (0, 2, 3, 2):
        state["action"] = torch.tensor([action])
        step, state = env.step_and_maybe_reset(state)
        frames, *_ = raw.step(np.array([action]))
        assert np.array_equal(step["next", "observation"].numpy(), frames)
    env.close()
    raw.close()


def test_frames_are_gymnasiums() -> None:
    """Same actions from the same reset without no-ops. The picture is scaled by another library: where Gymnasium uses
    OpenCV's area interpolation, ale-py has its own copy of it, so grey values may differ by rounding, no more."""
    pytest.importorskip("cv2", reason="Gymnasium scales with OpenCV")
    game = gymnasium.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
    reference = FrameStackObservation(AtariPreprocessing(game, noop_max=0, frame_skip=4, screen_size=84), 4)
    raw = AtariVectorEnv(
        "breakout", 1, noop_max=0, use_fire_reset=False, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    reference.reset(seed=0)
    raw.reset(seed=0)
    rng, worst, rewards = np.random.default_rng(0), 0, [0.0, 0.0]
    for step in range(120):
        action = int(rng.integers(4))
        frames, reward, terminated, truncated, _ = reference.step(action)
        ours, our_reward, our_terminated, our_truncated, _ = raw.step(np.array([action]))
        assert (bool(terminated), bool(truncated)) == (bool(our_terminated[0]), bool(our_truncated[0]))
        if terminated or truncated:
            break
        rewards[0], rewards[1] = rewards[0] + float(reward), rewards[1] + float(our_reward[0])
        if step >= 4:  # before, the stacks hold different padding
            worst = max(worst, int(np.abs(np.asarray(frames).astype(int) - ours[0].astype(int)).max()))
    assert step > 60
    assert rewards[0] == rewards[1]
    assert worst <= 1


def test_a_lost_life_terminates_and_the_game_goes_on() -> None:
    steps = play(AtariEnv("breakout", 3, seed=1), 400)
    lost = whole = 0
    for before, step in pairwise(steps):
        ended, over = before["next", "done"], before["next", "episode_end"]
        assert not (over & ~ended).any()
        goes_on = ended & ~over
        lost, whole = lost + int(goes_on.sum()), whole + int(over.sum())
        for index in goes_on.flatten().nonzero().flatten().tolist():
            # the step after a lost life starts from the very frames the life ended with, and the sums go on
            assert torch.equal(step["observation"][index], before["next", "observation"][index])
            assert step["is_init"][index]
            assert step["next", "episode_length"][index] == before["next", "episode_length"][index] + 1
        for index in over.flatten().nonzero().flatten().tolist():
            assert not torch.equal(step["observation"][index], before["next", "observation"][index])
            assert step["next", "episode_length"][index] == 1
    assert lost > 3 * whole > 0


def test_the_raw_return_is_the_sum_of_the_rewards() -> None:
    steps = play(AtariEnv("breakout", 4, seed=2), 300)
    sums = torch.zeros(4, 1)
    for step in steps:
        sums = sums + step["next", "reward"]
        torch.testing.assert_close(step["next", "episode_reward"], sums)
        sums = torch.where(step["next", "episode_end"], 0, sums)
    assert max(float(step["next", "reward"].max()) for step in steps) >= 1


def test_evaluation_plays_whole_games() -> None:
    steps = play(AtariEnv("breakout", 2, seed=1, evaluation=True), 400)
    assert sum(int(step["next", "done"].sum()) for step in steps) > 0
    assert all(torch.equal(step["next", "done"], step["next", "episode_end"]) for step in steps)


def test_the_cap_is_a_truncation() -> None:
    steps = play(AtariEnv("pong", 2, max_frames=400), 130)
    truncated = torch.stack([step["next", "truncated"] for step in steps])
    assert truncated.any()
    assert not torch.stack([step["next", "terminated"] for step in steps]).any()
    assert torch.equal(truncated, torch.stack([step["next", "episode_end"] for step in steps]))


@pytest.mark.parametrize("protocol", ["classic", "sticky"])
def test_every_end_of_a_short_game_is_seen(protocol: Any) -> None:
    """The no-ops of the next game are more frames than it had."""
    for step in play(AtariEnv("pong", 3, max_frames=8, evaluation=True, protocol=protocol), 40):
        following = step["next"]
        assert torch.equal(following["truncated"], following["episode_end"])
        assert (following["episode_length"] <= 2).all()


def test_seeds_differ_by_environment_and_repeat() -> None:
    first, again, other = (play(AtariEnv("pong", 3, seed=seed), 20)[-1]["next", "observation"] for seed in (0, 0, 7))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_sticky_actions_stick() -> None:
    """With the same actions two sticky games differ, two classic ones from the same seed do not; no no-ops."""
    games = {}
    for protocol in ("classic", "sticky"):
        env = AtariEnv("pong", 1, protocol=protocol, seed=0)
        games[protocol] = [play(env, 60, seed=1)[-1]["next", "observation"] for _ in range(2)]
        env.close()
    env = AtariEnv("pong", 4, protocol="sticky", seed=0)
    start = env.reset()["observation"]
    assert torch.equal(start[0], start[1])
    last = play(env, 60)[-1]["next", "observation"]
    assert not torch.equal(last[0], last[1])
    env.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_envs": 0}, "num_envs is 0; it must be at least 1"),
        ({"protocol": "clasic"}, "protocol must be 'classic' or"),
        ({"seed": -1}, "seed is -1, and those of 1 games follow it; it must be from 0 to 2147483647"),
        ({"seed": 2**31 - 1, "num_envs": 2}, "it must be from 0 to 2147483646"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AtariEnv("pong", **{"num_envs": 1, **options})


@pytest.mark.slow
def test_a_closed_environment_leaves_nothing_for_the_end_of_the_process() -> None:
    """Where the last collection of garbage is left out, as in the recipes: nanobind tells of each instance left."""
    code = (
        "import atexit, gc\n"
        "from offtrace.modules.envs import make_env\n"
        "gc.disable()\n"
        "env = make_env('pong', 2)\n"
        "env.reset()\n"
        "env.itself = env\n"
        "env.close()\n"
        "atexit.register(gc.freeze)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nanobind" not in done.stderr
