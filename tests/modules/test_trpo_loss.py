"""TRPO: Fisher products, conjugate gradients, and the whole step against explicit matrices; what must not move."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules.losses import TRPOLoss
from offtrace.modules.losses import natural_gradient as ng
from offtrace.modules.losses import trpo as trpo_module
from offtrace.modules.networks import build_policy, build_value
from tests.modules.test_a2c_loss import torchrl_networks
from tests.modules.test_impala_loss import ACTIONS, FEATURES, rollout

GAMMA, LMBDA = 0.9, 0.8
OPTIONS: dict[str, Any] = {"estimator": f"gae(lmbda={LMBDA})", "gamma": GAMMA}
KINDS = ("discrete", "masked", "continuous")


def networks(kind: str = "discrete", seed: int = 0, gain: float = 0.5, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    actions = {"action_dim": 2} if kind == "continuous" else {"num_actions": ACTIONS, "masked": kind == "masked"}
    policy = build_policy(observation_shape=[FEATURES], hidden=[5], critic=None, **actions, **more).double()
    for parameter in policy.parameters():  # the shipped policy starts almost uniform
        parameter.data += gain * torch.randn_like(parameter)
    return policy, build_value(observation_shape=[FEATURES], hidden=[6]).double()


def data(policy: Any, kind: str = "discrete", seed: int = 1, *, valid: bool = False) -> TensorDict:
    """A rollout of the policy itself, as on-policy data is."""
    td = rollout(seed=seed, dim=2 if kind == "continuous" else None)
    generator = torch.Generator().manual_seed(seed)
    if kind == "masked":
        td["action_mask"] = torch.rand(5, 7, ACTIONS, generator=generator) < 0.5
        td["action_mask"].scatter_(-1, td["action"].unsqueeze(-1), True)
    td["action_log_prob"] = distribution(policy, td).log_prob(td["action"]).detach()
    if valid:
        td["valid"] = torch.rand(5, 7, 1, generator=generator) < 0.7
    return td


def distribution(policy: Any, td: TensorDict) -> Any:
    return policy.get_dist(td.select(*policy.in_keys).clone())


def make(kind: str = "discrete", seed: int = 0, **options: Any) -> tuple[TRPOLoss, TensorDict]:
    policy, value = networks(kind, seed)
    return TRPOLoss(policy, value, **{**OPTIONS, **options}), data(policy, kind, seed + 1)


def flat(policy: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


class Direct:
    """L and the KL as functions of one vector of weights, from the parameters of the distributions by hand."""

    def __init__(self, loss: TRPOLoss, td: TensorDict) -> None:
        self.policy, self.td = loss.policy, td
        valid = td.get("valid", torch.ones(*td.shape, 1, dtype=torch.bool)).squeeze(-1)
        advantage = advantages(loss, td)[valid]
        if loss.normalize_advantage:
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        self.valid, self.advantage = valid, advantage
        self.names = [name for name, _ in self.policy.named_parameters()]
        self.shapes = [p.shape for p in self.policy.parameters()]
        self.old = [x.detach() for x in self.parameters(flat(self.policy))]

    def parameters(self, theta: Tensor) -> list[Tensor]:
        parts = theta.split([shape.numel() for shape in self.shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
        net = self.policy.module[0]
        inputs = {name.removeprefix("module.0."): x for name, x in weights.items()}
        out = torch.func.functional_call(net, inputs, (self.td.select(*net.in_keys).clone(),))
        return [out[key] for key in self.policy[-1].in_keys]

    def surrogate(self, theta: Tensor) -> Tensor:
        found = self.parameters(theta)
        if len(found) == 1:
            log_prob = found[0].log_softmax(-1).gather(-1, self.td["action"].unsqueeze(-1)).squeeze(-1)
        else:
            z = (self.td["action"] - found[0]) / found[1]
            log_prob = (-0.5 * z.square() - found[1].log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return ((log_prob - self.td["action_log_prob"]).exp()[self.valid] * self.advantage).mean()

    def kl(self, theta: Tensor) -> Tensor:
        """Of the old policy to the new one."""
        found = self.parameters(theta)
        if len(found) == 1:
            old, new = self.old[0].log_softmax(-1), found[0].log_softmax(-1)
            return (old.exp() * (old - new)).sum(-1)[self.valid].mean()
        (m, s), (n, r) = self.old, found
        each = (r / s).log() + (s.square() + (m - n).square()) / (2 * r.square()) - 0.5
        return each.sum(-1)[self.valid].mean()

    def hessian(self, theta: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.kl, theta)  # type: ignore[no-any-return]


def advantages(loss: TRPOLoss, td: TensorDict) -> Tensor:
    """GAE, one row and step at a time."""
    with torch.no_grad():
        value = loss.value(td.select("observation").clone())["state_value"].squeeze(-1)
        after = loss.value(td["next"].select("observation").clone())["state_value"].squeeze(-1)
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td.get("valid", torch.ones(*td.shape, 1, dtype=torch.bool)).squeeze(-1)
    out = torch.zeros_like(value)
    for b in range(td.shape[0]):
        for t in reversed(range(td.shape[1])):
            delta = reward[b, t] + (0.0 if terminated[b, t] else GAMMA) * after[b, t] - value[b, t]
            ends = done[b, t] or t == td.shape[1] - 1 or not valid[b, t + 1]
            out[b, t] = delta + (0.0 if ends else GAMMA * LMBDA * out[b, t + 1])
    return out


class Spied:
    """The products with the Fisher matrix, the gradient and the direction of one call of improve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def spy(product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int) -> Tensor:
            self.gradient = target
            self.matrix = torch.stack([product(row) for row in torch.eye(len(target), dtype=target.dtype)])
            return ng.conjugate_gradients(product, target, iterations=iterations)

        monkeypatch.setattr(trpo_module, "conjugate_gradients", spy)


