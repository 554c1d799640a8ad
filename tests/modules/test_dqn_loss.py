"""Deep Q-learning against its formulas, in float64 on small networks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Categorical, OneHot
from torchrl.modules import EGreedyModule, QValueActor

from offtrace.modules.estimators.action_values import TraceEstimator
from offtrace.modules.losses import DQNLoss, FastHardUpdate
from offtrace.modules.returns import categorical_projection

FEATURES, ACTIONS, ATOMS, GAMMA, KAPPA = 4, 3, 7, 0.9, 1.7


class QNetwork(nn.Module):
    """Observation to values [*, K, A], or logits [*, K, A, atoms], with an epsilon that it does not use."""

    def __init__(self, networks: int = 1, atoms: int = 0) -> None:
        super().__init__()
        self.sizes = (networks, ACTIONS, *([atoms] if atoms else []))
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, math.prod(self.sizes)))
        self.register_buffer("epsilon", torch.zeros(()))
        if atoms:
            self.register_buffer("support", torch.linspace(-3, 3, atoms))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.net(x).unflatten(-1, self.sizes)
        # what stands at an illegal action is nothing that anybody may look at
        return found if mask is None or found.ndim > mask.ndim + 1 else found.masked_fill(~mask.unsqueeze(-2), math.nan)


def network(*, networks: int = 1, atoms: int = 0, masked: bool = False) -> TensorDictModule:
    keys = ["observation", *(["action_mask"] if masked else [])]
    return TensorDictModule(QNetwork(networks, atoms), keys, ["value_logits" if atoms else "action_value"])


def dqn(*, networks: int = 1, atoms: int = 0, masked: bool = False, **options: Any) -> DQNLoss:
    """A loss whose target differs from its network."""
    torch.manual_seed(0)
    options = {"gamma": GAMMA, "reward_scale": KAPPA, **options}
    loss = DQNLoss(network(networks=networks, atoms=atoms, masked=masked), **options).double()
    for name, buffer in loss.named_buffers():
        if name.startswith("target_") and "net" in name:
            buffer.add_(0.5 * torch.randn_like(buffer))
    return loss


def batch(*shape: int, masked: bool = False, valid: bool = False, ends: float = 0.3) -> TensorDict:
    g = torch.Generator().manual_seed(1)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*shape, *sizes, generator=g, dtype=torch.float64)

    terminated = torch.rand(*shape, 1, generator=g) < ends / 2
    truncated = torch.rand(*shape, 1, generator=g) < ends / 2
    done = terminated | truncated
    flags = {"terminated": terminated, "truncated": truncated, "done": done}
    following = {"observation": normal(FEATURES).masked_fill(terminated, math.nan), "reward": normal(1), **flags}
    action = torch.randint(ACTIONS, shape, generator=g)
    found = {"observation": normal(FEATURES), "action": action, "action_log_prob": -1 + 0.3 * normal()}
    td = TensorDict({**found, "next": following}, shape)
    if masked:
        td["action_mask"] = (torch.rand(*shape, ACTIONS, generator=g) < 0.5).scatter(-1, action.unsqueeze(-1), True)
        legal = torch.rand(*shape, ACTIONS, generator=g) < 0.5
        legal[..., 0] |= ~legal.any(-1)
        td["next", "action_mask"] = legal & ~terminated  # behind the end of an episode nothing is legal
    if valid:
        td["valid"] = torch.rand(*shape, 1, generator=g) > 0.3
        for key, x in list(td.items(True, True)):
            if x.is_floating_point():
                td[key] = x.masked_fill(~td["valid"].view(*shape, *(1,) * (x.ndim - len(shape))), math.nan)
            elif key[-1] == "action_mask" or key == "action_mask":
                td[key] = x & td["valid"]
    return td


def q_at(module: Any, observation: Tensor) -> Tensor:
    """Values [*, K, A] or logits, straight from the network."""
    return next(part for part in module.modules() if isinstance(part, QNetwork))(observation.nan_to_num())


def means(loss: DQNLoss, found: Tensor) -> Tensor:
    """[*, K, A] of values or logits."""
    return found if loss.support is None else found.softmax(-1) @ loss.support


def legal(td: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Masks at the steps and behind them; all where the batch has none."""
    ones = torch.ones(*td.batch_size, ACTIONS, dtype=torch.bool)
    return td.get("action_mask", ones), td.get(("next", "action_mask"), ones)


