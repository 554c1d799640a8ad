"""The loss of IMPALA against the sums of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from offtrace.modules.losses import ImpalaLoss
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import evaluate_rollout, state_values
from offtrace.modules.networks import Policy, build_policy
from offtrace.modules.returns import effective_sample_size, lambda_return, trace_reach, vtrace

ACTIONS, FEATURES = 3, 4
LOSSES = ("loss_policy", "loss_value", "loss_entropy")


def make(*, action_dim: int | None = None, seed: int = 0, gain: float = 1.0, **kwargs: Any) -> Policy:
    torch.manual_seed(seed)
    actions = None if action_dim else ACTIONS
    policy = build_policy(
        network="mlp", observation_shape=[FEATURES], num_actions=actions, action_dim=action_dim, hidden=[16], **kwargs
    ).double()
    for parameter in policy.module[0].head.parameters():  # the shipped policy starts almost uniform
        parameter.data += gain * torch.randn_like(parameter)
    return policy


def rollout(batch: int = 5, time: int = 7, *, seed: int = 1, ends: float = 0.3, dim: int | None = None) -> TensorDict:
    """Random data in the layout of a collector, with ends of both kinds and successors that fit."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, time, *shape, generator=g, dtype=torch.float64)

    terminated = torch.rand(batch, time, 1, generator=g) < ends / 2
    truncated = torch.rand(batch, time, 1, generator=g) < ends / 2
    done = terminated | truncated
    observation, final = normal(FEATURES), normal(FEATURES)
    following = torch.cat([observation[:, 1:], final[:, -1:]], 1)
    is_init = torch.cat([torch.rand(batch, 1, 1, generator=g) < 0.5, done[:, :-1]], 1)
    reward = normal(1)
    last_reward = torch.cat([reward[:, :1], reward[:, :-1]], 1).masked_fill(is_init, 0)
    action = normal(dim) if dim else torch.randint(ACTIONS, (batch, time), generator=g)
    last_action = torch.cat([action[:, :1], action[:, :-1]], 1)
    return TensorDict(
        {
            "observation": observation,
            "is_init": is_init,
            "action": action,
            "last_action": last_action,
            "last_reward": last_reward,
            "action_log_prob": -1.1 + 0.7 * normal(),
            "recurrent_h": normal(6).tanh(),
            "recurrent_c": normal(6),
            "next": {
                "observation": torch.where(done, final, following),
                "is_init": torch.zeros_like(is_init),
                "last_action": action,
                "last_reward": reward.clone(),
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "done": done,
            },
        },
        [batch, time],
    )


def total(out: TensorDictBase) -> Tensor:
    return sum(out[name] for name in LOSSES)  # type: ignore[return-value]


def gradients(loss: ImpalaLoss, batch: TensorDictBase) -> list[Tensor]:
    loss.zero_grad()
    total(loss(batch)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in loss.parameters()]


def estimated(loss: Any, td: TensorDictBase) -> Any:
    """What the loss's estimator gives, [B, T]."""
    policy = evaluate_rollout(loss, td)
    value, next_value = state_values(loss, policy)
    return loss.estimator.estimate(policy.outcome, value=value, next_value=next_value, log_rho=policy.log_rho)


def network(policy: Policy, observation: Tensor) -> tuple[Any, Tensor]:
    """Distribution and value, straight from the modules."""
    net = policy.module[0]
    features = net.encoder(observation.reshape(-1, FEATURES)).view(*observation.shape[:-1], -1)
    dist = net.head.distribution(*net.head(features))
    return dist, net.value_head(features).squeeze(-1)


