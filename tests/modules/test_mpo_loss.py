"""The off-policy MPO losses against the sums of the papers, in float64, on small networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch import distributions as D

from offtrace.modules.estimators.base import Outcome
from offtrace.modules.estimators.selection import first_window
from offtrace.modules.losses import DiscreteMPOLoss, MPOLoss
from offtrace.modules.losses.critics import min_critic
from offtrace.modules.losses.updates import FastHardUpdate
from offtrace.modules.networks import DiagonalNormal, FullNormal, TanhNormal, build_critic, build_policy
from offtrace.modules.networks.distributions import Categorical
from offtrace.modules.returns import n_step_return, trace_reach

FEATURES, DIM, ATOMS = 4, 2, 11
LOSSES = ("loss_policy", "loss_dual", "loss_critic")
GAMMA = 0.9
TRACES = ("retrace", "importance_sampling", "tree_backup", "q_lambda")
MPOBase = MPOLoss | DiscreteMPOLoss


def spec(target: str, *, n: int = 5, lmbda: float = 0.95) -> str:
    """The estimator that the formulas call ``target``."""
    return {"one_step": "one_step", "n_step": f"n_step(n={n})"}.get(target, f"{target}(lmbda={lmbda})")


class Net(nn.Module):
    """Observation to the parameters of a policy."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(FEATURES, {"diagonal": 2, "full": 3, "discrete": 1}[kind] * 3)

    def forward(self, x: Tensor) -> Any:
        out = torch.tanh(self.linear(x))
        if self.kind == "discrete":
            return out
        if self.kind == "diagonal":
            return out[..., :DIM], out[..., DIM : 2 * DIM].exp()
        tril = torch.diag_embed(out[..., DIM : 2 * DIM].exp())
        below = torch.zeros_like(tril)
        below[..., 1, 0] = out[..., 4]
        return out[..., :DIM], tril + below


class Value(nn.Module):
    """Observation (and action) to K values, K x 3 values, or K x ATOMS logits."""

    def __init__(self, kind: str, critics: int) -> None:
        super().__init__()
        self.sizes = {"scalar": (critics,), "discrete": (critics, 3), "categorical": (critics, ATOMS)}[kind]
        features = FEATURES + (0 if kind == "discrete" else DIM)
        self.net = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, math.prod(self.sizes)))
        if kind == "categorical":
            self.register_buffer("support", torch.linspace(-6, 6, ATOMS))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(torch.cat(inputs, -1)).unflatten(-1, self.sizes)


def make_policy(kind: str = "diagonal") -> ProbabilisticTensorDictSequential:
    keys = {"diagonal": ["loc", "scale"], "full": ["loc", "scale_tril"], "discrete": ["logits"]}[kind]
    dist = {"diagonal": DiagonalNormal, "full": FullNormal, "discrete": Categorical}[kind]
    net = TensorDictModule(Net(kind), in_keys=["observation"], out_keys=keys)
    sampler = ProbabilisticTensorDictModule(
        in_keys=keys, out_keys=["action"], distribution_class=dist, return_log_prob=True, log_prob_key="action_log_prob"
    )
    return ProbabilisticTensorDictSequential(net, sampler).double()


def make_critic(kind: str = "scalar", critics: int = 1) -> TensorDictModule:
    reads = ["observation"] if kind == "discrete" else ["observation", "action"]
    writes = {"scalar": "state_action_value", "discrete": "action_value", "categorical": "value_logits"}[kind]
    return TensorDictModule(Value(kind, critics), in_keys=reads, out_keys=[writes]).double()


