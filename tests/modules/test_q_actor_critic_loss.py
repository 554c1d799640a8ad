"""The actor-critic whose critic values actions, against direct sums in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.losses import QActorCriticLoss
from offtrace.modules.networks import ActionValueHead, Policy, build_policy
from offtrace.modules.returns import trace_reach
from tests.modules.test_impala_loss import ACTIONS, FEATURES, LOSSES, gradients, make, rollout, total

GAMMA, LMBDA = 0.9, 0.8
TRACES = ("retrace", "importance_sampling", "tree_backup", "q_lambda")


def policy_of(**kwargs: Any) -> Policy:
    return make(critic="q", **kwargs)


def with_valid(td: TensorDict) -> TensorDict:
    td["valid"] = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(3)) < 0.8
    return td


def network(policy: Policy, observation: Tensor) -> tuple[Tensor, Tensor]:
    """log pi and Q of every action, straight from the modules."""
    net = policy.module[0]
    features = net.encoder(observation.reshape(-1, FEATURES)).view(*observation.shape[:-1], -1)
    return net.head(features)[0].log_softmax(-1), net.value_head(features).squeeze(-2)


def chosen(x: Tensor, td: TensorDictBase) -> Tensor:
    return x.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)


def coefficient(trace: str, rho: Tensor, pi: Tensor) -> Tensor:
    every = {"retrace": rho.clamp(max=1), "importance_sampling": rho, "q_lambda": torch.ones_like(rho)}
    return LMBDA * (pi if trace == "tree_backup" else every[trace])


@torch.no_grad()
def direct(policy: Policy, td: TensorDictBase, trace: str) -> tuple[Tensor, Tensor]:
    """G and G - V of every step by the sum over the steps behind it, one row and step at a time."""
    (log_pi, q), (after_pi, after_q) = (network(policy, td[key]) for key in ("observation", ("next", "observation")))
    value, after, taken = (log_pi.exp() * q).sum(-1), (after_pi.exp() * after_q).sum(-1), chosen(q, td)
    pi = chosen(log_pi, td).exp()
    c = coefficient(trace, pi / td["action_log_prob"].exp(), pi)
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones_like(done)
    target = taken.clone()
    for b in range(len(taken)):
        for s in range(taken.shape[1]):
            weight = 1.0
            for t in range(s, taken.shape[1]):
                if not valid[b, t]:
                    break
                weight *= 1.0 if t == s else GAMMA * float(c[b, t])
                follows = 0.0 if terminated[b, t] else GAMMA * float(after[b, t])
                target[b, s] += weight * (reward[b, t] + follows - taken[b, t])
                if done[b, t]:
                    break
    return target, target - value


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_equals_the_direct_sums(trace: str, masked: bool, reduction: str) -> None:
    policy, td = policy_of(), rollout()
    td = with_valid(td) if masked else td
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    loss = QActorCriticLoss(
        policy, estimator=f"{trace}(lmbda={LMBDA})", gamma=GAMMA, value_coef=0.7, entropy_coef=0.03, pg_rho_clip=1.3,
        reduction=reduction,
    )  # fmt: skip
    out = loss(td)
    log_pi, q = network(policy, td["observation"])
    log_prob, taken = chosen(log_pi, td), chosen(q, td)
    rho = (log_prob - td["action_log_prob"]).exp().detach()
    assert (rho[valid] > 1.3).any()
    assert (rho[valid] < 1).any()
    target, advantage = direct(policy, td, trace)
    advantage = rho.clamp(max=1.3) * advantage
    count = int(valid.sum())
    scale = 1 if reduction == "sum" else count
    torch.testing.assert_close(out["loss_policy"], -(advantage * log_prob)[valid].sum() / scale)
    torch.testing.assert_close(out["loss_value"], 0.7 * 0.5 * (target - taken).square()[valid].sum() / scale)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    torch.testing.assert_close(out["loss_entropy"], -0.03 * entropy[valid].sum() / scale)
    torch.testing.assert_close(out["entropy"], entropy[valid].mean().detach())
    torch.testing.assert_close(out["advantage_std"], advantage[valid].std(correction=0))
    explained = 1 - (target - taken)[valid].var(correction=0) / target[valid].var(correction=0)
    torch.testing.assert_close(out["explained_variance"], explained.detach())
    known = rho[valid]
    torch.testing.assert_close(out["ess"], known.sum() ** 2 / (count * known.square().sum()))
    torch.testing.assert_close(out["pg_rho_clipped"], (known > 1.3).float().mean())
    reach = trace_reach(
        trace=coefficient(trace, rho, log_prob.detach().exp()).t(), done=td["next", "done"].squeeze(-1).t(),
        gamma=GAMMA, valid=valid.t(),
    )  # fmt: skip
    torch.testing.assert_close(out["trace_length"], reach.length)
    assert ("contraction" in out) == (trace != "q_lambda")
    if "contraction" in out:
        torch.testing.assert_close(out["contraction"], reach.contraction)
    assert ("c_clipped" in out) == (trace == "retrace")
    if "c_clipped" in out:
        torch.testing.assert_close(out["c_clipped"], (known > 1).float().mean())
    assert out["valid_count"] == count
    assert set(out.keys()) == set(loss.out_keys)
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)


def test_gradients_in_closed_form() -> None:
    """d/dlogits = -A (onehot - pi) + c_e pi (log pi + H); d/dQ = value_coef (Q - G) onehot; 0 behind the steps."""
    policy, td = policy_of(), rollout()
    net, seen = policy.module[0], {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out
            seen[name].retain_grad()

        return hook

    hooks = [net.head.register_forward_hook(keep("logits")), net.value_head.register_forward_hook(keep("q"))]
    total(
        QActorCriticLoss(policy, estimator="retrace(lmbda=0.8)", gamma=GAMMA, entropy_coef=0.2, value_coef=0.7)(td)
    ).backward()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        log_pi, q = network(policy, td["observation"])
        target, advantage = direct(policy, td, "retrace")
        rho = (chosen(log_pi, td) - td["action_log_prob"]).exp().clamp(max=1)
        onehot, pi = torch.nn.functional.one_hot(td["action"], ACTIONS), log_pi.exp()
        entropy = -(pi * log_pi).sum(-1, keepdim=True)
        logits = -(rho * advantage).unsqueeze(-1) * (onehot - pi) + 0.2 * pi * (log_pi + entropy)
        values = 0.7 * (chosen(q, td) - target).unsqueeze(-1) * onehot
    for name, expected in (("logits", logits), ("q", values)):
        found = seen[name].grad.view(-1, ACTIONS)
        torch.testing.assert_close(found[found.abs().sum(-1) > 0], expected.flatten(0, 1))


def test_each_term_reaches_its_own_head_and_all_of_them_the_encoder() -> None:
    policy = policy_of()
    net, out = policy.module[0], QActorCriticLoss(policy)(rollout())
    for names, own, other in (
        (("loss_policy", "loss_entropy"), net.head, net.value_head),
        (("loss_value",), net.value_head, net.head),
    ):
        policy.zero_grad()
        sum(out[name] for name in names).backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.any() for p in (*own.parameters(), *net.encoder.parameters()))
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())


@pytest.mark.parametrize("recurrent", [None, 6])
def test_only_the_entries_that_matter_are_read(recurrent: int | None) -> None:
    """NaN in the successors inside an episode, of terminal steps and of invalid steps changes nothing."""
    policy, td = policy_of(recurrent=recurrent), with_valid(rollout(ends=0.5))
    valid, done, terminated = td["valid"], td["next", "done"], td["next", "terminated"]
    loss = QActorCriticLoss(policy)
    expected, grads = loss(td), gradients(loss, td)
    needed = done & ~terminated & valid
    needed[:, -1] = (~terminated & valid)[:, -1]
    assert needed[:, :-1].any()
    hidden = td.clone()
    for key in ("observation", "last_reward"):
        hidden["next", key] = td["next", key].masked_fill(~needed, math.nan)
    hidden["next", "reward"] = td["next", "reward"].masked_fill(~valid, math.nan)
    hidden["action_log_prob"] = td["action_log_prob"].masked_fill(~valid.squeeze(-1), math.nan)
    torch.testing.assert_close(loss(hidden), expected)
    torch.testing.assert_close(gradients(loss, hidden), grads)
    moved = td.clone()
    moved["next", "observation"] = td["next", "observation"] + 1.0 * needed
    assert not torch.allclose(loss(moved)["loss_value"], expected["loss_value"])


@pytest.mark.parametrize("recurrent", [None, 6])
def test_cutting_a_rollout_at_its_ends_equals_separate_rollouts(recurrent: int | None) -> None:
    policy, td = policy_of(recurrent=recurrent), rollout(ends=0.0)
    cut = 3
    for kind, row in (("terminated", 0), ("truncated", 1), ("truncated", 2), ("terminated", 3), ("truncated", 4)):
        td["next", kind][row, cut] = td["next", "done"][row, cut] = True
    td["is_init"][:, cut + 1] = True
    td["next", "observation"][:, cut] = torch.randn(5, FEATURES, dtype=torch.float64)
    loss = QActorCriticLoss(policy)
    whole, parts = gradients(loss, td), [gradients(loss, part) for part in (td[:, : cut + 1], td[:, cut + 1 :])]
    for all_, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(all_, first + second)


def test_illegal_actions_have_no_value_and_get_no_gradient() -> None:
    policy, td = policy_of(masked=True), rollout()
    mask = torch.tensor([True, True, False]).expand(5, 7, 3)
    td["action_mask"], td["action"] = mask.clone(), td["action"].clamp(max=1)
    with pytest.raises(KeyError, match=r"next.*action_mask"):
        QActorCriticLoss(policy)(td)
    td["next", "action_mask"] = mask.clone()
    loss, head = QActorCriticLoss(policy), policy.module[0].value_head
    expected, grads = loss(td), gradients(loss, td)
    assert policy.module[0].head.linear.bias.grad[2] == 0
    assert head.linear.bias.grad[2] == 0
    with torch.no_grad():
        head.linear.bias[2] += 100
    torch.testing.assert_close(loss(td), expected)
    torch.testing.assert_close(gradients(loss, td), grads)


def test_normalised_advantage_trust_region_and_reward_clip_are_those_of_impala() -> None:
    policy, td = policy_of(), rollout()
    log_prob = chosen(network(policy, td["observation"])[0], td).detach()
    rho, (_, advantage) = (log_prob - td["action_log_prob"]).exp(), direct(policy, td, "q_lambda")
    weight = rho.clamp(max=1)
    centred = weight * (advantage - (weight * advantage).sum() / weight.sum())
    normal = centred / centred.std(correction=0)
    outside = torch.where(normal > 0, rho > 1.2, rho < 0.8)
    assert outside.any()
    options: dict[str, Any] = {"estimator": f"q_lambda(lmbda={LMBDA})", "gamma": GAMMA}
    out = QActorCriticLoss(policy, normalize_advantage=True, policy_clip=0.2, **options)(td)
    torch.testing.assert_close(out["loss_policy"].detach(), -(normal * log_prob)[~outside].sum())
    torch.testing.assert_close(out["policy_clipped"], outside.double().mean())
    clipped = td.clone()
    clipped["next", "reward"] = td["next", "reward"].clamp(-0.5, 0.5)
    found = QActorCriticLoss(policy, reward_clip=0.5, **options)(td)
    torch.testing.assert_close(total(found), total(QActorCriticLoss(policy, **options)(clipped)))


def test_renamed_keys() -> None:
    policy, td = policy_of(), rollout()
    expected, loss = QActorCriticLoss(policy)(td), QActorCriticLoss(policy)
    loss.set_keys(sample_log_prob="mu", reward="r")
    renamed = td.clone().rename_key_("action_log_prob", "mu")
    renamed["next"].rename_key_("reward", "r")
    torch.testing.assert_close(loss(renamed), expected)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    policy, td = policy_of(), with_valid(rollout())
    loss = QActorCriticLoss(policy)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(td), loss(td))


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"estimator 'vtrace' is of state values, and one of action values is needed"):
        QActorCriticLoss(policy_of(), estimator="vtrace")
    with pytest.raises(ValueError, match="learns from every step of a rollout, and its estimator NStep from the first"):
        QActorCriticLoss(policy_of(), estimator="n_step")
    with pytest.raises(ValueError, match="needs a policy over discrete actions that writes 'action_value'"):
        QActorCriticLoss(make())
    with pytest.raises(ValueError, match="critic='q' needs discrete actions"):
        make(action_dim=2, critic="q")
    with pytest.raises(ValueError, match="critic must be 'v', 'q' or None, got 'both'"):
        make(critic="both")
    with pytest.raises(ValueError, match="pg_rho_clip must be above 0, got 0"):
        QActorCriticLoss(policy_of(), pg_rho_clip=0)


def test_the_policy_writes_values_of_all_actions_when_it_acts() -> None:
    policy = build_policy(network="mlp", observation_shape=[FEATURES], num_actions=ACTIONS, critic="q")
    assert isinstance(policy.module[0].value_head, ActionValueHead)
    step = policy(TensorDict({"observation": torch.randn(6, FEATURES)}, [6]))
    assert step["action_value"].shape == (6, 1, ACTIONS)
    assert "state_value" not in step
    assert "action_value" in policy.out_keys
