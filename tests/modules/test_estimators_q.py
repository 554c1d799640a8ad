"""The estimators of action values: enumeration, samples, critics' minimum, entropy; one line swaps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from offtrace.modules import (
    ImportanceSampling,
    NStep,
    OneStep,
    QLambda,
    Retrace,
    TreeBackup,
    build_critic,
    build_policy,
)
from offtrace.modules.estimators import Outcome, bind
from offtrace.modules.returns import (
    importance_trace,
    q_return,
    retrace_trace,
    tree_backup_trace,
)

B, T, A, GAMMA = 3, 8, 4, 0.9


def rollout(continuous: bool = False) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(B, T + 1, 5, generator=generator)
    terminated = torch.rand(B, T, 1, generator=generator) < 0.2
    done = terminated | (torch.rand(B, T, 1, generator=generator) < 0.2)
    pre_tanh = torch.randn(B, T, 2, generator=generator)
    action = pre_tanh.tanh() if continuous else torch.randint(A, (B, T), generator=generator)
    data = {
        "observation": observation[:, :-1], "action": action,
        "action_log_prob": -1.4 + 0.3 * torch.randn(B, T, generator=generator),
        "next": {
            "observation": observation[:, 1:], "reward": torch.randn(B, T, 1, generator=generator),
            "done": done, "terminated": terminated,
        },
    }  # fmt: skip
    return TensorDict({**data, **({"pre_tanh": pre_tanh} if continuous else {})}, batch_size=[B, T])


def discrete(critics: int | None) -> tuple[Any, Any]:
    """TorchRL's form of a critic (no axis of critics), or ours with K of them."""
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(5, A), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        logits, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    if critics is None:
        return actor, TensorDictModule(nn.Linear(5, A), in_keys=["observation"], out_keys=["action_value"])
    return actor, build_critic(network="mlp", observation_shape=(5,), num_actions=A, hidden=(16,), critics=critics)


def ends(data: TensorDict) -> dict[str, Any]:
    return {k: data["next", k].transpose(0, 1) for k in ("reward", "terminated", "done")} | {"gamma": GAMMA}


def by_hand(data: TensorDict, actor: Any, critic: Any, kind: type, lmbda: float, alpha: float) -> Tensor:
    """Target [B, T, 1] of discrete actions, from the networks' outputs."""
    with torch.no_grad():
        every, following = (critic(x.clone())["action_value"] for x in (data, data["next"]))
        if every.ndim == 4:
            every, following = every.amin(-2), following.amin(-2)
        log_pi = actor.module[0].module(data["observation"]).log_softmax(-1)
        log_next = actor.module[0].module(data["next", "observation"]).log_softmax(-1)
    expected = (log_next.exp() * (following - alpha * log_next)).sum(-1, keepdim=True)
    index = data["action"].unsqueeze(-1)
    log_pi, chosen = log_pi.gather(-1, index), every.gather(-1, index)
    log_rho = log_pi - data["action_log_prob"].unsqueeze(-1)
    trace = {
        Retrace: lambda: retrace_trace(log_rho=log_rho, lmbda=lmbda),
        ImportanceSampling: lambda: importance_trace(log_rho=log_rho, lmbda=lmbda),
        TreeBackup: lambda: tree_backup_trace(log_pi=log_pi, lmbda=lmbda),
        QLambda: lambda: torch.full_like(log_pi, lmbda),
    }[kind]()
    out = q_return(
        q_value=chosen.transpose(0, 1), next_state_value=expected.transpose(0, 1), trace=trace.transpose(0, 1),
        **ends(data),
    )  # fmt: skip
    return out.transpose(0, 1)