def make(
    policy: str = "diagonal",
    critic: str = "scalar",
    *,
    target: str = "n_step",
    n: int = 5,
    lmbda: float = 0.95,
    critics: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> MPOBase:
    """A loss whose online networks have moved away from their targets."""
    torch.manual_seed(seed)
    networks = make_policy(policy), make_critic(critic, critics)
    kwargs = {"estimator": spec(target, n=n, lmbda=lmbda), **kwargs}
    loss: MPOBase
    if policy == "discrete":
        loss = DiscreteMPOLoss(*networks, gamma=GAMMA, **kwargs).double()
    else:
        action_dim = DIM if policy == "diagonal" else None
        loss = MPOLoss(
            *networks, action_dim=action_dim, gamma=GAMMA, num_samples=6, covariance=policy, **kwargs
        ).double()
    FastHardUpdate(loss)
    for parameter in [*loss.policy_params.parameters(), *loss.critic_params.parameters()]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    for parameter in loss.param_groups()["duals"]:
        parameter.data.uniform_(-1.0, 1.0)
    return loss


def data(
    rows: int = 9, time: int | None = 5, *, seed: int = 1, discrete: bool = False, ends: float = 0.4
) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    batch = (rows,) if time is None else (rows, time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    terminated = torch.rand(*batch, 1, generator=g) < ends / 2
    truncated = torch.rand(*batch, 1, generator=g) < ends / 2
    observation, following = normal(FEATURES), normal(FEATURES)
    if time is not None:
        inside = torch.cat([observation[:, 1:], following[:, -1:]], 1)
        following = torch.where(terminated | truncated, following, inside)
    return TensorDict(
        {
            "observation": observation,
            "action": torch.randint(3, batch, generator=g) if discrete else 1.2 * normal(DIM),
            "action_log_prob": -1.5 + 0.7 * normal(),
            "next": {
                "observation": following,
                "reward": normal(1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch,
    )


def with_valid(td: TensorDict, seed: int = 3, share: float = 0.7) -> TensorDict:
    mask = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(seed)) < share
    return td.clone().set("valid", mask)


def total(out: TensorDictBase) -> Tensor:
    return sum(out[name] for name in LOSSES)  # type: ignore[return-value]


def policy_at(policy: Any, observation: Tensor) -> D.Distribution:
    """The distribution, straight from the network, as one of torch's own."""
    net = next(module for module in policy.modules() if isinstance(module, Net))
    out = net(observation)
    if net.kind == "discrete":
        return D.Categorical(logits=out)
    if net.kind == "diagonal":
        return D.Independent(D.Normal(*out), 1)
    return D.MultivariateNormal(out[0], scale_tril=out[1])


def value_at(critic: Any, *inputs: Tensor) -> Tensor:
    return next(module for module in critic.modules() if isinstance(module, Value))(*inputs)


def estimate(loss: MPOBase, observation: Tensor, action: Tensor | None = None) -> Tensor:
    """The target critics' smallest value."""
    inputs = (observation,) if action is None else (observation, action.clamp(-1, 1))
    with torch.no_grad():
        found = value_at(loss.target("critic"), *inputs)
    if loss.support is not None:
        return (found.softmax(-1) @ loss.support).amin(-1)
    return found.amin(-2) if action is None else found.amin(-1)


def samples(loss: Any, observation: Tensor, seed: int) -> Tensor:
    """The actions that the loss draws from the target policy in states [R], after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    noise = torch.randn(loss.num_samples, len(observation), DIM, dtype=torch.float64)
    with torch.no_grad():
        dist = policy_at(loss.target("policy"), observation)
        if isinstance(dist, D.MultivariateNormal):
            return dist.loc + torch.einsum("rij,srj->sri", dist.scale_tril, noise)
        return dist.base_dist.loc + dist.base_dist.scale * noise  # type: ignore[attr-defined]


def windows(td: TensorDict, n: int) -> list[tuple[float, float, int]]:
    """Reward sum, discount and last step of the window at step 0 of each row, step by step."""
    found = []
    for row in td:
        total_, factor, last = 0.0, 1.0, 0
        for t in range(min(n, len(row))):
            if not row.get("valid", torch.ones(len(row), 1))[t]:
                break
            total_ += factor * row["next", "reward"][t].item()
            factor, last = factor * GAMMA, t
            if row["next", "done"][t]:
                break
        found.append((total_, 0.0 if row["next", "terminated"][last] else factor, last))
    return found


# ------------------------------------------------------------------------------------------------------------ windows
@pytest.mark.parametrize("n", [1, 3, 5])
def test_windows_end_at_dones_and_before_invalid_steps(n: int) -> None:
    td = with_valid(data(40, ends=0.3), share=0.85)
    flags = [td["next", key].squeeze(-1) for key in ("reward", "terminated", "done")]
    valid = td["valid"].squeeze(-1)
    window = first_window(Outcome(*flags, valid), gamma=GAMMA, n=n)
    for row, (reward, discount, last) in enumerate(windows(td, n)):
        if valid[row, 0]:
            assert window.reward[row].item() == pytest.approx(reward)
            assert window.discount[row].item() == pytest.approx(discount)
            assert window.length[row] - 1 == last
    value = torch.randn(40, 5, dtype=torch.float64)
    reward, terminated, done = (x.t() for x in flags)
    common: dict[str, Any] = {"terminated": terminated, "done": done, "gamma": GAMMA, "n": n, "valid": valid.t()}
    expected = n_step_return(reward=reward, next_value=value.t(), **common)[0]
    found = window.reward + window.discount * value[torch.arange(40), window.length - 1]
    torch.testing.assert_close(found[valid[:, 0]], expected[valid[:, 0]])


# ---------------------------------------------------------------------------------------------------------- continuous
def coefficients(kind: str, rho: Tensor, log_pi: Tensor) -> Tensor:
    """c of a trace without its decay."""
    every = {"importance_sampling": rho, "q_lambda": torch.ones_like(rho), "tree_backup": log_pi.exp()}
    return rho.clamp(max=1) if kind == "retrace" else every[kind]


def check_told(out: TensorDictBase, td: TensorDict, kind: str, rho: Tensor, c: Tensor) -> None:
    valid, done = td["valid"].squeeze(-1), td["next", "done"].squeeze(-1)
    known = rho[valid]
    torch.testing.assert_close(out["ess"], known.sum() ** 2 / (len(known) * known.square().sum()))
    reach = trace_reach(trace=c.t(), done=done.t(), gamma=GAMMA, valid=valid.t())
    torch.testing.assert_close(out["trace_length"], reach.length)
    assert ("contraction" in out) == (kind != "q_lambda")
    if kind != "q_lambda":
        torch.testing.assert_close(out["contraction"], reach.contraction)
    assert ("c_clipped" in out) == (kind == "retrace")
    if kind == "retrace":
        torch.testing.assert_close(out["c_clipped"].double(), (known > 1).double().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["next", "root"])
@pytest.mark.parametrize("covariance", ["diagonal", "full", "joint"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_policy_and_dual_terms_equal_the_sums(covariance: str, where: str, reduction: str) -> None:
    extra = {"per_dimension": False} if covariance == "joint" else {}
    kind = "full" if covariance == "full" else "diagonal"
    bounds = {"epsilon": 0.2, "epsilon_mean": 0.03, "epsilon_cov": 0.007, "epsilon_penalty": 0.05}
    loss: Any = make(kind, critics=2, policy_states=where, reduction=reduction, **bounds, **extra)
    td = with_valid(data())
    valid = td["valid"][:, 0, 0]
    last = torch.tensor([x[2] for x in windows(td, 5)])
    ends = td["next", "terminated"].squeeze(-1).gather(1, last.unsqueeze(1))
    root = td["observation"][:, 0]
    after = torch.where(ends, root, td["next", "observation"][torch.arange(9), last])
    clean = torch.where(valid.unsqueeze(1), after, 0)  # what stands in invalid rows has no weight
    both = clean if where == "next" else torch.cat([clean, torch.where(valid.unsqueeze(1), root, 0)])
    action = samples(loss, both, 11)[:, -9:]
    states = both[-9:]
    torch.manual_seed(11)
    out = loss(td)

    value = estimate(loss, states.expand(6, -1, -1), action)
    eta, eta_cost = loss.temperature(), loss.penalty_temperature()
    cost = -(action - action.clamp(-1, 1)).norm(dim=-1)
    weights = (value / eta).softmax(0) + (cost / eta_cost).softmax(0)
    weights = weights.detach()
    online, target = policy_at(loss.policy, states), policy_at(loss.target("policy"), states)
    mixed_mean, mixed_scale, per = _mixed(online, target, action)
    kl_mean, kl_cov = per if covariance == "diagonal" else (x.sum(-1, keepdim=True) for x in per)
    fit = (weights * (mixed_mean + mixed_scale)).sum(0)
    alpha_mean, alpha_cov = loss.alpha_mean(), loss.alpha_cov()
    assert len(alpha_mean) == (DIM if covariance == "diagonal" else 1)
    penalty = (alpha_mean.detach() * kl_mean).sum(-1) + (alpha_cov.detach() * kl_cov).sum(-1)
    reduce = (lambda x: x[valid].mean()) if reduction == "mean" else (lambda x: x[valid].sum())
    torch.testing.assert_close(out["loss_policy"], reduce(penalty - fit))
    dual = eta * (0.2 + (value / eta).exp().mean(0).log()) + eta_cost * (0.05 + (cost / eta_cost).exp().mean(0).log())
    bound = (alpha_mean * (0.03 - kl_mean.detach())).sum(-1) + (alpha_cov * (0.007 - kl_cov.detach())).sum(-1)
    torch.testing.assert_close(out["loss_dual"], reduce(dual + bound))

    torch.testing.assert_close(out["kl_mean"], kl_mean.detach()[valid].mean(0).amax())
    torch.testing.assert_close(out["kl_cov"], kl_cov.detach()[valid].mean(0).amax())
    w = (value / eta).softmax(0).detach()
    torch.testing.assert_close(out["kl_improved"], (w * (6 * w).log()).sum(0)[valid].mean())
    torch.testing.assert_close(out["out_of_bounds"], (action.abs() > 1).any(-1).double().mean(0)[valid].mean())
    assert out["valid_count"] == valid.sum()
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)

    # gradients of the multipliers in closed form
    grads = torch.autograd.grad(out["loss_dual"], [loss.alpha_mean.raw, loss.temperature.raw])
    slope = (0.03 - kl_mean.detach())[valid]
    expected = (slope.mean(0) if reduction == "mean" else slope.sum(0)) * loss.alpha_mean.raw.detach().sigmoid()
    torch.testing.assert_close(grads[0], expected)
    steep = reduce(0.2 - (w * (6 * w).log()).sum(0)) * loss.temperature.raw.detach().sigmoid()
    torch.testing.assert_close(grads[1], steep)


def _mixed(online: Any, target: Any, action: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """log N(a; mu, Sigma_t), log N(a; mu_t, Sigma), and the two parts of the KL by torch's own, one column a factor."""
    if isinstance(online, D.MultivariateNormal):
        a = D.MultivariateNormal(online.loc, scale_tril=target.scale_tril.detach())
        b = D.MultivariateNormal(target.loc.detach(), scale_tril=online.scale_tril)
        kls = tuple(D.kl_divergence(target, x).unsqueeze(-1) for x in (a, b))
        return a.log_prob(action), b.log_prob(action), kls  # type: ignore[return-value]
    old, new = target.base_dist, online.base_dist
    a, b = D.Normal(new.loc, old.scale.detach()), D.Normal(old.loc.detach(), new.scale)
    kls = D.kl_divergence(old, a), D.kl_divergence(old, b)
    return a.log_prob(action).sum(-1), b.log_prob(action).sum(-1), kls  # type: ignore[return-value]


@pytest.mark.parametrize("critics", [1, 2])
def test_n_step_critic(critics: int) -> None:
    loss: Any = make(critics=critics, n=3)
    td = with_valid(data(20))
    valid = td["valid"][:, 0, 0]
    torch.manual_seed(5)
    out = loss(td)
    found = windows(td, 3)
    after = torch.stack([td["next", "observation"][i, x[2]] for i, x in enumerate(found)])
    ends = torch.tensor([x[1] == 0 for x in found]) | ~valid
    after = torch.where(ends.unsqueeze(1), td["observation"][:, 0], after)
    after = torch.where(valid.unsqueeze(1), after, 0)
    value = estimate(loss, after.expand(6, -1, -1), samples(loss, after, 5)).mean(0)
    y = torch.tensor([x[0] for x in found]) + torch.tensor([x[1] for x in found], dtype=torch.float64) * value
    q = value_at(loss.critic, td["observation"][:, 0], td["action"][:, 0].clamp(-1, 1))
    expected = 0.5 * (y.unsqueeze(-1) - q).square().sum(-1)
    torch.testing.assert_close(out["loss_critic"], expected[valid].mean())
    torch.testing.assert_close(out["target_value"], y[valid].mean())
    torch.testing.assert_close(out["q_value"], q.detach()[valid].mean())


def test_one_step_critic_of_transitions_and_of_sequences() -> None:
    loss: Any = make(target="one_step")
    td = data(12, None)
    torch.manual_seed(5)
    out = loss(td)
    ends = td["next", "terminated"]
    after = torch.where(ends, td["observation"], td["next", "observation"])
    value = estimate(loss, after.expand(6, -1, -1), samples(loss, after, 5)).mean(0)
    y = td["next", "reward"].squeeze(-1) + GAMMA * ~ends.squeeze(-1) * value
    q = value_at(loss.critic, td["observation"], td["action"].clamp(-1, 1)).squeeze(-1)
    torch.testing.assert_close(out["loss_critic"], 0.5 * (y - q).square().mean())
    torch.manual_seed(5)
    torch.testing.assert_close(loss(td.view(3, 4)), out)


def retrace_by_sums(td: TensorDict, q: Tensor, following: Tensor, c: Tensor) -> Tensor:
    """The sum form, one row and step at a time; ``q``, ``following`` and ``c`` [N, T]."""
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td.get("valid", torch.ones_like(td["next", "done"])).squeeze(-1)
    out = q.clone()
    for n in range(q.shape[0]):
        for s in range(q.shape[1]):
            weight = 1.0
            for t in range(s, q.shape[1]):
                if not valid[n, t]:
                    break
                g = 0.0 if terminated[n, t] else GAMMA
                out[n, s] += weight * (reward[n, t] + g * following[n, t] - q[n, t])
                if done[n, t] or t == q.shape[1] - 1:
                    break
                weight *= GAMMA * c[n, t + 1].item()
    return out


@pytest.mark.parametrize("where", ["next", "root"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("target", ["retrace", "importance_sampling", "q_lambda"])
def test_critic_of_a_trace_with_the_target_policys_ratios(target: str, covariance: str, where: str) -> None:
    loss: Any = make(covariance, critics=2, target=target, lmbda=0.8, policy_states=where)
    td = with_valid(data(8, 6, ends=0.2), share=0.85)
    valid = td["valid"]
    torch.manual_seed(5)
    out = loss(td)
    clean = torch.where(valid, td["observation"], 0)
    bad = td["next", "terminated"] | ~valid
    after = torch.where(bad, clean, td["next", "observation"])
    flat = after.flatten(0, 1) if where == "next" else torch.cat([after.flatten(0, 1), clean.flatten(0, 1)])
    value = estimate(loss, flat.expand(6, -1, -1), samples(loss, flat, 5))[:, :48].mean(0).view(8, 6)
    with torch.no_grad():
        pi = policy_at(loss.target("policy"), clean).log_prob(td["action"])
    rho = (pi - td["action_log_prob"]).exp()
    assert (rho[valid.squeeze(-1)] < 1).any()
    c = coefficients(target, rho, pi)
    y = retrace_by_sums(td, estimate(loss, clean, td["action"]), value, 0.8 * c)
    q = value_at(loss.critic, clean, td["action"].clamp(-1, 1))
    expected = 0.5 * (y.unsqueeze(-1) - q).square().sum(-1)[valid.squeeze(-1)].mean()
    torch.testing.assert_close(out["loss_critic"], expected)
    check_told(out, td, target, rho, 0.8 * c)


@pytest.mark.parametrize("target", ["n_step", "retrace"])
def test_categorical_critic(target: str) -> None:
    """The cross entropy with a target whose mean is the scalar one; its projection is tested with the returns."""
    loss: Any = make(critic="categorical", target=target, lmbda=0.8)
    td = data(10, 5, ends=0.2)
    td["next", "reward"] *= 0.1
    seen: list[Tensor] = []
    original = loss.estimator.estimate
    loss.estimator.estimate = lambda *args, **values: (found := original(*args, **values), seen.append(found.target))[0]
    torch.manual_seed(5)
    out = loss(td)
    (dist,) = seen
    torch.testing.assert_close(dist.sum(-1), torch.ones(len(dist), dtype=torch.float64))
    observation, action = (
        td[x][:, 0] if target == "n_step" else td[x].flatten(0, 1) for x in ("observation", "action")
    )
    logits = value_at(loss.critic, observation, action.clamp(-1, 1)).squeeze(-2)
    torch.testing.assert_close(out["loss_critic"], -(dist * logits.log_softmax(-1)).sum(-1).mean())
    bad = td["next", "terminated"]
    if target == "n_step":
        found = windows(td, 5)
        after = torch.stack(
            [(td["next", "observation"] if x[1] else td["observation"])[i, x[2]] for i, x in enumerate(found)]
        )
        after = torch.where(torch.tensor([x[1] == 0 for x in found]).unsqueeze(1), td["observation"][:, 0], after)
        value = estimate(loss, after.expand(6, -1, -1), samples(loss, after, 5)).mean(0)
        y = torch.tensor([x[0] for x in found]) + torch.tensor([x[1] for x in found], dtype=torch.float64) * value
    else:
        after = torch.where(bad, td["observation"], td["next", "observation"]).flatten(0, 1)
        value = estimate(loss, after.expand(6, -1, -1), samples(loss, after, 5)).mean(0).view(10, 5)
        with torch.no_grad():
            pi = policy_at(loss.target("policy"), td["observation"]).log_prob(td["action"])
        c = 0.8 * (pi - td["action_log_prob"]).exp().clamp(max=1)
        y = retrace_by_sums(td, estimate(loss, td["observation"], td["action"]), value, c).flatten()
    torch.testing.assert_close(dist @ loss.support, y)


def test_of_several_categorical_critics_the_one_with_the_smallest_mean_is_the_target() -> None:
    loss = make(critic="categorical", critics=3, target="one_step")
    logits = torch.randn(4, 3, ATOMS, dtype=torch.float64)
    value, dist = min_critic(logits, loss.support)
    probs = logits.softmax(-1)
    means = (probs * loss.support).sum(-1)
    torch.testing.assert_close(value, means.min(-1).values)
    for row in range(4):
        torch.testing.assert_close(dist[row], probs[row, means[row].argmin()])


# ------------------------------------------------------------------------------------------------------------ discrete
@pytest.mark.parametrize("where", ["next", "root"])
@pytest.mark.parametrize("target", ["n_step", *TRACES])
def test_discrete_mpo_by_enumeration(target: str, where: str) -> None:
    loss: Any = make("discrete", "discrete", critics=2, target=target, policy_states=where, epsilon_policy=0.02)
    td = with_valid(data(8, 5, discrete=True, ends=0.3), share=0.85)
    out = loss(td)
    valid, obs = td["valid"].squeeze(-1), torch.where(td["valid"], td["observation"], 0)
    after = torch.where(td["next", "terminated"] | ~td["valid"], obs, td["next", "observation"])
    if target == "n_step":
        found = windows(td, 5)
        ends = torch.tensor([x[1] == 0 for x in found]).unsqueeze(1)
        after = torch.stack([after[i, x[2]] for i, x in enumerate(found)])
        after = torch.where(ends, obs[:, 0], after)
    pi = policy_at(loss.target("policy"), after).probs.detach()
    value = (pi * estimate(loss, after)).sum(-1)
    if target == "n_step":
        y = torch.tensor([x[0] for x in found]) + torch.tensor([x[1] for x in found], dtype=torch.float64) * value
        valid, obs, action = valid[:, 0], obs[:, 0], td["action"][:, 0]
    else:
        action = td["action"]
        ratio = policy_at(loss.target("policy"), obs).log_prob(action).detach() - td["action_log_prob"]
        chosen = estimate(loss, obs).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        log_pi = policy_at(loss.target("policy"), obs).log_prob(action).detach()
        c = 0.95 * coefficients(target, ratio.exp(), log_pi)
        y = retrace_by_sums(td, chosen, value, c)
        check_told(out, td, target, ratio.exp(), c)
    index = action[..., None, None].expand(*action.shape, 2, 1)
    q = value_at(loss.critic, obs).gather(-1, index).squeeze(-1)
    torch.testing.assert_close(out["loss_critic"], 0.5 * (y.unsqueeze(-1) - q).square().sum(-1)[valid].mean())

    states = after if where == "next" else obs
    eta, alpha = loss.temperature(), loss.alpha()
    policy, old = policy_at(loss.policy, states), policy_at(loss.target("policy"), states)
    old = D.Categorical(logits=old.logits.detach())
    values = estimate(loss, states)
    raw = old.probs * (values / eta).exp()
    best = (raw / raw.sum(-1, keepdim=True)).detach()
    kl = D.kl_divergence(old, policy)
    loss_policy = -(best * policy.logits).sum(-1) + alpha.detach() * kl
    torch.testing.assert_close(out["loss_policy"], loss_policy[valid].mean())
    dual = eta * (0.1 + raw.sum(-1).log()) + alpha * (0.02 - kl.detach())
    torch.testing.assert_close(out["loss_dual"], dual[valid].mean())
    (slope,) = torch.autograd.grad(out["loss_dual"], loss.temperature.raw)
    expected = 0.1 - (best * (best / old.probs).log()).sum(-1)[valid].mean()
    torch.testing.assert_close(slope, expected * loss.temperature.raw.detach().sigmoid())


# --------------------------------------------------------------------------------------------------------- all of them
KINDS = [("diagonal", "scalar"), ("full", "scalar"), ("diagonal", "categorical"), ("discrete", "discrete")]


@pytest.mark.parametrize("target", ["one_step", "n_step", "retrace"])
@pytest.mark.parametrize(("policy", "critic"), KINDS)
def test_each_term_reaches_its_own_parameters_only(policy: str, critic: str, target: str) -> None:
    loss = make(policy, critic, target=target)
    out = loss(data(discrete=policy == "discrete"))
    assert set(loss.out_keys) == set(out.keys())
    groups = loss.param_groups()
    everything = [p for group in groups.values() for p in group]
    assert {id(p) for p in everything} == {id(p) for p in loss.parameters()}
    for name, own in zip(LOSSES, ("actor", "duals", "critic"), strict=True):
        grads = torch.autograd.grad(out[name], everything, retain_graph=True, allow_unused=True)
        reached = {id(p) for p, g in zip(everything, grads, strict=True) if g is not None and g.any()}
        assert reached == {id(p) for p in groups[own]}, name


@pytest.mark.parametrize("target", ["one_step", "n_step", "retrace", "importance_sampling", "q_lambda"])
@pytest.mark.parametrize(("policy", "critic"), KINDS)
def test_nan_in_entries_that_must_not_be_read_reaches_nothing(policy: str, critic: str, target: str) -> None:
    loss = make(policy, critic, target=target)
    td = with_valid(data(discrete=policy == "discrete"))
    hidden = td.clone()
    invalid, terminated = ~td["valid"], td["next", "terminated"]
    for key in ("observation", "action", "action_log_prob"):
        if td[key].is_floating_point():
            mask = invalid if td[key].ndim == 3 else invalid.squeeze(-1)
            hidden[key] = td[key].masked_fill(mask, math.nan)
    hidden["next", "reward"] = td["next", "reward"].masked_fill(invalid, math.nan)
    hidden["next", "observation"] = td["next", "observation"].masked_fill(invalid | terminated, math.nan)
    results = []
    for batch in (td, hidden):
        torch.manual_seed(2)
        loss.zero_grad()
        out = loss(batch)
        total(out).backward()
        results.append([out, [p.grad.clone() for p in loss.parameters() if p.grad is not None]])
    assert all(x.isfinite().all() for x in results[0][1])
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize(("policy", "critic"), KINDS)
def test_sum_is_count_times_mean(policy: str, critic: str) -> None:
    td = with_valid(data(discrete=policy == "discrete"))
    outs = []
    for reduction in ("mean", "sum"):
        loss = make(policy, critic, reduction=reduction)
        torch.manual_seed(2)
        outs.append(loss(td))
    for name in LOSSES:
        torch.testing.assert_close(outs[1][name], outs[0]["valid_count"] * outs[0][name])
    nothing = make(policy, critic)(td.clone().update({"valid": torch.zeros_like(td["valid"])}))
    assert all(nothing[name] == 0 for name in LOSSES)


@pytest.mark.parametrize(("policy", "critic"), KINDS)
def test_hard_update_copies_both_networks(policy: str, critic: str) -> None:
    loss = make(policy, critic)
    td = data(discrete=policy == "discrete")
    updater = FastHardUpdate(loss)
    for parameter in [*loss.policy_params.parameters(), *loss.critic_params.parameters()]:
        parameter.data += 0.5
    torch.manual_seed(1)
    stale = loss(td)
    assert stale["kl_policy" if policy == "discrete" else "kl_mean"] > 0
    updater.step()
    for name in ("policy_params", "critic_params"):
        for key, value in getattr(loss, name).items(True, True):
            assert torch.equal(value, getattr(loss, f"target_{name}").get(key))
    torch.manual_seed(1)
    fresh = loss(td)
    assert abs(fresh["kl_policy" if policy == "discrete" else "kl_mean"]) < 1e-12
    assert fresh["loss_critic"] != stale["loss_critic"]


@pytest.mark.parametrize(("policy", "critic"), KINDS)
def test_state_dict_round_trip_is_strict(policy: str, critic: str) -> None:
    first, second = make(policy, critic), make(policy, critic, seed=9)
    td = data(discrete=policy == "discrete")
    second.load_state_dict(first.state_dict(), strict=True)
    outs = []
    for loss in (first, second):
        torch.manual_seed(1)
        outs.append(loss(td))
    torch.testing.assert_close(outs[0], outs[1])


def test_set_keys_and_the_masks_of_torchrl() -> None:
    loss = make()
    td = with_valid(data())
    renamed = td.clone()
    for new, old in (("a", "action"), ("ok", "valid")):
        renamed.rename_key_(old, new)
    renamed["next"].rename_key_("reward", "gain")
    torch.manual_seed(1)
    expected = loss(td)
    loss.set_keys(action="a", valid="ok", reward="gain")
    assert ("next", "gain") in loss.in_keys
    assert "a" in loss.in_keys
    torch.manual_seed(1)
    torch.testing.assert_close(loss(renamed), expected)
    loss.set_keys(action=None, valid=None, reward=None)
    masked = td.clone()
    masked["collector", "mask"] = masked.pop("valid")
    torch.manual_seed(1)
    torch.testing.assert_close(loss(masked), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_dimension": True, "covariance": "full"}, "not a sum over dimensions"),
        ({"per_dimension": True, "action_dim": None}, "needs action_dim"),
        ({"covariance": "spherical"}, "covariance must be one of"),
        ({"estimator": "td"}, "there is no estimator 'td'"),
        ({"policy_states": "all"}, "policy_states must be 'next' or 'root'"),
        ({"reduction": "none"}, "reduction must be"),
        ({"epsilon_mean": 0.0}, "epsilon_mean must be positive"),
        ({"num_samples": 0}, "num_samples must be an int of 1 or more"),
        ({"estimator": "n_step(n=0)"}, "n must be 1 or more"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"action_bounds": (1.0, -1.0)}, "low < high"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    kind = "full" if arguments.get("covariance") == "full" else "diagonal"
    with pytest.raises(ValueError, match=message):
        MPOLoss(make_policy(kind), make_critic(), **{"action_dim": DIM, **arguments})


@pytest.mark.parametrize("kind", [TanhNormal, torchrl.modules.TanhNormal, torchrl.modules.TruncatedNormal])
def test_policies_that_are_no_normals_are_refused(kind: type) -> None:
    """Their parameters are named as a normal's, and their densities are others."""
    policy = make_policy()
    policy[-1].distribution_class = kind
    with pytest.raises(ValueError, match="needs an unsquashed Gaussian policy"):
        MPOLoss(policy, make_critic(), action_dim=DIM)


def test_the_multiplier_of_the_covariance_starts_where_its_bound_holds_it() -> None:
    """A bound a hundred times as wide needs a smaller one: Adam moves it by hundredths in an update."""
    assert MPOLoss(make_policy(), make_critic(), action_dim=DIM).alpha_cov.raw.tolist() == [1000.0] * DIM
    joint: Any = [MPOLoss(make_policy("full"), make_critic(), covariance="full")]
    joint.append(MPOLoss(make_policy(), make_critic(), per_dimension=False))
    assert all(loss.alpha_cov.raw.tolist() == [10.0] for loss in joint)
    assert MPOLoss(make_policy("full"), make_critic(), covariance="full", raw_alpha_cov=3.0).alpha_cov.raw.item() == 3


def test_the_actions_dimensions_are_those_of_the_policy() -> None:
    shapes: Any = {"network": "mlp", "observation_shape": [3], "action_dim": DIM}
    loss = MPOLoss(build_policy(head="gaussian", critic=None, **shapes), build_critic(**shapes))
    assert loss.alpha_mean.raw.shape == (DIM,)
    with pytest.raises(ValueError, match=f"action_dim is 7, and the policy's actions have {DIM} dimensions"):
        MPOLoss(build_policy(head="gaussian", critic=None, **shapes), build_critic(**shapes), action_dim=7)


def test_networks_and_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="use DiscreteMPOLoss"):
        MPOLoss(make_policy("discrete"), make_critic(), action_dim=DIM)
    with pytest.raises(ValueError, match="use MPOLoss"):
        DiscreteMPOLoss(make_policy(), make_critic("discrete"))
    with pytest.raises(ValueError, match="scale_tril"):
        MPOLoss(make_policy(), make_critic(), covariance="full")
    with pytest.raises(ValueError, match="critic that writes"):
        MPOLoss(make_policy(), make_critic("discrete"), action_dim=DIM)
    with pytest.raises(ValueError, match="critic that writes"):
        DiscreteMPOLoss(make_policy("discrete"), make_critic())
    with pytest.raises(ValueError, match="a density is no probability; use 'retrace'"):
        make(target="tree_backup")
    with pytest.raises(ValueError, match=r"needs sequences \[N, T\]"):
        make(target="retrace")(data(4, None))
    with pytest.raises(ValueError, match="needs sequences of 7 steps, got 5"):
        make(n=7)(data())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "critic", "target"),
    [
        ("diagonal", "scalar", "n_step"),
        ("full", "scalar", "retrace"),
        ("diagonal", "categorical", "n_step"),
        ("discrete", "discrete", "n_step"),
    ],
)
def test_compiled_equals_eager(policy: str, critic: str, target: str) -> None:
    td = with_valid(data(discrete=policy == "discrete"))
    torch._dynamo.reset()  # the code is shared by all losses, and counts as recompiled for each
    results = []
    for compiled in (False, True):
        loss = make(policy, critic, target=target)
        call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        torch.manual_seed(2)
        out = call(td)
        total(out).backward()
        results.append((out, [p.grad for p in loss.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
