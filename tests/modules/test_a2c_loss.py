"""The loss of advantage actor-critic: direct sums, closed-form gradients, and TorchRL's on the same batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss as TorchRLA2CLoss

from offtrace.modules.estimators import GAE, VTrace
from offtrace.modules.losses import A2CLoss, ImpalaLoss
from tests.modules.test_impala_loss import ACTIONS, FEATURES, LOSSES, gradients, make, network, rollout, total
from tests.modules.test_vmpo_loss import td_lambda

GAMMA = 0.9


def with_valid(td: TensorDict) -> TensorDict:
    td["valid"] = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(3)) < 0.8
    return td


@pytest.mark.parametrize("dim", [None, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_direct_sums(dim: int | None, reduction: str, masked: bool) -> None:
    policy, td = make(action_dim=dim), rollout(dim=dim)
    td = with_valid(td) if masked else td
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    loss = A2CLoss(
        policy, estimator="gae(lmbda=0.8)", gamma=GAMMA, value_coef=0.7, entropy_coef=0.03, reduction=reduction
    )
    out = loss(td)
    dist, value = network(policy, td["observation"])
    log_prob, entropy = dist.log_prob(td["action"]), dist.entropy()
    target = td_lambda(policy, td, 0.8)
    advantage = target - value.detach()
    scale = 1 if reduction == "sum" else int(valid.sum())
    torch.testing.assert_close(out["loss_policy"], -(advantage * log_prob)[valid].sum() / scale)
    torch.testing.assert_close(out["loss_value"], 0.7 * 0.5 * (target - value).square()[valid].sum() / scale)
    torch.testing.assert_close(out["loss_entropy"], -0.03 * entropy[valid].sum() / scale)
    torch.testing.assert_close(out["entropy"], entropy[valid].mean().detach())
    torch.testing.assert_close(out["advantage_std"], advantage[valid].std(correction=0))
    assert out["valid_count"] == valid.sum()
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)


def test_gradient_of_the_logits_in_closed_form() -> None:
    """d/dlogits = (-A (onehot - pi) + c_e pi (log pi + H)) / N."""
    policy, td = make(), rollout()
    head, seen = policy.module[0].head, []
    hook = head.register_forward_hook(lambda module, args, out: (out[0].retain_grad(), seen.append(out[0]))[1])
    total(A2CLoss(policy, gamma=GAMMA, entropy_coef=0.2)(td)).backward()
    hook.remove()
    dist, value = network(policy, td["observation"])
    pi, log_pi = dist.probs.detach(), dist.logits.detach()
    advantage = td_lambda(policy, td, 1.0) - value.detach()
    onehot, entropy = nn.functional.one_hot(td["action"], ACTIONS), dist.entropy().detach().unsqueeze(-1)
    expected = (-advantage.unsqueeze(-1) * (onehot - pi) + 0.2 * pi * (log_pi + entropy)) / td.numel()
    flat = seen[0].grad.flatten(0, 1)
    torch.testing.assert_close(flat[flat.abs().sum(-1) > 0], expected.flatten(0, 1))


def torchrl_networks() -> tuple[Any, Any, Any]:
    """An actor and a value of TorchRL's own modules; and both as one policy that our losses take."""
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(FEATURES, ACTIONS), in_keys=["observation"], out_keys=["logits"]).double()
    value = ValueOperator(nn.Linear(FEATURES, 1), in_keys=["observation"]).double()
    options: dict[str, Any] = {"in_keys": ["logits"], "distribution_class": torch.distributions.Categorical}
    actor = ProbabilisticActor(logits, return_log_prob=True, **options)
    return actor, value, ProbabilisticActor(TensorDictSequential(logits, value), return_log_prob=True, **options)


@pytest.mark.parametrize("estimator", [GAE(gamma=GAMMA, lmbda=0.8), VTrace(gamma=GAMMA, lmbda=0.8)])
def test_the_gradient_is_that_of_torchrls_loss_on_the_same_batch(estimator: Any) -> None:
    """With TorchRL's own modules, and the same estimator object in both."""
    actor, value, policy = torchrl_networks()
    td = rollout(ends=0.0)
    td["next", "terminated"][1, -1] = td["next", "done"][1, -1] = True
    ours = A2CLoss(policy, estimator=estimator, gamma=GAMMA, value_coef=1.0, entropy_coef=0.03)
    total(ours(td)).backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    theirs = TorchRLA2CLoss(actor, value, entropy_coeff=0.03, critic_coeff=0.5, loss_critic_type="l2")
    alone = type(estimator)(gamma=GAMMA, lmbda=0.8, value_network=value, actor_network=actor)
    theirs.make_value_estimator(alone)
    out = theirs(td.clone())
    sum(x for name, x in out.items() if name.startswith("loss_")).backward()
    parameters = [*theirs.actor_network_params.parameters(), *theirs.critic_network_params.parameters()]
    found = {tuple(p.shape): p.grad for p in parameters}
    for parameter, gradient in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(gradient, found[tuple(parameter.shape)])


