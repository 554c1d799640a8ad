"""Recurrent replay: the stored state is the actor's, and what renews it gives what a run from the start would give."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import make_env
from offtrace.modules.losses import ImpalaLoss, burn_in
from offtrace.modules.losses.views import recurrent_keys
from offtrace.modules.networks import Policy, build_policy
from offtrace.modules.replay import Prioritized, Replay

ENVS, STEPS, HIDDEN = 4, 6, 5
STATE = ("recurrent_h", "recurrent_c")


def make_policy() -> Policy:
    torch.manual_seed(0)
    policy = build_policy(
        network="mlp", observation_shape=[4], num_actions=2, action_dim=None, hidden=[8], recurrent=HIDDEN
    )
    for parameter in policy.parameters():  # biases too, so that a state of 0 is no fixed point
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def rollouts(policy: Policy, number: int, steps: int = STEPS) -> list[TensorDictBase]:
    """CartPole: episodes of a few dozen steps and less."""
    torch.manual_seed(1)
    env = partial(make_env, "CartPole-v1", ENVS, last_step=True)
    collector = make_collector(env, policy, frames_per_batch=ENVS * steps, num_workers=0, seed=3)
    found = [next(collector).clone() for _ in range(number)]
    collector.shutdown()
    return found


def make_replay(**options: Any) -> Replay:
    options = {"capacity": 4000, "num_envs": ENVS, "batch_size": 8, "length": STEPS, "pad": True, **options}
    return Replay(**options)


class Known:
    """Every step that was collected, by its observation: whose state the actor had, and the steps of its episode."""

    def __init__(self, found: list[TensorDictBase]) -> None:
        whole = torch.cat(found, 1)
        self.rows = whole
        self.place = {}
        for n in range(whole.shape[0]):
            begin = 0
            for t in range(whole.shape[1]):
                begin = t if whole["is_init"][n, t] else begin
                self.place[whole["observation"][n, t].numpy().tobytes()] = (n, t, begin)

    def goes_on(self, n: int, t: int) -> bool:
        """Whether a sequence begins at ``t`` that goes on from the one before, all that was collected being there."""
        done = self.rows["next", "done"][n, :, 0]
        if t >= len(done) or done[t - STEPS : t].any():
            return False
        return t + STEPS <= len(done) or bool(done[t:].any())

    def of(self, observation: Tensor) -> tuple[int, int, int]:
        """Environment, step, and the first step of the episode."""
        return self.place[observation.numpy().tobytes()]

    def state(self, observation: Tensor) -> list[Tensor]:
        """The actor's."""
        n, t, _ = self.of(observation)
        return [self.rows[key][n, t] for key in STATE]

    def run(self, policy: Policy, observation: Tensor, begin: int | None = None) -> list[Tensor]:
        """What ``policy`` has there, step after step from the start of the episode, or from the state at ``begin``."""
        n, t, first = self.of(observation)
        begin = first if begin is None else begin
        state = {key: self.rows[key][n, begin][None] for key in STATE}
        for step in range(begin, t):
            inputs = self.rows[n : n + 1, step].select(*policy.in_keys).update(state)
            with torch.no_grad():
                out = policy.get_dist_params(inputs)
            state = {key: out["next", key] for key in STATE}
        return [x[0] for x in state.values()]


def filled(policy: Policy, number: int = 20, **options: Any) -> tuple[Replay, Known]:
    replay, found = make_replay(**options), rollouts(policy, number)
    for rollout in found:
        replay.extend(rollout)
    return replay, Known(found)


def test_a_sequence_begins_with_the_state_that_the_actor_had() -> None:
    """Once a step, and bit for bit; the network then says what it said while acting."""
    policy = make_policy()
    replay, known = filled(policy)
    assert {(key,) for key in STATE} <= set(replay._storage.state)
    batch = replay.sample(64)
    for row in batch:
        expected = known.state(row["observation"][0])
        assert all(torch.equal(row[key][0], x) for key, x in zip(STATE, expected, strict=True))
    loss = ImpalaLoss(policy)
    assert float(loss(batch)["kl"].abs()) < 1e-6