def direct(policy: Policy, td: TensorDictBase, *, gamma: float, rho: Tensor, clips: tuple[float, float, float]) -> Any:
    """Targets and advantages by the double sum of the paper, one row and step at a time."""
    with torch.no_grad():
        value = network(policy, td["observation"])[1]
        after = network(policy, td["next", "observation"])[1]
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    batch, time = reward.shape
    target, advantage = value.clone(), torch.zeros_like(value)
    for b in range(batch):
        for s in reversed(range(time)):
            weight = 1.0
            for t in range(s, time):
                g = 0.0 if terminated[b, t] else gamma
                delta = min(clips[0], rho[b, t]) * (reward[b, t] + g * after[b, t] - value[b, t])
                target[b, s] += weight * delta
                if done[b, t]:
                    break
                weight *= gamma * min(clips[1], rho[b, t])
            g = 0.0 if terminated[b, s] else gamma
            bootstrap = after[b, s] if done[b, s] or s == time - 1 else target[b, s + 1]
            advantage[b, s] = min(clips[2], rho[b, s]) * (reward[b, s] + g * bootstrap - value[b, s])
    return target, advantage


@pytest.mark.parametrize("dim", [None, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_equals_the_sums_of_the_paper(dim: int | None, reduction: str) -> None:
    policy, td = make(action_dim=dim), rollout(dim=dim)
    taken = network(policy, td["observation"])[0].log_prob(td["action"]).detach()
    td["action_log_prob"] = taken + 0.7 * torch.randn(taken.shape, dtype=torch.float64)
    coefficients = {"value_coef": 0.7, "entropy_coef": 0.03}
    estimator = "vtrace(rho_clip=1.3, c_clip=1.1, pg_rho_clip=0.8)"
    loss = ImpalaLoss(policy, estimator=estimator, gamma=0.9, reduction=reduction, **coefficients)
    out = loss(td)
    dist, value = network(policy, td["observation"])
    log_prob = dist.log_prob(td["action"])
    rho = (log_prob - td["action_log_prob"]).exp().detach()
    assert (rho > 1.3).any()
    assert (rho < 0.8).any()
    target, advantage = direct(policy, td, gamma=0.9, rho=rho, clips=(1.3, 1.1, 0.8))
    scale = 1 if reduction == "sum" else td.numel()
    torch.testing.assert_close(out["loss_policy"], -(advantage * log_prob).sum() / scale)
    torch.testing.assert_close(out["loss_value"], 0.7 * 0.5 * (target - value).square().sum() / scale)
    torch.testing.assert_close(out["loss_entropy"], -0.03 * dist.entropy().sum() / scale)
    torch.testing.assert_close(out["ratio_mean"], rho.mean())
    torch.testing.assert_close(out["rho_clipped"], (rho > 1.3).float().mean())
    torch.testing.assert_close(out["c_clipped"], (rho > 1.1).float().mean())
    torch.testing.assert_close(out["pg_rho_clipped"], (rho > 0.8).float().mean())
    torch.testing.assert_close(out["ess"], rho.sum() ** 2 / (td.numel() * rho.square().sum()))
    torch.testing.assert_close(out["advantage_std"], advantage.std(correction=0))
    explained = 1 - (target - value).var(correction=0) / target.var(correction=0)
    torch.testing.assert_close(out["explained_variance"], explained)
    torch.testing.assert_close(out["kl"], (td["action_log_prob"] - log_prob).mean())
    assert out["valid_count"] == td.numel()
    assert not any(value.requires_grad for name, value in out.items() if name not in LOSSES)


def test_gradient_of_the_logits_in_closed_form() -> None:
    """d/dlogits = -A (onehot - pi) + c_e pi (log pi + H)."""
    policy, td = make(), rollout()
    head = policy.module[0].head
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, out: (out[0].retain_grad(), seen.append(out[0]))[1])
    loss = ImpalaLoss(policy, gamma=0.9, entropy_coef=0.2)
    total(loss(td)).backward()
    hook.remove()
    dist, _ = network(policy, td["observation"])
    pi, log_pi = dist.probs.detach(), dist.logits.detach()
    rho = (log_pi.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1) - td["action_log_prob"]).exp()
    _, advantage = direct(policy, td, gamma=0.9, rho=rho, clips=(1.0, 1.0, 1.0))
    onehot = torch.nn.functional.one_hot(td["action"], ACTIONS)
    entropy = dist.entropy().detach().unsqueeze(-1)
    expected = -advantage.unsqueeze(-1) * (onehot - pi) + 0.2 * pi * (log_pi + entropy)
    # the steps stand in front of their successors; every other place of the unroll gets no gradient
    found = seen[0].grad
    assert found is not None
    flat = found.flatten(0, 1)
    torch.testing.assert_close(flat[flat.abs().sum(-1) > 0], expected.flatten(0, 1))


