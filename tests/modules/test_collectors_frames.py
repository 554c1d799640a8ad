"""Rollouts that hold each frame once: bit for bit what the actor saw, whatever ends where."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.collectors import PackedRollout, make_collector
from offtrace.modules.collectors.buffer_pool import BufferPool
from offtrace.modules.collectors.frames import FRAMES, Packer
from offtrace.modules.envs import EnvironmentFailure, make_env
from offtrace.modules.networks import build_policy

CHANNELS, SIDE = 2, 3
_STACKS = ("observation", ("next", "observation"))


def rollout(rows: int, steps: int, stack: int, ends: float, seed: int = 0) -> TensorDict:
    """Stacks that move by one frame a step; behind an end stands a first stack of frames of its own."""
    generator = torch.Generator().manual_seed(seed)

    def frames(number: int) -> Tensor:
        return torch.randint(256, (number, CHANNELS, SIDE, SIDE), dtype=torch.uint8, generator=generator)

    done = torch.rand(rows, steps, 1, generator=generator) < ends
    observation = torch.empty(rows, steps, stack, CHANNELS, SIDE, SIDE, dtype=torch.uint8)
    successor = torch.empty_like(observation)
    for n in range(rows):
        state = frames(stack)
        for t in range(steps):
            observation[n, t] = state
            state = successor[n, t] = torch.cat([state[1:], frames(1)])
            if done[n, t]:
                state = frames(stack)
    found = {"observation": observation.flatten(2, 3), "number": torch.arange(rows * steps).view(rows, steps)}
    return TensorDict({**found, "next": {"observation": successor.flatten(2, 3), "done": done}}, [rows, steps])


@pytest.mark.parametrize("stack", [2, 4])
@pytest.mark.parametrize("ends", [0.0, 0.2, 1.0])
def test_packed_and_unpacked_is_the_rollout(stack: int, ends: float) -> None:
    for seed in range(5):
        given = rollout(3, 7, stack, ends, seed)
        packed = Packer(stack).pack(given)
        assert not any(key in packed for key in _STACKS)
        found = PackedRollout(packed, given.shape, stack).unpack()
        assert set(found.keys(True, True)) == set(given.keys(True, True))
        for key in given.keys(True, True):
            assert torch.equal(found[key], given[key]), key


def test_every_frame_is_there_once() -> None:
    """T + k frames of an environment, and k more for each end inside."""
    given = rollout(3, 7, 4, 0.3, seed=1)
    ends = int(given["next", "done"][:, :-1].sum())
    assert ends > 0
    frames = Packer(4).pack(given)[FRAMES]
    number = 3 * (7 + 4) + 4 * ends
    assert len(frames) == number + number // 128
    assert len(frames[:number].flatten(1).unique(dim=0)) == number


def test_frames_are_written_into_the_memory_that_is_there() -> None:
    packer = Packer(4)
    first = packer.pack(rollout(3, 7, 4, 0.0))[FRAMES]
    assert packer.pack(rollout(3, 7, 4, 0.0, seed=1), first)[FRAMES] is first
    assert packer.pack(rollout(3, 7, 4, 1.0, seed=2), first)[FRAMES] is not first


def test_the_stacks_memory_is_used_again_when_nobody_holds_it() -> None:
    given = TensorDict(
        {
            "observation": torch.zeros(8, 16, 4, 84, 84, dtype=torch.uint8),
            "next": {
                "observation": torch.zeros(8, 16, 4, 84, 84, dtype=torch.uint8),
                "done": torch.zeros(8, 16, 1, dtype=torch.bool),
            },
        },
        [8, 16],
    )
    packed = PackedRollout(Packer(4).pack(given), given.shape, 4, BufferPool())
    one = packed.unpack()
    address, kept = one["observation"].data_ptr(), one["next", "observation"]
    del one
    assert packed.unpack()["observation"].data_ptr() != address, "a view still uses it"
    del kept
    assert packed.unpack()["observation"].data_ptr() == address


@pytest.mark.parametrize("where", ["inside a stack", "between two steps"])
def test_what_is_no_stack_is_refused(where: str) -> None:
    given = rollout(3, 7, 4, 0.0)
    changed = given["observation"] if where == "between two steps" else given["next", "observation"]
    changed[1, 2, 0] += 1  # the oldest frame
    with pytest.raises(
        ValueError, match=r"frame_stack is 4, but from step \d of environment 1 .* does not move by one"
    ):
        Packer(4).pack(given)
    with pytest.raises(ValueError, match=r"frame_stack is 3; the observation must be one tensor .* got \[8, 3, 3\]"):
        Packer(3).pack(rollout(3, 7, 4, 0.0))


def test_where_a_simulator_failed_nothing_is_known_of_the_successor() -> None:
    """ControlEnv repeats the state there, which is no stack moved by one frame."""
    given = rollout(3, 7, 4, 0.0)
    valid = torch.ones(3, 7, 1, dtype=torch.bool)
    valid[1, 2] = False
    given["next", "observation"][1, 2] = given["observation"][1, 2]
    given["next", "done"][1, 2] = True
    given["next", "valid"] = valid
    found = PackedRollout(Packer(4).pack(given), given.shape, 4).unpack()
    assert torch.equal(found["observation"], given["observation"])
    where = valid.squeeze(-1)
    assert torch.equal(found["next", "observation"][where], given["next", "observation"][where])


def pong(workers: int, frame_stack: int, **options: Any) -> list[TensorDictBase]:
    """Three rollouts of a random policy, with lives lost and, by the step limit, games cut off."""
    policy = build_policy(network="shallow", observation_shape=[4, 84, 84], num_actions=4, **options)
    env = partial(make_env, "breakout", 3, last_step=bool(options))
    with make_collector(
        env, policy, frames_per_batch=3 * 40, num_workers=workers, seed=5, frame_stack=frame_stack
    ) as collector:
        return [next(collector).clone() for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"recurrent": 8}])
def test_games_arrive_as_the_actor_saw_them(workers: int, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    whole = pong(workers, 1, **options)
    torch.manual_seed(1)
    packed = pong(workers, 4, **options)
    assert any(bool(x["next", "done"][:, :-1].any()) for x in whole), "no episode ended inside a rollout"
    for one, other in zip(whole, packed, strict=True):
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        for key in one.keys(True, True):
            assert torch.equal(one[key], other[key]), key


@pytest.mark.slow
def test_frames_of_several_actors_come_as_one() -> None:
    """The same two rollouts together, shuffled, and one after the other."""
    torch.manual_seed(1)
    policy = build_policy(network="shallow", observation_shape=[4, 84, 84], num_actions=4)
    order = torch.tensor([2, 5, 0, 1, 4, 3])
    found: list[list[TensorDictBase]] = []
    for together in (1, 2):
        with make_collector(
            partial(make_env, "breakout", 3), policy, frames_per_batch=3 * 40, num_workers=2, frame_stack=4,
            rollouts_per_batch=together,
        ) as collector:  # fmt: skip
            collector.order = None if together == 1 else lambda _: order
            found.append([next(collector).clone() for _ in range(4 // together)])
    assert any(bool(x["next", "done"][:, :-1].any()) for x in found[0]), "no episode ended inside a rollout"
    for number, joined in enumerate(found[1]):
        apart = torch.cat(found[0][2 * number : 2 * number + 2])[order]
        for key in apart.keys(True, True):
            assert torch.equal(joined[key], apart[key]), key


def test_an_order_is_applied_to_the_stacks_too() -> None:
    order = torch.tensor([2, 0, 1])
    found = []
    for given in (None, lambda size: order[:size]):
        torch.manual_seed(1)
        policy = build_policy(network="shallow", observation_shape=[4, 84, 84], num_actions=4)
        with make_collector(
            partial(make_env, "breakout", 3), policy, frames_per_batch=3 * 8, num_workers=0, frame_stack=4
        ) as collector:
            collector.order = given
            found.append(next(collector))
    for key in (*_STACKS, "action", ("next", "reward")):
        assert torch.equal(found[1][key], found[0][key][order]), key


def test_a_wrong_number_of_frames_is_one_sentence() -> None:
    policy = build_policy(network="shallow", observation_shape=[4, 84, 84], num_actions=4)
    with (
        make_collector(
            partial(make_env, "breakout", 3), policy, frames_per_batch=3 * 8, num_workers=0, frame_stack=2
        ) as collector,
        pytest.raises(EnvironmentFailure, match="frame_stack is 2, but from step 0 of environment 0"),
    ):
        next(collector)