def test_with_the_weights_that_acted_a_burn_in_changes_nothing() -> None:
    """Bit for bit, whatever its length; and the sequences are those that would have come without it."""
    policy = make_policy()
    plain = filled(policy)[0].sample(ENVS)
    for steps in (1, 5, 40):
        replay, known = filled(policy, burn_in=steps)
        batch = replay.sample(ENVS)
        assert batch.shape == (ENVS, steps + STEPS)
        renewed = burn_in(policy, batch, steps)
        assert renewed.shape == (ENVS, STEPS)
        assert (renewed == plain).all()
        for row in renewed:
            expected = known.state(row["observation"][0])
            assert all(torch.equal(row[key][0], x) for key, x in zip(STATE, expected, strict=True))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_burn_in_runs_the_new_network_from_the_stored_state(overlap: bool) -> None:
    """Over as many steps as the episode has in front, and no more than were asked for."""
    policy, steps = make_policy(), 5
    replay, known = filled(policy, burn_in=steps, overlap=overlap)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    lengths = Counter()
    for _ in range(30):
        batch = replay.sample()
        front = batch["valid"][:, :steps, 0]
        renewed = burn_in(policy, batch, steps)
        for row, there in zip(renewed, front, strict=True):
            first = row["observation"][0]
            _, t, begin = known.of(first)
            expected = known.run(policy, first, max(begin, t - steps))
            for key, x in zip(STATE, expected, strict=True):
                torch.testing.assert_close(row[key][0], x)
            length = min(steps, t - begin)
            assert there.tolist() == [False] * (steps - length) + [True] * length
            lengths[length] += 1
        assert torch.equal(renewed["valid"][:, 0], torch.ones(8, 1, dtype=torch.bool))
    assert lengths[0] >= 1, "starts of episodes are learnt from"
    assert lengths[steps] > 20
    assert len(lengths) == (steps + 1 if overlap else 2)


class OwnPolicy(Policy):
    """Any policy with a recurrent state: what its network does is its own business."""


def test_a_burn_in_encodes_the_steps_in_front_once_and_needs_no_heads() -> None:
    """And gives the state that an own policy has, one whole step after the other."""
    policy, steps = make_policy(), 5
    batch = filled(policy, burn_in=steps)[0].sample(16)
    assert not batch["valid"][:, :steps].all()
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    own = OwnPolicy(policy.network)
    calls: Counter[str] = Counter()
    for name in ("encoder", "head", "core.cell"):
        part = policy.network.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    renewed = burn_in(policy, batch, steps)
    assert calls == {"encoder": 1, "core.cell": steps}
    calls.clear()
    expected = burn_in(own, batch, steps)
    assert calls == {"encoder": steps, "head": steps, "core.cell": steps}
    for key in STATE:
        torch.testing.assert_close(renewed[key], expected[key], rtol=0, atol=1e-6)
        assert not torch.equal(renewed[key][:, 0], batch[key][:, steps])


def test_a_network_without_state_has_none_behind_a_sequence() -> None:
    network = build_policy(network="mlp", observation_shape=[4], num_actions=2, action_dim=None).network
    with pytest.raises(ValueError, match="the policy network has no recurrent core"):
        network.state_behind(TensorDict({"observation": torch.zeros(2, 3, 4)}, [2, 3]))


def test_steps_in_front_are_those_that_are_still_there() -> None:
    """Of a ring that is being overwritten the oldest steps have fewer, and none is of another episode."""
    policy, steps = make_policy(), 9
    replay, known = filled(policy, 40, capacity=4 * 30, burn_in=steps)
    short = 0
    for _ in range(60):
        batch = replay.sample()
        for row in batch:
            n, t, begin = known.of(row["observation"][steps])
            length = int(row["valid"][:steps].sum())
            assert length <= min(steps, t - begin)
            short += length < min(steps, t - begin)
            for back in range(1, length + 1):
                assert known.of(row["observation"][steps - back]) == (n, t - back, begin)
            for missing in range(steps - length):  # stand-ins, of the first that is there
                assert torch.equal(row["observation"][missing], row["observation"][steps - length])
                assert torch.equal(row["recurrent_h"][missing], row["recurrent_h"][steps - length])
    assert short


