"""Replay: what comes out is what went in, window by window, against a list of slots kept by hand."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.replay import DamagedReplay, LazyPrioritized, Prioritized, Replay, SamplesPerInsert, Uniform
from offtrace.modules.replay.limiter import rows_of_share
from offtrace.modules.replay.rings import STEP


class Stream:
    """Rollouts of N environments whose observations are (environment, episode, step), with all kinds of endings."""

    def __init__(self, envs: int, *, seed: int = 0, longest: int = 9, invalid: float = 0.0, first: int = 0) -> None:
        self.random = random.Random(seed)
        self.envs, self.longest, self.invalid, self.first = envs, longest, invalid, first
        self.episode = [0] * envs
        self.step = [0] * envs
        self.end = [self.random.randint(1, longest) for _ in range(envs)]

    def rollout(self, steps: int) -> TensorDict:
        names = ("observation", "successor", "terminated", "truncated", "init", "valid")
        found: dict[str, list[Any]] = {name: [] for name in names}
        for env in range(self.envs):
            for _ in range(steps):
                here = [self.first + env, self.episode[env], self.step[env]]
                found["observation"].append(here)
                found["init"].append(self.step[env] == 0)
                self.step[env] += 1
                failed = self.random.random() < self.invalid
                over = failed or self.step[env] == self.end[env]
                terminated = over and not failed and self.random.random() < 0.5
                found["successor"].append(here if failed else [here[0], here[1], here[2] + 1])
                found["terminated"].append(terminated)
                found["truncated"].append(over and not terminated)
                found["valid"].append(not failed)
                if over:
                    self.start(env)
        return self.tensors({name: torch.tensor(values) for name, values in found.items()}, steps)

    def start(self, env: int) -> None:
        self.episode[env] += 1
        self.step[env] = 0
        self.end[env] = self.random.randint(1, self.longest)

    def tensors(self, found: dict[str, Tensor], steps: int) -> TensorDict:
        flags = {name: found[name].view(self.envs, steps, 1) for name in ("terminated", "truncated", "init", "valid")}
        here, there = (found[name].view(self.envs, steps, 3).float() for name in ("observation", "successor"))
        number = (here * torch.tensor([1e4, 100.0, 1.0])).sum(-1)
        root = {
            "observation": here, "action": torch.stack([number, -number], -1), "action_log_prob": number + 0.5,
            "loc": number[..., None] + 0.25, "policy_version": number.long(), "is_init": flags["init"],
            "episode_reward": number[..., None], "done": torch.zeros_like(flags["init"]),
        }  # fmt: skip
        following = {
            "observation": there, "reward": number[..., None] + 0.75, "terminated": flags["terminated"],
            "truncated": flags["truncated"], "done": flags["terminated"] | flags["truncated"],
            "policy_version": number.long(), "is_init": torch.zeros_like(flags["init"]),
        }  # fmt: skip
        if self.invalid:
            root["valid"] = flags["valid"]
            # nothing of a step that is no data may come out
            bad = ~flags["valid"]
            following["reward"] = following["reward"].masked_fill(bad, float("nan"))
            following["observation"] = following["observation"].masked_fill(bad, float("nan"))
        return TensorDict({**root, "next": following}, [self.envs, steps])


class ByHand:
    """The rings as lists of ("step", observation, place in its run) and ("final", observation)."""

    def __init__(self, rings: int, size: int, length: int, pad: bool, overlap: bool = True) -> None:
        self.size, self.length, self.pad, self.overlap = size, length, pad, overlap
        self.rings: list[list[Any]] = [[] for _ in range(rings)]

    def extend(self, rollout: TensorDict, first: int) -> None:
        steps = rollout.shape[1]
        valid = rollout.get("valid", torch.ones(*rollout.shape, 1, dtype=torch.bool))
        for env in range(rollout.shape[0]):
            ring = self.rings[first + env]
            for t in range(steps):
                here = tuple(rollout["observation"][env, t].tolist())
                there = tuple(rollout["next", "observation"][env, t].tolist())
                joins = ring and ring[-1][0] == "head"
                place = 0
                if joins and valid[env, t] and ring[-1][1] == here:
                    ring.pop()
                    place = ring[-1][2] + 1
                elif joins:
                    ring[-1] = ("final", ring[-1][1])
                if not valid[env, t]:
                    continue
                done = bool(rollout["next", "done"][env, t])
                ring.append(("step", here, place))
                ring.append(("final" if done else "head", there))
            del ring[: -self.size]

    def starts(self) -> dict[tuple[float, ...], list[tuple[float, ...]]]:
        """First observation to the observations of the window's states, the last one's successor included."""
        found = {}
        for ring in self.rings:
            for index, (kind, observation, *place) in enumerate(ring):
                if kind != "step" or not (self.overlap or place[0] % self.length == 0):
                    continue
                window = [observation]
                for kind, following, *_ in ring[index + 1 : index + 1 + self.length]:
                    window.append(following)
                    if kind != "step":
                        break
                last = ring[index + len(window) - 1][0]
                if len(window) == self.length + 1 or (self.pad and last == "final"):
                    found[observation] = window
        return found


def starts_of(replay: Replay) -> list[tuple[float, ...]]:
    stored = replay._storage.leaves[("observation",)]
    return [tuple(row) for row in stored[torch.from_numpy(replay._rings.starts)].tolist()]


@pytest.mark.parametrize(
    ("length", "pad", "overlap", "invalid", "told"),
    [
        (1, False, True, 0.0, True), (1, True, True, 0.1, False), (3, False, True, 0.0, False),
        (3, False, True, 0.1, True), (5, True, True, 0.0, True), (5, True, True, 0.1, False),
        (12, True, True, 0.05, True), (1, True, False, 0.0, True), (4, True, False, 0.0, True),
        (5, True, False, 0.1, False), (12, True, False, 0.05, True),
    ],
)  # fmt: skip
def test_against_a_list_kept_by_hand(length: int, pad: bool, overlap: bool, invalid: float, told: bool) -> None:
    """Starts, windows, successors, flags and what travels, over several turns of the ring and two actors.

    ``told``: the rollouts say where an episode begins. Without it a restart of an actor shows in the observation.
    """
    envs, workers = 3, 2
    replay = Replay(240, num_envs=envs, num_workers=workers, batch_size=16, length=length, pad=pad, overlap=overlap)
    hand = ByHand(envs * workers, 41, length, pad, overlap)
    streams = [Stream(envs, seed=w, longest=16, invalid=invalid, first=envs * w) for w in range(workers)]
    rng = random.Random(1)
    given = 0
    for turn in range(60):
        worker = rng.randrange(workers)
        stream = streams[worker]
        if turn % 13 == 12:  # an actor was restarted: its environments begin anew
            for env in range(envs):
                stream.start(env)
        rollout = stream.rollout(rng.choice([1, 2, 7, 15]))
        rollout = rollout if told else rollout.exclude("is_init")
        given += replay.extend(rollout, worker=worker)
        hand.extend(rollout, worker * envs)
        wanted = hand.starts()
        assert sorted(starts_of(replay)) == sorted(wanted)
        assert len(replay) == sum(entry[0] == "step" for ring in hand.rings for entry in ring)
        assert replay.num_starts == len(wanted)
        if len(wanted) >= 16:
            check_batch(replay.sample(), wanted, length, pad)
    assert replay.inserted == given
    assert (replay.dropped > 0) == (invalid > 0)


def check_batch(batch: TensorDict, wanted: dict[Any, Any], length: int, pad: bool) -> None:
    pad = pad and length > 1
    assert batch.shape == ((16,) if length == 1 else (16, length))
    flat = batch if batch.ndim == 2 else batch.unsqueeze(1)
    assert ("finals" in flat.keys()) == (length > 1)  # noqa: SIM118 - a TensorDict
    if length > 1:
        truncated = flat["next", "done"] & ~flat["next", "terminated"]
        within = (truncated & flat["valid"] if pad else truncated)[:, :-1]
        assert flat["finals"].shape == (16, length, int(within.sum(1).max()), 0)
    assert ("valid" in flat.keys()) == pad  # noqa: SIM118 - a TensorDict
    assert "policy_version" not in flat["next"].keys()  # noqa: SIM118
    assert "episode_reward" not in flat.keys()  # noqa: SIM118
    for key, value in flat.items(True, True):
        assert not value.is_floating_point() or value.isfinite().all(), key
    number = (flat["observation"] * torch.tensor([1e4, 100.0, 1.0])).sum(-1)
    for row in range(16):
        window = wanted[tuple(flat["observation"][row, 0].tolist())]
        known = len(window) - 1
        assert flat["observation"][row, :known].tolist() == [list(x) for x in window[:known]]
        assert flat["next", "observation"][row, :known].tolist() == [list(x) for x in window[1:]]
        if pad:
            assert flat["valid"][row].flatten().tolist() == [t < known for t in range(length)]
        else:
            assert known == length
        assert not flat["next", "done"][row, : known - 1].any()
        first = flat["observation"][row, 0, 2] == 0
        if "is_init" in flat.keys():  # noqa: SIM118
            assert flat["is_init"][row].flatten().tolist() == [bool(first), *[False] * (length - 1)]
        for t in range(known, length):  # padding repeats the last step and the state after it
            assert torch.equal(flat["action"][row, t], flat["action"][row, known - 1])
            assert flat["observation"][row, t].tolist() == list(window[-1])
            assert flat["next", "observation"][row, t].tolist() == list(window[-1])
        mine = number[row, :known]
        assert torch.equal(flat["action"][row, :known], torch.stack([mine, -mine], -1))
        assert torch.equal(flat["action_log_prob"][row, :known], mine + 0.5)
        assert torch.equal(flat["loc"][row, :known, 0], mine + 0.25)
        assert torch.equal(flat["policy_version"][row, :known], mine.long())
        assert torch.equal(flat["next", "reward"][row, :known, 0], mine + 0.75)


def test_flags_and_final_observations_are_those_of_the_step() -> None:
    stream = Stream(4, seed=3)
    replay = Replay(400, num_envs=4, batch_size=64, length=2, pad=True)
    truth = {}
    for _ in range(6):
        rollout = stream.rollout(11)
        replay.extend(rollout)
        for row in rollout.view(-1):
            key = tuple(row["observation"].tolist())
            flags = [bool(row["next", name]) for name in ("terminated", "truncated", "done")]
            truth[key] = flags, row["next", "observation"].tolist()
    seen = set()
    for _ in range(20):
        batch = replay.sample()
        for row in batch[batch["valid"].squeeze(-1)]:
            flags, successor = truth[tuple(row["observation"].tolist())]
            assert [bool(row["next", name]) for name in ("terminated", "truncated", "done")] == flags
            assert row["next", "observation"].tolist() == successor
            seen.add(tuple(flags))
    assert len(seen) == 3


@pytest.mark.parametrize("pad", [False, True])
def test_an_episode_that_begins_as_the_last_one_stood_is_another_one(pad: bool) -> None:
    """All observations alike: only is_init tells that a ring was restarted between two rollouts, or within one."""
    replay = Replay(100, num_envs=1, batch_size=1, length=2, pad=pad)
    rollout = Stream(1, longest=1000).rollout(6)
    for key in ("observation", ("next", "observation")):
        rollout[key] = torch.zeros(1, 6, 3)
    rollout["is_init"][:] = torch.tensor([1, 0, 0, 1, 0, 0]).bool().view(1, 6, 1)
    for turns in range(1, 4):
        replay.extend(rollout)
        # of three steps two begin a whole sequence; the last one of a run that is known to be over a short one
        assert replay.num_starts == 4 * turns + (2 * turns - 1 if pad else 0)


def one_run(envs: int, steps: int, episode: int, begin: int) -> TensorDict:
    """Steps ``begin`` to ``begin + steps`` of episodes of one length; the action is the place in the episode."""
    place = (torch.arange(begin, begin + steps) % episode).expand(envs, steps)
    number = torch.arange(begin, begin + steps).float().expand(envs, steps)[..., None]
    done = (place == episode - 1)[..., None]
    following = {"observation": number + 1, "reward": number, "terminated": done, "done": done}
    return TensorDict(
        {"observation": number, "action": place.clone(), "is_init": (place == 0)[..., None], "next": following},
        [envs, steps],
    )


@pytest.mark.parametrize("steps", [4, 5, 13])
@pytest.mark.parametrize("episode", [1, 3, 4, 5, 9, 12, 500])
def test_sequences_without_overlap_hold_every_step_of_an_episode_once(episode: int, steps: int) -> None:
    """Of all that is stored, but for the piece whose beginning was overwritten and the one under way; all the time.

    Episodes of 500 steps fill a ring several times: where its pieces begin does not depend on what was overwritten.
    """
    length, size = 4, 61
    replay = Replay(2 * (size - 1), num_envs=2, batch_size=8, length=length, pad=True, overlap=False)
    for turn in range(60):
        replay.extend(one_run(2, steps, episode, turn * steps))
        _, rows, valid = replay._rings.windows(replay._rings.starts)
        assert valid is not None
        held = np.bincount(rows[valid], minlength=2 * size)
        assert held.max() <= 1
        places = replay._storage.leaves[("action",)].numpy()
        assert (places[replay._rings.starts] % length == 0).all()
        left = 0
        for ring in range(2):
            here = slice(ring * size, ring * size + size)
            steps_here = replay._rings.flags[here] & STEP != 0
            left += int((steps_here & (held[here] == 0)).sum())
        assert left <= 2 * 2 * (length - 1)
        whole = (turn + 1) * steps <= size // 2  # nothing was overwritten, where a step takes two slots at most
        assert not whole or left == 2 * ((turn + 1) * steps % episode % length)


@pytest.mark.parametrize("episode", [9, 50, 100])
def test_every_step_of_an_episode_is_replayed_equally_often(episode: int) -> None:
    length = 20
    replay = Replay(8000, num_envs=8, batch_size=64, length=length, pad=True, overlap=False, seed=1)
    for turn in range(9):
        replay.extend(one_run(8, 100, episode, 100 * turn))
    counts = np.zeros(episode)
    for _ in range(300):
        batch = replay.sample()
        counts += np.bincount(batch["action"][batch["valid"].squeeze(-1)].numpy(), minlength=episode)
    pieces = counts[::length]
    assert np.array_equal(counts, np.repeat(pieces, length)[:episode]), "a piece is drawn as one"
    assert pieces.sum() == 300 * 64
    assert len(pieces) == 1 or chisquare(pieces).pvalue > 1e-3


@pytest.mark.parametrize(("length", "pad"), [(1, False), (4, False), (4, True)])
def test_uniform_over_all_starts(length: int, pad: bool) -> None:
    stream = Stream(3, seed=5, longest=12)
    replay = Replay(150, num_envs=3, batch_size=50, length=length, pad=pad, seed=1)
    for _ in range(30):
        replay.extend(stream.rollout(8))
    starts = {start: index for index, start in enumerate(starts_of(replay))}
    counts = np.zeros(len(starts))
    for _ in range(600):
        batch = replay.sample()
        first = batch["observation"] if batch.ndim == 1 else batch["observation"][:, 0]
        for row in first.tolist():
            counts[starts[tuple(row)]] += 1
    assert chisquare(counts).pvalue > 1e-3
    assert counts.sum() == 30_000


@pytest.mark.parametrize("storage", ["tensor", "memmap"])
@pytest.mark.parametrize(
    ("length", "pad", "overlap", "turns"),
    [(1, False, True, 2), (3, True, True, 25), (4, False, True, 25), (4, True, False, 2), (4, True, False, 25)],
)
def test_after_a_load_everything_goes_on_as_without_it(
    storage: Any, length: int, pad: bool, overlap: bool, turns: int, tmp_path: Path
) -> None:
    """Samples, then insertions that overwrite, then samples; before and after the ring has turned over."""
    numbers: dict[str, Any] = {"num_envs": 3, "num_workers": 2, "batch_size": 8, "length": length, "pad": pad}
    numbers["overlap"] = overlap
    replay = Replay(120, storage=storage, path=tmp_path / "live" if storage == "memmap" else None, **numbers)
    streams = [Stream(3, seed=worker, invalid=0.05, first=3 * worker) for worker in range(2)]
    for turn in range(turns):
        replay.extend(streams[turn % 2].rollout(7), worker=turn % 2)
        if replay.num_starts >= 8:
            replay.sample()
    replay.dump(tmp_path / "replay")
    other = Replay(120, seed=99, **numbers)  # in memory, whatever wrote it
    other.load(tmp_path / "replay")
    assert (other.inserted, other.sampled, other.dropped) == (replay.inserted, replay.sampled, replay.dropped)
    assert (len(other), other.num_starts) == (len(replay), replay.num_starts)
    for turn in range(20):
        one, two = replay.sample(), other.sample()
        assert (one == two).all()
        rollout = streams[turn % 2].rollout(5)
        assert replay.extend(rollout, worker=turn % 2) == other.extend(rollout, worker=turn % 2)
    replay.dump(tmp_path / "replay")  # replaces the first
    assert sorted(path.name for path in tmp_path.iterdir()) == (["live"] if storage == "memmap" else []) + ["replay"]
    again = Replay(120, **numbers)
    again.load(tmp_path / "replay")
    assert (again.sample() == other.sample()).all()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("sampler", "more"),
    [
        (Uniform, {}),
        (Uniform, {"length": 3, "pad": True}),
        (Uniform, {"length": 3, "pad": True, "overlap": False, "burn_in": 2}),
        (Uniform, {"length": 3, "pad": True, "whole_episodes": True}),
        (Prioritized, {}),
        (LazyPrioritized, {"length": 3, "pad": True}),
    ],
)
def test_on_a_gpu_the_samples_are_those_of_the_cpu(sampler: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """And what one of them wrote the other reads."""
    numbers: dict[str, Any] = {"num_envs": 3, "batch_size": 8, **more}
    here, there, later = (Replay(120, device=d, sampler=sampler(), **numbers) for d in ("cpu", "cuda", "cuda"))
    stream = Stream(3, seed=0, invalid=0.05)
    for turn in range(30):
        rollout = stream.rollout(7)
        assert here.extend(rollout) == there.extend(rollout)
        one, two = here.sample(), there.sample()
        assert two.device is not None
        assert two.device.type == "cuda"
        assert (one == two.cpu()).all()
        if here.sampler.prioritized:
            priority = torch.rand(8)
            index = one["index"].view(8, -1)[:, 0]
            assert here.update_priorities(index, priority) == there.update_priorities(index, priority)
        if turn == 15:
            here.dump(tmp_path / "replay")
            later.load(tmp_path / "replay")
            one, two, three = here.sample(), there.sample(), later.sample()
            assert (one == two.cpu()).all()
            assert (one == three.cpu()).all()


def filled(**numbers: Any) -> Replay:
    replay = Replay(100, **{"num_envs": 2, "batch_size": 4, **numbers})
    replay.extend(Stream(2).rollout(20))
    return replay


def test_an_actor_that_has_given_nothing_yet_is_saved_and_loaded(tmp_path: Path) -> None:
    """As where a run is stopped with its first rollout."""
    replays = [Replay(100, num_envs=2, num_workers=2, batch_size=4) for _ in range(2)]
    replays[0].extend(Stream(2).rollout(20), worker=1)
    replays[0].dump(tmp_path / "replay")
    replays[1].load(tmp_path / "replay")
    assert (replays[0].sample() == replays[1].sample()).all()


def test_entries_without_a_number_are_kept(tmp_path: Path) -> None:
    rollout = Stream(2).rollout(20)
    rollout["nothing"] = torch.zeros(2, 20, 0)
    replays = [Replay(100, num_envs=2, batch_size=4) for _ in range(2)]
    replays[0].extend(rollout)
    replays[0].dump(tmp_path / "replay")
    replays[1].load(tmp_path / "replay")
    assert replays[1].sample()["nothing"].shape == (4, 0)


def test_a_rollout_that_does_not_fit_changes_nothing() -> None:
    """Which one does is a matter of how many episodes end in it, and so it may come late."""
    replay, twin = filled(), filled()
    with pytest.raises(ValueError, match="does not fit the 51 slots"):
        replay.extend(Stream(2).rollout(80))
    later = Stream(2, seed=5).rollout(10)
    for one in (replay, twin):
        one.extend(later)
    assert (replay.sample() == twin.sample()).all()


def test_no_pickle_and_only_what_is_filled_is_written(tmp_path: Path) -> None:
    replay = Replay(100_000, num_envs=2, batch_size=4)
    replay.extend(Stream(2).rollout(20))
    replay.dump(tmp_path / "replay")
    files = sorted(path.name for path in (tmp_path / "replay").iterdir())
    assert {Path(name).suffix for name in files} == {".bin", ".json"}
    data = json.loads((tmp_path / "replay" / "replay.json").read_text().split("\n")[1])["data"]
    observation = next(entry for entry in data if entry["key"] == ["observation"])
    assert observation["bytes"] < 80 * 3 * 4


@pytest.mark.parametrize("damage", ["missing", "short", "altered", "no json", "json altered", "no folder"])
def test_a_damaged_folder_is_refused_and_nothing_is_lost(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "replay"
    filled().dump(folder)
    file, text = folder / "data0.bin", folder / "replay.json"
    content = bytearray(file.read_bytes())
    words = {
        "missing": r"is damaged: data0.bin: No such file",
        "short": r"is damaged: data0.bin has \d+ bytes instead of \d+",
        "altered": r"is damaged: the content of data0.bin was altered",
        "no json": r"there is no replay in .*: replay.json cannot be read",
        "json altered": r"is damaged: the content of replay.json was altered",
        "no folder": r"there is no replay in",
    }[damage]
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-3])
    elif damage == "altered":
        content[5] ^= 1
        file.write_bytes(content)
    elif damage == "no json":
        text.unlink()
    elif damage == "json altered":
        text.write_text(text.read_text().replace('"inserted": 40', '"inserted": 41'))
    else:
        folder = tmp_path / "nowhere"
    replay, twin = filled(seed=7), filled(seed=7)
    with pytest.raises(DamagedReplay, match=words):
        replay.load(folder)
    assert (replay.sample() == twin.sample()).all()


def test_a_dump_that_was_stopped_between_its_renames_is_found(tmp_path: Path) -> None:
    replay = filled()
    replay.dump(tmp_path / "replay")
    (tmp_path / "replay").rename(tmp_path / "replay.old")
    other = filled(seed=3)
    other.load(tmp_path / "replay")
    assert (other.sample() == replay.sample()).all()


def test_an_interrupted_insertion_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The books are ahead of the data then; what was written before stays, and can be loaded."""
    replay = filled()
    replay.dump(tmp_path / "replay")

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.Tensor.index_copy_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replay.extend(Stream(2).rollout(3))
    for use in (lambda: replay.dump(tmp_path / "replay"), replay.sample, lambda: replay.extend(Stream(2).rollout(3))):
        with pytest.raises(DamagedReplay, match="an insertion was interrupted"):
            use()
    replay.load(tmp_path / "replay")
    replay.dump(tmp_path / "again")