def next_values(loss: DQNLoss, td: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Value of every step's successor by going through the actions one by one, and the action taken for it."""
    with torch.no_grad():
        target = means(loss, q_at(loss.target("policy"), td["next", "observation"])).amin(-2)
        online = means(loss, q_at(loss.policy, td["next", "observation"])).amin(-2)
    chooser, mask = online if loss.is_double else target, legal(td)[1]
    best = torch.zeros(td.batch_size, dtype=torch.int64)
    for place in torch.ones(td.batch_size).nonzero().tolist():
        allowed = [a for a in range(ACTIONS) if mask[(*place, a)]] or [0]
        best[tuple(place)] = max(allowed, key=lambda a: float(chooser[(*place, a)]))
    return target.gather(-1, best.unsqueeze(-1)).squeeze(-1), best


def huber(error: Tensor) -> Tensor:
    return torch.where(error.abs() < 1, 0.5 * error.square(), error.abs() - 0.5)


# ---------------------------------------------------------------------------------------------------------- the target
@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("function", ["huber", "l2"])
def test_one_step_equals_the_formula(function: str, double: bool, valid: bool, masked: bool, networks: int) -> None:
    loss = dqn(double=double, loss_function=function, networks=networks, masked=masked)
    td = batch(40, masked=masked, valid=valid)
    out = loss(td)
    mask = td["valid"].squeeze(-1) if valid else torch.ones(40, dtype=torch.bool)
    value, _ = next_values(loss, td)
    going = ~td["next", "terminated"].squeeze(-1)
    y = KAPPA * td["next", "reward"].squeeze(-1) + torch.where(going, GAMMA * value, 0)
    q = q_at(loss.policy, td["observation"]).gather(-1, td["action"].view(-1, 1, 1).expand(-1, networks, 1)).squeeze(-1)
    error = q - y.unsqueeze(-1)
    assert (error[mask].abs() > 1).any()
    assert (error[mask].abs() < 1).any()
    expected = (huber(error) if function == "huber" else 0.5 * error.square()).sum(-1)
    torch.testing.assert_close(out["loss_q"], expected[mask].mean())
    torch.testing.assert_close(out["q_value"], q.detach()[mask].mean())
    torch.testing.assert_close(out["target_value"], y[mask].mean())
    torch.testing.assert_close(out["td_error"], error.detach()[mask].abs().mean())
    assert out["valid_count"] == mask.sum()
    assert set(out.keys()) == set(loss.out_keys)
    out["loss_q"].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in loss.parameters())


