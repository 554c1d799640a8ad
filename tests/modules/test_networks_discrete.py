"""Discrete actions: epsilon-greedy probabilities, dueling and distributional values, masks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from offtrace.modules.networks import (
    ActionValueHead,
    CategoricalValueHead,
    GreedyHead,
    Policy,
    build_critic,
    build_policy,
)

FEATURES, ACTIONS = 5, 4
# three values of which two may be equal, under every mask with a legal action
VALUES = torch.tensor(list(itertools.product((-1.5, 0.0, 2.0), repeat=3)), dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product((False, True), repeat=3))[1:])


def dqn(**options: Any) -> Policy:
    torch.manual_seed(0)
    given = {"observation_shape": [FEATURES], "num_actions": ACTIONS, "head": "greedy", "critic": "q", **options}
    return build_policy(**given)


def masks(*batch: int) -> Tensor:
    mask = torch.rand(*batch, ACTIONS) < 0.5
    mask[..., 1] = True
    return mask


def states(*batch: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*batch, FEATURES), "action_mask": masks(*batch)}, batch)


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_greedy_probabilities_are_those_of_the_definition_with_ties_and_masks(epsilon: float) -> None:
    head = GreedyHead(3, epsilon=epsilon, masked=True).double()
    for value, mask in itertools.product(VALUES, MASKS):
        legal = [a for a in range(3) if mask[a]]
        best = max(float(value[a]) for a in legal)
        ties = [a for a in legal if value[a] == best]
        wanted = [epsilon / len(legal) * (a in legal) + (1 - epsilon) / len(ties) * (a in ties) for a in range(3)]
        logits, same = head(value.unsqueeze(-2), mask)
        dist = head.distribution(logits, same)
        found = dist.logits.exp()
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
        assert (found[~mask] == 0).all()
        assert float(found.sum()) == pytest.approx(1, abs=1e-15)
        assert int(dist.deterministic_sample) == ties[0] == int(dist.mode)
        assert dist.entropy().isfinite()


def test_greedy_without_a_mask_is_greedy_with_all_actions_legal() -> None:
    free, masked = GreedyHead(3, epsilon=0.3), GreedyHead(3, epsilon=0.3, masked=True)
    value = VALUES.float().unsqueeze(-2)
    torch.testing.assert_close(free(value), masked(value, torch.ones(len(value), 3, dtype=torch.bool)))
    # nothing is legal where nobody acts, in padding: no NaN may come of it
    assert masked(value, torch.zeros(len(value), 3, dtype=torch.bool))[0].isfinite().all()


def test_epsilon_travels_with_the_weights_and_no_gradient_through_the_policy() -> None:
    policy = dqn()
    policy.network.head.set_epsilon(0.5)  # type: ignore[operator]
    other = dqn()
    other.load_state_dict(policy.state_dict())
    assert other.network.head.epsilon == 0.5
    assert copy.deepcopy(policy).network.head.epsilon == 0.5
    out = policy(states(6))
    assert not out["logits"].requires_grad
    assert not out["action_log_prob"].requires_grad
    assert out["action_value"].requires_grad
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], got 1.5"):
        policy.network.head.set_epsilon(1.5)  # type: ignore[operator]


def test_greedy_policy_explores_as_often_as_it_says_and_acts_by_the_largest_value() -> None:
    policy, td = dqn(head_options={"epsilon": 0.4}), states(1).expand(20_000)
    out = policy(td.clone())
    best = out["action_value"][0, 0].argmax()
    counts = torch.bincount(out["action"], minlength=ACTIONS) / len(out)
    wanted = torch.full((ACTIONS,), 0.1).index_fill(0, best, 0.7)
    torch.testing.assert_close(counts, wanted, atol=0.02, rtol=0)
    policy.network.head.set_epsilon(1.0)  # type: ignore[operator]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (policy(td.clone())["action"] == best).all()


@pytest.mark.parametrize("critic", ["v", "q"])
def test_masks_of_another_kind_or_size_are_named(critic: str) -> None:
    """Gymnasium's own masks are int8; one of a single column would be broadcast over all actions."""
    policy = build_policy(
        network="mlp", observation_shape=[FEATURES], num_actions=ACTIONS, masked=True, critic=critic, hidden=[8]
    )
    td = states(5)
    policy(td.clone())
    with pytest.raises(TypeError, match=r"'action_mask' must be a bool tensor, .* got torch.int8"):
        policy(td.clone().set("action_mask", td["action_mask"].to(torch.int8)))
    with pytest.raises(ValueError, match=rf"'action_mask' is \[5, 1\]; .* the {ACTIONS} actions"):
        policy(td.clone().set("action_mask", td["action_mask"][:, :1]))


@pytest.mark.parametrize("options", [{}, {"recurrent": 6, "last_step": False}, {"critic_options": {"atoms": 5}}])
def test_a_masked_greedy_policy_takes_legal_actions_only(options: dict[str, Any]) -> None:
    policy = dqn(masked=True, head_options={"epsilon": 1.0}, **options)
    td = states(500).set("is_init", torch.ones(500, 1, dtype=torch.bool))
    for mode in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(mode):
            out = policy(td.clone())
        assert td["action_mask"].gather(-1, out["action"].unsqueeze(-1)).all()
        assert out["action_log_prob"].isfinite().all()
    legal = out["action_value"].squeeze(-2).masked_fill(~td["action_mask"], -math.inf)
    torch.testing.assert_close(out["action"], legal.argmax(-1))