def test_only_log_prob_entropy_and_value_of_the_steps_carry_gradient() -> None:
    policy, td = make(), rollout(ends=0.0)
    root, after = td["observation"].requires_grad_(), td["next", "observation"].requires_grad_()
    behaviour = td["action_log_prob"].requires_grad_()
    total(ImpalaLoss(policy)(td)).backward()
    assert root.grad is not None
    assert (root.grad != 0).any(-1).all()
    assert after.grad is None or not after.grad.any()
    assert behaviour.grad is None


def test_policy_term_alone_leaves_the_value_head_alone() -> None:
    policy = make()
    loss = ImpalaLoss(policy)
    out = loss(rollout())
    (out["loss_policy"] + out["loss_entropy"]).backward()
    net = policy.module[0]
    assert all(p.grad is None or not p.grad.any() for p in net.value_head.parameters())
    assert all(p.grad.any() for p in net.head.parameters())


@pytest.mark.parametrize("recurrent", [None, 6])
def test_only_the_entries_that_matter_are_read(recurrent: int | None) -> None:
    """NaN in the successors inside an episode, of terminal steps and of invalid steps changes nothing."""
    policy, td = make(recurrent=recurrent), rollout(ends=0.5)
    td["valid"] = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(3)) < 0.8
    valid, done, terminated = td["valid"], td["next", "done"], td["next", "terminated"]
    loss = ImpalaLoss(policy)
    expected, grads = loss(td), gradients(loss, td)
    needed = done & ~terminated & valid
    needed[:, -1] = (~terminated & valid)[:, -1]
    assert needed[:, :-1].any()
    assert (~needed[:, -1]).any()
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
    policy, td = make(recurrent=recurrent), rollout(ends=0.0)
    cut = 3
    for kind, row in (("terminated", 0), ("truncated", 1), ("truncated", 2), ("terminated", 3), ("truncated", 4)):
        td["next", kind][row, cut] = td["next", "done"][row, cut] = True
    td["is_init"][:, cut + 1] = True
    td["next", "observation"][:, cut] = torch.randn(5, FEATURES, dtype=torch.float64)
    loss = ImpalaLoss(policy)
    whole, parts = gradients(loss, td), [gradients(loss, part) for part in (td[:, : cut + 1], td[:, cut + 1 :])]
    for all_, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(all_, first + second)
    torch.testing.assert_close(total(loss(td)), total(loss(td[:, : cut + 1])) + total(loss(td[:, cut + 1 :])))


def test_recurrent_unroll_equals_single_steps() -> None:
    """Values of steps and successors from one call equal those of the acting form, step after step."""
    policy, td = make(recurrent=6), rollout(ends=0.5)
    loss = ImpalaLoss(policy, estimator="vtrace(lmbda=0)", gamma=1.0, value_coef=2.0)
    net = policy.module[0]
    h, c = td["recurrent_h"][:, 0], td["recurrent_c"][:, 0]
    values, after = [], []
    for t in range(td.shape[1]):
        step = net(td[:, t].update({"recurrent_h": h, "recurrent_c": c}))
        h, c = step["next", "recurrent_h"], step["next", "recurrent_c"]
        values.append(step["state_value"])
        after.append(net(td["next"][:, t].select(*net.in_keys, strict=False).update(step["next"]))["state_value"])
    value, successor = torch.stack(values, 1), torch.stack(after, 1)
    g = (~td["next", "terminated"]).double()
    # with lambda = 0 the value error is the clipped ratio times the one-step error
    td["action_log_prob"] = torch.full_like(td["action_log_prob"], -200.0)  # every ratio clips to 1
    expected = (td["next", "reward"] + g * successor - value).square().sum()
    torch.testing.assert_close(loss(td)["loss_value"], expected)