KINDS = [Retrace, ImportanceSampling, TreeBackup, QLambda]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("critics", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_discrete_actions_are_enumerated(kind: Any, critics: int | None, alpha: float) -> None:
    actor, critic = discrete(critics)
    data = rollout()
    out = kind(gamma=GAMMA, lmbda=0.8, qvalue_network=critic, actor_network=actor, alpha=alpha)(data.clone())
    expected = by_hand(data, actor, critic, kind, 0.8, alpha)
    torch.testing.assert_close(out["value_target"], expected)
    assert not out["value_target"].requires_grad
    assert not out["advantage"].requires_grad
    assert out["value_target"].shape == (B, T, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_in_the_batch_needs_no_network(kind: Any) -> None:
    actor, critic = discrete(2)
    data = rollout()
    expected = kind(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.clone())
    with torch.no_grad():
        every, following = (critic(x.clone())["action_value"].amin(-2) for x in (data, data["next"]))
        log_pi = actor.module[0].module(data["observation"]).log_softmax(-1)
        pi_next = actor.module[0].module(data["next", "observation"]).softmax(-1)
    data["chosen_action_value"] = every.gather(-1, data["action"].unsqueeze(-1))
    data["next", "state_value"] = (pi_next * following).sum(-1, keepdim=True)
    data["target_log_prob"] = log_pi.gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)
    out = kind(gamma=GAMMA)
    for key in out.in_keys:
        assert data.get(key, None) is not None, key
    torch.testing.assert_close(out(data)["value_target"], expected["value_target"])
    torch.testing.assert_close(out.value_estimate(data), expected["value_target"])


def test_the_entries_are_renamed_by_set_keys() -> None:
    actor, critic = discrete(2)
    data = rollout()
    expected = Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.clone())
    data.rename_key_("action_log_prob", "mu")
    data.rename_key_(("next", "reward"), ("next", "r"))
    estimator = Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)
    estimator.set_keys(sample_log_prob="mu", reward="r", value_target="goal")
    torch.testing.assert_close(estimator(data)["goal"], expected["value_target"])


def continuous() -> tuple[Any, Any]:
    torch.manual_seed(0)
    shapes: Any = {"network": "mlp", "observation_shape": (5,), "action_dim": 2, "hidden": (16,)}
    actor = build_policy(head="tanh", critic=None, activation="relu", **shapes)
    return actor, build_critic(critics=2, **shapes)


@pytest.mark.parametrize("samples", [1, 6, "mean"])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_continuous_actions_are_sampled(samples: Any, alpha: float) -> None:
    """Log-probabilities from the sample before the tanh; the successor's value from fresh actions or the mean's."""
    actor, critic = continuous()
    data = rollout(continuous=True)
    estimator = Retrace(
        gamma=GAMMA, lmbda=0.9, qvalue_network=critic, actor_network=actor, num_samples=samples, alpha=alpha
    )
    torch.manual_seed(7)
    out = estimator(data.clone())
    torch.manual_seed(7)
    with torch.no_grad():
        dist = actor.get_dist(data["next"].clone())
        actions = dist.deterministic_sample[None] if samples == "mean" else dist.sample((samples,))
        total = torch.zeros(B, T, 1)
        for action in actions:
            value = critic(data["next"].clone().set("action", action))["state_action_value"].amin(-1, keepdim=True)
            total += (value - alpha * dist.log_prob(action).unsqueeze(-1)) / len(actions)
        chosen = critic(data.clone())["state_action_value"].amin(-1, keepdim=True)
        log_pi = actor.get_dist(data.clone()).log_prob_pre_tanh(data["pre_tanh"])
    trace = retrace_trace(log_rho=log_pi - data["action_log_prob"], lmbda=0.9).unsqueeze(-1)
    expected = q_return(
        q_value=chosen.transpose(0, 1), next_state_value=total.transpose(0, 1), trace=trace.transpose(0, 1),
        **ends(data),
    )  # fmt: skip
    torch.testing.assert_close(out["value_target"], expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_target_networks_take_the_place_of_the_online_ones() -> None:
    actor, critic = discrete(None)
    params, target = (TensorDict.from_module(critic).clone() for _ in range(2))
    target.apply_(lambda x: x.mul_(0.5))
    data = rollout()
    estimator = Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)
    online = estimator(data.clone(), params=params)["value_target"]
    torch.testing.assert_close(online, estimator(data.clone())["value_target"])
    out = estimator(data.clone(), params=params, target_params=target)["value_target"]
    target.to_module(critic)
    torch.testing.assert_close(out, estimator(data.clone())["value_target"])
    assert (out - online).abs().max() > 1e-2


