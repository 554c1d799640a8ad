"""Stacks of frames of which a replay stores each once: samples are the environment's own observations, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules.envs import env_info, make_env
from offtrace.modules.replay import Replay
from offtrace.modules.replay.frames import check_shifted
from offtrace.modules.replay.rings import STEP, Rings

SIDE = (2, 2)
COMPARED = (
    "observation", "action",
    ("next", "observation"), ("next", "reward"), ("next", "terminated"), ("next", "truncated"),
)  # fmt: skip


class Stream:
    """Rollouts of N environments whose every state has a newest frame ``[1, 2, 2]`` of its own: its number in bytes.

    ``padding`` says what the older frames of an episode's first state are: zeros, the first frame again, the frames of
    the episode before, as after a lost life, or noise. Episodes end as terminated, as truncated, in a step that is not
    valid, or with a restart that only ``is_init`` tells of.
    """

    def __init__(
        self, envs: int, frames: int = 3, *, padding: str = "zeros", seed: int = 0, longest: int = 9, wild: bool = True
    ) -> None:
        self.random = random.Random(seed)
        self.envs, self.frames, self.padding, self.longest, self.wild = envs, frames, padding, longest, wild
        self.count = seed << 16
        self.stack = torch.zeros(envs, frames, *SIDE, dtype=torch.uint8)
        self.step, self.end = [0] * envs, [1] * envs
        for env in range(envs):
            self.start(env)

    def start(self, env: int) -> None:
        self.step[env], self.end[env] = 0, self.random.randint(1, self.longest)
        new = self.frame()
        older = {
            "zeros": torch.zeros_like(self.stack[env, 1:]),
            "repeat": new.expand(self.frames - 1, *SIDE),
            "life": self.stack[env, 1:],
            "noise": torch.tensor(self.random.choices(range(256), k=4 * (self.frames - 1))).byte().view(-1, *SIDE),
        }[self.padding]
        self.stack[env] = torch.cat([older, new])

    def frame(self) -> Tensor:
        self.count += 1
        return torch.tensor(list(self.count.to_bytes(4, "big")), dtype=torch.uint8).view(1, *SIDE)

    def rollout(self, steps: int) -> TensorDict:
        rows = [[self.advance(env) for _ in range(steps)] for env in range(self.envs)]
        return torch.stack([torch.stack(row) for row in rows])  # type: ignore[arg-type,return-value]

    def advance(self, env: int) -> TensorDict:
        here, init = self.stack[env].clone(), self.step[env] == 0
        failed, restart = (self.wild and self.random.random() < 0.05 for _ in range(2))
        self.step[env] += 1
        if not failed:
            self.stack[env] = torch.cat([self.stack[env, 1:], self.frame()])
        following = self.stack[env].clone()  # a failed step comes with the observation before it
        over = failed or self.step[env] == self.end[env]
        terminated = over and not failed and self.random.random() < 0.5
        if over or restart:
            self.start(env)
        flag = lambda value: torch.tensor([value])  # noqa: E731
        successor = {
            "observation": following, "reward": torch.rand(1), "terminated": flag(terminated),
            "truncated": flag(over and not terminated), "done": flag(over), "valid": flag(not failed),
        }  # fmt: skip
        root = {"observation": here, "is_init": flag(init), "action": torch.rand(2)}
        return TensorDict({**root, "next": TensorDict(successor)})


def number(observation: Tensor) -> int:
    """The newest frame's."""
    return int.from_bytes(bytes(observation[-1].flatten().tolist()), "big")


