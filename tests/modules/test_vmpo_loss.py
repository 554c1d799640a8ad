"""The loss of V-MPO against the sums of the paper, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch import distributions as D

from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.vmpo import VMPOLoss, select_top
from offtrace.modules.networks import MLP, CholeskyHead, Policy, PolicyNetwork, ValueHead, build_policy
from offtrace.modules.networks.value_heads import PopArtHead
from offtrace.modules.returns import trace_reach

ACTIONS, FEATURES, DIM, GAMMA = 3, 4, 2, 0.9
LOSSES = ("loss_policy", "loss_dual", "loss_value")
KINDS = ["discrete", "diagonal", "full"]


def make(kind: str = "discrete", *, seed: int = 0, **kwargs: Any) -> Policy:
    torch.manual_seed(seed)
    if kind == "full":
        policy = Policy(PolicyNetwork(MLP(FEATURES, [16]), CholeskyHead(16, DIM), ValueHead(16)))
    else:
        action: dict[str, Any] = {"num_actions": ACTIONS} if kind == "discrete" else {"action_dim": DIM}
        action |= {} if kind == "discrete" else {"head_options": {"state_dependent": True}}
        policy = build_policy(network="mlp", observation_shape=[FEATURES], hidden=[16], **action, **kwargs)
    for parameter in policy.module[0].head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy.double()


def network(policy: Policy, observation: Tensor) -> tuple[Any, Tensor]:
    """One of torch's own distributions, and the value, straight from the modules."""
    net = policy.module[0]
    features = net.encoder(observation.reshape(-1, FEATURES)).view(*observation.shape[:-1], -1)
    out = net.head(features)
    if len(out) == 1:
        dist: Any = D.Categorical(logits=out[0])
    elif out[1].shape == out[0].shape:
        dist = D.Independent(D.Normal(*out), 1)
    else:
        dist = D.MultivariateNormal(out[0], scale_tril=out[1])
    return dist, net.value_head(features).squeeze(-1)