def test_invalid_steps_and_unread_entries() -> None:
    actor, critic = discrete(2)
    data = rollout()
    data["valid"] = torch.ones(B, T, 1, dtype=torch.bool)
    data["valid"][1, 3] = False
    clean = Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.clone())["value_target"]
    data["next", "reward"][1, 3] = torch.nan
    data["action_log_prob"][1, 3] = torch.nan
    estimator = Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor, validate=True)
    torch.testing.assert_close(estimator(data)["value_target"], clean)


def test_bad_input_is_named() -> None:
    actor, critic = discrete(2)
    data = rollout()
    with pytest.raises(KeyError, match="'chosen_action_value' is missing, and there is no qvalue_network"):
        Retrace(gamma=GAMMA)(data)
    data["chosen_action_value"] = data["next", "state_value"] = torch.zeros(B, T, 1)
    with pytest.raises(KeyError, match="'target_log_prob' is missing, and there is no actor_network"):
        Retrace(gamma=GAMMA)(data)
    with pytest.raises(KeyError, match="'action_log_prob', the behaviour policy's log-probability, is missing"):
        Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.exclude("action_log_prob"))
    for options, words in (
        ({"gamma": 1.5}, "gamma must be in"),
        ({"gamma": 0.9, "lmbda": 1.1}, "lmbda must be in"),
        ({"gamma": 0.9, "num_samples": 0}, "num_samples must be at least 1, or 'mean', got 0"),
        ({"gamma": 0.9, "qvalue_network": critic}, "a qvalue_network needs an actor_network too"),
    ):
        with pytest.raises(ValueError, match=words):
            Retrace(**options)
    tanh_actor, twin = continuous()
    with pytest.raises(ValueError, match="TreeBackup needs probabilities of discrete actions"):
        TreeBackup(gamma=GAMMA, qvalue_network=twin, actor_network=tanh_actor)(rollout(continuous=True))
    data = rollout()
    data["action_log_prob"][0, 0] = 0.1
    with pytest.raises(ValueError, match="action_log_prob is the log-probability of a discrete action"):
        Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor, validate=True)(data)
    data = rollout()
    data["next", "reward"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="reward must be finite, got 1 entries that are not"):
        QLambda(gamma=GAMMA, qvalue_network=critic, actor_network=actor, validate=True)(data)


def test_values_and_shapes_that_do_not_fit_are_named() -> None:
    actor, critic = discrete(2)
    networks: dict[str, Any] = {"qvalue_network": critic, "actor_network": actor}
    for key in ("action_log_prob", ("next", "reward"), ("next", "done")):
        data = rollout()
        data[key] = data[key].reshape(B, T, 1).expand(B, T, 2).clone()
        with pytest.raises(ValueError, match=r"must have the shape of the values, \[3, 8, 1\], got \[3, 8, 2\]"):
            Retrace(gamma=GAMMA, **networks)(data)
    data = rollout()
    data["action_log_prob"] = data["action_log_prob"].to("meta")
    with pytest.raises(ValueError, match="'action_log_prob' must be on the device of the values, cpu, got meta"):
        Retrace(gamma=GAMMA, **networks)(data)
    data = rollout()
    data["next", "reward"] = data["next", "reward"].long()
    with pytest.raises(TypeError, match=r"reward must be a floating-point tensor, got torch.int64"):
        Retrace(gamma=GAMMA, **networks)(data)
    other = TensorDictModule(nn.Linear(5, A), in_keys=["observation"], out_keys=["q"])
    with pytest.raises(KeyError, match="the qvalue_network does not write 'state_action_value'"):
        Retrace(gamma=GAMMA, qvalue_network=other, actor_network=actor)(rollout())


@pytest.mark.parametrize("kind", KINDS)
def test_validate_looks_behind_the_steps_but_not_behind_the_end(kind: Any) -> None:
    data = rollout()
    data["chosen_action_value"] = torch.zeros(B, T, 1)
    data["target_log_prob"] = data["action_log_prob"].clamp(max=0)
    data["action_log_prob"] = data["action_log_prob"].clamp(max=0)
    data["next", "state_value"] = torch.zeros(B, T, 1).masked_fill(data["next", "terminated"], torch.nan)
    assert data["next", "terminated"].any()
    estimator = kind(gamma=GAMMA, validate=True)
    assert estimator(data)["value_target"].isfinite().all()
    step = (~data["next", "terminated"]).nonzero()[0]
    data["next", "state_value"][tuple(step)] = torch.nan
    with pytest.raises(ValueError, match="next_value must be finite, got 1 entries that are not"):
        estimator(data)
    data["valid"] = data["next", "state_value"].isfinite() | data["next", "terminated"]
    if kind is not QLambda:  # nor at steps that are no data
        data["target_log_prob"] = data["target_log_prob"].masked_fill(~data["valid"].squeeze(-1), torch.nan)
    assert estimator(data)["value_target"].isfinite().all()
    if kind is not QLambda:
        with pytest.raises(ValueError, match="target_log_prob must be a number, got 1 entries that are NaN"):
            estimator(data.exclude("valid"))