# --------------------------------------------------------------------------------- pure functions
@pytest.mark.parametrize("size", [1, 3, 12])
def test_conjugate_gradients_solve_the_system(size: int) -> None:
    root = torch.randn(size, size, dtype=torch.float64)
    matrix = root @ root.t() + 0.5 * torch.eye(size, dtype=torch.float64)
    target = torch.randn(size, dtype=torch.float64)
    found = ng.conjugate_gradients(lambda v: matrix @ v, target, iterations=size + 3)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-8, atol=1e-8)


def test_fewer_iterations_minimise_over_the_krylov_space() -> None:
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root @ root.t() + torch.eye(8, dtype=torch.float64)
    target = torch.randn(8, dtype=torch.float64)
    taken: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        taken.append(v)
        return matrix @ v

    found = ng.conjugate_gradients(product, target, iterations=3)
    assert len(taken) == 3
    basis = torch.stack([target, matrix @ target, matrix @ matrix @ target], 1)
    best = basis @ torch.linalg.solve(basis.t() @ matrix @ basis, basis.t() @ target)
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-9)


def test_without_a_gradient_there_is_no_step() -> None:
    zero = torch.zeros(4)
    found = ng.conjugate_gradients(lambda v: 2 * v, zero, iterations=5)
    assert torch.equal(found, zero)
    assert ng.step_length(found @ found, delta=0.01) == 0
    assert ng.step_length(torch.tensor(-1.0), delta=0.01) == 0


def test_the_step_ends_where_the_quadratic_kl_is_delta() -> None:
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, x = root @ root.t(), torch.randn(6, dtype=torch.float64)
    step = ng.step_length(x @ matrix @ x, delta=0.03) * x
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(0.03)