def test_double_and_single_differ_where_the_networks_disagree_and_only_there() -> None:
    td, found = batch(40, ends=0.0), {}
    for double in (True, False):
        loss = dqn(double=double, reduction="sum", priorities=True)
        value, best = next_values(loss, td)
        loss(td)
        found[double] = (value, best, td["td_error"].clone())
    agree = found[True][1] == found[False][1]
    assert agree.any()
    assert not agree.all()
    assert torch.equal(found[True][2] == found[False][2], agree)
    # the largest value is never below that of another's choice: single overestimates at least as much
    assert (found[False][0] >= found[True][0]).all()


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_the_clipped_error(masked: bool) -> None:
    """d loss / d Q(x, a) is the error clipped to [-1, 1]; that of any other action is 0 (Mnih et al. 2015)."""
    loss, td = dqn(masked=masked), batch(12, masked=masked)
    seen: list[Tensor] = []
    inner = loss._q

    def watched(states: Any) -> Tensor:
        seen.append(inner(states))
        return seen[-1]

    loss._q = watched
    out = loss(td)
    (gradient,) = torch.autograd.grad(out["loss_q"], seen[:1])
    value, _ = next_values(loss, td)
    y = KAPPA * td["next", "reward"].squeeze(-1) + torch.where(td["next", "terminated"].squeeze(-1), 0, GAMMA * value)
    q = q_at(loss.policy, td["observation"]).gather(-1, td["action"].view(-1, 1, 1)).flatten()
    wanted = torch.zeros(12, 1, ACTIONS, dtype=torch.float64)
    wanted = wanted.scatter(-1, td["action"].view(-1, 1, 1), ((q - y).clamp(-1, 1) / 12).detach().view(-1, 1, 1))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_n_steps_by_sums_of_the_first_window(masked: bool) -> None:
    loss, td = dqn(estimator="n_step(n=3)", masked=masked), batch(12, 5, masked=masked, valid=True)
    out, (value, _) = loss(td), next_values(loss, td)
    reward, terminated, done, valid = (
        td[key].squeeze(-1) for key in (("next", "reward"), ("next", "terminated"), ("next", "done"), "valid")
    )
    errors = []
    for n in range(12):
        if not valid[n, 0]:
            continue
        y, factor, t = 0.0, 1.0, 0
        while True:
            y += factor * KAPPA * float(reward[n, t])
            factor *= GAMMA
            if t == 2 or done[n, t] or not valid[n, t + 1]:
                y += 0.0 if terminated[n, t] else factor * float(value[n, t])
                break
            t += 1
        errors.append(q_at(loss.policy, td["observation"][n, 0])[0, td["action"][n, 0]] - y)
    torch.testing.assert_close(out["loss_q"], huber(torch.stack(errors)).mean())


@pytest.mark.parametrize("estimator", ["retrace(lmbda=0.8)", "q_lambda(lmbda=0.8)", "tree_backup(lmbda=0.8)"])
def test_traces_are_those_of_the_greedy_policy(estimator: str) -> None:
    """With greedy pi Retrace and tree backup are Watkins' Q(lambda): cut where the batch's action is not the best."""
    loss, td = dqn(estimator=estimator, loss_function="l2", masked=True), batch(8, 6, masked=True, ends=0.2)
    out, (value, _) = loss(td), next_values(loss, td)
    with torch.no_grad():
        every = q_at(loss.policy, td["observation"]).squeeze(-2).masked_fill(~legal(td)[0], -math.inf)
        target = q_at(loss.target("policy"), td["observation"]).squeeze(-2)
    greedy = every.argmax(-1) == td["action"]
    assert greedy.any()
    assert not greedy.all()
    taken = target.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    y = taken.clone()
    for n in range(8):
        for s in range(6):
            weight = 1.0
            for t in range(s, 6):
                if t > s:
                    c = 1.0 if estimator.startswith("q_lambda") else float(greedy[n, t])
                    weight *= GAMMA * 0.8 * c
                bootstrap = 0.0 if terminated[n, t] else GAMMA * float(value[n, t])
                y[n, s] += weight * (KAPPA * float(reward[n, t]) + bootstrap - float(taken[n, t]))
                if done[n, t]:
                    break
    q = q_at(loss.policy, td["observation"]).squeeze(-2).gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out["loss_q"], 0.5 * (q - y).square().mean())
    rho = greedy * (-td["action_log_prob"]).exp()
    torch.testing.assert_close(out["ess"], rho.sum() ** 2 / (rho.numel() * rho.square().sum()))


class Halved(TraceEstimator):
    """A trace of somebody else's."""

    uses_behaviour = False
    uses_log_pi = False

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> float:
        return 0.5 * self.lmbda


