"""Spaces of Gymnasium: dictionaries against its own ``flatten``, combinations of actions against ``itertools``."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical, Unbounded
from torchrl.envs.utils import check_env_specs

from offtrace.modules.collectors import make_collector
from offtrace.modules.envs import EnvironmentFailure, GymEnv, StepResult, VectorEnv, env_info, make_env
from offtrace.modules.envs.spaces import Actions
from offtrace.modules.networks import build_policy

NESTED = spaces.Dict(
    {
        "speed": spaces.Box(-2, 2, (2, 3), np.float64),
        "gear": spaces.Discrete(4, start=-1),
        "arm": spaces.Dict({"grip": spaces.MultiBinary((2, 2)), "angle": spaces.Box(-1, 1, (), np.float32)}),
        "pair": spaces.Tuple((spaces.MultiDiscrete([2, 3]), spaces.Box(0, 255, (5,), np.uint8))),
    }
)
SHAPES = {
    "arm.angle": (1,), "arm.grip": (2, 2), "gear": (4,), "pair.0": (5,), "pair.1": (5,), "speed": (2, 3),
}  # fmt: skip


class Player(gymnasium.Env[Any, Any]):
    """Shows samples of a space in episodes of three steps, and keeps what it showed and what it was told to do."""

    def __init__(self, observation: Any, action: Any = None, masks: Any = None) -> None:
        self.observation_space = observation
        self.action_space = spaces.Discrete(2) if action is None else action
        self.shown: list[Any] = []
        self.told: list[Any] = []
        self.masks = masks

    def _show(self) -> tuple[Any, dict[str, Any]]:
        self.shown.append(self.observation_space.sample())
        info = {} if self.masks is None else {"action_mask": self.masks[(len(self.shown) - 1) % len(self.masks)]}
        return self.shown[-1], info

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            self.shown.clear()
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.told.append(action)
        observation, info = self._show()
        return observation, 1.0, False, len(self.told) % 3 == 0, info


def player(**changes: Any) -> GymEnv:
    made = {"observation": spaces.Box(-1, 1, (2,)), **changes}
    flatten = made.pop("flatten", True)
    return GymEnv(lambda: Player(**made), made.pop("number", 1), name="mine", flatten=flatten)


def shown(env: GymEnv) -> tuple[list[Any], list[Any]]:
    """Root and next observations of seven steps, and what the one environment had shown by then."""
    state, given = env.reset(), []
    for _ in range(7):
        state["action"] = env.action_spec.rand()
        step, state = env.step_and_maybe_reset(state)
        given.append((step["observation"], step["next", "observation"]))
    truth = env._envs[0].shown
    # after three steps an episode ends: what is shown next is where the following one starts
    starts = [step + step // 3 for step in range(7)]
    return given, [(truth[start], truth[start + 1]) for start in starts]


@pytest.mark.parametrize(
    "space",
    [
        NESTED,
        spaces.Tuple((spaces.Discrete(3), NESTED)),
        spaces.Discrete(5, start=2),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
        spaces.MultiBinary(6),
        spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(-1, 1, (3,), np.float32)}),
    ],
    ids=["nested", "tuple", "discrete", "multi_discrete", "multi_binary", "dict"],
)
def test_a_dictionary_is_the_vector_that_gymnasium_makes_of_it(space: spaces.Space[Any]) -> None:
    env = player(observation=space)
    size = spaces.flatdim(space)
    assert env.observation_spec["observation"].shape == (1, size)
    for got, wanted in zip(*shown(env), strict=True):
        for tensor, truth in zip(got, wanted, strict=True):
            assert tensor.dtype == torch.float32
            np.testing.assert_array_equal(tensor[0].numpy(), spaces.flatten(space, truth).astype(np.float32))


def test_entries_of_a_dictionary_are_its_members() -> None:
    env = player(observation=NESTED, flatten=False)
    for got, wanted in zip(*shown(env), strict=True):
        for entries, truth in zip(got, wanted, strict=True):
            assert {key: tuple(value.shape[1:]) for key, value in entries.items()} == SHAPES
            one = {key: value[0].numpy() for key, value in entries.items()}
            assert one["pair.1"].dtype == np.uint8
            np.testing.assert_array_equal(one["pair.1"], truth["pair"][1])
            np.testing.assert_array_equal(one["speed"], truth["speed"].astype(np.float32))
            np.testing.assert_array_equal(one["arm.grip"], truth["arm"]["grip"])
            assert one["arm.angle"].tolist() == [truth["arm"]["angle"]]
            assert one["gear"].tolist() == [float(gear == truth["gear"]) for gear in range(-1, 3)]
            first, second = truth["pair"][0]
            assert one["pair.0"].tolist() == [first == 0, first == 1, second == 0, second == 1, second == 2]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_single_number_is_a_vector_of_one(dtype: Any) -> None:
    env = player(observation=spaces.Box(0, 1, (), dtype), number=2)
    check_env_specs(env)
    policy = build_policy(observation_shape=env.observation_spec["observation"].shape[1:], num_actions=2)
    rollout = env.rollout(4, policy, break_when_any_done=False)
    assert rollout["observation"].shape == (2, 4, 1)
    assert rollout["observation"].dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)


@pytest.mark.parametrize("action", [spaces.Discrete(2), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize("flatten", [True, False])
def test_specs(flatten: bool, action: spaces.Space[Any]) -> None:
    check_env_specs(player(observation=NESTED, action=action, flatten=flatten, number=2))


class Faulty(Player):
    """Its fifth observation has an entry that is not finite."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        found = super().step(action)
        if len(self.told) == 5:
            found[0]["speed"] = np.full((2, 3), np.nan)
        return found