def test_the_line_search_takes_the_first_fraction_that_holds() -> None:
    surrogates = {1.0: 2.0, 0.5: 0.9, 0.25: math.nan, 0.125: 1.5, 0.0625: 1.2}
    kls = {1.0: 0.02, 0.5: 0.005, 0.25: 0.001, 0.125: 0.01, 0.0625: 0.0}
    tried: list[float] = []

    def measure(fraction: float) -> tuple[Tensor, Tensor]:
        tried.append(fraction)
        return torch.tensor(surrogates[fraction]), torch.tensor(kls[fraction])

    move = ng.line_search(measure, torch.tensor(1.0), delta=torch.tensor(0.01).item(), tries=5)
    assert tried == [1.0, 0.5, 0.25, 0.125]
    assert (move.fraction, move.surrogate.item()) == (0.125, 1.5)
    tried.clear()
    move = ng.line_search(measure, torch.tensor(1.0), delta=0.01, tries=3)
    assert tried == [1.0, 0.5, 0.25]
    assert (move.fraction, move.surrogate.item(), move.kl.item()) == (0.0, 1.0, 0.0)
    move = ng.line_search(measure, torch.tensor(1.0), delta=0.02, tries=1, shrink=0.8)
    assert move.fraction == 1.0
    other: list[float] = []
    ng.line_search(
        lambda f: (other.append(f), torch.tensor(0.0))[1:] * 2, torch.tensor(1.0), delta=1.0, tries=3, shrink=0.8
    )
    assert other == pytest.approx([1.0, 0.8, 0.64])
    same = ng.line_search(lambda f: (torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(1.0), delta=1.0, tries=4)
    assert same.fraction == 0, "a surrogate that stays is no better"


# --------------------------------------------------------------------------------- the products
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_hessian_of_the_kl(
    kind: str, damping: float, valid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, value = networks(kind)
    td = data(policy, kind, valid=valid)
    loss = TRPOLoss(policy, value, damping=damping, **OPTIONS)
    direct, theta = Direct(loss, td), flat(policy)
    spied = Spied(monkeypatch)
    loss.improve(td)
    matrix = direct.hessian(theta)
    assert matrix.abs().max() > 1e-2
    torch.testing.assert_close(spied.matrix, matrix + damping * torch.eye(len(theta), dtype=theta.dtype))
    theta.requires_grad_()
    torch.testing.assert_close(spied.gradient, torch.autograd.grad(direct.surrogate(theta), theta)[0])


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_hessian_is_the_covariance_of_the_score(kind: str) -> None:
    """The Fisher matrix by its definition, E[grad log pi grad log pi'], from the closed form of the parameters."""
    loss, td = make(kind)
    direct, theta = Direct(loss, td), flat(loss.policy)
    jacobians = torch.autograd.functional.jacobian(lambda t: torch.cat(direct.parameters(t), -1), theta)
    found = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    params = torch.cat(direct.old, -1)
    for b in range(5):
        for t in range(7):
            if kind == "discrete":
                p = params[b, t].softmax(-1)
                inner = p.diag() - p.outer(p)
            else:
                s = params[b, t, 2:]
                inner = torch.cat([1 / s.square(), 2 / s.square()]).diag()
            found += jacobians[b, t].t() @ inner @ jacobians[b, t]
    torch.testing.assert_close(direct.hessian(theta), found / 35)


# --------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.01, 0.3])
def test_the_whole_step_is_the_direct_one(kind: str, delta: float, valid: bool) -> None:
    """Matrix, solution and line search by hand; as many iterations as there are weights solve it exactly."""
    policy, value = networks(kind)
    td = data(policy, kind, valid=valid)
    loss = TRPOLoss(policy, value, delta=delta, damping=0.1, cg_iterations=80, **OPTIONS)
    direct, theta = Direct(loss, td), flat(policy)
    matrix = direct.hessian(theta) + 0.1 * torch.eye(len(theta), dtype=theta.dtype)
    point = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(direct.surrogate(point), point)[0]
    x = torch.linalg.solve(matrix, gradient)
    step = math.sqrt(2 * delta / (x @ matrix @ x).item()) * x
    fraction = 1.0
    while not (
        direct.surrogate(theta + fraction * step) > direct.surrogate(theta)
        and direct.kl(theta + fraction * step) <= delta
    ):
        fraction /= 2
    before = {name: x.clone() for name, x in loss.value.state_dict().items()}
    out = loss.improve(td)
    torch.testing.assert_close(flat(policy), theta + fraction * step, rtol=1e-6, atol=1e-8)
    assert out["step_fraction"] == fraction
    assert out["line_search_failed"] == 0
    torch.testing.assert_close(out["surrogate"], direct.surrogate(theta))
    torch.testing.assert_close(out["surrogate_new"], direct.surrogate(theta + fraction * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out["kl_new"], direct.kl(theta + fraction * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out["policy_grad_norm"], gradient.norm())
    assert out["surrogate_new"] > out["surrogate"]
    assert 0.02 * delta < out["kl_new"] <= delta
    for name, x in loss.value.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_and_the_surrogate_never_falls(kind: str) -> None:
    """Over random policies, rollouts and sizes of the region, measured by hand after the step."""
    taken = []
    for seed in range(25):
        delta = (0.001, 0.01, 0.1, 1.0)[seed % 4]
        loss, td = make(kind, seed, delta=delta, damping=1e-3)
        direct, theta = Direct(loss, td), flat(loss.policy)
        out = loss.improve(td)
        now = flat(loss.policy)
        kl = direct.kl(now)
        assert kl <= delta * (1 + 1e-9)
        torch.testing.assert_close(out["kl_new"], kl)
        rise = direct.surrogate(now) - direct.surrogate(theta)
        assert (rise > 0) == (out["line_search_failed"] == 0)
        assert rise >= 0
        assert not any(p.requires_grad for p in loss.policy.parameters())
        taken.append(out["step_fraction"].item())
    assert len({*taken}) > 1, "every search ended at the same fraction"
    assert sum(fraction > 0 for fraction in taken) >= 23


def test_old_data_count_by_their_ratio() -> None:
    """Of a behaviour policy that is not the policy before the step: the KL is that of the policies, L has the ratio."""
    loss, td = make()
    td["action_log_prob"] += 0.4 * torch.randn(5, 7, dtype=torch.float64)
    direct, theta = Direct(loss, td), flat(loss.policy)
    out = loss.improve(td)
    torch.testing.assert_close(out["surrogate"], direct.surrogate(theta))
    torch.testing.assert_close(out["surrogate_new"], direct.surrogate(flat(loss.policy)))
    torch.testing.assert_close(out["kl_new"], direct.kl(flat(loss.policy)))
    assert (out["ratio_mean"] - 1).abs() > 1e-3


@pytest.mark.parametrize("broken", ["sign", "no gradient", "infinite reward", "nan weights"])
def test_a_failed_search_leaves_the_weights_bit_for_bit(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, td = make()
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    if broken == "sign":  # downhill every fraction of the step falls
        monkeypatch.setattr(
            trpo_module, "conjugate_gradients", lambda product, g, *, iterations: -ng.conjugate_gradients(
                product, g, iterations=iterations
            )
        )  # fmt: skip
    elif broken == "no gradient":
        loss.prepare(td)
        td["advantage"] = torch.zeros(5, 7, 1, dtype=torch.float64)
    elif broken == "infinite reward":
        td["next", "reward"][0, 0] = torch.inf
    else:
        monkeypatch.setattr(trpo_module, "step_length", lambda *_, **__: torch.tensor(torch.nan))
    out = loss.improve(td)
    assert out["line_search_failed"] == 1
    assert out["step_fraction"] == out["kl_new"] == 0
    torch.testing.assert_close(out["surrogate_new"], out["surrogate"], equal_nan=True)
    assert bool(out["policy_grad_norm"].isfinite()) == (broken != "infinite reward")
    for name, x in loss.state_dict().items():
        assert torch.equal(x, before[name]), name


# --------------------------------------------------------------------------------- masks and actions
def test_invalid_steps_reach_nothing() -> None:
    policy, value = networks("masked")
    td = data(policy, "masked", valid=True)
    hidden = td.clone()
    gone = ~td["valid"].squeeze(-1)
    assert gone.any()
    # the observation of an invalid step is read as the successor of a valid step in front of it
    alone = gone.clone()
    alone[:, 1:] &= gone[:, :-1] | td["next", "done"].squeeze(-1)[:, :-1]
    hidden["observation"][alone] = torch.nan
    for key in ("action_log_prob", ("next", "reward")):
        hidden[key][gone] = torch.nan
    hidden["action"][gone] = (hidden["action"][gone] + 1) % ACTIONS
    hidden["action_mask"][gone] = False
    found = []
    for batch in (td, hidden):
        loss = TRPOLoss(copy.deepcopy(policy), copy.deepcopy(value), **OPTIONS)
        loss.prepare(batch)
        out = loss.improve(batch)
        loss_value = loss(batch)["loss_value"]
        loss_value.backward()
        kept = {name: out[name] for name in ("surrogate", "surrogate_new", "kl_new", "step_fraction", "entropy")}
        found.append((flat(loss.policy), kept, loss_value.detach(), [p.grad for p in loss.value.parameters()]))
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0][0], flat(policy))


def test_illegal_actions_stay_illegal() -> None:
    loss, td = make("masked")
    loss.improve(td)
    probs = distribution(loss.policy, td).logits.exp()
    assert (probs[~td["action_mask"]] == 0).all()
    assert all(p.isfinite().all() for p in loss.policy.parameters())


def test_without_a_valid_step_nothing_moves() -> None:
    loss, td = make()
    td["valid"] = torch.zeros(5, 7, 1, dtype=torch.bool)
    before = flat(loss.policy)
    out = loss.improve(td)
    assert torch.equal(flat(loss.policy), before)
    assert out["line_search_failed"] == 1
    assert loss(td)["loss_value"] == 0


# --------------------------------------------------------------------------------- the value
@pytest.mark.parametrize("valid", [False, True])
def test_the_value_learns_the_lambda_return(valid: bool) -> None:
    policy, value = networks()
    td = data(policy, valid=valid)
    loss = TRPOLoss(policy, value, **OPTIONS)
    mask = td["valid"].squeeze(-1) if valid else torch.ones(5, 7, dtype=torch.bool)
    now = value(td.select("observation").clone())["state_value"].squeeze(-1)
    target = advantages(loss, td) + now.detach()
    out = loss(td)
    torch.testing.assert_close(out["loss_value"], 0.5 * (target - now)[mask].square().mean())
    explained = 1 - (target - now)[mask].var(correction=0) / target[mask].var(correction=0)
    torch.testing.assert_close(out["explained_variance"], explained.detach())
    assert out["valid_count"] == mask.sum()
    assert set(out.keys()) == set(loss.out_keys)
    out["loss_value"].backward()
    assert all(p.grad is not None and p.grad.any() for p in value.parameters())
    assert all(p.grad is None for p in policy.parameters())


def test_what_is_prepared_stays_while_the_weights_move() -> None:
    loss, td = make()
    first = loss(td)
    assert set(loss.prepare(td)) == set(loss.estimator.diagnostic_keys)
    hidden = td.clone()
    hidden["next", "observation"] = torch.full_like(td["next", "observation"], torch.nan)
    torch.testing.assert_close(loss(hidden), first)
    for parameter in loss.value.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    kept = td.select("advantage", "value_target").clone()
    again = copy.deepcopy(loss)
    torch.testing.assert_close(loss.improve(td)["advantage_std"], kept["advantage"].std(correction=0))
    torch.testing.assert_close(td.select("advantage", "value_target"), kept)
    assert (again.improve(td.exclude("advantage"))["advantage_std"] - kept["advantage"].std(correction=0)).abs() > 1e-3


def test_policy_and_value_move_apart() -> None:
    """The step of the policy leaves the value alone, an optimiser of the loss the policy."""
    loss, td = make()
    loss.prepare(td)
    policy, value = flat(loss.policy), flat(loss.value)
    loss.improve(td)
    assert torch.equal(flat(loss.value), value)
    moved = flat(loss.policy)
    assert not torch.equal(moved, policy)
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(td)["loss_value"].backward()
        optimizer.step()
    assert torch.equal(flat(loss.policy), moved)
    assert not torch.equal(flat(loss.value), value)


# --------------------------------------------------------------------------------- what it takes
def test_torchrls_modules_copies_precisions_and_autocast() -> None:
    _, value, _ = torchrl_networks()
    policy, _ = networks()
    td = data(policy)
    loss = TRPOLoss(policy, copy.deepcopy(value), **OPTIONS)
    again, half = copy.deepcopy(loss), copy.deepcopy(loss).float()
    single = td.apply(lambda x: x.float() if x.is_floating_point() else x)
    rough = copy.deepcopy(half)
    expected = loss.improve(td)
    torch.testing.assert_close(again.improve(td), expected)
    found = half.improve(single)
    for name, x in found.items():
        torch.testing.assert_close(x.double(), expected[name].double(), rtol=1e-2, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough.prepare(single)
    with torch.autocast("cpu", torch.bfloat16):
        assert rough.improve(single)["kl_new"].dtype == torch.float32


def test_an_estimators_weight_does_not_multiply_the_ratio_again() -> None:
    loss, td = make()
    td["action_log_prob"] += 0.4 * torch.randn(5, 7, dtype=torch.float64)
    for name in ("done", "terminated"):
        td["next", name] = torch.ones_like(td["next", name])
    other = TRPOLoss(copy.deepcopy(loss.policy), copy.deepcopy(loss.value), estimator="vtrace", gamma=GAMMA)
    loss.prepare(td)
    expected = td["advantage"].clone()
    other.prepare(td)
    torch.testing.assert_close(td["advantage"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta must be above 0 and finite, got 0.0"),
        ({"delta": math.inf}, "delta must be above 0 and finite, got inf"),
        ({"damping": -0.1}, r"damping must be at least 0 and finite, got -0.1"),
        ({"cg_iterations": 0}, "cg_iterations must be an int of 1 or more, got 0"),
        ({"shrink": 1.0}, r"shrink must be in \(0, 1\), got 1.0"),
        ({"backtracks": 0}, "backtracks must be an int of 1 or more, got 0"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"reward_clip": 0.0}, "reward_clip must be positive and finite, or None, got 0.0"),
        ({"estimator": "retrace"}, "estimator 'retrace' is of action values, and one of state values is needed"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        TRPOLoss(*networks(), **options)
    assert "\n" not in str(raised.value)


def test_networks_and_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="TRPOLoss needs networks without a recurrent state, got one that reads 'rec"):
        TRPOLoss(*networks(recurrent=4))
    _, shared, both = torchrl_networks()
    with pytest.raises(ValueError, match="needs a policy and a value without common parameters"):
        TRPOLoss(both, shared)
    loss, td = make()
    for call in (loss.improve, loss):
        with pytest.raises(ValueError, match=r"the batch must be \[B, T\], environments then time; got \[35\]"):
            call(td.reshape(-1))


def test_an_update_that_is_interrupted_leaves_no_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved after a stop within the line search are weights that were learnt."""
    loss, td = make()
    before, evaluate, calls = flat(loss.policy), loss._evaluate, 0

    def interrupted(tensordict: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first step that is tried
            raise KeyboardInterrupt
        return evaluate(tensordict)

    monkeypatch.setattr(loss, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss.improve(td)
    assert torch.equal(flat(loss.policy), before)
    monkeypatch.undo()
    loss.improve(td)
    assert not torch.equal(flat(loss.policy), before)