def test_an_estimator_from_outside_by_object_and_import_path() -> None:
    td = batch(6, 5)
    same = [dqn(estimator=spec)(td)["loss_q"] for spec in (Halved(lmbda=0.8), f"{__name__}:Halved(lmbda=0.8)")]
    same.append(dqn(estimator="q_lambda(lmbda=0.4)")(td)["loss_q"])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)
    torch.testing.assert_close(same[0], same[2])


# ------------------------------------------------------------------------------------------------------- distributions
@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("double", [True, False])
def test_distributions_learn_the_projected_target(double: bool, masked: bool, networks: int) -> None:
    loss = dqn(atoms=ATOMS, double=double, masked=masked, networks=networks, priorities=True)
    td = batch(20, masked=masked)
    out = loss(td)
    _, best = next_values(loss, td)
    support: Any = loss.support
    target = q_at(loss.target("policy"), td["next", "observation"]).softmax(-1).detach()
    reward, going = KAPPA * td["next", "reward"], ~td["next", "terminated"]
    expected, errors, gaps = [], [], []
    for n in range(20):
        of_best = target[n, :, best[n]]
        probs = of_best[(of_best @ support).argmin()]
        atoms = reward[n] + GAMMA * going[n] * support
        y = categorical_projection(atoms=atoms, probs=probs, support=support)
        logits = q_at(loss.policy, td["observation"][n])[:, td["action"][n]]
        cross = -(y * logits.log_softmax(-1)).sum(-1)
        expected.append(cross.sum())
        gaps.append((cross + (y * y.clamp(min=1e-300).log()).sum()).mean())
        errors.append((logits.softmax(-1) @ support - y @ support).abs().mean())
    torch.testing.assert_close(out["loss_q"], torch.stack(expected).mean())
    torch.testing.assert_close(out["td_error"], torch.stack(errors).mean().detach())
    torch.testing.assert_close(td["td_error"], torch.stack(gaps).detach())
    assert (td["td_error"] >= 0).all()


def test_a_distribution_that_equals_its_target_has_no_priority() -> None:
    loss = dqn(atoms=ATOMS, priorities=True, reward_scale=1.0, gamma=1.0, double=False)
    FastHardUpdate(loss).step()
    with torch.no_grad():  # the same distribution everywhere
        last = next(part for part in loss.policy.modules() if isinstance(part, QNetwork)).net[-1]
        last.weight.zero_()
        last.bias.copy_(torch.randn(ATOMS, dtype=torch.float64).repeat(ACTIONS))
    FastHardUpdate(loss).step()
    td = batch(5, ends=0.0)
    td["next", "reward"].zero_()
    out = loss(td)
    torch.testing.assert_close(td["td_error"], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(out["loss_q"], [last.bias])
    assert gradient.abs().max() < 1e-12
    td["next", "reward"].fill_(0.4)
    loss(td)
    assert (td["td_error"] > 1e-3).all()


# ------------------------------------------------------------------------------------ weights, priorities, exploration
@pytest.mark.parametrize("atoms", [0, ATOMS])
@pytest.mark.parametrize("column", [False, True])
def test_weights_scale_the_losses_of_the_items(atoms: int, column: bool) -> None:
    loss, td = dqn(atoms=atoms), batch(6)
    single = torch.stack([loss(td[n : n + 1])["loss_q"] for n in range(6)])
    weight = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.1, 3.0])
    out = loss(td.clone().set("weight", weight.unsqueeze(-1) if column else weight))
    torch.testing.assert_close(out["loss_q"], (single * (weight / 4).double()).mean())
    plain = loss(td)
    assert plain["loss_q"] != out["loss_q"]
    assert all(torch.equal(plain[name], out[name]) for name in ("q_value", "target_value", "td_error"))