def test_sum_is_count_times_mean_and_invalid_steps_have_no_weight() -> None:
    policy, td = make(), rollout()
    td["valid"] = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(0)) < 0.6
    mean, summed = (ImpalaLoss(policy, reduction=kind)(td) for kind in ("mean", "sum"))
    count = int(td["valid"].sum())
    assert mean["valid_count"] == summed["valid_count"] == count
    for name in LOSSES:
        torch.testing.assert_close(summed[name], count * mean[name])
    nothing = ImpalaLoss(policy, reduction="mean")(td.clone().update({"valid": torch.zeros_like(td["valid"])}))
    assert all(nothing[name] == 0 for name in LOSSES)


WEIGHTS: list[tuple[str, Any]] = [
    ("vtrace", lambda rho: rho.clamp(max=1)),
    ("vtrace(pg_rho_clip=1.5)", lambda rho: rho.clamp(max=1.5)),
    ("vtrace(leak=0.7)", lambda rho: 0.7 * rho.clamp(max=1) + 0.3 * rho),
    ("importance_sampling", lambda rho: rho),
    ("one_step(pg_rho_clip=0.8)", lambda rho: rho.clamp(max=0.8)),
    ("gae", torch.ones_like),
    ("n_step(n=3)", torch.ones_like),
]


@pytest.mark.parametrize(("estimator", "weight"), WEIGHTS)
def test_normalised_advantage_is_the_formula(estimator: str, weight: Any) -> None:
    policy, td = make(), rollout()
    td["valid"] = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(0)) < 0.6
    normalised = ImpalaLoss(policy, estimator=estimator, normalize_advantage=True)
    dist = network(policy, td["observation"])[0]
    log_prob = dist.log_prob(td["action"]).detach()
    mask = td["valid"].squeeze(-1)
    w = weight((log_prob - td["action_log_prob"]).exp())[mask]
    advantage = estimated(ImpalaLoss(policy, estimator=estimator), td).advantage[mask]
    # the weighted mean of what the ratios multiply, and their product with it taken away
    centred = w * (advantage / w - (w * (advantage / w)).sum() / w.sum())
    normal = centred / centred.std(correction=0)
    assert normal.mean().abs() < 1e-12
    torch.testing.assert_close(normalised(td)["loss_policy"].detach(), -(normal * log_prob[mask]).sum())


def test_normalisation_does_not_move_actions_that_the_policy_has_left() -> None:
    """A ratio of 0 has no gradient, whatever the other advantages are."""
    policy, td = make(), rollout()
    td["next", "reward"] += 3.0
    td["action_log_prob"][2:] += 60  # rho = exp(-60)
    loss = ImpalaLoss(policy, normalize_advantage=True, value_coef=0.0, entropy_coef=0.0)
    everything, known = (torch.cat([g.flatten() for g in gradients(loss, x)]) for x in (td, td[:2]))
    assert known.norm() > 0.1
    torch.testing.assert_close(everything / everything.norm(), known / known.norm())


@pytest.mark.parametrize("uneven", [False, True])
def test_normalisation_on_policy_is_the_usual_one(uneven: bool) -> None:
    stats = Stats(None if not uneven else torch.rand(8, 9) < 0.5, torch.zeros(8, 9))
    x = 1000 + torch.randn(8, 9)
    found = stats.standardised(x, torch.ones_like(x))
    known = x if not uneven else x[stats._valid]
    expected = (x - known.mean()) / known.std(correction=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ["vtrace", "importance_sampling", "one_step", "gae"])
