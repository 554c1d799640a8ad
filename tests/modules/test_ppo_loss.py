"""The loss of PPO: its clipped gradient in closed form, what is fixed over the passes, single steps and rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from offtrace.modules.losses import A2CLoss, PPOLoss
from offtrace.modules.networks import build_policy
from tests.modules.test_a2c_loss import torchrl_networks
from tests.modules.test_impala_loss import ACTIONS, LOSSES, gradients, make, network, rollout, total
from tests.modules.test_vmpo_loss import td_lambda

GAMMA, LMBDA, EPSILON = 0.9, 0.8, 0.2
OPTIONS: dict[str, Any] = {"estimator": f"gae(lmbda={LMBDA})", "gamma": GAMMA, "normalize_advantage": False}


def with_valid(td: TensorDict) -> TensorDict:
    td["valid"] = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(3)) < 0.8
    return td


def near(policy: Any, td: TensorDict, spread: float = 0.4) -> TensorDict:
    """The rollout of a behaviour policy whose ratios lie on both sides of the clip."""
    log_prob = network(policy, td["observation"])[0].log_prob(td["action"]).detach()
    noise = torch.randn(log_prob.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    td["action_log_prob"] = log_prob + spread * noise
    return td


@pytest.mark.parametrize("dim", [None, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_formula_of_the_paper(dim: int | None, reduction: str, masked: bool) -> None:
    policy = make(action_dim=dim)
    td = near(policy, rollout(dim=dim))
    td = with_valid(td) if masked else td
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    out = PPOLoss(policy, value_coef=0.7, entropy_coef=0.03, reduction=reduction, **OPTIONS)(td)
    dist, value = network(policy, td["observation"])
    rho = (dist.log_prob(td["action"]) - td["action_log_prob"]).exp()
    target = td_lambda(policy, td, LMBDA)
    advantage = target - value.detach()
    lower = torch.stack([rho * advantage, rho.clamp(1 - EPSILON, 1 + EPSILON) * advantage]).amin(0)
    scale = 1 if reduction == "sum" else int(valid.sum())
    torch.testing.assert_close(out["loss_policy"], -lower[valid].sum() / scale)
    torch.testing.assert_close(out["loss_value"], 0.7 * 0.5 * (target - value).square()[valid].sum() / scale)
    torch.testing.assert_close(out["loss_entropy"], -0.03 * dist.entropy()[valid].sum() / scale)
    outside = torch.where(advantage > 0, rho > 1 + EPSILON, rho < 1 - EPSILON)[valid]
    assert 0.1 < outside.double().mean() < 0.9
    torch.testing.assert_close(out["policy_clipped"], outside.double().mean())
    known = rho.detach()[valid]
    torch.testing.assert_close(out["ess"], known.sum() ** 2 / (len(known) * known.square().sum()))
    torch.testing.assert_close(out["ratio_mean"], known.mean())
    torch.testing.assert_close(out["advantage_std"], advantage[valid].std(correction=0))
    assert out["clip_epsilon"] == pytest.approx(EPSILON)
    assert set(out.keys()) == set(PPOLoss(policy).out_keys)
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)


def test_the_clipped_gradient_in_closed_form() -> None:
    """d/dlogits = -rho A (onehot - pi) / N, and 0 where the ratio has left the clip in the advantage's direction."""
    policy = make()
    td = near(policy, rollout())
    head, seen = policy.module[0].head, []
    hook = head.register_forward_hook(lambda module, args, out: (out[0].retain_grad(), seen.append(out[0]))[1])
    PPOLoss(policy, **OPTIONS)(td)["loss_policy"].backward()
    hook.remove()
    dist, value = network(policy, td["observation"])
    rho = (dist.log_prob(td["action"]) - td["action_log_prob"]).exp().detach()
    advantage = td_lambda(policy, td, LMBDA) - value.detach()
    outside = torch.where(advantage > 0, rho > 1 + EPSILON, rho < 1 - EPSILON)
    assert outside.any()
    # a ratio beyond the clip against its direction keeps its gradient
    assert (torch.where(advantage > 0, rho < 1 - EPSILON, rho > 1 + EPSILON)).any()
    onehot = nn.functional.one_hot(td["action"], ACTIONS)
    expected = -(rho * advantage).unsqueeze(-1) * (onehot - dist.probs.detach()) / td.numel()
    found = seen[0].grad.flatten(0, 1)
    found = found[found.abs().sum(-1) > 0]
    torch.testing.assert_close(found, expected.flatten(0, 1)[~outside.flatten()])