def test_an_episode_that_ends_inside_the_burn_in_teaches_nothing() -> None:
    policy = make_policy()
    replay, _ = filled(policy, length=10)
    for _ in range(20):
        batch = replay.sample()
        ended = batch[~batch["valid"][:, 4, 0]]
        if len(ended):
            break
    renewed = burn_in(policy, ended, 4)
    assert not renewed["valid"].any()
    assert all(renewed[key].isfinite().all() for key in STATE)
    loss = ImpalaLoss(policy)
    out = loss(renewed)
    (out["loss_policy"] + out["loss_value"] + out["loss_entropy"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    mixed = burn_in(policy, torch.cat([ended, batch[batch["valid"][:, 4, 0]]]), 4)
    assert all(value.isfinite() for value in loss(mixed).values())


def follow(policy: Policy, replay: Replay, batches: int, rows: int = ENVS) -> list[TensorDictBase]:
    found = []
    for _ in range(batches):
        renewed = burn_in(policy, replay.sample(rows), STEPS)
        replay.renew(renewed)
        found.append(renewed)
    return found


@pytest.mark.parametrize("overlap", [True, False])
def test_rows_go_through_whole_episodes_with_the_actors_states(overlap: bool) -> None:
    """With the weights that acted: bit for bit. Each episode from its first step to its last, then another one."""
    policy = make_policy()
    replay, known = filled(policy, 40, whole_episodes=True, overlap=overlap)
    ended, before = 0, [None] * ENVS
    for batch in follow(policy, replay, 60):
        for n, row in enumerate(batch):
            first = row["observation"][0]
            ring, t, begin = known.of(first)
            assert all(torch.equal(row[key][0], x) for key, x in zip(STATE, known.state(first), strict=True))
            if before[n] is None:
                assert t == begin, "an episode from its start"
                assert row["is_init"][0]
            else:
                assert (ring, t, begin) == before[n], "goes on where the piece before ended"
            goes_on = known.goes_on(ring, t + STEPS)
            before[n] = (ring, t + STEPS, begin) if goes_on else None
            ended += not goes_on
    assert ended > 10


def test_new_weights_give_the_state_of_a_run_from_the_start() -> None:
    policy = make_policy()
    replay, known = filled(policy, 40, whole_episodes=True)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    furthest = 0
    for batch in follow(policy, replay, 30):
        for row in batch:
            first = row["observation"][0]
            for key, x in zip(STATE, known.run(policy, first), strict=True):
                torch.testing.assert_close(row[key][0], x)
            _, t, begin = known.of(first)
            furthest = max(furthest, t - begin)
    assert furthest >= 3 * STEPS


def test_only_the_newest_batch_is_renewed() -> None:
    """As it came: a state that is written into another episode would be seen by nobody."""
    policy = make_policy()
    replay, _ = filled(policy, 40, whole_episodes=True)
    older, newest = (burn_in(policy, replay.sample(ENVS), STEPS) for _ in range(2))
    swapped = newest[torch.arange(ENVS).roll(1)]
    for batch, rows in ((older, ENVS), (newest[:1], 1), (swapped, ENVS)):
        with pytest.raises(ValueError, match=f"this batch of {rows} rows is not the newest, of {ENVS}; give what"):
            replay.renew(batch)
    replay.renew(newest)
    plain, _ = filled(policy, 40)
    with pytest.raises(ValueError, match="whole_episodes is False; a state is renewed for the row that goes on"):
        plain.renew(burn_in(policy, plain.sample(ENVS), 4))


def test_on_a_device_the_host_waits_neither_for_a_batch_nor_for_its_renewal() -> None:
    """Of the device meta nothing can be read."""
    replay, _ = filled(make_policy(), 40, whole_episodes=True)
    expected = replay.sample(ENVS)
    replay._storage.device = torch.device("meta")
    replay._storage.leaves = {key: leaf.to("meta") for key, leaf in replay._storage.leaves.items()}
    batch = replay.sample(ENVS)
    assert {str(value.device) for value in batch.values(True, True)} == {"meta"}
    assert {key: value.shape for key, value in batch.items(True, True) if key != "finals"} == {
        key: value.shape for key, value in expected.items(True, True) if key != "finals"
    }
    replay.renew(batch[:, STEPS:])
    with pytest.raises(ValueError, match="is not the newest"):
        replay.renew(batch[:1, STEPS:])


def test_episodes_are_drawn_uniformly() -> None:
    policy = make_policy()
    replay, known = filled(policy, 30, whole_episodes=True)
    starts = replay.num_starts
    counts: Counter[Any] = Counter()
    number = 200
    for batch in (replay.sample(32) for _ in range(number)):
        for row in batch:
            if not row["valid"][:STEPS].any():  # nothing in front: it begins
                counts[known.of(row["observation"][STEPS])] += 1
    assert all(t == begin for _, t, begin in counts)
    assert len(counts) == starts
    mean = sum(counts.values()) / starts
    # multinomial: chi squared within five of its standard deviations
    chi = sum((count - mean) ** 2 / mean for count in counts.values())
    assert abs(chi - (starts - 1)) < 5 * (2 * (starts - 1)) ** 0.5


@pytest.mark.parametrize("every", [1, 6])
def test_a_row_whose_piece_was_overwritten_begins_another_episode(every: int) -> None:
    """As most are where six rollouts come between two batches; what lies in its slots then is of another episode."""
    policy = make_policy()
    found = rollouts(policy, 60 * every)
    known = Known(found)
    replay = make_replay(capacity=4 * 40, whole_episodes=True)
    before: list[Any] = [None] * ENVS
    began = went_on = 0
    for number, rollout in enumerate(found):
        replay.extend(rollout)
        if number % every or not replay.num_starts:
            continue
        for n, row in enumerate(follow(policy, replay, 1)[0]):
            place = known.of(row["observation"][0])
            if before[n] == place:
                went_on += 1
            else:
                assert place[1] == place[2], "an episode from its start"
                began += 1
            for key, x in zip(STATE, known.state(row["observation"][0]), strict=True):
                torch.testing.assert_close(row[key][0], x)
            before[n] = (place[0], place[1] + STEPS, place[2])
    assert began > 20
    assert went_on > 20 or every > 1


@pytest.mark.parametrize("overlap", [True, False])
def test_where_no_episodes_start_is_there_any_sequence_is_drawn(overlap: bool) -> None:
    """An episode that is longer than its ring."""
    policy = make_policy()
    found = rollouts(policy, 1)[0]
    replay = make_replay(capacity=4 * 20, whole_episodes=True, overlap=overlap)
    steps = torch.arange(STEPS)
    for k in range(10):
        rollout = found.clone()
        number = (100.0 * torch.arange(ENVS)[:, None] + steps + k * STEPS)[..., None].expand(ENVS, STEPS, 4)
        rollout["observation"], rollout["next", "observation"] = number.clone(), number + 1
        rollout["is_init"] = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
        rollout["is_init"][:, 0] = k == 0
        for key in ("done", "terminated", "truncated"):
            rollout["next", key] = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
        replay.extend(rollout)
    assert replay.num_starts == 0
    batch = replay.sample()
    assert batch["valid"][:, STEPS:].all()
    following = replay.sample()
    went_on = following["observation"][:, STEPS, 0] == batch["observation"][:, -1, 0] + 1
    assert went_on.any()
    assert following["valid"][:, STEPS:].all()


def test_a_saved_replay_goes_on_in_the_same_episodes(tmp_path: Path) -> None:
    """With the renewed states, which are not the actor's any more."""
    policy = make_policy()
    replay, _ = filled(policy, 40, whole_episodes=True)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    follow(policy, replay, 3)
    replay.dump(tmp_path / "saved")
    other = make_replay(whole_episodes=True, seed=99)
    other.load(tmp_path / "saved")
    for one, same in zip(follow(policy, replay, 20), follow(policy, other, 20), strict=True):
        assert (one == same).all()
    with pytest.raises(ValueError, match="has sampler uniform, whole episodes, this one has uniform"):
        make_replay().load(tmp_path / "saved")
    plain, _ = filled(policy)
    plain.dump(tmp_path / "plain")
    make_replay(burn_in=4).load(tmp_path / "plain")  # what is stored is the same
    with pytest.raises(ValueError, match="has sampler uniform, this one has uniform, whole episodes"):
        other.load(tmp_path / "plain")


def test_images_in_front_are_stacked_as_the_actor_saw_them() -> None:
    """Frames that are stored once, at the start of an episode too."""
    g = torch.Generator().manual_seed(0)
    replay = Replay(200, num_envs=1, batch_size=16, length=3, pad=True, frame_stack=3, burn_in=4, seed=1)
    frames = torch.randint(255, (60, 1, 2, 2), generator=g, dtype=torch.uint8)
    ends = {7, 8, 20, 33}
    stacks, begin = [], 0
    for t in range(60):
        stacks.append(torch.cat([frames[max(begin, t - back)] for back in (2, 1, 0)]))
        begin = t + 1 if t in ends else begin
    observation = torch.stack(stacks)[None]
    done = torch.tensor([t in ends for t in range(60)])[None, :, None]
    final = torch.randint(255, observation.shape, generator=g, dtype=torch.uint8)
    final[0, :, :2] = observation[0, :, 1:]
    following = torch.where(done[..., None, None], final, observation.roll(-1, 1))
    following[0, -1, :2] = observation[0, -1, 1:]
    whole = TensorDict(
        {
            "observation": observation,
            "action": torch.arange(60)[None],
            "is_init": done.roll(1, 1),
            "next": {
                "observation": following, "reward": torch.zeros(1, 60, 1), "terminated": done,
                "truncated": torch.zeros_like(done), "done": done,
            },
        },
        [1, 60],
    )  # fmt: skip
    for part in whole.split(5, 1):
        replay.extend(part)
    for row in replay.sample(200):
        steps = row["action"][row["valid"][:, 0]]
        assert (steps.diff() == 1).all()
        assert torch.equal(row["observation"][row["valid"][:, 0]], observation[0, steps])
        assert row["valid"][4]
        assert not any(int(t) in ends for t in steps[:-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"burn_in": -1}, "burn_in is -1; it must be at least 0"),
        ({"burn_in": 3, "whole_episodes": True}, "burn_in is 3, and whole_episodes is True: .* must be 0"),
        ({"burn_in": 3, "length": 1}, "burn_in is 3; that is for sequences, of a length of 2 or more, and length is 1"),
        ({"whole_episodes": True, "length": 1}, "whole_episodes is True; that is for sequences"),
        ({"burn_in": 995}, "995 steps in front of sequences of 6 need 1001; .* both together must be below 1001"),
        ({"whole_episodes": True, "capacity": 44}, "6 steps in front of sequences of 6 need 12; .* 11 steps"),
        (
            {"whole_episodes": True, "sampler": Prioritized()},
            "whole_episodes is True, and the sampler is prioritized.*; rows that go on have no priorities",
        ),
    ],
)
def test_what_does_not_fit_a_replay_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_replay(**options)


def test_what_cannot_be_burnt_in_is_refused() -> None:
    policy = make_policy()
    assert recurrent_keys(policy) == list(STATE)
    batch = filled(policy)[0].sample()
    for steps in (-1, STEPS):
        with pytest.raises(ValueError, match=rf"the batch is \[8, 6\], and the burn-in {steps} steps"):
            burn_in(policy, batch, steps)
    with pytest.raises(KeyError, match="the policy reads 'recurrent_c', which the batch lacks"):
        burn_in(policy, batch.exclude("recurrent_c"), 2)
    feed_forward = build_policy(network="mlp", observation_shape=[4], num_actions=2, action_dim=None)
    with pytest.raises(ValueError, match="the policy has no recurrent state that steps in front of a sequence could"):
        burn_in(feed_forward, batch, 2)
    assert (burn_in(policy, batch, 0) == batch).all()