@pytest.mark.parametrize("masked", [False, True])
def test_estimators_by_name_are_the_returns_of_that_name(estimator: str, masked: bool) -> None:
    policy, td = make(), rollout()
    valid = None
    if masked:
        td["valid"] = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(3)) < 0.8
        td["action_log_prob"][~td["valid"].squeeze(-1)] = math.nan
        valid = td["valid"].squeeze(-1).t()
    dist, value = network(policy, td["observation"])
    log_prob, after = dist.log_prob(td["action"]), network(policy, td["next", "observation"])[1].detach()
    log_rho, done = (log_prob.detach() - td["action_log_prob"]).t(), td["next", "done"].squeeze(-1).t()
    known: dict[str, Any] = {
        "reward": td["next", "reward"].squeeze(-1).t(), "value": value.detach().t(), "next_value": after.t(),
        "terminated": td["next", "terminated"].squeeze(-1).t(), "done": done, "gamma": 0.9, "lmbda": 0.8,
        "valid": valid,
    }  # fmt: skip
    clips = dict.fromkeys(("rho_clip", "c_clip", "pg_rho_clip"), math.inf)
    rho, one = log_rho.exp(), torch.ones_like(log_rho)
    options: dict[str, float] = {"one_step": {"pg_rho_clip": 0.7}}.get(estimator, {})
    if estimator == "vtrace":
        options = {"rho_clip": 1.3, "c_clip": 1.1, "pg_rho_clip": 0.7, "leak": 0.9}
        target, advantage = vtrace(log_rho=log_rho, **options, **known)
        weights, trace = (0.9 * rho.clamp(max=limit) + 0.1 * rho for limit in (1.3, 1.1))
        clipped = {"rho_clipped", "c_clipped", "pg_rho_clipped"}
    elif estimator == "importance_sampling":
        target, advantage = vtrace(log_rho=log_rho, **clips, **known)
        weights, trace, clipped = rho, rho, set()
    else:
        target = lambda_return(**known)
        advantage = target - known["value"]
        if estimator == "one_step":
            advantage = torch.where(one.bool() if valid is None else valid, advantage * rho.clamp(max=0.7), 0)
        weights, trace, clipped = one, one, {"pg_rho_clipped"} if estimator == "one_step" else set()
    text = ", ".join(f"{name}={value}" for name, value in {"lmbda": 0.8, **options}.items())
    loss = ImpalaLoss(policy, estimator=f"{estimator}({text})", gamma=0.9)
    out = loss(td)
    torch.testing.assert_close(out["loss_policy"], -(advantage.t() * log_prob).sum())
    torch.testing.assert_close(out["loss_value"], 0.25 * (target.t() - value).square().sum())
    torch.testing.assert_close(out["ess"], effective_sample_size(log_rho, valid=valid))
    reach = trace_reach(trace=0.8 * trace, done=done, gamma=0.9, rho=weights, valid=valid)
    torch.testing.assert_close(out["trace_length"], reach.length)
    torch.testing.assert_close(out["contraction"], reach.contraction)
    assert {name for name in loss.out_keys if name.endswith("_clipped")} - {"policy_clipped"} == clipped
    assert set(loss.out_keys) == set(out.keys())


def test_on_policy_all_estimators_are_one() -> None:
    policy, td = make(), rollout()
    td["action_log_prob"] = network(policy, td["observation"])[0].log_prob(td["action"]).detach()
    expected = ImpalaLoss(policy, estimator="vtrace(lmbda=0.8)")(td)
    for estimator in ("importance_sampling", "one_step", "gae"):
        found = ImpalaLoss(policy, estimator=f"{estimator}(lmbda=0.8)")(td)
        for name in (*LOSSES, "ess", "trace_length", "contraction"):
            torch.testing.assert_close(found[name], expected[name])
    assert expected["kl"].abs() < 1e-12
    assert expected["ess"] == 1


def test_reward_clip() -> None:
    policy, td = make(), rollout()
    clipped = td.clone()
    clipped["next", "reward"] = td["next", "reward"].clamp(-0.5, 0.5)
    torch.testing.assert_close(total(ImpalaLoss(policy, reward_clip=0.5)(td)), total(ImpalaLoss(policy)(clipped)))


