"""The estimators of state values: V-trace uses the batch's actions, alone and inside TorchRL's losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss

from offtrace.modules import GAE, NStepReturn, VTrace
from offtrace.modules.estimators import Outcome, StateValueEstimator, WeightedGAE, bind, make_estimator
from offtrace.modules.estimators.names import ESTIMATORS, RANGES
from offtrace.modules.returns import gae, vtrace

B, T, A = 3, 7, 4


def networks(action: str = "action", log_prob: str = "action_log_prob", value: str = "state_value") -> tuple[Any, Any]:
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(5, A), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        logits,
        in_keys=["logits"],
        out_keys=[action],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key=log_prob,
    )
    return actor, ValueOperator(nn.Linear(5, 1), in_keys=["observation"], out_keys=[value])


def rollout(action: str = "action", log_prob: str = "action_log_prob", reward: str = "reward") -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(B, T + 1, 5, generator=generator)
    terminated = torch.rand(B, T, 1, generator=generator) < 0.2
    done = terminated | (torch.rand(B, T, 1, generator=generator) < 0.2)
    return TensorDict(
        {
            "observation": observation[:, :-1],
            action: torch.randint(A, (B, T), generator=generator),
            log_prob: -1.4 + 0.3 * torch.randn(B, T, generator=generator),
            "next": {
                "observation": observation[:, 1:],
                reward: torch.randn(B, T, 1, generator=generator),
                "done": done,
                "terminated": terminated,
            },
        },
        batch_size=[B, T],
    )


def by_hand(
    data: TensorDict, actor: Any, critic: Any, actions: torch.Tensor, mu: torch.Tensor, reward: torch.Tensor
) -> Any:
    """Advantage and target [B, T, 1] from log-probabilities computed without the estimator."""
    log_pi = actor.module[0].module(data["observation"]).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        value, following = (critic.module(x).squeeze(-1) for x in (data["observation"], data["next", "observation"]))
    out = vtrace(
        reward=reward.squeeze(-1).t(), value=value.t(), next_value=following.t(), log_rho=(log_pi - mu).detach().t(),
        terminated=data["next", "terminated"].squeeze(-1).t(), done=data["next", "done"].squeeze(-1).t(), gamma=0.9,
    )  # fmt: skip
    return out.advantage.t().unsqueeze(-1), out.target.t().unsqueeze(-1)


def test_it_is_vtrace_on_the_batchs_actions_and_changes_with_them() -> None:
    actor, critic = networks()
    data = rollout()
    advantage, target = by_hand(data, actor, critic, data["action"], data["action_log_prob"], data["next", "reward"])
    out = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(data.clone())
    torch.testing.assert_close(out["advantage"], advantage)
    torch.testing.assert_close(out["value_target"], target)
    changed = data.clone().set("action", (data["action"] + 1) % A)
    other = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(changed)
    assert (other["advantage"] - out["advantage"]).abs().max() > 1e-2
    assert not out["advantage"].requires_grad
    assert not out["value_target"].requires_grad


def test_what_is_given_in_the_batch_needs_no_network() -> None:
    actor, critic = networks()
    data = rollout()
    expected = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(data.clone())
    with torch.no_grad():
        data["state_value"] = critic.module(data["observation"])
        data["next", "state_value"] = critic.module(data["next", "observation"])
        data["target_log_prob"] = actor.get_dist(data).log_prob(data["action"])
    out = VTrace(gamma=0.9)(data)
    torch.testing.assert_close(out["advantage"], expected["advantage"])
    torch.testing.assert_close(VTrace(gamma=0.9).value_estimate(data), expected["value_target"])


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
@pytest.mark.parametrize("renamed", [False, True])
def test_inside_torchrls_losses(kind: Any, renamed: bool) -> None:
    """The loss with our estimator is the loss with the advantage put in by hand."""
    names = {"action": "a", "log_prob": "mu", "value": "v"} if renamed else {}
    actor, critic = networks(**names)
    data = rollout(
        names.get("action", "action"), names.get("log_prob", "action_log_prob"), "r" if renamed else "reward"
    )
    loss = kind(actor, critic)
    keys = {"action": "a", "sample_log_prob": "mu", "value": "v", "reward": "r"} if renamed else {}
    estimator = VTrace(gamma=0.9, value_network=critic, actor_network=actor)
    loss.make_value_estimator(estimator)
    loss.set_keys(**keys)
    if renamed:
        estimator.set_keys(action="a", sample_log_prob="mu")
    actions, mu = data[names.get("action", "action")], data[names.get("log_prob", "action_log_prob")]
    advantage, target = by_hand(data, actor, critic, actions, mu, data["next", keys.get("reward", "reward")])
    given = data.clone()
    given["advantage"], given["value_target"] = advantage, target
    ours, expected = loss(data.clone()), loss(given)
    for name in expected.keys():  # noqa: SIM118 - a TensorDict
        if name.startswith("loss_"):
            torch.testing.assert_close(ours[name], expected[name])
    sum(value for name, value in ours.items() if name.startswith("loss_")).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.actor_network_params.parameters())


def test_gae_takes_the_place_of_vtrace() -> None:
    actor, critic = networks()
    data = rollout()
    with torch.no_grad():
        value, following = (
            critic.module(x).transpose(0, 1) for x in (data["observation"], data["next", "observation"])
        )
    ends = {name: data["next", name].transpose(0, 1) for name in ("reward", "terminated", "done")}
    expected = gae(value=value, next_value=following, **ends, gamma=0.9, lmbda=0.8)
    out = GAE(gamma=0.9, lmbda=0.8, value_network=critic, actor_network=actor)(
        data.clone().exclude("action_log_prob", "action")
    )
    torch.testing.assert_close(out["advantage"], expected.advantage.transpose(0, 1))
    torch.testing.assert_close(out["value_target"], expected.target.transpose(0, 1))


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
def test_gae_inside_torchrls_losses(kind: Any) -> None:
    actor, critic = networks()
    data = rollout()
    loss = kind(actor, critic)
    loss.make_value_estimator(GAE(gamma=0.9, lmbda=0.8, value_network=critic))
    given = GAE(gamma=0.9, lmbda=0.8, value_network=critic)(data.clone())
    ours, expected = loss(data.clone()), loss(given)
    for name in expected.keys():  # noqa: SIM118 - a TensorDict
        if name.startswith("loss_"):
            torch.testing.assert_close(ours[name], expected[name])


def test_time_may_be_any_dimension() -> None:
    actor, critic = networks()
    data = rollout()
    expected = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(data.clone())["advantage"]
    turned = data.clone().transpose(0, 1).contiguous()
    out = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(turned, time_dim=0)
    torch.testing.assert_close(out["advantage"], expected.transpose(0, 1))


def test_invalid_steps() -> None:
    actor, critic = networks()
    data = rollout()
    data["valid"] = torch.ones(B, T, 1, dtype=torch.bool)
    data["valid"][1, 3] = False
    data["next", "reward"][1, 3] = torch.nan
    out = VTrace(gamma=0.9, value_network=critic, actor_network=actor)(data)
    assert torch.isfinite(out["advantage"]).all()
    assert out["advantage"][1, 3] == 0


def test_bad_input_is_named() -> None:
    data = rollout()
    with pytest.raises(KeyError, match="'state_value' is missing, and there is no value_network"):
        VTrace(gamma=0.9)(data)
    _, critic = networks()
    with pytest.raises(KeyError, match="'target_log_prob' is missing, and there is no actor_network"):
        VTrace(gamma=0.9, value_network=critic)(data)
    for options, words in (
        ({"gamma": 1.5}, "gamma must be in"),
        ({"gamma": 0.9, "lmbda": -0.1}, "lmbda must be in"),
        ({"gamma": 0.9, "c_clip": 2.0}, "c_clip must be at most rho_clip, 1.0, got 2.0"),
        ({"gamma": 0.9, "leak": 2.0}, "leak must be in"),
        ({"lmbda": 1.5}, "lmbda must be in"),
        ({"gamma": 0.9, "pg_rho_clip": 0.0}, "pg_rho_clip must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            VTrace(**options)
    actor, critic = networks()
    data["next", "reward"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="reward must be finite, got 1 entries"):
        VTrace(gamma=0.9, value_network=critic, actor_network=actor, validate=True)(data)
    data = rollout()
    data["action_log_prob"][0, 0] = 0.5
    with pytest.raises(ValueError, match="action_log_prob is the log-probability of a discrete action and must not be"):
        VTrace(gamma=0.9, value_network=critic, actor_network=actor, validate=True)(data)
    data = rollout()
    data["target_log_prob"] = torch.ones(B, T)
    with pytest.raises(ValueError, match="target_log_prob is the log-probability of a discrete action and must not be"):
        VTrace(gamma=0.9, value_network=critic, validate=True)(data)
    with pytest.raises(ValueError, match=r"VTrace has no gamma: make it VTrace\(gamma=...\), or give it to a loss"):
        VTrace(value_network=critic, actor_network=actor)(rollout())


def test_an_own_estimator_alone_meets_no_ratio_of_steps_that_are_no_data() -> None:
    class Seen(StateValueEstimator):
        def compute(self, **known: Any) -> tuple[torch.Tensor, torch.Tensor]:
            assert known["log_rho"].isfinite().all()
            return known["value"], known["log_rho"] / known["valid"]

    actor, critic = networks()
    data = rollout()
    data["valid"] = torch.rand(B, T, 1, generator=torch.Generator().manual_seed(0)) < 0.8
    data["action_log_prob"][~data["valid"].squeeze(-1)] = torch.nan
    out = Seen(gamma=0.9, value_network=critic, actor_network=actor)(data)
    assert out["advantage"].isfinite().all()
    assert not out["advantage"][~data["valid"]].any()


STATE = [VTrace(lmbda=0.8, c_clip=0.9), GAE(lmbda=0.8), WeightedGAE(lmbda=0.8, pg_rho_clip=0.7), NStepReturn(n=3)]


@pytest.mark.parametrize("estimator", STATE)
@pytest.mark.parametrize("masked", [False, True])
def test_alone_and_in_a_loss_it_is_one_computation(estimator: Any, masked: bool) -> None:
    data = rollout()
    data["state_value"], data["next", "state_value"] = torch.randn(2, B, T, 1)
    data["target_log_prob"] = data["action_log_prob"] + 0.8 * torch.randn(B, T)
    if masked:
        data["valid"] = torch.rand(B, T, 1) < 0.8
        data["action_log_prob"][~data["valid"].squeeze(-1)] = torch.nan
    ours = bind(estimator, "state", gamma=0.9)
    assert ours is not estimator
    assert estimator.gamma is None
    alone = ours(data.clone())
    valid = data["valid"].squeeze(-1) if masked else None
    log_rho = data["target_log_prob"] - data["action_log_prob"]
    known = [data["next", key].squeeze(-1) for key in ("reward", "terminated", "done")]
    found = ours.estimate(
        Outcome(*known, valid),
        value=data["state_value"].squeeze(-1),
        next_value=data["next", "state_value"].squeeze(-1),
        log_rho=log_rho,
    )
    assert torch.equal(found.target, alone["value_target"].squeeze(-1))
    assert torch.equal(found.advantage, alone["advantage"].squeeze(-1))
    assert set(found.diagnostics) == set(ours.diagnostic_keys)
    weight = {VTrace: log_rho.exp().clamp(max=1), WeightedGAE: log_rho.exp().clamp(max=0.7)}
    expected = weight.get(type(estimator), torch.ones(B, T))
    torch.testing.assert_close(found.weight, expected if valid is None else torch.where(valid, expected, 0))


def test_without_ratios_only_the_effective_sample_size_is_unknown() -> None:
    for estimator in (GAE(), NStepReturn(n=3)):
        ours = bind(estimator, "state", gamma=0.9)
        done = torch.zeros(B, T, dtype=torch.bool)
        value = torch.randn(B, T)
        found = ours.estimate(Outcome(value, done, done, None), value=value, next_value=value, log_rho=None)
        assert set(found.diagnostics) == set(ours.diagnostic_keys)
        assert {name for name, value in found.diagnostics.items() if value.isnan()} == {"ess"}


@pytest.mark.parametrize("kind", ["state", "action"])
def test_the_names_have_the_options_of_their_classes(kind: str) -> None:
    """And each of them is set by its name."""
    values = {"n": 3, "root": 2, "lmbda": 0.7, "leak": 0.6, "rho_clip": 1.4, "c_clip": 0.8, "pg_rho_clip": 1.2}
    for name, named in ESTIMATORS[kind].items():
        given = {option: values[option] for option in named.options}
        text = ", ".join(f"{option}={value}" for option, value in given.items())
        found = make_estimator(f"{name}({text})", kind)
        for option, value in (*given.items(), *named.fixed.items()):
            assert getattr(found, option) == value
        plain = make_estimator(name, kind)
        assert {option: getattr(plain, option) for option in named.options} == named.options, "one default"
        assert found.kind == plain.kind == kind
        assert plain.only_discrete == named.only_discrete
        assert set(named.options) <= RANGES.keys()