@pytest.mark.parametrize("flatten", [True, False])
def test_an_entry_that_is_not_finite(flatten: bool) -> None:
    continuous = GymEnv(lambda: Faulty(NESTED, spaces.Box(-1, 1, (1,))), 1, name="mine", flatten=flatten)
    with pytest.warns(
        RuntimeWarning, match=r"mine: environment 0 failed at step 5 \(an observation that is not finite"
    ):
        rollout = continuous.rollout(7, break_when_any_done=False)
    assert rollout["next", "valid"].flatten().tolist() == [True] * 4 + [False] + [True] * 2
    before, after = rollout[:, 4]["observation"], rollout[:, 4]["next", "observation"]
    assert bool((before == after).all())
    discrete = GymEnv(lambda: Faulty(NESTED), 1, name="mine", flatten=flatten)
    with pytest.raises(EnvironmentFailure, match=r"mine: environment 0 returned a observation that is not finite at"):
        discrete.rollout(7, break_when_any_done=False)


class OneNumber(VectorEnv):
    """The user's own, whose observation is a number and at the second step none."""

    def __init__(self) -> None:
        super().__init__("mine", 2, observation=Unbounded(()), action=Categorical(2))

    def _start(self) -> tuple[torch.Tensor, None]:
        return torch.zeros(2), None

    def _following(self) -> torch.Tensor:
        return torch.zeros(2)

    def _advance(self, action: torch.Tensor) -> StepResult:
        numbers, never = torch.tensor([0.0, torch.nan if self._steps == 2 else 0.0]), torch.zeros(2, dtype=torch.bool)
        return StepResult(numbers, torch.zeros(2), never, never, never)


def test_a_single_number_that_is_not_finite() -> None:
    with pytest.raises(EnvironmentFailure, match="mine: environment 1 returned a observation that is not finite at st"):
        OneNumber().rollout(3)


IMAGE = spaces.Dict({"eye": spaces.Box(0, 255, (3, 8, 8), np.uint8), "step": spaces.Discrete(9)})


def test_images_in_a_dictionary_are_kept_apart() -> None:
    words = (
        r"mine has an image of shape \[3, 8, 8\] among its observations, 'eye', .*: pass flatten=False, and a network"
    )
    with pytest.raises(ValueError, match=words):
        player(observation=IMAGE)
    env = player(observation=IMAGE, flatten=False)
    state = env.reset()
    assert (state["observation", "eye"].dtype, state["observation", "step"].dtype) == (torch.uint8, torch.float32)
    assert tuple(state["observation", "eye"].shape) == (1, 3, 8, 8)
    assert player(observation=IMAGE["eye"]).reset()["observation"].dtype == torch.uint8  # an image alone stays one