def test_exact_kl_from_the_stored_parameters() -> None:
    policy, behaviour, td = make(), make(seed=5), rollout()
    td["logits"] = network(behaviour, td["observation"])[0].logits.detach()
    p, q = td["logits"].exp(), network(policy, td["observation"])[0].logits
    torch.testing.assert_close(ImpalaLoss(policy)(td)["kl"], (p * (td["logits"] - q)).sum(-1).mean().detach())


def test_illegal_actions_give_finite_losses_and_no_gradient() -> None:
    policy, td = make(masked=True), rollout()
    mask = torch.rand(5, 7, ACTIONS, generator=torch.Generator().manual_seed(0)) < 0.5
    td["action_mask"] = mask.scatter(-1, td["action"].unsqueeze(-1), True)
    td["next", "action_mask"] = torch.zeros_like(mask)  # a final observation may have no legal action
    bias = policy.module[0].head.linear.bias
    loss = ImpalaLoss(policy)
    assert all(torch.isfinite(g).all() for g in gradients(loss, td))
    everywhere = td.clone()
    everywhere["action_mask"] = torch.tensor([True, True, False]).expand(5, 7, 3).clone()
    everywhere["action"] = td["action"].clamp(max=1)
    gradients(loss, everywhere)
    assert bias.grad[2] == 0
    assert bias.grad[:2].all()
    assert math.isfinite(float(loss(td.update(policy.get_dist_params(td.clone()).select("logits").detach()))["kl"]))


def test_renamed_keys() -> None:
    policy, td = make(), rollout()
    expected = ImpalaLoss(policy)(td)
    loss = ImpalaLoss(policy)
    loss.set_keys(sample_log_prob="mu", reward="r", valid=("masks", "ok"))
    renamed = td.clone().rename_key_("action_log_prob", "mu")
    renamed["next"].rename_key_("reward", "r")
    torch.testing.assert_close(loss(renamed), expected)
    assert ("next", "r") in loss.in_keys
    assert "mu" in loss.in_keys
    renamed["masks", "ok"] = torch.zeros(5, 7, 1, dtype=torch.bool)
    assert total(loss(renamed)) == 0