def test_priorities_are_errors_of_items_over_their_valid_steps() -> None:
    td = batch(6, valid=True)
    dqn()(td)
    assert "td_error" not in td
    loss = dqn(priorities=True)
    out = loss(td)
    single = torch.stack([loss(td[n : n + 1].clone())["td_error"] for n in range(6)])
    torch.testing.assert_close(td["td_error"], single)
    valid = td["valid"].squeeze(-1)
    assert not td["td_error"][~valid].any()
    torch.testing.assert_close(out["td_error"], td["td_error"][valid].mean())
    assert not td["td_error"].requires_grad
    loss, td = dqn(priorities=True, estimator="retrace"), batch(6, 5, valid=True)
    loss(td)
    assert td["td_error"].shape == (6, 5)
    single = torch.stack([loss(td[n : n + 1].clone())["td_error"] for n in range(6)])
    torch.testing.assert_close(td["td_error"], single.unsqueeze(1).expand(6, 5))


def test_epsilon_falls_linearly_and_stays() -> None:
    loss = dqn(epsilon_start=0.9, epsilon_end=0.1, epsilon_fraction=0.5)
    buffer = next(part for part in loss.policy.modules() if isinstance(part, QNetwork)).epsilon
    for fraction, wanted in ((0.0, 0.9), (0.125, 0.7), (0.25, 0.5), (0.5, 0.1), (0.8, 0.1), (1.0, 0.1)):
        loss.set_progress(fraction)
        assert float(buffer) == pytest.approx(wanted)
        assert float(loss(batch(4))["epsilon"]) == pytest.approx(wanted)
    assert "policy_params.module.epsilon" in loss.state_dict()
    plain = TensorDictModule(nn.Linear(FEATURES, ACTIONS), ["observation"], ["action_value"])
    without = DQNLoss(plain)
    without.set_progress(0.5)
    assert "epsilon" not in without.out_keys


# ------------------------------------------------------------------------------------------------------------- TorchRL
@pytest.mark.parametrize("explores", [False, True])
def test_torchrls_actor_is_the_network_behind_it(explores: bool) -> None:
    torch.manual_seed(0)
    net, spec = nn.Linear(FEATURES, ACTIONS), Categorical(ACTIONS)
    actor: Any = QValueActor(net, in_keys=["observation"], spec=spec, action_mask_key="action_mask")
    if explores:
        actor = TensorDictSequential(actor, EGreedyModule(spec=spec, action_mask_key="action_mask"))
    td = batch(20, masked=True)
    loss = DQNLoss(actor, gamma=GAMMA).double()
    out = loss(td)
    assert {("next", "action_mask"), "action_mask"} <= set(loss.in_keys)
    q = net.double()(td["observation"]).detach().gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    after = net(td["next", "observation"].nan_to_num()).detach().masked_fill(~td["next", "action_mask"], -math.inf)
    value = torch.where(td["next", "terminated"].squeeze(-1), 0, after.max(-1).values)
    y = td["next", "reward"].squeeze(-1) + GAMMA * value
    torch.testing.assert_close(out["loss_q"].detach(), huber(q - y).mean())
    out["loss_q"].backward()
    assert all(p.grad is not None for p in loss.parameters())


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    one_hot = QValueActor(nn.Linear(FEATURES, ACTIONS), in_keys=["observation"], spec=OneHot(ACTIONS))
    nothing = TensorDictModule(nn.Linear(FEATURES, ACTIONS), ["observation"], ["value"])
    td = batch(4)
    hot = td.clone().set("action", nn.functional.one_hot(td["action"], ACTIONS))
    no_support = TensorDictModule(nn.Linear(FEATURES, 6), ["observation"], ["value_logits"])
    wrong: list[tuple[Any, str]] = [
        (lambda: DQNLoss(one_hot), "needs actions as indices, got action_space='one_hot'"),
        (lambda: DQNLoss(nothing), "needs a network that writes 'action_value' or 'value_logits'"),
        (lambda: DQNLoss(no_support), "must have a buffer 'support'"),
        (lambda: dqn()(hot), r"'action' must hold indices of actions, \[4\], got \[4, 3\]; of one-hot actions take"),
        (lambda: dqn(estimator="n_steps"), "did you mean n_step"),
        (lambda: dqn(estimator="retrace")(td), r"needs sequences \[N, T\]"),
        (lambda: dqn(gamma=1.5), "gamma must be in"),
        (lambda: dqn(loss_function="l1"), "loss_function must be one of"),
        (lambda: dqn(epsilon_start=1.5), "epsilon_start must be in"),
        (lambda: dqn(epsilon_fraction=0.0), "epsilon_fraction must be above 0"),
        (lambda: dqn(reduction="none"), "reduction must be"),
    ]
    for make, message in wrong:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"needs discrete actions, as integers; 'action' is torch.float64"):
        dqn()(td.clone().set("action", torch.randn(4, 2, dtype=torch.float64)))