def rollout(kind: str = "discrete", batch: int = 6, time: int = 7, *, seed: int = 1, ends: float = 0.3) -> TensorDict:
    """Random rollouts of a behaviour policy that is not the one that learns."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, time, *shape, generator=g, dtype=torch.float64)

    terminated = torch.rand(batch, time, 1, generator=g) < ends / 2
    truncated = torch.rand(batch, time, 1, generator=g) < ends / 2
    done = terminated | truncated
    observation, final = normal(FEATURES), normal(FEATURES)
    following = torch.cat([observation[:, 1:], final[:, -1:]], 1)
    torch.manual_seed(seed)
    with torch.no_grad():
        dist = network(make(kind, seed=5), observation)[0]
        action = dist.sample()
        stored = {"logits": dist.logits} if kind == "discrete" else {"loc": dist.mean}
        if kind != "discrete":
            stored |= {"scale": dist.stddev} if kind == "diagonal" else {"scale_tril": dist.scale_tril}
    after = {"observation": torch.where(done, final, following), "reward": normal(1)}
    after |= {"terminated": terminated, "truncated": truncated, "done": done}
    return TensorDict(
        {
            "observation": observation,
            "action": action,
            "action_log_prob": dist.log_prob(action),
            "next": after,
            **stored,
        },
        [batch, time],
    )


def with_valid(td: TensorDict, share: float = 0.7) -> TensorDict:
    mask = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(3)) < share
    return td.clone().set("valid", mask)


def td_lambda(policy: Policy, td: TensorDictBase, lmbda: float) -> Tensor:
    """Targets by the double sum, one row and step at a time."""
    with torch.no_grad():
        value, after = network(policy, td["observation"])[1], network(policy, td["next", "observation"])[1]
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td.get("valid", torch.ones_like(td["next", "done"])).squeeze(-1)
    target = value.clone()
    for b in range(value.shape[0]):
        for s in range(value.shape[1]):
            weight = 1.0
            for t in range(s, value.shape[1]):
                if not valid[b, t]:
                    break
                g = 0.0 if terminated[b, t] else GAMMA
                target[b, s] += weight * (reward[b, t] + g * after[b, t] - value[b, t])
                weight *= GAMMA * lmbda
                if done[b, t]:
                    break
    return target


def top_half(advantage: Tensor, valid: Tensor, fraction: float = 0.5) -> Tensor:
    order = sorted(range(advantage.numel()), key=lambda i: (not valid.flatten()[i], -advantage.flatten()[i].item()))
    mask = torch.zeros(advantage.numel(), dtype=torch.bool)
    mask[order[: max(1, int(fraction * valid.sum()))]] = True
    return mask.view_as(advantage)


def constraint(policy: Policy, td: TensorDict, valid: Tensor) -> list[Tensor]:
    """Mean KL of behaviour to online policy, whole or in two parts, by torch's own."""
    dist = network(policy, td["observation"])[0]
    if "logits" in td:
        kls = [D.kl_divergence(D.Categorical(logits=td["logits"]), dist)]
    elif "scale" in td:
        old, new = D.Normal(td["loc"], td["scale"]), dist.base_dist
        moved = D.Normal(new.loc, old.scale), D.Normal(old.loc, new.scale)
        kls = [D.kl_divergence(old, x).sum(-1) for x in moved]
    else:
        old = D.MultivariateNormal(td["loc"], scale_tril=td["scale_tril"])
        full = (
            D.MultivariateNormal(dist.loc, scale_tril=old.scale_tril),
            D.MultivariateNormal(old.loc, scale_tril=dist.scale_tril),
        )
        kls = [D.kl_divergence(old, x) for x in full]
    return [kl[valid].mean() for kl in kls]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_sums_of_the_paper(kind: str, reduction: str, masked: bool) -> None:
    policy, td = make(kind), rollout(kind)
    td = with_valid(td) if masked else td
    bounds = {"epsilon": 0.05, "epsilon_kl": 0.02, "epsilon_mean": 0.03, "epsilon_cov": 0.004}
    loss = VMPOLoss(
        policy, estimator="gae(lmbda=0.8)", gamma=GAMMA, value_coef=0.7, temperature=0.6, alpha=2.5,
        reduction=reduction, **bounds,
    ).double()  # fmt: skip
    out = loss(td)
    valid = td["valid"].squeeze(-1) if masked else torch.ones(6, 7, dtype=torch.bool)
    dist, value = network(policy, td["observation"])
    target = td_lambda(policy, td, 0.8)
    advantage = target - value.detach()
    chosen = top_half(advantage, valid)
    assert chosen.sum() == int(valid.sum()) // 2
    eta, alpha = 0.6, 2.5
    psi = (advantage[chosen] / eta).exp()
    psi = psi / psi.sum()
    kls = constraint(policy, td, valid)
    limits = [0.02] if kind == "discrete" else [0.03, 0.004]
    times = valid.sum() if reduction == "sum" else 1
    expected = -(psi * dist.log_prob(td["action"])[chosen]).sum() + sum(alpha * kl for kl in kls)
    torch.testing.assert_close(out["loss_policy"], times * expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out["loss_value"], times * 0.7 * 0.5 * (target - value).square()[valid].mean())
    dual = eta * (0.05 + (advantage[chosen] / eta).exp().mean().log())
    dual = dual + sum(alpha * (limit - kl.detach()) for limit, kl in zip(limits, kls, strict=True))
    torch.testing.assert_close(out["loss_dual"], times * dual.detach(), rtol=1e-6, atol=1e-8)
    gain = (psi * (psi * len(psi)).log()).sum()
    torch.testing.assert_close(out["kl_improved"], gain, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out["threshold"], advantage[chosen].min())
    torch.testing.assert_close(out["ess_improved"], 1 / (len(psi) * psi.square().sum()), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out["entropy"], dist.entropy()[valid].mean().detach())
    assert out["valid_count"] == valid.sum()
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)
    # the multipliers' gradients in closed form
    name = "kl" if kind == "discrete" else "cov"
    raws = [loss.temperature.raw, loss.alphas[name].raw]
    slopes = torch.autograd.grad(out["loss_dual"], raws)
    for slope, raw, error in zip(slopes, raws, (0.05 - gain, limits[-1] - kls[-1].detach()), strict=True):
        torch.testing.assert_close(
            slope.squeeze(), times * error * raw.detach().sigmoid().squeeze(), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_ties_do_not_make_the_half_larger(fraction: float) -> None:
    advantage = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 5.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    stats = Stats(valid, advantage)
    weights, _, _ = select_top(
        advantage.masked_fill(~valid, 0), torch.ones(1), 0.01, fraction, valid=valid, stats=stats
    )
    assert (weights > 0).sum() == int(7 * fraction)
    assert weights[1, 3] == 0
    assert weights[1, 1] == weights[1, 2] > 0
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("target", ["n_step", "vtrace"])
def test_other_targets(target: str) -> None:
    policy, td = make(), rollout()
    estimator = {"n_step": "n_step(n=2)", "vtrace": "vtrace(lmbda=0.9)"}[target]
    loss = VMPOLoss(policy, gamma=GAMMA, estimator=estimator).double()
    out = loss(td)
    with torch.no_grad():
        dist, value = network(policy, td["observation"])
        after = network(policy, td["next", "observation"])[1]
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    rho = (dist.log_prob(td["action"]) - td["action_log_prob"]).exp().clamp(max=1)
    assert (rho < 1).any()
    g = GAMMA * (~terminated).double()
    goal, advantage = torch.zeros_like(value), torch.zeros_like(value)
    for b in range(6):
        for t in reversed(range(7)):
            going = not done[b, t] and t < 6
            if target == "n_step":
                one = reward[b, t] + g[b, t] * after[b, t]
                goal[b, t] = reward[b, t] + GAMMA * (reward[b, t + 1] + g[b, t + 1] * after[b, t + 1]) if going else one
                advantage[b, t] = goal[b, t] - value[b, t]
            else:
                tail = GAMMA * 0.9 * rho[b, t] * (goal[b, t + 1] - value[b, t + 1]) if going else 0
                goal[b, t] = value[b, t] + rho[b, t] * (reward[b, t] + g[b, t] * after[b, t] - value[b, t]) + tail
                behind = 0.9 * goal[b, t + 1] + 0.1 * value[b, t + 1] if going else after[b, t]
                advantage[b, t] = rho[b, t] * (reward[b, t] + g[b, t] * behind - value[b, t])
    torch.testing.assert_close(out["loss_value"].detach(), 0.5 * (goal - value).square().mean())
    torch.testing.assert_close(out["advantage_std"], advantage.std(correction=0))
    torch.testing.assert_close(out["threshold"], advantage[top_half(advantage, torch.ones_like(done))].min())


def window(td: TensorDict, b: int, t: int, n: int) -> int:
    """Steps of the n-step return of step t: up to an end of the episode, of the rollout, or of what is known."""
    done, valid = (x.squeeze(-1) for x in (td["next", "done"], td["valid"]))
    for m in range(1, n + 1):
        if done[b, t + m - 1] or t + m == td.shape[1] or not valid[b, t + m]:
            return m
    return n


@pytest.mark.parametrize("target", ["gae", "n_step", "vtrace"])
def test_how_far_off_policy_the_rollout_is(target: str) -> None:
    policy, td = make(), with_valid(rollout())
    loss = VMPOLoss(policy, gamma=GAMMA, estimator=target if target == "n_step" else f"{target}(lmbda=0.8)").double()
    out, valid = loss(td), td["valid"].squeeze(-1)
    with torch.no_grad():
        log_rho = network(policy, td["observation"])[0].log_prob(td["action"]) - td["action_log_prob"]
    rho = log_rho.exp()
    known = rho[valid]
    torch.testing.assert_close(out["ess"], known.sum() ** 2 / (len(known) * known.square().sum()))
    weight = rho.clamp(max=1) if target == "vtrace" else torch.ones_like(rho)
    done = td["next", "done"].squeeze(-1)
    reach = trace_reach(trace=0.8 * weight.t(), done=done.t(), gamma=GAMMA, rho=weight.t(), valid=valid.t())
    if target == "n_step":
        steps = torch.tensor([window(td, b, t, 5) for b, t in valid.nonzero().tolist()], dtype=torch.float64)
        assert len(steps.unique()) > 2
        torch.testing.assert_close(out["trace_length"], (steps - 1).mean())
        torch.testing.assert_close(out["contraction"], (GAMMA**steps).mean())
    else:
        torch.testing.assert_close(out["trace_length"], reach.length)
        torch.testing.assert_close(out["contraction"], reach.contraction)
    assert ("c_clipped" in out) == (target == "vtrace")
    if target == "vtrace":
        for name in ("rho_clipped", "c_clipped", "pg_rho_clipped"):
            torch.testing.assert_close(out[name], (known > 1).float().mean())
    assert set(out.keys()) == set(loss.out_keys)


@pytest.mark.parametrize("kind", KINDS)
def test_each_term_reaches_its_own_parameters_only(kind: str) -> None:
    policy = make(kind)
    loss = VMPOLoss(policy).double()
    out = loss(rollout(kind))
    assert set(loss.out_keys) == set(out.keys())
    net, groups = policy.module[0], loss.param_groups()
    assert {id(p) for p in loss.parameters()} == {id(p) for group in groups.values() for p in group}
    everything = list(loss.named_parameters())
    heads = {"loss_policy": net.value_head, "loss_value": net.head}
    for name in LOSSES:
        grads = torch.autograd.grad(out[name], [p for _, p in everything], retain_graph=True, allow_unused=True)
        reached = {id(p) for (_, p), g in zip(everything, grads, strict=True) if g is not None and g.any()}
        if name == "loss_dual":
            assert reached == {id(p) for p in groups["duals"]}
        else:
            unwanted = [*groups["duals"], *heads[name].parameters()]
            assert reached == {id(p) for p in groups["actor_critic"]} - {id(p) for p in unwanted}


@pytest.mark.parametrize("target", ["gae", "n_step", "vtrace"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_entries_that_must_not_be_read_reaches_nothing(kind: str, target: str) -> None:
    policy, td = make(kind), with_valid(rollout(kind))
    loss = VMPOLoss(policy, estimator=target).double()
    hidden = td.clone()
    valid, done, terminated = td["valid"], td["next", "done"], td["next", "terminated"]
    needed = done & ~terminated & valid
    needed[:, -1] = (~terminated & valid)[:, -1]
    hidden["next", "observation"] = td["next", "observation"].masked_fill(~needed, math.nan)
    hidden["next", "reward"] = td["next", "reward"].masked_fill(~valid, math.nan)
    for key in ("action_log_prob", "logits", "loc", "scale", "scale_tril", *(["action"] if kind != "discrete" else [])):
        if key in td:
            mask = valid.view(*td.batch_size, *(1,) * (td[key].ndim - 2))
            hidden[key] = td[key].masked_fill(~mask, math.nan)
    results = []
    for batch in (td, hidden):
        loss.zero_grad()
        out = loss(batch)
        sum(out[name] for name in LOSSES).backward()  # type: ignore[union-attr]
        results.append((out, [p.grad.clone() for p in loss.parameters()]))  # type: ignore[union-attr]
    assert all(grad.isfinite().all() for grad in results[0][1])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_valid_step_every_term_is_zero(kind: str) -> None:
    loss = VMPOLoss(make(kind)).double()
    td = rollout(kind)
    td["valid"] = torch.zeros_like(td["next", "done"])
    out = loss(td)
    sum(out[name] for name in LOSSES).backward()  # type: ignore[union-attr]
    assert all(out[name] == 0 for name in LOSSES)
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_compiled_equals_eager(kind: str, compiled: bool) -> None:
    td = with_valid(rollout(kind, ends=0.0))
    first, second = VMPOLoss(make(kind)).double(), VMPOLoss(make(kind, seed=8), alpha=1.0).double()
    second.load_state_dict(first.state_dict(), strict=True)
    expected, found = first(td), (torch.compile(second, backend="aot_eager") if compiled else second)(td)
    torch.testing.assert_close(found, expected)
    for loss, out in ((first, expected), (second, found)):
        sum(out[name] for name in LOSSES).backward()  # type: ignore[union-attr]
        assert loss.temperature.raw.grad is not None
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_popart_changes_no_value_and_normalises_the_error() -> None:
    """Against moments by numpy: values before and after an update are equal, the loss is in units of the deviation."""
    policy, plain = make(critic_options={"popart": True}), make()
    plain.load_state_dict(policy.state_dict(), strict=False)
    td = rollout()
    loss, without = VMPOLoss(policy, gamma=GAMMA).double(), VMPOLoss(plain, gamma=GAMMA).double()
    head = policy[0].value_head
    assert torch.equal(loss(td)["loss_value"], without(td)["loss_value"])  # scale 1, mean 0 at first
    seen: list[Tensor] = []
    inner = loss.estimator.estimate
    loss.estimator.estimate = lambda *x, **y: seen.append(inner(*x, **y).target) or inner(*x, **y)
    for number in range(3):
        value = policy(td.clone())["state_value"]
        loss(td)
        loss.update_values()
        loss.update_values()  # a batch counts once
        assert head.count == number + 1
        torch.testing.assert_close(policy(td.clone())["state_value"], value)
        returns = torch.stack(seen)
        torch.testing.assert_close(head.mean, returns.mean())
        torch.testing.assert_close(head.scale, returns.std(correction=0))
        td["next", "reward"] += 50
    out = loss(td)
    value = policy(td.clone())["state_value"].squeeze(-1)
    torch.testing.assert_close(out["loss_value"], 0.5 * (seen[-1] - value).square().mean() / head.scale.square())
    head.rate = 0.5  # from now on a moving average
    before = head.mean.clone()
    loss.update_values()
    torch.testing.assert_close(head.mean, (before + seen[-1].mean()) / 2)


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 0.05), (10_000.0, 1.0)])
def test_popart_knows_a_deviation_that_is_small_beside_the_returns(mean: float, deviation: float) -> None:
    """In the precision of the recipes. By mean of squares minus square of mean in float32 it was rounding noise."""
    generator = torch.Generator().manual_seed(0)
    loss = VMPOLoss(make(critic_options={"popart": True})).float()
    head = PopArtHead(4, rate=3e-3)
    scales = []
    for _ in range(600):
        target = mean + deviation * torch.randn(512, generator=generator)
        stats = Stats(None, like=target, reduction="mean")
        loss.policy[0].value_head = head
        assert loss._scaled_value_coef(target, stats).dtype == torch.float32
        loss.update_values()
        scales.append(float(head.scale))
    assert scales[-1] == pytest.approx(deviation, rel=0.02)
    assert max(scales[100:]) < 1.1 * deviation
    assert min(scales[100:]) > 0.9 * deviation


