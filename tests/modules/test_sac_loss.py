"""The SAC losses against their formulas, computed step by step in float64."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.common import LossModule

from offtrace.modules.losses import DiscreteSACLoss, FastSoftUpdate, SACLoss, SACv1Loss, compile_loss
from offtrace.modules.losses.base import Loss
from offtrace.modules.networks import Policy, build_critic, build_policy, build_value, share_normalizer
from offtrace.modules.returns import trace_reach

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
FEATURES, ACTIONS = 4, 2
GAMMA, LMBDA, ALPHA, KAPPA = 0.9, 0.8, 0.3, 1.7
TRACES = ("retrace", "importance_sampling", "tree_backup", "q_lambda")
TARGETS = ("one_step", "n_step", *TRACES)


def spec(target: str, lmbda: float = LMBDA) -> str:
    """The estimator that the formulas call ``target``, with windows of 3 steps."""
    return {"one_step": "one_step", "n_step": "n_step(n=3)"}.get(target, f"{target}(lmbda={lmbda})")


def networks(*, discrete: bool = False, critics: int = 2, kind: str = "tanh", normalize: bool = False) -> Any:
    torch.manual_seed(0)
    actions = {"num_actions": 3} if discrete else {"action_dim": ACTIONS}
    common: dict[str, Any] = {"observation_shape": [FEATURES], "hidden": [8], "normalize": normalize}
    head = "categorical" if discrete else kind
    actor = build_policy(head=head, critic=None, activation="relu", network="mlp", **actions, **common)
    critic = build_critic(network="layernorm_mlp", critics=critics, **actions, **common)
    for parameter in (*actor.parameters(), *critic.parameters()):  # fresh ones give values near zero
        parameter.data += 0.5 * torch.randn_like(parameter)
    return actor.double(), critic.double()


def sac(target: str = "one_step", *, critics: int = 2, kind: str = "tanh", **kwargs: Any) -> SACLoss:
    options = {"estimator": spec(target), "gamma": GAMMA, "alpha_init": ALPHA, "reward_scale": KAPPA, **kwargs}
    return apart(SACLoss(*networks(critics=critics, kind=kind), **options))


def discrete(target: str = "one_step", **kwargs: Any) -> DiscreteSACLoss:
    options = {"estimator": spec(target), "gamma": GAMMA, "alpha_init": ALPHA, "reward_scale": KAPPA, **kwargs}
    return apart(DiscreteSACLoss(*networks(discrete=True), **options))


def v1(target: str = "one_step", **kwargs: Any) -> SACv1Loss:
    actor, critic = networks()
    value = build_value(network="mlp", observation_shape=[FEATURES], hidden=[8]).double()
    return apart(SACv1Loss(actor, critic, value, estimator=spec(target), gamma=GAMMA, **kwargs))


def apart(loss: Any) -> Any:
    """In float64, with targets that differ from what they follow."""
    loss.double()
    if "log_alpha" in dict(loss.named_parameters()):
        loss.log_alpha.data.fill_(math.log(ALPHA))  # what came from float32 lacks digits
    torch.manual_seed(5)
    for name, buffer in loss.named_buffers():
        if name.startswith("target_") and "normalizer" not in name:
            buffer.add_(0.3 * torch.randn_like(buffer))
    return loss


def replay(*batch: int, kinds: int | None = None, ends: float = 0.3, valid: bool = False) -> TensorDict:
    """Random data; behaviour log-probabilities on both sides of the policy's. NaN where nothing may be read."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    terminated = torch.rand(*batch, 1, generator=g) < ends / 2
    truncated = torch.rand(*batch, 1, generator=g) < ends / 2
    pre_tanh = normal(ACTIONS)
    td = TensorDict(
        {
            "observation": normal(FEATURES),
            "action": torch.randint(kinds, batch, generator=g) if kinds else pre_tanh.tanh(),
            "pre_tanh": pre_tanh,
            "action_log_prob": -2 + normal(),
            "next": {
                "observation": normal(FEATURES).masked_fill(terminated, math.nan),
                "reward": normal(1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch,
    )
    if valid:
        td["valid"] = torch.rand(*batch, 1, generator=g) > 0.3
        for key, x in list(td.items(True, True)):
            if x.is_floating_point():
                mask = td["valid"].view(*batch, *(1,) * (x.ndim - len(batch)))
                td[key] = x.masked_fill(~mask, math.nan)
    return td


def single(td: TensorDictBase) -> TensorDictBase:
    """Floats in float32."""
    return td.apply(lambda x: x.float() if x.is_floating_point() else x)


def coefficient(kind: str, rho: float, pi: float) -> float:
    """c of the trace."""
    return LMBDA * {"retrace": min(1.0, rho), "importance_sampling": rho, "q_lambda": 1.0, "tree_backup": pi}[kind]


def targets(loss: Loss, td: TensorDictBase, following: Tensor, values: Tensor, log_prob: Tensor, kind: str) -> Tensor:
    """y of every step [N, T] by sums over steps, one by one; ``values`` and ``log_prob`` of the batch's actions."""
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones_like(done)
    y, kappa = torch.zeros_like(reward), loss.reward_scale

    def bootstrap(n: int, t: int) -> float:
        return 0.0 if terminated[n, t] else GAMMA * float(following[n, t])

    for n in range(len(reward)):
        steps = reward.shape[1]
        for s in range(steps):
            if not valid[n, s]:
                continue
            if kind == "one_step":
                y[n, s] = kappa * reward[n, s] + bootstrap(n, s)
            elif kind == "n_step":
                t, factor = s, 1.0
                while True:
                    y[n, s] += factor * kappa * reward[n, t]
                    if t - s + 1 == 3 or done[n, t] or t + 1 == steps or not valid[n, t + 1]:
                        y[n, s] += factor * bootstrap(n, t)
                        break
                    t, factor = t + 1, factor * GAMMA
            else:
                y[n, s], weight = values[n, s], 1.0
                for t in range(s, steps):
                    if not valid[n, t]:
                        break
                    if t > s:
                        rho = math.exp(log_prob[n, t] - td["action_log_prob"][n, t])
                        weight *= GAMMA * coefficient(kind, rho, math.exp(log_prob[n, t]))
                    y[n, s] += weight * (kappa * reward[n, t] + bootstrap(n, t) - values[n, t])
                    if done[n, t]:
                        break
    return y


def parts(td: TensorDictBase, n_step: bool) -> Any:
    """Rows [M] that are learnt from, and their mask."""
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones(td.batch_size).bool()
    return (lambda x: x[:, 0], valid[:, 0]) if n_step else (lambda x: x.flatten(0, 1), valid.flatten())


def q_of(critic: Any, observation: Tensor, action: Tensor) -> Tensor:
    batch = observation.shape[:-1]
    return critic(TensorDict({"observation": observation, "action": action}, batch))["state_action_value"]


def gaussian(actor: Policy, observation: Tensor) -> tuple[Tensor, Tensor]:
    found = actor.get_dist_params(TensorDict({"observation": observation}, observation.shape[:-1]))
    return found["loc"], found["scale"]


def log_density(loc: Tensor, scale: Tensor, u: Tensor, tanh: bool) -> Tensor:
    normal = -0.5 * ((u - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
    return (normal + 2 * u.cosh().log() * tanh).sum(-1)  # 1 - tanh^2 = 1 / cosh^2


def noises(rows: int, samples: int = 1) -> tuple[Tensor, Tensor]:
    """What the loss draws after ``torch.manual_seed(7)``: at the successors, then at the states."""
    torch.manual_seed(7)
    first = torch.randn(samples, rows, ACTIONS, dtype=torch.float64)
    return first, torch.randn(rows, ACTIONS, dtype=torch.float64)


def policies(td: TensorDictBase) -> Any:
    return td["observation"].nan_to_num(), td["next", "observation"].nan_to_num()


@pytest.mark.parametrize("target", ["one_step", "n_step", "retrace", "importance_sampling", "q_lambda"])
@pytest.mark.parametrize(
    ("reduction", "critics", "valid", "alpha_loss", "kind", "samples"),
    [
        ("mean", 2, False, "alpha", "tanh", 1),
        ("sum", 3, True, "log_alpha", "tanh", 1),
        ("mean", 1, True, "alpha", "gaussian", 1),
        ("mean", 2, True, "alpha", "tanh", 4),
    ],
)
def test_terms_equal_the_formulas(
    target: str, reduction: str, critics: int, valid: bool, alpha_loss: str, kind: str, samples: int
) -> None:
    options = {"critics": critics, "kind": kind, "reduction": reduction, "alpha_loss": alpha_loss}
    loss, td = sac(target, num_samples=samples, **options), replay(6, 5, valid=valid)
    if kind == "gaussian":
        td["action"] = 2 * td["pre_tanh"]
    select, mask = parts(td, target == "n_step")
    (x, after), tanh = policies(td), kind == "tanh"
    # the windows need V only where they end, so noise belongs to rows: here one window end in each row
    if target == "n_step":
        ends = last_of_window(td)
        noise_after, noise = noises(6, samples)
        noise_after = noise_after.unsqueeze(2).expand(samples, 6, 5, ACTIONS)
        assert len(set(ends)) > 1
    else:
        noise_after, noise = noises(30, samples)
        noise_after = noise_after.unflatten(1, (6, 5))
    torch.manual_seed(7)
    out = loss(td)
    with torch.no_grad():
        loc, scale = gaussian(loss.actor, after)
        u = loc + scale * noise_after
        action = u.tanh() if tanh else u
        bootstrap = q_of(loss.target("critic"), after.expand(*u.shape[:-1], FEATURES), action).min(-1).values
        following = (bootstrap - ALPHA * log_density(loc, scale, u, tanh)).mean(0)
        stored = td["pre_tanh"].nan_to_num() if tanh else td["action"].nan_to_num()
        log_prob = log_density(*gaussian(loss.actor, x), stored, tanh)
        values = q_of(loss.target("critic"), x, td["action"].nan_to_num())
        y = targets(loss, td, following, values.min(-1).values, log_prob, target)
    q = q_of(loss.critic, x, td["action"].nan_to_num())
    count = int(mask.sum())

    def reduce(step: Tensor) -> Tensor:
        return step[mask].sum() / (count if reduction == "mean" else 1)

    error = select(q - y.unsqueeze(-1))
    torch.testing.assert_close(out["loss_critic"], reduce(0.5 * error.square().sum(-1)))
    loc, scale = gaussian(loss.actor, select(x))
    u = loc + scale * noise
    fresh, best = log_density(loc, scale, u, tanh), q_of(loss.critic, select(x), u.tanh() if tanh else u).min(-1).values
    torch.testing.assert_close(out["loss_actor"], reduce(ALPHA * fresh - best))
    factor = ALPHA if alpha_loss == "alpha" else math.log(ALPHA)
    torch.testing.assert_close(out["loss_alpha"], reduce(-factor * (fresh - ACTIONS)))
    torch.testing.assert_close(out["entropy"], -fresh[mask].mean())
    torch.testing.assert_close(out["alpha"], torch.tensor(ALPHA).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out["q_value"], select(q)[mask].mean())
    torch.testing.assert_close(out["td_error"], error[mask].abs().mean())
    assert out["valid_count"] == count
    if target in TRACES:
        check_told(out, td, target, log_prob)
    assert set(out.keys()) == set(loss.out_keys)
    assert not any(x.requires_grad for name, x in out.items() if not name.startswith("loss_"))


def check_told(out: TensorDictBase, td: TensorDictBase, kind: str, log_prob: Tensor) -> None:
    """Diagnostics of a trace, from log pi of the batch's actions [N, T]."""
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones(td.batch_size).bool()
    pi = log_prob.detach().exp()
    rho = pi / td["action_log_prob"].exp()
    known = rho[valid]
    assert (known > 1).any()
    assert (known < 1).any()
    torch.testing.assert_close(out["ess"], known.sum() ** 2 / (len(known) * known.square().sum()))
    assert ("c_clipped" in out) == (kind == "retrace")
    if kind == "retrace":
        torch.testing.assert_close(out["c_clipped"].double(), (known > 1).double().mean(), rtol=1e-5, atol=0)
    pairs = zip(rho.flatten().tolist(), pi.flatten().tolist(), strict=True)
    c = torch.tensor([coefficient(kind, *pair) for pair in pairs], dtype=torch.float64)
    c, done = c.view(rho.shape).t(), td["next", "done"].squeeze(-1).t()
    reach = trace_reach(trace=c, done=done, gamma=GAMMA, valid=valid.t())
    torch.testing.assert_close(out["trace_length"], reach.length)
    assert ("contraction" in out) == (kind != "q_lambda")
    if kind != "q_lambda":
        torch.testing.assert_close(out["contraction"], reach.contraction)


def last_of_window(td: TensorDictBase) -> list[int]:
    done = td["next", "done"].squeeze(-1)
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones_like(done)
    found = []
    for n in range(len(done)):
        t = 0
        while t < 2 and not done[n, t] and valid[n, t + 1]:
            t += 1
        found.append(t)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("valid", [False, True])
def test_discrete_terms_are_exact_expectations(target: str, valid: bool) -> None:
    loss, td = discrete(target), replay(6, 5, kinds=3, valid=valid)
    (x, after), (select, mask) = policies(td), parts(td, target == "n_step")
    out = loss(td)

    def both(network: Any, observation: Tensor) -> tuple[Tensor, Tensor]:
        inputs = TensorDict({"observation": observation}, observation.shape[:-1])
        logits = loss.actor.get_dist_params(inputs.clone())["logits"]
        return logits.softmax(-1), network(inputs.clone())["action_value"]

    with torch.no_grad():
        pi, values = both(loss.target("critic"), after)
        following = (pi * (values.min(-2).values - ALPHA * pi.log())).sum(-1)
        pi, values = both(loss.target("critic"), x)
        index = td["action"].unsqueeze(-1)
        chosen = values.min(-2).values  # of each action, then that of the batch's: for one action both orders agree
        y = targets(
            loss, td, following, chosen.gather(-1, index).squeeze(-1), pi.gather(-1, index).squeeze(-1).log(), target
        )
    pi, values = both(loss.critic, x)
    q = torch.stack([values[..., i, :].gather(-1, index).squeeze(-1) for i in range(2)], -1)
    torch.testing.assert_close(out["loss_critic"], select(0.5 * (q - y.unsqueeze(-1)).square().sum(-1))[mask].mean())
    actor = (pi * (ALPHA * pi.log() - values.min(-2).values)).sum(-1)
    torch.testing.assert_close(out["loss_actor"], select(actor)[mask].mean())
    entropy = -(pi * pi.log()).sum(-1)
    torch.testing.assert_close(out["loss_alpha"], select(ALPHA * (entropy - 0.98 * math.log(3)))[mask].mean())
    torch.testing.assert_close(out["entropy"], select(entropy)[mask].mean())
    assert set(out.keys()) == set(loss.out_keys)
    if target in TRACES:
        check_told(out, td, target, pi.gather(-1, index).squeeze(-1).log())


@pytest.mark.parametrize("target", ["one_step", "n_step"])
@pytest.mark.parametrize("which", ["first", "min"])
def test_v1_terms_equal_the_formulas(target: str, which: str) -> None:
    loss, td = v1(target, actor_value=which, reward_scale=KAPPA), replay(6, 5, valid=True)
    (x, after), (select, mask) = policies(td), parts(td, target == "n_step")
    torch.manual_seed(7)
    noise = torch.randn(int(mask.numel()), ACTIONS, dtype=torch.float64)
    torch.manual_seed(7)
    out = loss(td)

    def value(network: Any, observation: Tensor) -> Tensor:
        return network(TensorDict({"observation": observation}, observation.shape[:-1]))["state_value"].squeeze(-1)

    with torch.no_grad():
        y = targets(loss, td, value(loss.target("value"), after), x.sum(-1), x.sum(-1), target)
    q = q_of(loss.critic, x, td["action"].nan_to_num())
    torch.testing.assert_close(out["loss_critic"], select(0.5 * (q - y.unsqueeze(-1)).square().sum(-1))[mask].mean())
    loc, scale = gaussian(loss.actor, select(x))
    u = loc + scale * noise
    log_prob, found = log_density(loc, scale, u, True), q_of(loss.critic, select(x), u.tanh())
    best = found[:, 0] if which == "first" else found.min(-1).values
    torch.testing.assert_close(out["loss_actor"], (log_prob - best)[mask].mean())
    error = value(loss.value, select(x)) - (found.min(-1).values - log_prob)
    torch.testing.assert_close(out["loss_value"], 0.5 * error[mask].square().mean())
    assert "loss_alpha" not in out
    reach = {"loss_value": {"value"}, "loss_critic": {"critic"}, "loss_actor": {"actor"}}
    assert {name: reached(loss, out[name]) for name in reach} == reach


def reached(loss: Loss, term: Tensor) -> set[str]:
    """Groups in which some parameter gets a gradient other than zero from ``term``."""
    found = set()
    for name, parameters in loss.param_groups().items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        if any(g is not None and g.any() for g in gradients):
            found.add(name)
    return found


@pytest.mark.parametrize("target", ["one_step", "n_step", "retrace"])
@pytest.mark.parametrize("make", [sac, discrete])
def test_which_parameters_a_term_reaches(make: Any, target: str) -> None:
    loss, td = make(target), replay(6, 5, kinds=3 if make is discrete else None)
    out = loss(td)
    reach = {"loss_critic": {"critic"}, "loss_actor": {"actor"}, "loss_alpha": {"alpha"}}
    assert {name: reached(loss, out[name]) for name in reach} == reach
    parameters = {id(p) for group in loss.param_groups().values() for p in group}
    assert parameters == {id(p) for p in loss.parameters()}
    sum(out[name] for name in reach).backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert not any(b.requires_grad for b in loss.buffers())


@pytest.mark.parametrize("alpha_loss", ["alpha", "log_alpha"])
@pytest.mark.parametrize("make", [sac, discrete])
def test_gradient_of_the_temperature_in_closed_form(make: Any, alpha_loss: str) -> None:
    """d/d(log alpha) = (entropy - target) times alpha, or times 1."""
    loss = make(alpha_loss=alpha_loss, target_entropy=-0.7)
    out = loss(replay(20, kinds=3 if make is discrete else None))
    (found,) = torch.autograd.grad(out["loss_alpha"], [loss.log_alpha])
    torch.testing.assert_close(
        found, (out["entropy"] + 0.7) * (ALPHA if alpha_loss == "alpha" else 1.0), rtol=1e-6, atol=0
    )


def test_fixed_temperature_does_not_learn() -> None:
    for alpha in (0.0, 0.2):
        loss = sac(fixed_alpha=alpha)
        out = loss(replay(20))
        assert "loss_alpha" not in out
        assert set(loss.param_groups()) == {"actor", "critic"}
        assert out["alpha"] == pytest.approx(alpha)
        assert out["loss_actor"].isfinite()


@pytest.mark.parametrize("target", ["one_step", "n_step", "retrace", "importance_sampling", "q_lambda"])
@pytest.mark.parametrize("make", [sac, discrete])
def test_what_is_not_valid_reaches_nothing(make: Any, target: str) -> None:
    loss = make(target)
    kinds = 3 if make is discrete else None
    poisoned = replay(6, 5, kinds=kinds, valid=True)
    clean = poisoned.apply(lambda x: x.nan_to_num(123.0) if x.is_floating_point() else x)
    results = []
    for td in (poisoned, clean):
        loss.zero_grad()
        torch.manual_seed(3)
        out = loss(td)
        sum(x for name, x in out.items() if name.startswith("loss_")).backward()
        results.append([*(out[name].detach() for name in loss.out_keys), *(p.grad.clone() for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    poisoned["valid"].fill_(False)
    out = loss(poisoned)
    assert all(not out[name].any() for name in loss.out_keys if name.startswith("loss_"))


@pytest.mark.parametrize("target", ["n_step", "retrace"])
def test_nothing_comes_back_across_an_end(target: str) -> None:
    """What the two steps of an episode learn is the same whatever stands behind its end, and not so without the end."""
    for end in (True, False):
        loss, td = sac(target), replay(4, 5, ends=0)
        td["next", "done"][:, 1] = td["next", "truncated"][:, 1] = end
        other = td.clone()
        for key in (("next", "reward"), "observation", "action", "pre_tanh", ("next", "observation")):
            other[key][:, 2:] += 0.5
        found, inner = [], loss.estimator.estimate

        def watched(*args: Any, inner: Any = inner, found: list[Tensor] = found, **kwargs: Any) -> Any:
            estimate = inner(*args, **kwargs)
            found.append(estimate.target)
            return estimate

        loss.estimator.estimate = watched
        for batch in (td, other):
            torch.manual_seed(3)
            loss(batch)
        if target == "retrace":
            found = [x.view(4, 5)[:, :2] for x in found]
        assert torch.equal(*found) == end


def test_a_time_limit_bootstraps_and_a_termination_does_not() -> None:
    loss, td = sac(), replay(20, ends=0)
    results = {}
    for name in ("neither", "truncated", "terminated"):
        batch = td.clone()
        if name != "neither":
            batch["next", name].fill_(True)
            batch["next", "done"].fill_(True)
        torch.manual_seed(3)
        results[name] = loss(batch)["loss_critic"]
    assert torch.equal(results["neither"], results["truncated"])
    q = q_of(loss.critic, td["observation"], td["action"])
    torch.testing.assert_close(results["terminated"], 0.5 * (q - KAPPA * td["next", "reward"]).square().sum(-1).mean())


def test_retrace_without_traces_is_one_step() -> None:
    td, found = replay(6, 5), []
    for loss in (sac("one_step"), sac(estimator=spec("retrace", 0.0))):
        torch.manual_seed(3)
        found.append(loss(td)["loss_critic"])
    torch.testing.assert_close(*found)


def test_saturated_actions_give_finite_ratios() -> None:
    loss, td = sac("retrace").float(), single(replay(6, 5))
    td["pre_tanh"] = td["pre_tanh"] * 20
    td["action"] = td["pre_tanh"].tanh()
    assert (td["action"].abs() == 1).any()
    with torch.no_grad():
        dist = loss.actor.get_dist(td)
        td["action_log_prob"] = dist.log_prob_pre_tanh(td["pre_tanh"])  # type: ignore[attr-defined]
    out = loss(td)
    assert out["ess"] == pytest.approx(1, abs=1e-3)  # on-policy: every ratio is one


@pytest.mark.parametrize("updater_class", [SoftUpdate, FastSoftUpdate])
@pytest.mark.parametrize("make", [sac, discrete, v1])
def test_targets_follow_and_share_nothing_else(make: Any, updater_class: Any) -> None:
    loss, td = make(), replay(8, kinds=3 if make is discrete else None)
    updater = updater_class(loss, tau=0.25)
    loss.float().double()  # tensors are replaced, the updater follows
    name = "value" if make is v1 else "critic"
    network, follower = getattr(loss, name), loss.target(name)
    before = [p.clone() for p in network.parameters()]
    for parameter in network.parameters():
        parameter.data += 1
    loss(td)
    updater.step()
    followers = dict(follower.named_buffers())
    for (path, parameter), old in zip(network.named_parameters(), before, strict=True):
        torch.testing.assert_close(followers[path], 0.75 * old + 0.25 * parameter.detach())
    HardUpdate(loss, value_network_update_interval=1)
    for path, parameter in network.named_parameters():
        assert torch.equal(followers[path], parameter)


def test_normaliser_is_one_for_policy_critic_and_target() -> None:
    actor, critic = networks(normalize=True)
    share_normalizer(actor.network, critic)
    loss = SACLoss(actor, critic)
    updater = SoftUpdate(loss, tau=0.1)
    loss = loss.double()
    actor.network.normalizer.update(3 + 2 * torch.randn(50, FEATURES))
    updater.step()
    for module in (loss.critic, loss.target("critic"), loss.frozen("critic")):
        assert torch.equal(module.normalizer.shift, actor.network.normalizer.shift)  # type: ignore[attr-defined]
        assert module.normalizer.count == 50  # type: ignore[attr-defined]
    state = {name: x.clone() for name, x in loss.state_dict().items()}
    other = SACLoss(*networks(normalize=True)).double()
    other.load_state_dict(state)
    assert other.target("critic").normalizer.count == 50  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [sac, discrete, v1])
def test_state_dict_round_trip_is_strict_and_copies_stand_alone(make: Any) -> None:
    loss, td = make(), replay(8, kinds=3 if make is discrete else None)
    for parameter in loss.parameters():
        parameter.data += 0.1
    fresh = make()
    fresh.load_state_dict(loss.state_dict(), strict=True)
    copied = copy.deepcopy(loss)
    outputs = []
    for one in (loss, fresh, copied):
        torch.manual_seed(3)
        outputs.append(one(td))
    for other in outputs[1:]:
        assert all(torch.equal(outputs[0][name], other[name]) for name in loss.out_keys)
    copied.zero_grad()
    sum(x for name, x in outputs[2].items() if name.startswith("loss_")).backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in loss.parameters())


def test_views_follow_a_change_of_dtype_and_an_optimiser() -> None:
    loss = sac().float()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    td = single(replay(8))
    sum(x for name, x in loss(td).items() if name.startswith("loss_")).backward()
    optimizer.step()
    for name, parameter in loss.critic.named_parameters():
        frozen = loss.frozen("critic").get_buffer(name)  # type: ignore[attr-defined]
        assert frozen.dtype == torch.float32
        assert torch.equal(frozen, parameter)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (sac, "one_step"),
        pytest.param(sac, "n_step", marks=pytest.mark.slow),
        pytest.param(sac, "retrace", marks=pytest.mark.slow),
        pytest.param(discrete, "one_step", marks=pytest.mark.slow),
        pytest.param(discrete, "retrace", marks=pytest.mark.slow),
        pytest.param(discrete, "tree_backup", marks=pytest.mark.slow),
        pytest.param(v1, "one_step", marks=pytest.mark.slow),
        pytest.param(v1, "n_step", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(make: Any, target: str) -> None:
    loss, td = make(target), replay(6, 5, kinds=3 if make is discrete else None)
    torch._dynamo.reset()  # the code is shared by all losses, and counts as recompiled for each
    _check_same(loss, torch.compile(loss, backend="aot_eager", fullgraph=True), td)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="inductor of torch 2.11 draws others")
def test_inductor_draws_what_eager_draws() -> None:
    loss, td = sac("one_step"), replay(6)
    torch._dynamo.reset()
    _check_same(loss, compile_loss(loss), td)


def _check_same(loss: LossModule, compiled: Any, td: TensorDict) -> None:
    results = []
    for function in (loss, compiled):
        loss.zero_grad()
        torch.manual_seed(3)
        out = function(td)
        sum(x for name, x in out.items() if name.startswith("loss_")).backward()
        results.append([*(out[name].detach() for name in loss.out_keys), *(p.grad.clone() for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_and_masks() -> None:
    loss, td = sac("retrace"), replay(6, 5)
    torch.manual_seed(3)
    wanted = loss(td)
    renamed = td.clone()
    for old, new in (("action_log_prob", "mu"), ("pre_tanh", "u")):
        renamed.rename_key_(old, new)
    renamed["next"].rename_key_("reward", "gain")
    loss.set_keys(sample_log_prob="mu", pre_tanh="u", reward="gain")
    assert "mu" in loss.in_keys
    torch.manual_seed(3)
    assert torch.equal(loss(renamed)["loss_critic"], wanted["loss_critic"])
    loss = sac()
    half, both = replay(6), replay(6)
    both["collector", "mask"] = torch.arange(6).unsqueeze(-1) < 3
    half["valid"] = torch.arange(6).unsqueeze(-1) < 3
    found = []
    for batch in (half, both):
        torch.manual_seed(3)
        found.append(loss(batch)["loss_actor"])
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    continuous, exact = networks(), networks(discrete=True)
    value = build_value(network="mlp", observation_shape=[FEATURES])
    wrong: list[tuple[Any, str]] = [
        (lambda: SACLoss(*exact), "needs continuous actions"),
        (lambda: SACLoss(continuous[0], exact[1]), "writes 'state_action_value'"),
        (lambda: DiscreteSACLoss(*continuous), "needs discrete actions"),
        (lambda: DiscreteSACLoss(exact[0], continuous[1]), "writes 'action_value'"),
        (lambda: SACv1Loss(*continuous, value, estimator="retrace"), "needs target critics"),
        (lambda: v1().make_value_estimator("q_lambda"), "needs target critics"),
        (lambda: SACLoss(*continuous, estimator="tree_backup"), "a density is no probability; use 'retrace'"),
        (lambda: sac("q_lambda")(replay(4)), "needs sequences"),
        (lambda: SACLoss(*continuous, estimator="td"), "there is no estimator 'td'"),
        (lambda: SACLoss(*continuous, alpha_loss="both"), "alpha_loss must be one of"),
        (lambda: SACLoss(*continuous, reduction="none"), "reduction must be"),
        (lambda: SACLoss(*continuous, gamma=1.2), "gamma must be in"),
        (lambda: SACLoss(*continuous, estimator="n_step(n=0)"), "n must be 1 or more"),
        (lambda: SACLoss(*continuous, alpha_init=0.0), "temperature must be positive"),
        (lambda: SACLoss(*continuous, num_samples=0), "num_samples must be"),
        (lambda: SACLoss(*continuous, target_entropy="low"), "target_entropy must be"),
        (lambda: sac("retrace")(replay(4)), "needs sequences"),
        (lambda: sac("n_step")(replay(4, 2)), "needs sequences of 3 steps, got 2"),
        (lambda: sac()(replay(2, 3, 4)), r"must be \[N\] or \[N, T\]"),
    ]
    for make, message in wrong:
        with pytest.raises(ValueError, match=message):
            make()