class ByHand:
    """The rings as lists of ("older" | "step" | "final" | "head", number), and the rows by number."""

    def __init__(self, rings: int, capacity: int, frames: int, length: int, pad: bool) -> None:
        self.size, self.frames, self.length, self.pad = capacity // rings + frames, frames, length, pad
        self.rings: list[list[tuple[str, int]]] = [[] for _ in range(rings)]
        self.rows: dict[int, dict[Any, Tensor]] = {}

    def extend(self, rollout: TensorDict, first: int) -> None:
        for env in range(rollout.shape[0]):
            ring = self.rings[first + env]
            for row in rollout[env].unbind(0):
                valid, init = bool(row["next", "valid"]), bool(row["is_init"])
                here, there = number(row["observation"]), number(row["next", "observation"])
                joins = bool(ring) and ring[-1] == ("head", here) and valid and not init
                if joins:
                    ring.pop()
                elif ring and ring[-1][0] == "head":
                    ring[-1] = ("final", ring[-1][1])
                if valid:
                    self.rows[here] = {key: row[key] for key in COMPARED}
                    ring += [] if joins else [("older", 0)] * (self.frames - 1)
                    ring += [("step", here), ("final" if row["next", "done"] else "head", there)]
            del ring[: -self.size]

    def steps(self) -> int:
        return sum(kind == "step" for ring in self.rings for kind, _ in ring[self.frames - 1 :])

    def starts(self) -> dict[int, list[int]]:
        """Number of the first state to those of the window's states, the last one's successor included."""
        found = {}
        for ring in self.rings:
            for index in range(self.frames - 1, len(ring)):
                window = []
                for kind, state in ring[index : index + self.length + 1]:
                    window.append(state)
                    if kind != "step":
                        break
                if ring[index][0] == "step" and (
                    len(window) == self.length + 1 or (self.pad and ring[index + len(window) - 1][0] == "final")
                ):
                    found[ring[index][1]] = window
        return found


def check_batch(batch: TensorDict, hand: ByHand, wanted: dict[int, list[int]]) -> None:
    flat = batch if batch.ndim == 2 else batch.unsqueeze(1)
    # tensors, not rows of the TensorDict: reading entry after entry takes five times as long
    entries, valid = {key: flat[key] for key in COMPARED}, flat.get("valid", None)
    for index, first in enumerate(entries["observation"][:, 0]):
        numbers = wanted[number(first)]
        known = len(numbers) - 1
        truth = [hand.rows[state] for state in numbers[:known]]
        for key, entry in entries.items():
            assert torch.equal(entry[index, :known], torch.stack([row[key] for row in truth])), key
        for key in ("observation", ("next", "observation")):  # padding repeats the state after the last step
            assert (entries[key][index, known:] == truth[-1]["next", "observation"]).all()
        if valid is not None:
            assert valid[index].flatten().tolist() == [t < known for t in range(hand.length)]


def run(replay: Replay, padding: str, *, longest: int = 16, wild: bool = True) -> None:
    """Random rollouts of two actors, checked after each against lists kept by hand."""
    rings, frames = replay._rings, replay.frame_stack
    hand = ByHand(rings.number, replay.capacity, frames, replay.length, replay.pad)
    options: dict[str, Any] = {"padding": padding, "longest": longest, "wild": wild}
    streams = [Stream(replay.num_envs, frames, seed=worker + 1, **options) for worker in range(2)]
    rng = random.Random(0)
    for turn in range(120):
        worker = rng.randrange(2)
        if turn % 13 == 12:  # an actor was restarted: its environments begin anew
            for env in range(replay.num_envs):
                streams[worker].start(env)
        rollout = streams[worker].rollout(rng.choice([1, 2, 5, 9]))
        replay.extend(rollout, worker=worker)
        hand.extend(rollout, worker * replay.num_envs)
        wanted = hand.starts()
        assert len(replay) == hand.steps()
        starts = replay._batches.take(("observation",), torch.from_numpy(rings.starts))
        assert sorted(map(number, starts)) == sorted(wanted)
        if wanted:
            check_batch(replay.sample(24), hand, wanted)
    assert int(rings.written.min()) > 5 * rings.size
    assert (replay.dropped > 0) == wild