@pytest.mark.parametrize("recurrent", [None, 6])
def test_bf16_autocast_gives_float32_losses_close_to_exact(recurrent: int | None) -> None:
    policy = make(recurrent=recurrent).float()
    td = rollout().apply(lambda x: x.float() if x.is_floating_point() else x)
    exact = ImpalaLoss(policy, reduction="mean")(td)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ImpalaLoss(policy, reduction="mean")(td)
    total(rough).backward()
    for name in LOSSES:
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], exact[name], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction": "none"}, "reduction"),
        ({"gamma": 1.5}, "gamma"),
        ({"estimator": "vtrace(leak=-0.1)"}, "leak must be in"),
        ({"reward_clip": 0.0}, "reward_clip"),
        ({"policy_clip": -1.0}, "policy_clip must be positive and finite, or None, got -1.0"),
        ({"estimator": "vtrace(pg_rho_clip=0)"}, "pg_rho_clip must be above 0, got 0"),
        ({"estimator": "one_step(rho_clip=2)"}, "'one_step' has no option 'rho_clip', .*; did you mean pg_rho_clip"),
        ({"estimator": "gae(pg_rho_clip=2)"}, "estimator 'gae' has no option 'pg_rho_clip', its options are 'lmbda'$"),
        ({"estimator": "importance_sampling(leak=0.5)"}, "estimator 'importance_sampling' has no option 'leak'"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImpalaLoss(make(), **kwargs)


def test_bad_batches_are_named() -> None:
    loss = ImpalaLoss(make(recurrent=6))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        loss(rollout()[0])
    with pytest.raises(KeyError, match="recurrent_h"):
        loss(rollout().exclude("recurrent_h"))
    with pytest.raises(KeyError, match=r"next.*last_reward"):
        loss(rollout().exclude(("next", "last_reward")))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Feed-forward; the count of truncations inside the rollout is read on the host and splits the graph there."""
    policy, td = make(), rollout()
    loss = ImpalaLoss(policy)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(td), loss(td))


def test_it_is_a_torchrl_loss_without_copies_of_parameters() -> None:
    policy = make()
    loss = ImpalaLoss(policy)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in policy.parameters()}
    assert set(loss.out_keys) == set(loss(rollout()).keys())
    loss.load_state_dict(loss.state_dict(), strict=True)


def test_policy_clip_masks_what_has_moved_in_its_direction() -> None:
    """Gradients against PPO's clipped surrogate, whose ratio is cut at 1 as V-trace's is."""
    generator = torch.Generator().manual_seed(0)
    shape = (6, 5)
    policy = build_policy(network="mlp", observation_shape=[3], num_actions=4, hidden=[8]).double()
    done = torch.zeros(*shape, 1, dtype=torch.bool)
    batch = TensorDict(
        {
            "observation": torch.randn(*shape, 3, generator=generator, dtype=torch.float64),
            "action": torch.randint(4, shape, generator=generator),
            "action_log_prob": -1.4 + 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64),
            "is_init": done.clone(),
            "next": {
                "observation": torch.randn(*shape, 3, generator=generator, dtype=torch.float64),
                "reward": torch.randn(*shape, 1, generator=generator, dtype=torch.float64),
                "done": done.clone(),
                "terminated": done.clone(),
            },
        },
        batch_size=shape,
    )
    clip = 0.2
    loss = ImpalaLoss(policy, reduction="mean", policy_clip=clip)
    out = loss(batch)
    ours = torch.autograd.grad(out["loss_policy"], policy.parameters(), allow_unused=True)

    log_prob = policy.build_dist_from_params(policy.get_dist_params(batch.clone())).log_prob(batch["action"])
    ratio = (log_prob - batch["action_log_prob"]).exp()
    # the advantage without its truncated ratio, from the same loss with nothing masked
    plain = torch.autograd.grad(
        ImpalaLoss(policy, reduction="sum")(batch)["loss_policy"], policy.parameters(), allow_unused=True
    )
    weighted = _advantages(policy, batch)
    surrogate = torch.max(
        -weighted / ratio.detach().clamp(max=1) * ratio.clamp(max=1),
        -weighted / ratio.detach().clamp(max=1) * ratio.clamp(1 - clip, 1 + clip),
    )
    # where the ratio is between 1 and 1 + clip the truncation of V-trace stops PPO's gradient, not V-trace's
    between = (ratio > 1) & ~((weighted > 0) & (ratio > 1 + clip))
    surrogate = torch.where(between.detach(), -weighted * log_prob, surrogate)
    theirs = torch.autograd.grad(surrogate.mean(), policy.parameters(), allow_unused=True)

    assert 0.1 < out["policy_clipped"] < 0.9
    assert plain is not None
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _advantages(policy: Any, batch: TensorDict) -> torch.Tensor:
    """V-trace advantages [B, T] of a rollout without ends."""
    with torch.no_grad():
        values = policy.get_dist_params(batch.clone())["state_value"].squeeze(-1)
        last = policy.get_dist_params(batch["next"].select("observation", "is_init", strict=False).clone())[
            "state_value"
        ][:, -1]
        log_prob = policy.build_dist_from_params(policy.get_dist_params(batch.clone())).log_prob(batch["action"])
        following = torch.cat([values[:, 1:], last], 1)
        no = torch.zeros_like(values, dtype=torch.bool)
        return vtrace(
            reward=batch["next", "reward"].squeeze(-1).t(), value=values.t(), next_value=following.t(),
            log_rho=(log_prob - batch["action_log_prob"]).t(), terminated=no.t(), done=no.t(), gamma=0.99,
        ).advantage.t()  # fmt: skip