def test_on_policy_it_is_impala_without_ratios() -> None:
    policy, td = make(), rollout()
    td["action_log_prob"] = network(policy, td["observation"])[0].log_prob(td["action"]).detach()
    torch.testing.assert_close(gradients(A2CLoss(policy, reduction="sum"), td), gradients(ImpalaLoss(policy), td))
    torch.testing.assert_close(
        gradients(A2CLoss(policy, estimator="vtrace", reduction="sum"), td.clone()), gradients(ImpalaLoss(policy), td)
    )


def test_the_behaviour_policy_is_read_where_it_is_needed_or_there() -> None:
    policy, td = make(), rollout()
    loss, without = A2CLoss(policy), rollout().exclude("action_log_prob")
    known, unknown = loss(td), loss(without)
    torch.testing.assert_close(total(known), total(unknown))
    assert set(loss.out_keys) == set(known.keys()) == set(unknown.keys())
    assert {name for name, value in unknown.items() if value.isnan()} == {"ess", "kl", "ratio_mean"}
    assert not any(value.isnan() for value in known.values())
    assert "action_log_prob" not in loss.in_keys
    ratios = A2CLoss(policy, estimator="vtrace")
    assert set(ratios.out_keys) == set(ratios(td).keys())
    with pytest.raises(KeyError, match="A2CLoss reads 'action_log_prob', which the batch lacks"):
        ratios(without)
    loss.make_value_estimator("vtrace", lmbda=0.9)
    assert set(loss.out_keys) == set(ratios.out_keys)
    torch.testing.assert_close(loss(td), A2CLoss(policy, estimator="vtrace(lmbda=0.9)")(td))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options", [{"recurrent": 6}, {"masked": True}, {"action_dim": 2}, {"action_dim": 2, "recurrent": 6}]
)
def test_every_kind_of_policy_learns(options: dict[str, Any], compiled: bool) -> None:
    policy, td = make(**options), rollout(dim=options.get("action_dim"))
    if options.get("masked"):
        td["action_mask"] = torch.rand(5, 7, ACTIONS, generator=torch.Generator().manual_seed(0)) < 0.5
        td["action_mask"].scatter_(-1, td["action"].unsqueeze(-1), True)
    loss = A2CLoss(policy)
    assert all(g.isfinite().all() and g.any() for g in gradients(loss, with_valid(td)))
    if compiled:
        torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(td), loss(td))


def test_normalised_advantages_and_clipped_rewards() -> None:
    policy, td = make(), with_valid(rollout())
    valid = td["valid"].squeeze(-1)
    clipped = td.clone()
    clipped["next", "reward"] = td["next", "reward"].clamp(-0.5, 0.5)
    torch.testing.assert_close(total(A2CLoss(policy, reward_clip=0.5)(td)), total(A2CLoss(policy)(clipped)))
    dist, value = network(policy, td["observation"])
    advantage = (td_lambda(policy, td, 1.0) - value.detach())[valid]
    normal = (advantage - advantage.mean()) / advantage.std(correction=0)
    found = A2CLoss(policy, gamma=GAMMA, normalize_advantage=True)(td)["loss_policy"]
    torch.testing.assert_close(found, -(normal * dist.log_prob(td["action"])[valid]).mean())


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    for options, message in (
        ({"reduction": "none"}, "reduction must be 'sum' or 'mean', got 'none'"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"reward_clip": 0.0}, "reward_clip must be positive and finite, or None, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            A2CLoss(make(), **options)
    with pytest.raises(ValueError, match=r"the batch must be \[B, T\], environments then time; got \[7\]"):
        A2CLoss(make())(rollout()[0])


def test_it_learns_from_entries_that_matter_alone() -> None:
    policy, td = make(), with_valid(rollout(ends=0.5))
    loss: Any = A2CLoss(policy)
    expected = gradients(loss, td)
    hidden: TensorDictBase = td.clone()
    for key in (("next", "reward"), "action_log_prob", "observation"):
        wrong: Tensor = td["valid"].view(5, 7, *(1,) * (td[key].ndim - 2))
        after = torch.cat([torch.ones_like(wrong[:, :1]), ~(wrong & ~td["next", "done"].view_as(wrong))[:, :-1]], 1)
        hide = ~wrong & after if key == "observation" else ~wrong
        hidden[key] = td[key].masked_fill(hide, torch.nan)
    torch.testing.assert_close(gradients(loss, hidden), expected)