# ---------------------------------------------------------------------------------------------------------- all of them
CASES: list[dict[str, Any]] = [
    {},
    {"masked": True, "double": False},
    {"atoms": ATOMS, "estimator": "n_step(n=2)", "masked": True},
    {"estimator": "retrace", "networks": 2},
    {"atoms": ATOMS, "estimator": "retrace"},
]


@pytest.mark.parametrize("options", CASES)
def test_what_is_not_valid_reaches_nothing(options: dict[str, Any]) -> None:
    loss, results = dqn(**options), []
    poisoned = batch(6, 5, masked=options.get("masked", False), valid=True)
    clean = poisoned.apply(lambda x: x.nan_to_num(123.0) if x.is_floating_point() else x)
    for td in (poisoned, clean):
        loss.zero_grad()
        out = loss(td)
        out["loss_q"].backward()
        results.append([*(out[name].detach() for name in loss.out_keys), *(p.grad.clone() for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", CASES)
def test_copies_stand_alone_and_compiled_equals_eager(options: dict[str, Any], compiled: bool) -> None:
    loss = dqn(priorities=True, **options)
    td = batch(6, 5, masked=options.get("masked", False), valid=True)
    torch._dynamo.reset()
    fresh = dqn(priorities=True, **options)
    fresh.load_state_dict(loss.state_dict(), strict=True)
    others = [torch.compile(loss, backend="aot_eager", fullgraph=True)] if compiled else [copy.deepcopy(loss), fresh]
    results = []
    for function in (loss, *others):
        loss.zero_grad()
        data = td.clone()
        out = function(data)
        results.append([*(out[name].detach() for name in loss.out_keys), data["td_error"]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_the_whole_network_is_followed() -> None:
    loss = dqn()
    updater = FastHardUpdate(loss)
    loss.float().double()
    for parameter in loss.parameters():
        parameter.data += 1
    updater.step()
    followers = dict(loss.target("policy").named_buffers())
    assert all(torch.equal(followers[name], p) for name, p in loss.policy.named_parameters())
    assert set(loss.param_groups()) == {"policy"}


def test_rewards_are_clipped_before_they_are_scaled() -> None:
    td = batch(16)
    td["next", "reward"] *= 5
    clipped = td.clone()
    clipped["next", "reward"] = td["next", "reward"].clamp(-0.7, 0.7)
    assert (clipped["next", "reward"] != td["next", "reward"]).any()
    wanted = dqn()(clipped)
    found = dqn(reward_clip=0.7)(td)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, equal_nan=True)
    with pytest.raises(ValueError, match=r"reward_clip must be positive and finite, or None, got 0"):
        dqn(reward_clip=0)


def test_a_module_that_keeps_its_network_by_that_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = QNetwork()
            self.values = nn.ModuleList()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    torch.manual_seed(0)
    module = TensorDictModule(Named(), ["observation"], ["action_value"])
    for policy in (module, TensorDictSequential(module)):
        policy.network = module.module.network  # type: ignore[assignment]
        losses = DQNLoss(policy.double(), gamma=GAMMA)(batch(5))
        plain = TensorDictModule(module.module.network, ["observation"], ["action_value"])
        torch.testing.assert_close(losses["loss_q"], DQNLoss(plain, gamma=GAMMA)(batch(5))["loss_q"])