@pytest.mark.parametrize(("channels", "flatten"), [(1, True), (3, True), (4, True), (3, False)])
def test_an_image_whose_channels_are_last_is_turned_round(channels: int, flatten: bool) -> None:
    image = spaces.Box(0, 255, (9, 6, channels), np.uint8)
    env = player(observation=image if flatten else spaces.Dict({"eye": image}), flatten=flatten)
    check_env_specs(player(observation=image if flatten else spaces.Dict({"eye": image}), flatten=flatten, number=2))
    for got, wanted in zip(*shown(env), strict=True):
        for tensor, truth in zip(got, wanted, strict=True):
            ours, theirs = (tensor, truth) if flatten else (tensor["eye"], truth["eye"])
            assert (ours.shape, ours.dtype) == ((1, channels, 9, 6), torch.uint8)
            assert ours.is_contiguous()
            for place in itertools.product(range(9), range(6), range(channels)):
                assert ours[0, place[2], place[0], place[1]] == theirs[place]


@pytest.mark.parametrize("shape", [(4, 84, 84), (3, 9, 6), (12, 3, 3), (9, 6, 5)])
def test_other_images_are_as_they_come(shape: tuple[int, ...]) -> None:
    assert player(observation=spaces.Box(0, 255, shape, np.uint8)).reset()["observation"].shape == (1, *shape)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Text(5), r"mine has Text\(.*\) as observations; the agents read Box, Discrete"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Text(5)})}), r"mine has Text\(.*\) among its observations, 'a.b'"),
        (spaces.Sequence(spaces.Discrete(2)), r"mine has Sequence\(.*\) as observations"),
        (spaces.Dict({}), r"mine has observations of Dict\(\), which are empty"),
    ],
)
def test_observations_nobody_can_read(space: spaces.Space[Any], words: str) -> None:
    for flatten in (True, False):
        with pytest.raises(ValueError, match=words):
            GymEnv(lambda: Player(space), 1, name="mine", flatten=flatten)


def test_entries_of_one_name() -> None:
    space = spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})})
    with pytest.raises(ValueError, match=r"mine has two observations of one name: a.b, a.b"):
        player(observation=space, flatten=False)
    assert player(observation=space).reset()["observation"].shape == (1, 4)


def own_dictionary() -> gymnasium.Env[Any, Any]:
    return Player(NESTED, spaces.MultiDiscrete([2, 3]))


def test_descriptions_of_own_environments() -> None:
    name = f"{__name__}:own_dictionary"
    whole, parts = env_info(name), env_info(name, flatten=False)
    assert (whole.observation_shape, parts.observation_shape) == ((spaces.flatdim(NESTED),), SHAPES)
    assert (parts.kind, parts.num_actions, parts.action_dim, parts.masked) == ("discrete", 6, None, False)


def test_a_network_of_the_users_reads_entries_in_a_collector() -> None:
    module = nn.Linear(4, 2)
    policy = TensorDictModule(
        lambda gear: module(gear).argmax(-1), in_keys=[("observation", "gear")], out_keys=["action"]
    )
    env_fn = lambda seed: make_env(f"{__name__}:own_dictionary", 2, seed=seed, flatten=False)  # noqa: E731
    with make_collector(env_fn, policy, frames_per_batch=10, num_workers=0) as collector:
        rollout = next(collector)
    assert {key: tuple(value.shape[2:]) for key, value in rollout["observation"].items()} == SHAPES
    entry = torch.stack([rollout["next", "observation", "gear"][:, 0], rollout["observation", "gear"][:, 1]])
    assert torch.equal(entry[0], entry[1])


ACTIONS = [
    (spaces.MultiDiscrete([2, 3, 2]), [range(2), range(3), range(2)]),
    (spaces.MultiDiscrete([2, 3], start=[5, -1]), [range(5, 7), range(-1, 2)]),
    (spaces.MultiDiscrete([[2, 2], [3, 1]]), [range(2), range(2), range(3), range(1)]),
    (spaces.MultiBinary(3), [range(2)] * 3),
    (spaces.MultiBinary((2, 2)), [range(2)] * 4),
]