def test_popart_learns_from_no_invalid_step() -> None:
    loss, td = VMPOLoss(make(critic_options={"popart": True})).double(), rollout()
    td["valid"] = torch.zeros_like(td["next", "done"])
    loss(td)
    loss.update_values()
    assert loss.policy[0].value_head.count == 0


def test_recurrent_policies_run() -> None:
    policy = make(recurrent=6)
    td = rollout()
    init = torch.zeros(6, 7, 1, dtype=torch.bool)
    init[:, 1:] = td["next", "done"][:, :-1]
    extra = {"is_init": init, "last_action": td["action"], "last_reward": td["next", "reward"]}
    state = {key: torch.zeros(6, 7, 6, dtype=torch.float64) for key in ("recurrent_h", "recurrent_c")}
    td.update({**extra, **state})
    td["next"].update({"last_action": td["action"], "last_reward": td["next", "reward"], "is_init": ~init & init})
    out = VMPOLoss(policy).double()(td)
    sum(out[name] for name in LOSSES).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "retrace"}, "estimator 'retrace' is of action values, and one of state values is needed"),
        ({"top_fraction": 0.0}, r"top_fraction must be in \(0, 1\], got 0.0"),
        ({"epsilon_kl": -1.0}, "epsilon_kl must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": 1e-9}, "temperature is 1e-09; it must be at least 2e-08"),
        ({"alpha": 1e-9}, "alpha is 1e-09; it must be at least 2e-08"),
        ({"value_coef": -1.0}, "value_coef must be at least 0 and finite, got -1.0"),
        ({"estimator": "gae(lmbda=2)"}, "lmbda must be in"),
        ({"reduction": "none"}, "reduction must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMPOLoss(make(), **arguments)


def test_policies_that_are_no_normals_are_refused() -> None:
    policy = make("diagonal")
    policy[-1].distribution_class = torchrl.modules.TanhNormal
    with pytest.raises(ValueError, match="a discrete or an unsquashed normal policy"):
        VMPOLoss(policy)


def test_batches_that_do_not_fit_are_refused() -> None:
    td = rollout()
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        VMPOLoss(make()).double()(td[0])
    with pytest.raises(KeyError, match="logits"):
        VMPOLoss(make()).double()(td.exclude("logits"))


def test_returns_of_all_ranks_count_by_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with one valid step beside one with all of them: the statistics are those of the joined batch."""
    td = rollout()
    td["valid"] = torch.ones_like(td["next", "done"])
    td["valid"][:3], td["valid"][0, 0] = False, True
    td["next", "reward"][3:] += 10
    joined, *ranks = (VMPOLoss(make(critic_options={"popart": True})).double() for _ in range(3))
    joined(td)
    joined.update_values()
    for loss, part in zip(ranks, (td[:3], td[3:]), strict=True):
        loss(part)
    other = ranks[1]._sums
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(other))
    ranks[0].update_values()
    for name in ("mean", "scale"):
        torch.testing.assert_close(*(getattr(loss.policy[0].value_head, name) for loss in (ranks[0], joined)))