def test_a_folder_of_other_numbers_is_refused(tmp_path: Path) -> None:
    filled().dump(tmp_path / "replay")
    with pytest.raises(ValueError, match=r"has length 1, this one has 3"):
        filled(length=3).load(tmp_path / "replay")
    filled(length=3, pad=True).dump(tmp_path / "overlapping")
    with pytest.raises(ValueError, match=r"has overlap True, this one has False"):
        filled(length=3, pad=True, overlap=False).load(tmp_path / "overlapping")
    live = Replay(100, num_envs=2, batch_size=4, storage="memmap", path=tmp_path / "live")
    live.extend(Stream(2).rollout(20))
    for folder in (tmp_path / "live", tmp_path):
        with pytest.raises(ValueError, match=r"holds the files this replay works on"):
            live.dump(folder)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_dump_replaces_replays_alone(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "ckpt"
    mine = place if kind == "file" else place / "policy.pt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"ckpt' is there and holds no replay; it would be lost: give another folder"):
        filled().dump(place)
    assert mine.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        filled().dump(tmp_path / "empty")
    filled().load(tmp_path / "empty")


def test_a_replay_says_what_types_it_holds() -> None:
    rollout = Stream(2).rollout(5)
    for where in (rollout, rollout["next"]):
        where["observation"] = where["observation"].to(torch.complex64)
    with pytest.raises(ValueError, match=r"'observation' is torch.complex64 in the rollout; a replay holds float32, "):
        Replay(100, num_envs=2, batch_size=4).extend(rollout)


def test_a_rollout_of_no_steps_changes_nothing() -> None:
    replay, twin = filled(), filled()
    assert replay.extend(Stream(2).rollout(3)[:, :0]) == 0
    assert (replay.sample() == twin.sample()).all()


def test_every_entry_of_the_state_is_stored_once() -> None:
    """Observations in parts, masks, recurrent states: all that has a successor."""
    env = make_env("cartpole-swingup", 2, flatten=False, last_step=True, time_limit=0.05)
    replay = Replay(64, num_envs=2, batch_size=8, length=2, pad=True)
    rollout = env.rollout(12, break_when_any_done=False, auto_cast_to_device=True)
    replay.extend(rollout)
    keys = {(name,) if isinstance(name, str) else name for name in replay._storage.leaves}
    wanted = {("observation", "position"), ("observation", "velocity"), ("last_action",), ("last_reward",)}
    assert keys == wanted | {("action",), ("next", "reward")}
    truth = {tuple(row["observation", "position"].tolist()): row for row in rollout.view(-1)}
    batch = replay.sample(16)
    for row in batch[batch["valid"].squeeze(-1)]:
        same = truth[tuple(row["observation", "position"].tolist())]
        for key in [*wanted, ("action",)]:
            assert torch.equal(row[key], same[key])
        for key in [*wanted, ("reward",), ("truncated",)]:
            assert torch.equal(row[("next", *key)], same[("next", *key)])


@pytest.mark.parametrize("length", [1, 3])
def test_parts_of_an_observation_that_come_with_the_step(length: int) -> None:
    """One part is a state, stored once; another is only under "next", as what a simulator tells of a step."""
    rollout = Stream(2).rollout(20)
    for td in (rollout, rollout["next"]):
        td["observation"] = TensorDict({"place": td["observation"]}, td.shape)
    rollout["next", "observation", "force"] = rollout["action"].clone()
    replay = Replay(100, num_envs=2, batch_size=16, length=length)
    replay.extend(rollout)
    batch = replay.sample()
    assert torch.equal(batch["next", "observation", "force"], batch["action"])
    assert torch.equal(batch["next", "observation", "place"][..., :2], batch["observation", "place"][..., :2])
    assert torch.equal(batch["next", "observation", "place"][..., 2], batch["observation", "place"][..., 2] + 1)


def test_rollouts_of_a_collector_join() -> None:
    """Episodes of 20 steps in rollouts of 8: whole in the replay, with all that collector and environment write."""
    policy = TensorDictModule(nn.Linear(5, 1), in_keys=["observation"], out_keys=["action"])
    env_fn = lambda seed: make_env("cartpole-swingup", 2, seed=seed, time_limit=0.2)  # noqa: E731
    replay = Replay(200, num_envs=2, batch_size=4, length=20)
    with make_collector(env_fn, policy, frames_per_batch=16, num_workers=0) as collector:
        for _ in range(10):
            replay.extend(next(collector))
    assert replay.num_starts == 2 * 4  # one in each episode of the 80 steps
    batch = replay.sample()
    assert batch["next", "truncated"][:, :, 0].tolist() == [[*[False] * 19, True]] * 4
    assert batch["is_init"][:, :, 0].tolist() == [[True, *[False] * 19]] * 4
    with torch.no_grad():
        torch.testing.assert_close(batch["action"], policy.module(batch["observation"]))
    assert set(batch.keys()) == {"observation", "action", "is_init", "policy_version", "index", "finals", "next"}


def test_memory_of_a_step() -> None:
    replay = filled()
    numbers = 3 + 2 + 1 + 1 + 1  # observation, action, log-probability, loc, reward
    assert replay.bytes_per_slot == 4 * numbers + 8 + 9  # the version, and the books


def test_batches_are_copies() -> None:
    replay = filled()
    batch = replay.sample()
    stored = {key: leaf.clone() for key, leaf in replay._storage.leaves.items()}
    batch.apply_(lambda tensor: tensor.zero_())
    for key, leaf in replay._storage.leaves.items():  # as bytes: what was never written may be NaN
        assert torch.equal(stored[key].view(torch.uint8), leaf.view(torch.uint8))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"capacity": 0}, r"capacity is 0; it must be at least 1"),
        ({"length": 0}, r"length is 0; it must be at least 1"),
        ({"batch_size": 200}, r"capacity is 100; a batch of 200 needs a replay of 200 at least"),
        ({"length": 60}, r"length is 60; a capacity of 100 leaves each of 2 environments 50 steps, .* below 51"),
        ({"length": 3, "overlap": False}, r"overlap is False, and pad is False; .* pad must be True, or overlap True"),
        ({"storage": "disk"}, r"storage is 'disk'; it must be 'tensor' or 'memmap'"),
        ({"storage": "memmap", "device": "cuda"}, r"a 'memmap' storage lies on the CPU, got device 'cuda'"),
    ],
)
def test_numbers_that_make_no_replay(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Replay(**{"capacity": 100, "num_envs": 2, "batch_size": 4, **numbers})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r[:1], r"2 environments per actor; it takes rollouts \[2, T\], got one of shape \[1, 20\]"),
        (lambda r: r[:, 0], r"got one of shape \[2\]"),
        (lambda r: r.exclude("loc"), r"lacks 'loc', which the replay stores"),
        (lambda r: r.exclude(("next", "observation")), r"lacks \('next', 'observation'\), which the replay stores"),
        (lambda r: r.exclude(("next", "terminated")), r"lacks \('next', 'terminated'\), which a replay needs"),
        (lambda r: r.set("extra", torch.zeros(2, 20)), r"has 'extra', which the first one did not have"),
        (lambda r: r.set("loc", torch.zeros(2, 20, 4)), r"'loc' is torch.float32 \[4\] in the rollout, but .* \[1\]"),
        (lambda r: r.set("loc", r["loc"].double()), r"'loc' is torch.float64 \[1\] in the rollout, but torch.float32"),
    ],
)
def test_rollouts_that_do_not_fit(change: Any, words: str) -> None:
    replay, twin = filled(), filled()
    with pytest.raises(ValueError, match=words):
        replay.extend(change(Stream(2).rollout(20)))
    assert (replay.inserted, len(replay)) == (twin.inserted, len(twin))
    assert (replay.sample() == twin.sample()).all()