@pytest.mark.parametrize("padding", ["zeros", "repeat", "life", "noise"])
@pytest.mark.parametrize(
    ("frames", "length", "pad", "storage"),
    [
        pytest.param(3, 1, False, "tensor", marks=pytest.mark.slow),
        (2, 1, False, "memmap"),
        pytest.param(4, 3, False, "tensor", marks=pytest.mark.slow),
        (3, 5, True, "tensor"),
    ],
)
def test_samples_are_the_environments_own(padding: str, frames: int, length: int, pad: bool, storage: Any) -> None:
    """Terminated, truncated and invalid steps, restarts within and between rollouts, several turns of the ring."""
    replay = Replay(
        180, num_envs=2, num_workers=2, batch_size=8, length=length, pad=pad, frame_stack=frames, storage=storage
    )
    run(replay, padding)


@pytest.mark.parametrize("steps", [3, 9])
def test_sequences_without_overlap_where_older_frames_take_slots_too(steps: int) -> None:
    replay = Replay(90, num_envs=2, batch_size=8, length=4, pad=True, overlap=False, frame_stack=3)
    stream = Stream(2, longest=11, wild=False)
    for _ in range(40):
        replay.extend(stream.rollout(steps))
        _, rows, valid = replay._rings.windows(replay._rings.starts)
        assert valid is not None
        held = np.bincount(rows[valid], minlength=len(replay._rings.flags))
        assert held.max() <= 1
        left = (replay._rings.flags & STEP != 0).sum() - held.sum()
        assert 0 <= left <= 2 * 2 * 3, "the piece under way, and the one that is being overwritten"


@pytest.mark.parametrize("pad", [False, True])
def test_windows_almost_as_long_as_a_lane(pad: bool) -> None:
    """A rollout that completes a window may overwrite the older frames of its first state."""
    replay = Replay(100, num_envs=2, num_workers=2, batch_size=8, length=20, pad=pad, frame_stack=3)
    run(replay, "noise", longest=60, wild=False)