@pytest.mark.parametrize("alpha", [0.3, 2.0, 1e4])
def test_illegal_actions_count_for_nothing_whatever_the_temperature(alpha: float) -> None:
    _, critic = discrete(2)
    legal = torch.tensor([0.0, 0.0, 0.0, -torch.inf])

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, A)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + legal

    torch.manual_seed(0)
    masked = Masked()
    actor = ProbabilisticActor(
        TensorDictModule(masked, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    data = rollout()
    data["action"] = data["action"].clamp(max=A - 2)
    data["next", "done"][:] = True  # then the target is the successor's value alone
    data["next", "terminated"][:] = False
    found = TreeBackup(gamma=1.0, qvalue_network=critic, actor_network=actor, alpha=alpha)(data.clone())
    with torch.no_grad():
        log_pi = masked.net(data["next", "observation"])[..., :-1].log_softmax(-1)
        every = critic(data["next"].clone())["action_value"].amin(-2)[..., :-1]
    expected = (log_pi.exp() * (every - alpha * log_pi)).sum(-1, keepdim=True)
    torch.testing.assert_close(found["value_target"] - data["next", "reward"], expected, rtol=1e-4, atol=1e-4)


def test_densities_are_refused_by_what_they_are() -> None:
    """Without the actions at hand, by a log-probability above 0."""
    data = rollout().exclude("action")
    data["chosen_action_value"] = data["next", "state_value"] = torch.zeros(B, T, 1)
    data["target_log_prob"] = torch.full((B, T), 3.0)
    with pytest.raises(ValueError, match="target_log_prob is the log-probability of a discrete action"):
        TreeBackup(gamma=GAMMA, validate=True)(data)


@pytest.mark.parametrize("kind", [Retrace, ImportanceSampling, TreeBackup])
def test_an_action_that_the_target_policy_never_takes_is_a_legal_ratio(kind: Any) -> None:
    data = rollout()
    data["chosen_action_value"] = data["next", "state_value"] = torch.zeros(B, T, 1)
    data["action_log_prob"] = data["action_log_prob"].clamp(max=0)
    data["target_log_prob"] = torch.full((B, T), -torch.inf)
    assert kind(gamma=GAMMA, validate=True)(data)["value_target"].isfinite().all()
    data["action_log_prob"][0, 0] = -torch.inf
    if kind is not TreeBackup:
        data["target_log_prob"] = torch.zeros(B, T)
        with pytest.raises(ValueError, match="log_rho must be finite, got 1 entries"):
            kind(gamma=GAMMA, validate=True)(data)


def test_n_step_of_one_step_is_one_step() -> None:
    """On transitions and on sequences, of which every step is learnt from."""
    one, same = (bind(spec, "action", gamma=GAMMA) for spec in ("one_step", "n_step(n=1)"))
    for length in (1, 5):
        assert one.sequence_length(length) == same.sequence_length(length) == 1
        assert one.steps_per_sequence(length) == same.steps_per_sequence(length) == length
        flags = torch.rand(2, 4, length) < 0.3
        outcome = Outcome(torch.randn(4, length), flags[0] & flags[1], flags[0], None)
        following = torch.randn(4 * length)
        found = [x.estimate(x.select(outcome, gamma=GAMMA), next_value=following) for x in (one, same)]
        assert found[0].target.shape == following.shape
        assert torch.equal(found[0].target, found[1].target)
        assert found[0].diagnostics.keys() == found[1].diagnostics.keys()


def test_what_is_missing_or_no_index_is_named() -> None:
    actor, critic = discrete(2)
    with pytest.raises(KeyError, match=r"'next', which holds the successors, is missing|'next', 'reward'"):
        Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(rollout().exclude("next"))
    data = rollout()
    data["action"] = nn.functional.one_hot(data["action"], A)
    with pytest.raises(ValueError, match=r"'action' must hold the indices .*, got torch.int64 \[3, 8, 4\]; of one-hot"):
        Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data)
    with pytest.raises(TypeError, match="lmbda must be a number, got None"):
        Retrace(gamma=0.9, lmbda=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Retrace has no gamma: make it Retrace\(gamma=...\), or give it to a loss"):
        Retrace(qvalue_network=critic, actor_network=actor)(rollout())
    data = rollout()
    data["valid"] = torch.ones(B, T, 1)
    with pytest.raises(TypeError, match=r"'valid' must be a bool tensor, got torch.float32"):
        Retrace(gamma=GAMMA, qvalue_network=critic, actor_network=actor, validate=True)(data)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_under_autocast(kind: Any) -> None:
    actor, critic = discrete(2)
    data = rollout()
    expected = kind(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.clone())["value_target"]
    with torch.autocast("cpu", torch.bfloat16):
        found = kind(gamma=GAMMA, qvalue_network=critic, actor_network=actor)(data.clone())["value_target"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_advantage_of_a_step_that_is_no_data_is_zero(kind: Any) -> None:
    data = rollout()
    data["chosen_action_value"] = torch.randn(B, T, 1)
    data["next", "state_value"] = torch.zeros(B, T, 1)
    data["target_log_prob"] = data["action_log_prob"]
    data["valid"] = torch.ones(B, T, 1, dtype=torch.bool)
    data["valid"][1, 3] = False
    data["chosen_action_value"][1, 3] = torch.nan
    out = kind(gamma=GAMMA)(data)
    assert out["advantage"].isfinite().all()
    assert out["advantage"][1, 3] == 0


@pytest.mark.parametrize("root", [1, 2, 3])
def test_the_root_of_retrace_is_acers(root: int) -> None:
    data = rollout()
    data["chosen_action_value"], data["next", "state_value"] = torch.randn(2, B, T, 1)
    data["target_log_prob"] = data["action_log_prob"] + 0.8 * torch.randn(B, T)
    rho = (data["target_log_prob"] - data["action_log_prob"]).exp()
    found = Retrace(gamma=GAMMA, lmbda=0.7, root=root)(data)["value_target"]
    chosen, following = (data[key].transpose(0, 1) for key in ("chosen_action_value", ("next", "state_value")))
    expected = q_return(
        q_value=chosen, next_state_value=following,
        trace=(0.7 * rho.pow(1 / root).clamp(max=1)).t().unsqueeze(-1), **ends(data),
    )  # fmt: skip
    torch.testing.assert_close(found, expected.transpose(0, 1))
    assert Retrace(root=root).contracts == (root == 1)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_n_step_returns_alone_and_in_the_windows_of_a_loss_are_the_same(n: int) -> None:
    """A loss takes the first step of each sequence; the sequences that start later are those of the other steps."""
    data = rollout()
    data["chosen_action_value"], data["next", "state_value"] = torch.randn(2, B, T, 1)
    data["valid"] = torch.rand(B, T, 1) < 0.8
    every = NStep(gamma=GAMMA, n=n)(data.clone())["value_target"].squeeze(-1)
    estimator = bind(OneStep() if n == 1 else NStep(n=n), "action", gamma=GAMMA)
    for start in range(T):
        part = data[:, start:]
        known = [part["next", key].squeeze(-1) for key in ("reward", "terminated", "done")]
        selection = estimator.select(Outcome(*known, part["valid"].squeeze(-1)), gamma=GAMMA)
        after = selection.successor(part["next", "state_value"].squeeze(-1))
        found = estimator.estimate(selection, next_value=after).target
        first = found.view(B, -1)[:, 0] if n == 1 else found
        here = part["valid"].squeeze(-1)[:, 0]
        torch.testing.assert_close(first[here], every[:, start][here])
        assert estimator.steps_per_sequence(T) == (T if n == 1 else 1)
        assert estimator.sequence_length(40) == n