def test_other_mistakes() -> None:
    rollout = Stream(2).rollout(20)
    for missing in ("action", ("next", "reward")):
        with pytest.raises(ValueError, match=r"lacks .*, which a replay needs"):
            Replay(100, num_envs=2, batch_size=4).extend(rollout.exclude(missing))
    with pytest.raises(ValueError, match=r"lacks 'observation', at its root or under 'next'"):
        Replay(100, num_envs=2, batch_size=4).extend(rollout.exclude(("next", "observation")))
    with pytest.raises(ValueError, match=r"worker is 1; the replay has rings for actors 0 to 0"):
        filled().extend(rollout, worker=1)
    with pytest.raises(ValueError, match=r"a rollout of 80 steps does not fit the 51 slots"):
        filled().extend(Stream(2).rollout(80))
    with pytest.raises(ValueError, match=r"no sample of length 1 can begin anywhere: the replay has 0 steps"):
        Replay(100, num_envs=2, batch_size=4).sample()
    padded = Replay(100, num_envs=2, batch_size=4, length=9, pad=True)
    padded.extend(Stream(2).rollout(3).set("valid", torch.zeros(2, 3, 1, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"no sample of length 9 can begin anywhere: the replay has 0 steps; insert"):
        padded.sample()
    assert filled().sample(90).shape == (90,)  # drawn with replacement
    with pytest.raises(
        ValueError, match=r"length is 20, and the longest of the episodes so far has 9 steps; .* 9 or less, or pad=True"
    ):
        filled(length=20).sample()


def test_the_rollout_says_which_actor_made_it() -> None:
    """By its entry "worker", whatever the order of arrival; the argument goes before it, and it is not stored."""
    said, given = (Replay(100, num_envs=2, num_workers=2, batch_size=8, seed=3) for _ in range(2))
    streams = [Stream(2, seed=worker, first=2 * worker) for worker in range(2)]
    for worker in (1, 1, 0, 1, 0):
        rollout = streams[worker].rollout(5)
        given.extend(rollout, worker=worker)
        said.extend(rollout.set("worker", torch.tensor(worker).expand(2, 5)))
    assert said._rings.written.tolist() == given._rings.written.tolist()
    assert (said.sample() == given.sample()).all()
    assert "worker" not in said.sample().keys()  # noqa: SIM118 - a TensorDict
    with pytest.raises(ValueError, match=r"worker is 2; the replay has rings for actors 0 to 1"):
        said.extend(rollout.set("worker", torch.full((2, 5), 2)))


@pytest.mark.parametrize(("ratio", "batch", "chunk"), [(1, 256, 8), (32, 256, 1), (0.1, 64, 250), (7.3, 100, 13)])
def test_the_ratio_holds(ratio: float, batch: int, chunk: int) -> None:
    limiter = SamplesPerInsert(ratio, min_size=1000)
    while limiter.inserted < max(20_000, 200 * chunk):
        while limiter.may_sample(batch):
            limiter.sample(batch)
        limiter.insert(chunk)
        if limiter.inserted >= 1000 + chunk:
            assert 0 <= limiter.owed < batch + ratio * chunk
    assert limiter.sampled / (limiter.inserted - 1000) == pytest.approx(ratio, rel=0.01)
    limiter.restart()
    assert limiter.owed == -1000 * limiter.ratio
    assert not limiter.may_sample(1)


def test_the_ratio_is_counted_exactly() -> None:
    limiter = SamplesPerInsert(0.1, min_size=0)
    for _ in range(30):
        assert not limiter.may_sample(1)
        limiter.insert(9)
        assert not limiter.may_sample(1)
        limiter.insert(1)
        assert limiter.may_sample(1)  # ten times a tenth is one
        limiter.sample(1)
    assert limiter.owed == 0
    other = SamplesPerInsert(0.1, min_size=0)
    other.load_state_dict(limiter.state_dict())
    assert (other.inserted, other.sampled) == (300, 30)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"ratio": 0.0}, r"ratio is 0.0; it must be above 0 and finite"),
        ({"ratio": float("inf")}, r"ratio is inf; it must be above 0 and finite"),
        ({"min_size": -1}, r"min_size is -1; it must be at least 0"),
        ({"min_size": 2000}, r"min_size is 2000, but the replay holds 1000 steps; it must be 1000 or less"),
        ({"ratio": 0.1}, r"allows one batch of 256 per 2560 inserted ones, .* 1000; raise it to 0.256 at least"),
    ],
)
def test_ratios_that_cannot_hold(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplesPerInsert(**{"ratio": 1.0, "min_size": 100, **numbers}).check(capacity=1000, batch=256)


def test_the_advice_of_a_refusal_is_taken() -> None:
    for capacity in range(600, 700):
        with pytest.raises(ValueError, match="raise it to") as refused:
            SamplesPerInsert(0.01, 0).check(capacity=capacity, batch=100)
        least = re.findall(r"raise it to (\S+) at least", str(refused.value))[0]
        SamplesPerInsert(float(least), 0).check(capacity=capacity, batch=100)
        assert float(least) == pytest.approx(100 / capacity, rel=0.01)
    for fresh, share in itertools.product([1, 3, 16, 30, 64, 128, 512], [0.05, 0.15, 0.35, 0.55, 0.85, 0.95]):
        try:
            rows_of_share(fresh, share)
        except ValueError as refused:
            near = float(str(refused).rpartition(" ")[2])
            rows = rows_of_share(fresh, near)
            assert near == pytest.approx(rows / (fresh + rows), abs=0.01)