@pytest.mark.parametrize("atoms", [0, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_dueling_is_the_papers_identity(atoms: int, masked: bool) -> None:
    torch.manual_seed(0)
    kind: Any = CategoricalValueHead if atoms else ActionValueHead
    head = kind(FEATURES, ACTIONS, dueling=True, masked=masked, **({"atoms": atoms} if atoms else {})).double()
    assert head.masked == masked
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    x, mask = torch.randn(3, 6, FEATURES, dtype=torch.float64), masks(3, 6)
    value = x @ head.state.weight.t() + head.state.bias
    advantage = (x @ head.linear.weight.t() + head.linear.bias).view(3, 6, ACTIONS, -1)
    found = head(x, mask if masked else None).view(3, 6, ACTIONS, -1)
    for row, column in itertools.product(range(3), range(6)):
        legal = mask[row, column] if masked else torch.ones(ACTIONS, dtype=torch.bool)
        mean = advantage[row, column][legal].mean(0)
        torch.testing.assert_close(found[row, column], value[row, column] + advantage[row, column] - mean)
        # what the identity is for: the mean over legal actions is V
        torch.testing.assert_close(found[row, column][legal].mean(0), value[row, column])


@pytest.mark.parametrize("dueling", [False, True])
def test_distributional_head_writes_logits_and_their_means(dueling: bool) -> None:
    policy = dqn(critic_options={"atoms": 11, "v_max": 4.0, "dueling": dueling}).double()
    head = policy.network.value_head
    for parameter in head.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter)
    td = states(2, 3).double()
    out = policy(td.clone())
    assert out["value_logits"].shape == (2, 3, 1, ACTIONS, 11)
    support = torch.linspace(-4, 4, 11, dtype=torch.float64)
    weight = out["value_logits"].exp()
    wanted = (weight * support).sum(-1) / weight.sum(-1)
    torch.testing.assert_close(out["action_value"], wanted)
    assert set(policy.out_keys) == {"logits", "value_logits", "action_value", "action", "action_log_prob"}
    assert "module.0.value_head.support" in policy.state_dict()
    flat = {"observation": td["observation"].flatten(0, 1)}
    torch.testing.assert_close(policy.network.values(flat).unflatten(0, (2, 3)), out["value_logits"])


def test_distributional_values_start_near_zero() -> None:
    out = dqn(critic_options={"atoms": 51}, hidden=[256, 256])(states(500))
    assert out["action_value"].abs().max() < 1


@pytest.mark.parametrize(
    "options",
    [
        {"head": "categorical", "critic": None},
        {"head": "categorical", "critic": "v"},
        {"head": "categorical", "critic": "q", "critic_options": {"dueling": True}},
        {"head": "categorical", "critic": "q", "critic_options": {"dueling": True, "atoms": 5}},
        {"head": "greedy", "critic": "q"},
        {"head": "greedy", "critic": "q", "critic_options": {"dueling": True}},
        {"head": "greedy", "critic": "q", "critic_options": {"atoms": 5}},
    ],
)
def test_masks_reach_every_head_and_tensors_give_what_tensordicts_give(options: dict[str, Any]) -> None:
    policy = dqn(masked=True, **options)
    td = states(40)
    out = policy(td.clone())
    plain = {key: td[key] for key in policy.in_keys}
    assert set(plain) == {"observation", "action_mask"}
    for key, value in zip(policy[-1].in_keys, policy.parameters_at(plain), strict=True):
        torch.testing.assert_close(value, out[key])
    dist = policy.distribution_at(plain)
    assert (dist.probs[~td["action_mask"]] == 0).all()  # type: ignore[attr-defined]
    torch.testing.assert_close(dist.probs.sum(-1), torch.ones(40))  # type: ignore[attr-defined]
    torch.testing.assert_close(dist.log_prob(out["action"]), out["action_log_prob"])
    if options["critic"] is not None:
        values = policy.network.values(plain)
        torch.testing.assert_close(values, out[policy.network.value_head.out_keys[0]])  # type: ignore[union-attr]
    with pytest.raises(KeyError, match="action_mask"):
        policy(td.exclude("action_mask"))


def test_values_of_illegal_actions_are_finite_and_reach_no_expectation() -> None:
    """What losses form of a discrete critic: sum of pi Q."""
    torch.manual_seed(0)
    policy = dqn(masked=True, head="categorical", critic=None)
    critic = build_critic(observation_shape=[FEATURES], num_actions=ACTIONS, hidden=[8])
    td = states(40)
    td["action_mask"][:, 3] = False
    plain = {key: td[key] for key in policy.in_keys}
    pi = policy.distribution_at(plain).probs.unsqueeze(-2)  # type: ignore[attr-defined]
    before = (pi * critic.values(plain)).sum(-1)
    critic.ensemble.last.bias.data[..., 3] = 1e30
    assert critic.values(plain).isfinite().all()
    assert torch.equal((pi * critic.values(plain)).sum(-1), before)


def test_states_are_for_networks_without_memory() -> None:
    policy = dqn(recurrent=4, last_step=False)
    with pytest.raises(ValueError, match="a recurrent network reads sequences"):
        policy.distribution_at({"observation": torch.randn(2, FEATURES)})
    with pytest.raises(ValueError, match="has no value head"):
        dqn(head="categorical", critic=None).network.values({"observation": torch.randn(2, FEATURES)})