@pytest.mark.parametrize(("space", "ranges"), ACTIONS, ids=[str(space) for space, _ in ACTIONS])
def test_combinations_are_those_of_itertools(space: Any, ranges: list[range]) -> None:
    env = player(action=space)
    combinations = list(itertools.product(*ranges))
    assert int(env.action_spec.space.n) == len(combinations)
    assert env.action_spec.shape == (1,)
    state = env.reset()
    for index in range(len(combinations)):
        state["action"] = torch.tensor([index])
        _, state = env.step_and_maybe_reset(state)
    told = [action.flatten().tolist() for action in env._envs[0].told]  # Player asks whether its space has them
    assert told == [list(combination) for combination in combinations]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.MultiDiscrete([16, 16, 17]), r"mine has 4,352 combinations of actions, of MultiDiscrete.*at most"),
        (spaces.MultiDiscrete([2**20] * 8), r"combinations of actions, .*choose among 4,096 at most"),
        (spaces.MultiBinary(13), r"mine has 8,192 combinations of actions, of MultiBinary"),
        (spaces.Dict({}), r"mine has actions of Dict\(\); the agents act in Discrete, MultiDiscrete, MultiBinary and"),
        (spaces.Box(-1, 1, (2, 2)), r"mine has actions of Box"),
    ],
)
def test_actions_nobody_can_take(space: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        player(action=space)


def test_as_many_combinations_as_there_may_be() -> None:
    assert int(player(action=spaces.MultiBinary(12)).action_spec.space.n) == 4096


BOXES = [
    spaces.Box(-0.1, 0.1, (3,), np.float64),
    spaces.Box(np.array([-0.1, 0, -np.inf]), np.array([0.3, np.inf, np.inf]), dtype=np.float64),
    spaces.Box(-0.3, 0.7, (3,), np.float16),
    spaces.Box(-2, 3, (3,), np.int64),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Box(-np.inf, np.inf, (3,), np.int8),
    spaces.Box(-(2**63), 2**63 - 1, (3,), np.int64),
    spaces.Box(0, 2**64 - 1, (3,), np.uint64),
    spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (3,), np.float32),
]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("space", BOXES, ids=str)
def test_numbers_are_of_the_space(space: spaces.Box, rescale: bool) -> None:
    """Player asks its space; at the bounds and beyond, where float32 rounds outwards, and between whole numbers."""
    env = GymEnv(lambda: Player(spaces.Box(-1, 1, (2,)), space), 1, name="mine", rescale_actions=rescale)
    state = env.reset()
    for number in (-1000.0, -1.0, -0.1, 0.0, 0.4, 0.6, 1.0, 1000.0):
        state["action"] = torch.full((1, 3), number)
        _, state = env.step_and_maybe_reset(state)
        told = env._envs[0].told[-1]
        assert told.dtype == space.dtype
        if not rescale and np.issubdtype(space.dtype, np.integer):
            assert told.tolist() == [min(max(round(number), int(space.low[0])), int(space.high[0]))] * 3
    reached = np.stack(env._envs[0].told)
    bounded = space.bounded_below & space.bounded_above
    if rescale:
        np.testing.assert_allclose(reached.min(0)[bounded], space.low[bounded], rtol=1e-6)
        np.testing.assert_allclose(reached.max(0)[bounded], space.high[bounded], rtol=1e-6)
        assert (np.abs(reached[:, ~bounded]) <= 1).all()


def product(sizes: list[int], legal: Any) -> list[bool]:
    return [all(legal[place][digit] for place, digit in enumerate(combination)) for combination in
            itertools.product(*(range(size) for size in sizes))]  # fmt: skip


def test_the_mask_of_combinations_is_the_product_of_the_masks() -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 3, 4]
    actions = Actions("mine", spaces.MultiDiscrete(sizes))
    for _ in range(20):
        parts = tuple(rng.integers(2, size=size, dtype=np.int8) for size in sizes)
        assert actions.mask(parts).tolist() == product(sizes, parts)
        whole = rng.integers(2, size=24, dtype=np.int8)
        assert actions.mask(whole).tolist() == whole.astype(bool).tolist()
    nested = Actions("mine", spaces.MultiDiscrete([[2, 3], [2, 2]]))
    parts = ((np.array([0, 1]), np.array([1, 0, 1])), (np.array([1, 1]), np.array([0, 1])))
    assert nested.mask(parts).tolist() == product([2, 3, 2, 2], [*parts[0], *parts[1]])