def test_a_ratio_of_one_gives_the_gradient_of_a2c() -> None:
    policy = make()
    td = near(policy, rollout(), spread=0.0)
    a2c = {name: OPTIONS[name] for name in ("estimator", "gamma")}
    torch.testing.assert_close(gradients(PPOLoss(policy, **OPTIONS), td), gradients(A2CLoss(policy, **a2c), td))
    normalised = PPOLoss(policy, **{**OPTIONS, "normalize_advantage": True})
    torch.testing.assert_close(
        gradients(normalised, td), gradients(A2CLoss(policy, normalize_advantage=True, **a2c), td)
    )


def test_advantages_are_normalised_over_the_valid_steps_of_each_minibatch() -> None:
    policy = make()
    td = with_valid(near(policy, rollout()))
    loss = PPOLoss(policy, **{**OPTIONS, "normalize_advantage": True})
    loss.prepare(td)
    for part in (td[:2], td[2:]):
        valid = part["valid"].squeeze(-1)
        advantage = part["advantage"].squeeze(-1)[valid]
        normal = (advantage - advantage.mean()) / advantage.std(correction=0)
        rho = (network(policy, part["observation"])[0].log_prob(part["action"]) - part["action_log_prob"]).exp()[valid]
        lower = torch.minimum(rho * normal, rho.clamp(1 - EPSILON, 1 + EPSILON) * normal)
        torch.testing.assert_close(loss(part)["loss_policy"], -lower.mean(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recurrent", [None, 6])
def test_prepare_keeps_the_advantages_fixed_while_the_weights_move(recurrent: int | None) -> None:
    policy, td = make(recurrent=recurrent), rollout()
    loss = PPOLoss(policy, value_clip=0.3, **OPTIONS)
    fresh = loss(td)
    told = loss.prepare(td)
    assert set(told) == set(loss.estimator.diagnostic_keys)
    assert td["advantage"].shape == td["value_target"].shape == td["state_value"].shape == (5, 7, 1)
    assert not any(td[key].requires_grad for key in ("advantage", "value_target", "state_value"))
    # with the weights of the moment it is what the loss computes itself, and nothing behind the steps is read
    hidden = td.clone()
    hidden["next", "observation"] = torch.full_like(td["next", "observation"], torch.nan)
    for name, x in loss(hidden).items():
        torch.testing.assert_close(x, fresh[name], msg=name)
    before = td.select("advantage", "value_target", "state_value").clone()
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    moved = loss(td)
    torch.testing.assert_close(td.select("advantage", "value_target", "state_value"), before)
    assert moved["advantage_std"] == fresh["advantage_std"]
    assert (moved["ratio_mean"] - fresh["ratio_mean"]).abs() > 1e-3
    changed = loss(td.exclude("advantage"))
    assert (changed["advantage_std"] - fresh["advantage_std"]).abs() > 1e-3


def test_single_steps_are_the_rows_in_any_order() -> None:
    policy = make()
    td = with_valid(near(policy, rollout()))
    loss = PPOLoss(policy, value_clip=0.3, **{**OPTIONS, "normalize_advantage": True})
    loss.prepare(td)
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    expected, found = loss(td), loss(td.reshape(-1)[order])
    torch.testing.assert_close(found, expected)
    steps = td.reshape(-1)[order]
    torch.testing.assert_close(gradients(loss, steps), gradients(loss, td))
    hidden = td.clone()
    hidden["observation"] = td["observation"].masked_fill(~td["valid"], torch.nan)
    torch.testing.assert_close(gradients(loss, hidden), gradients(loss, td))
    kept = steps[steps["valid"].squeeze(-1)].exclude("valid")
    torch.testing.assert_close(total(loss(kept)), total(expected))
    with pytest.raises(
        KeyError, match=r"reads 'advantage' of single steps \[35\], .*call prepare on the whole rollout"
    ):
        loss(steps.exclude("advantage"))
    with pytest.raises(KeyError, match="PPOLoss reads 'value_target', which the batch lacks"):
        loss(td.exclude("value_target"))
    with pytest.raises(ValueError, match=r"a recurrent policy needs rows \[B, T\] of a rollout, got \[35\]"):
        PPOLoss(make(recurrent=6))(steps)


def test_the_value_is_clipped_as_in_baselines() -> None:
    """The greater of two errors; no gradient where the clipped one is greater, and beyond the clip."""
    policy = make()
    td = near(policy, rollout())
    loss = PPOLoss(policy, value_clip=0.1, value_coef=1.0, **OPTIONS)
    loss.prepare(td)
    old = td["state_value"].squeeze(-1)
    for parameter in policy.module[0].value_head.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    value, target = network(policy, td["observation"])[1], td["value_target"].squeeze(-1)
    inside = old + (value - old).clamp(-0.1, 0.1)
    errors = torch.stack([(target - value).square(), (target - inside).square()])
    out = loss(td)
    assert (errors[1] > errors[0] + 1e-9).any()
    assert (errors[0] > errors[1] + 1e-9).any()
    torch.testing.assert_close(out["loss_value"], 0.5 * errors.amax(0).mean())
    torch.testing.assert_close(out["value_clipped"], ((value - old).abs() > 0.1).double().mean())
    bias = policy.module[0].value_head.linear.bias
    slope = torch.where((errors[1] > errors[0]) & ((value - old).abs() > 0.1), 0, value - target).mean()
    torch.testing.assert_close(torch.autograd.grad(out["loss_value"], bias)[0].squeeze(), slope.detach())
    assert "value_clipped" not in PPOLoss(policy, **OPTIONS)(td)


def test_the_clips_shrink_with_the_progress() -> None:
    policy = make()
    td = near(policy, rollout())
    fixed, annealed = PPOLoss(policy, **OPTIONS), PPOLoss(policy, anneal_clip=True, value_clip=0.4, **OPTIONS)
    smaller = PPOLoss(policy, clip_epsilon=0.75 * EPSILON, value_clip=0.3, **OPTIONS)
    annealed.prepare(td)
    td["state_value"] += 0.35
    for loss in (fixed, annealed):
        loss.set_progress(0.25)
    torch.testing.assert_close(annealed(td), smaller(td))
    assert fixed(td)["clip_epsilon"] == pytest.approx(EPSILON)
    assert "clip_scale" not in annealed.state_dict()
    annealed.set_progress(1.0)
    assert annealed(td)["loss_policy"].isfinite()
    with pytest.raises(ValueError, match=r"the progress must be in \[0, 1\], got 1.2"):
        annealed.set_progress(1.2)


@pytest.mark.slow
def test_compiled_equals_eager_while_the_clip_changes() -> None:
    policy = make()
    td = with_valid(near(policy, rollout()))
    loss = PPOLoss(policy, anneal_clip=True, value_clip=0.2, **OPTIONS)
    loss.prepare(td)
    compiled = torch.compile(loss, backend="aot_eager")
    for fraction in (0.0, 0.6):
        loss.set_progress(fraction)
        torch.testing.assert_close(compiled(td), loss(td))
    torch.testing.assert_close(compiled(td.reshape(-1)), loss(td))


@pytest.mark.parametrize(
    "options", [{"recurrent": 6}, {"masked": True}, {"action_dim": 2}, {"action_dim": 2, "recurrent": 6}]
)
@pytest.mark.parametrize("prepared", [False, True])
def test_every_kind_of_policy_learns(options: dict[str, Any], prepared: bool) -> None:
    policy, td = make(**options), rollout(dim=options.get("action_dim"))
    if options.get("masked"):
        td["action_mask"] = torch.rand(5, 7, ACTIONS, generator=torch.Generator().manual_seed(0)) < 0.5
        td["action_mask"].scatter_(-1, td["action"].unsqueeze(-1), True)
    loss = PPOLoss(policy, clip_epsilon=0.9)
    td = with_valid(td)
    if prepared:
        loss.prepare(td)
    assert all(g.isfinite().all() and g.any() for g in gradients(loss, td))


def test_recurrent_rows_are_evaluated_from_their_first_state() -> None:
    """The values of the steps are those of the acting form, whether successors are inserted between them or not."""
    policy, td = make(recurrent=6), rollout(ends=0.5)
    net = policy.module[0]
    h, c = td["recurrent_h"][:, 0], td["recurrent_c"][:, 0]
    values = []
    for t in range(td.shape[1]):
        step = net(td[:, t].update({"recurrent_h": h, "recurrent_c": c}))
        h, c = step["next", "recurrent_h"], step["next", "recurrent_c"]
        values.append(step["state_value"])
    loss = PPOLoss(policy, value_coef=2.0, **OPTIONS)
    loss.prepare(td)
    torch.testing.assert_close(td["state_value"], torch.stack(values, 1))
    error = td["value_target"] - td["state_value"]
    torch.testing.assert_close(loss(td)["loss_value"].detach(), error.square().mean())


def test_torchrls_modules_copies_and_other_precisions() -> None:
    _, _, policy = torchrl_networks()
    td = rollout()
    loss = PPOLoss(policy, **OPTIONS)
    loss.prepare(td)
    expected = loss(td)
    again = copy.deepcopy(loss)
    for parameter in policy.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(again(td), expected)
    again.float()
    single = td.apply(lambda x: x.float() if x.is_floating_point() else x)
    for name, x in again(single).items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), expected[name].double(), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = again(single)
    for name in LOSSES:
        torch.testing.assert_close(rough[name].double(), expected[name], rtol=0.1, atol=0.1)


def test_ratios_that_overflow_leave_no_nan() -> None:
    policy, td = make(), rollout()
    td["action_log_prob"][0] -= 2000.0
    td["valid"] = torch.ones(5, 7, 1, dtype=torch.bool)
    td["valid"][1] = False
    td["action_log_prob"][1] = torch.nan
    loss = PPOLoss(policy, **OPTIONS)
    loss.prepare(td)
    out: TensorDictBase = loss(td)
    assert not any(bool(x.isnan()) for x in out.values())
    found: list[Tensor] = gradients(loss, td)
    assert not any(bool(x.isnan().any()) for x in found)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    for options, message in (
        ({"clip_epsilon": 0.0}, r"clip_epsilon must be in \(0, 1\), got 0.0"),
        ({"value_clip": -1.0}, "value_clip must be positive and finite, or None, got -1.0"),
        ({"value_clip": float("inf")}, "value_clip must be positive and finite, or None, got inf"),
        ({"gamma": "0.9"}, r"gamma must be in \[0, 1\], got '0.9'"),
        ({"estimator": "retrace"}, "estimator 'retrace' is of action values, and one of state values is needed"),
        ({"estimator": "gae(lmbda=2)"}, r"lmbda must be in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOLoss(make(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "estimator", ["vtrace", "vtrace(pg_rho_clip=inf)", "one_step(lmbda=0.8)", "importance_sampling"]
)
def test_an_estimators_weight_does_not_multiply_the_ratio_again(estimator: str) -> None:
    """Of steps that all end an episode, every estimator has the advantage r - V: the gradient is that of GAE."""
    policy = make()
    td = near(policy, rollout())
    for name in ("done", "terminated"):
        td["next", name] = torch.ones_like(td["next", name])
    wanted = gradients(PPOLoss(policy, value_coef=0, **OPTIONS), td.clone())
    loss = PPOLoss(policy, value_coef=0, **{**OPTIONS, "estimator": estimator})
    prepared = td.clone()
    loss.prepare(prepared)
    for batch in (td, prepared):
        for one, other in zip(gradients(loss, batch.clone()), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_smoothed_policy_is_not_a_recurrent_one() -> None:
    smooth = build_policy(network="mlp", observation_shape=[4], num_actions=None, action_dim=2, smoothing=0.5)
    assert not PPOLoss(smooth).is_recurrent
    assert PPOLoss(make(recurrent=3)).is_recurrent