@pytest.mark.parametrize("change", ["one slot too few", "one slot too far", "not around the ring", "margin forgotten"])
def test_the_check_sees_a_wrong_look_back(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to the code after which the test above must fail."""

    def stacks(self: Rings, slots: Tensor) -> Tensor:
        place = (slots % self.size)[:, None]
        back = torch.arange(self.older, -1, -1)
        if change == "one slot too few":
            back = (back - 1).clamp(min=0)
        elif change == "one slot too far":
            back = back + (back > 0)
        shifted = place - back
        wrapped = shifted.clamp(min=0) if change == "not around the ring" else shifted % self.size
        return slots[:, None] - place + wrapped

    overwrite = Rings._overwrite
    if change == "margin forgotten":  # the last ones of two rings
        monkeypatch.setattr(Rings, "_overwrite", lambda self, x, other, flags: overwrite(self, x, other[:-4], flags))
    else:
        monkeypatch.setattr(Rings, "stacks", stacks)
    with pytest.raises(AssertionError):
        run(Replay(180, num_envs=2, num_workers=2, batch_size=8, frame_stack=3), "noise")


def test_a_restart_shows_in_the_older_frames() -> None:
    """The newest frame is that in which the ring stood, the older ones are not, and no flag tells of a new episode."""
    stream = Stream(1, longest=1000, wild=False)
    replay = Replay(100, num_envs=1, batch_size=1, frame_stack=3)
    for _ in range(3):
        rollout = stream.rollout(6).exclude("is_init")
        replay.extend(rollout)
        stream.stack[0, :-1] = 255 - stream.stack[0, :-1]
    assert replay._rings.written.item() == 3 * (2 + 6) + 2  # two final states, and the provisional one is not counted
    truth = {number(rollout["observation"][0, t]): rollout[0, t] for t in range(6)}
    batch = replay.sample(200)
    checked = 0
    for row in batch.unbind(0):
        if number(row["observation"]) in truth:
            same = truth[number(row["observation"])]
            assert torch.equal(row["observation"], same["observation"])
            assert torch.equal(row["next", "observation"], same["next", "observation"])
            checked += 1
    assert checked


@pytest.mark.parametrize("storage", ["tensor", "memmap"])
@pytest.mark.parametrize(("length", "pad"), [(1, False), (4, True)])
@pytest.mark.parametrize("turns", [3, 25])
def test_after_a_load_everything_goes_on(storage: Any, length: int, pad: bool, turns: int, tmp_path: Path) -> None:
    """Samples and insertions, before and after the ring has turned over."""
    numbers: dict[str, Any] = {"num_envs": 2, "batch_size": 8, "length": length, "pad": pad, "frame_stack": 3}
    replay = Replay(80, storage=storage, path=tmp_path / "live" if storage == "memmap" else None, **numbers)
    stream = Stream(2, padding="noise")
    for _ in range(turns):
        replay.extend(stream.rollout(7))
    replay.dump(tmp_path / "replay")
    other = Replay(80, seed=9, **numbers)
    other.load(tmp_path / "replay")
    for _ in range(15):
        assert (replay.sample() == other.sample()).all()
        rollout = stream.rollout(5)
        assert replay.extend(rollout) == other.extend(rollout)
    whole = Replay(80, **{**numbers, "frame_stack": 1})
    with pytest.raises(ValueError, match=r"has frame_stack 3, this one has 1"):
        whole.load(tmp_path / "replay")


def _own(rollout: TensorDict, replay: Replay, chunk: int) -> None:
    """Inserts a rollout in pieces; every sample must be one of its steps."""
    for piece in rollout.split(chunk, 1):
        replay.extend(piece)
    name = lambda row: tuple(  # noqa: E731
        row[key].numpy().tobytes() for key in ("observation", ("next", "observation"), "action", ("next", "terminated"))
    )
    truth = {name(row) for row in rollout.reshape(-1).unbind(0)}
    seen = {name(row) for row in replay.sample(800).unbind(0)}
    assert seen <= truth
    assert len(seen) > 0.5 * len(replay)


def test_atari() -> None:
    """Zeros ahead of a game, and lost lives, which end an episode but not the stack."""
    torch.manual_seed(0)
    env = make_env("breakout", 2, seed=1)
    replay = Replay(200, num_envs=2, batch_size=8, frame_stack=env_info("breakout").frame_stack)
    assert replay.frame_stack == 4
    rollout = env.rollout(250, break_when_any_done=False)
    assert rollout["next", "terminated"].sum() > 4
    assert rollout["next", "episode_end"].any()
    _own(rollout, replay, 10)


@pytest.mark.slow
def test_images_of_dm_control() -> None:
    """The first frame again, ahead of an episode."""
    options: dict[str, Any] = {"pixels": True, "height": 16, "width": 16, "frame_stack": 3, "time_limit": 0.15}
    assert env_info("cartpole-swingup", **options).frame_stack == 3
    assert env_info("cartpole-swingup").frame_stack == 1
    rollout = make_env("cartpole-swingup", 2, **options).rollout(60, break_when_any_done=False)
    assert rollout["next", "truncated"].sum() == 2 * 4
    _own(rollout, Replay(60, num_envs=2, batch_size=8, frame_stack=3), 7)


def test_memory_is_that_of_a_frame() -> None:
    sizes = []
    for frames in (1, 3):
        replay = Replay(100, num_envs=2, batch_size=4, frame_stack=frames)
        replay.extend(Stream(2).rollout(20))
        sizes.append(replay.bytes_per_slot)
    assert sizes[0] - sizes[1] == 2 * 4
    stored = replay._storage.leaves["observation",]
    assert stored.shape[1:] == (1, *SIDE)
    assert stored.is_contiguous()


def test_as_many_steps_as_without_stacks() -> None:
    """One episode that does not end: the capacity is that of steps which can be sampled."""
    for frames in (1, 3):
        replay = Replay(60, num_envs=2, batch_size=4, frame_stack=frames)
        stream = Stream(2, longest=10**6, wild=False)
        stream.end = [10**6] * 2
        for _ in range(10):
            replay.extend(stream.rollout(11))
        assert len(replay) == replay.num_starts == 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, env, t: x["observation"][env, t, 0].fill_(7), "from step 3 of environment 1 to the next"),
        (lambda x, env, t: x["observation"].copy_(x["observation"].flip(2)), "from step 0 of environment 0"),
        (lambda x, env, t: x["next", "observation"][env, -1, 1].fill_(7), "from step 8 of environment 1 to the next"),
        (lambda x, env, t: x["next", "observation"][0, 2, 0].fill_(7), "from step 2 of environment 0 to the next"),
    ],
)
def test_what_does_not_move_by_a_frame_is_refused(change: Any, words: str) -> None:
    """Within a run, at the end of a rollout and of an episode; in the first insertion and in a later one."""
    stream = Stream(2, longest=1000, wild=False)
    replay = Replay(60, num_envs=2, batch_size=8, frame_stack=3)
    for inserted in (0, 18):
        stream.end = [stream.step[0] + 3, 1000]
        rollout = stream.rollout(9)
        bad = rollout.clone()
        change(bad, 1, 4)
        with pytest.raises(ValueError, match=f"frame_stack is 3, but {words}"):
            replay.extend(bad)
        assert replay.inserted == inserted
        replay.extend(rollout)
    twin = Replay(60, num_envs=2, batch_size=8, frame_stack=3)
    twin.extend(rollout)
    assert set(map(number, replay.sample(500)["observation"])) > set(map(number, twin.sample(500)["observation"]))


def test_what_is_no_stack_is_refused() -> None:
    rollout = Stream(2, frames=4).rollout(5)
    with pytest.raises(ValueError, match=r"frame_stack is 3; the first dimension .* a multiple of it, got \[4, 2, 2\]"):
        Replay(60, num_envs=2, batch_size=8, frame_stack=3).extend(rollout)
    with pytest.raises(ValueError, match=r"frame_stack is 2, but from step \d of environment 0 to the next"):
        Replay(60, num_envs=2, batch_size=8, frame_stack=2).extend(rollout)
    with pytest.raises(ValueError, match=r"frame_stack is 0; it must be at least 1"):
        Replay(60, num_envs=2, batch_size=8, frame_stack=0)
    for key in ("observation", ("next", "observation")):
        rollout[key] = TensorDict({"eye": rollout[key]}, rollout.shape)
    with pytest.raises(ValueError, match=r"frame_stack is 4; the observation must be one tensor then, got several"):
        Replay(60, num_envs=2, batch_size=8, frame_stack=4).extend(rollout)
    with pytest.raises(ValueError, match=r"a rollout of 9 steps does not fit the 6 slots"):
        Replay(10, num_envs=2, batch_size=8, frame_stack=3).extend(Stream(2).rollout(9))
    with pytest.raises(ValueError, match=r"lacks 'observation', at its root or under 'next'"):
        Replay(60, num_envs=2, batch_size=8, frame_stack=3).extend(Stream(2).rollout(9).exclude("observation"))


def test_stacks_of_bfloat16_are_compared_too() -> None:
    frames = torch.arange(5.0).view(1, 5, 1, 1, 1).to(torch.bfloat16)
    stacks = torch.cat([frames[:, :-1], frames[:, 1:]], 2)  # of two frames each
    entries = {("observation",): stacks[:, :-1], ("next", "observation"): stacks[:, 1:]}
    valid, joined = np.ones((1, 3), bool), np.ones((1, 2), bool)
    check_shifted(entries, 2, valid, joined)
    with pytest.raises(ValueError, match="from step 0 of environment 0 to the next the observation does not"):
        check_shifted({key: x.flip(2) for key, x in entries.items()}, 2, valid, joined)