@pytest.mark.parametrize(
    ("space", "mask"),
    [
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), (np.array([1, 0, 1], np.int8), np.array([1, 1], np.int8))),
        (spaces.MultiDiscrete([3, 2]), (np.array([1, 0, 1], np.int8), np.array([0, 1], np.int8))),
        (spaces.MultiBinary(3), np.array([0, 2, 2], np.int8)),
        (spaces.MultiBinary(3), np.array([2, 1, 0], np.int8)),
        (spaces.Discrete(4), np.array([0, 1, 1, 0], np.int8)),
    ],
)
def test_legal_is_what_gymnasium_may_sample(space: Any, mask: Any) -> None:
    space.seed(0)
    actions = Actions("mine", space)
    legal = actions.decode(actions.mask(mask).nonzero()[0])
    sampled = {tuple(np.ravel(space.sample(mask=mask)).tolist()) for _ in range(300)}
    assert sampled == {tuple(np.ravel(action).tolist()) for action in legal}


@pytest.mark.parametrize(
    ("space", "mask", "words"),
    [
        (spaces.Discrete(3), np.ones(2), r"gave the action_mask .*; it must be an array of 3$"),
        (
            spaces.MultiDiscrete([2, 3]),
            np.ones(5),
            r"must be an array of 6, or an array for each of the sizes \(2, 3\)",
        ),
        (spaces.MultiDiscrete([2, 3]), (np.ones(3), np.ones(2)), r"must be an array of 6, or an array for each"),
        (spaces.MultiBinary(3), np.ones(4), r"must be an array of 8, or one of 3 numbers 0, 1 or 2"),
    ],
)
def test_masks_of_another_size(space: Any, mask: Any, words: str) -> None:
    env = player(action=space, masks=[mask])
    with pytest.raises(EnvironmentFailure, match=rf"mine: .*mine {words}" if "gave" in words else words):
        env.reset()


SPACE = spaces.MultiDiscrete([2, 2])
A, B, NONE = (np.array([1, 0]), np.array([1, 1])), (np.array([0, 1]), np.array([1, 1])), (np.zeros(2), np.zeros(2))


def test_a_mask_belongs_to_its_observation_at_the_end_of_an_episode_too() -> None:
    """Shown: start, two steps, a last one, start again; each with the mask that was shown with it."""
    masks = [(np.array([1, 1]), np.array([1, 0])), A, B, A, B, A, A, A]
    env = player(action=SPACE, masks=masks)
    check_env_specs(player(action=SPACE, masks=masks, number=2))
    truth = [product([2, 2], mask) for mask in masks]
    state, roots, nexts = env.reset(), [], []
    for _ in range(4):
        state["action"] = torch.zeros(1, dtype=torch.int64)
        step, state = env.step_and_maybe_reset(state)
        roots.append(step["action_mask"][0].tolist())
        nexts.append(step["next", "action_mask"][0].tolist())
    assert roots == [truth[0], truth[1], truth[2], truth[4]]
    assert nexts == [truth[1], truth[2], truth[3], truth[5]]


@pytest.mark.parametrize("last", [NONE, None])
def test_where_nothing_is_left_to_do_everything_is_legal(last: Any) -> None:
    """Nothing is done in an episode's last observation, and a policy that has no legal action has no probabilities."""
    env = player(action=SPACE, masks=[A, A, A, last, A, A, A])
    rollout = env.rollout(4, break_when_any_done=False, auto_cast_to_device=False)
    assert rollout["next", "action_mask"][0, 2].tolist() == [True] * 4
    assert rollout["action_mask"][0, 3].tolist() == product([2, 2], A)


def test_a_mask_that_is_no_longer_given() -> None:
    env = player(action=SPACE, masks=[A, None])
    with pytest.raises(EnvironmentFailure, match=r"environment 0 raised ValueError at step 1: info has no action_mask"):
        env.rollout(3)


def test_masks_of_continuous_actions() -> None:
    with pytest.raises(ValueError, match=r"mine gives an action_mask, but its actions are Box\(.*, which take none"):
        player(action=spaces.Box(-1, 1, (2,)), masks=[np.ones(2)])
