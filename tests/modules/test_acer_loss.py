"""ACER: its functions against autograd and the paper's identities, its loss against direct sums in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor
from torchrl.modules.tensordict_module.rnn import set_recurrent_mode

from offtrace.modules.losses import ACERLoss, FastSoftUpdate, acer, unroll
from offtrace.modules.losses.acer import acer_gradient, kl_gradient, truncated_weights, trust_region
from offtrace.modules.losses.unroll import evaluate_rollout
from tests.modules.test_impala_loss import ACTIONS, LOSSES, gradients, make, rollout, total
from tests.modules.test_q_actor_critic_loss import chosen, direct, network, policy_of, with_valid
from tests.modules.test_returns_mutations import mutant

GAMMA = 0.9
PAPER = (0.7, 0.2, 0.1), (0.05, 0.45, 0.5), (1.0, 0.5, -1.0)


def cases(seed: int, number: int = 300, actions: int = 4, illegal: bool = True) -> dict[str, Tensor]:
    """Random states in float64; one illegal action in each, where wanted."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = normal(3, number, actions, scale=2.0)
    if illegal:
        logits[:, torch.arange(number), torch.randint(actions, (number,), generator=g)] = -torch.inf
    probs, behaviour, average = logits.softmax(-1)
    action = torch.multinomial(behaviour, 1, generator=g).squeeze(-1)
    return {
        "probs": probs, "behaviour_probs": behaviour, "average": average, "action": action,
        "q_value": normal(number, actions), "q_return": normal(number, scale=3.0),
    }  # fmt: skip


def direct_gradient(case: dict[str, Tensor], clip: float) -> Tensor:
    """Equation 9 by autograd, one state and one action at a time."""
    out = torch.zeros_like(case["probs"])
    for n in range(len(out)):
        f = case["probs"][n].clone().requires_grad_()
        mu, q, a = case["behaviour_probs"][n], case["q_value"][n], int(case["action"][n])
        value = sum(float(f[b]) * float(q[b]) for b in range(len(f)))
        rho = float(f[a]) / float(mu[a])
        objective = min(clip, rho) * f[a].log() * (float(case["q_return"][n]) - value)
        for b in range(len(f)):
            if f[b] > 0:
                weight = max(0.0, 1 - clip * float(mu[b]) / float(f[b]))
                objective = objective + weight * float(f[b]) * f[b].log() * (float(q[b]) - value)
        out[n] = torch.autograd.grad(objective, f)[0].nan_to_num()
    return out


def gradient_error(module: dict[str, Any]) -> float:
    worst = 0.0
    for clip in (0.5, 1.0, 10.0):
        case = cases(1)
        average = case.pop("average")
        assert average.shape == case["probs"].shape
        found = module["acer_gradient"](**case, clip=clip)
        expected = direct_gradient(case, clip)
        worst = max(worst, float(((found - expected).abs() / (1 + expected.abs())).max()))
    return worst


def trust_region_error(module: dict[str, Any]) -> float:
    """How far the conditions of Karush, Kuhn and Tucker are from holding.

    z = g - m k, m >= 0, k.z <= delta, m (k.z - delta) = 0.
    """
    g = torch.Generator().manual_seed(2)
    gradient, against = torch.randn(2, 500, 4, generator=g, dtype=torch.float64)
    worst = 0.0
    for delta in (0.01, 0.5, 3.0):
        z = module["trust_region"](gradient=gradient, kl_gradient=against, delta=delta)
        multiplier = ((gradient - z) * against).sum(-1) / against.square().sum(-1)
        excess = (against * z).sum(-1) - delta
        worst = max(
            worst, float((gradient - z - multiplier.unsqueeze(-1) * against).abs().max()), float(-multiplier.min()),
            float(excess.max()), float((multiplier * excess).abs().max()),
        )  # fmt: skip
        if not (multiplier > 1e-6).any() or not (excess < -1e-6).any():  # both sides of the bound must be seen
            return math.inf
    return worst


def divergence_error(module: dict[str, Any]) -> float:
    case = cases(3)
    f = case["probs"].clone().requires_grad_()
    average = case["average"]
    divergence = torch.where(average > 0, average * (average / f).log(), 0).sum()
    expected = torch.autograd.grad(divergence, f)[0]
    expected = torch.where(average > 0, expected, 0)
    found = module["kl_gradient"](log_average=average.log(), log_probs=case["probs"].log())
    return float(((found - expected).abs() / (1 + expected.abs())).max())


def weights_error(module: dict[str, Any]) -> float:
    """mu min(c, rho) + pi [1 - c / rho]_+ = pi, and what each of them is."""
    case, worst = cases(4, illegal=False), 0.0
    pi, mu = case["probs"], case["behaviour_probs"]
    for clip in (0.3, 1.0, 10.0, math.inf):
        weight, correction = module["truncated_weights"](log_rho=pi.log() - mu.log(), clip=clip)
        rho = (pi / mu).clamp(max=clip)
        worst = max(
            worst, float(((mu * weight + pi * correction) / pi - 1).abs().max()), float((weight / rho - 1).abs().max())
        )
    return worst


ERRORS = (gradient_error, trust_region_error, divergence_error, weights_error)
MUTATIONS = {
    "pi and mu swapped": (gradient_error, "bound = clip * behaviour_probs", "bound = clip * probs"),
    "no bias correction": (gradient_error, "gradient = correction_weights(", "gradient = 0 * correction_weights("),
    "correction of the ratio itself": (gradient_error, "1 - bound / probs, 0)", "bound / probs, 0)"),
    "no baseline": (gradient_error, "weight * (q_return.unsqueeze(-1) - value)", "weight * q_return.unsqueeze(-1)"),
    "truncated at 1": (gradient_error, "torch.minimum(clip / chosen", "torch.minimum(1 / chosen"),
    "not truncated": (gradient_error, "torch.minimum(clip / chosen, 1 / behaviour)", "1 / behaviour"),
    "value of mu": (gradient_error, "value = (probs * q_value)", "value = (behaviour_probs * q_value)"),
    "only the action taken": (gradient_error, "gradient.scatter_add(", "(0 * gradient).scatter_add("),
    "projected always": (trust_region_error, "- delta / scale).clamp(min=0)", "- delta / scale)"),
    "delta forgotten": (trust_region_error, "- delta / scale)", ")"),
    "wrong unit of delta": (trust_region_error, "delta / scale)", "delta)"),
    "not divided by the square": (trust_region_error, "excess / square, 0)", "excess, 0)"),
    "wrong side": (trust_region_error, "return gradient - torch.where", "return gradient + torch.where"),
    "KL the other way round": (
        divergence_error, "(log_average - log_probs).clamp", "(log_probs - log_average).clamp",
    ),
    "sign of the KL": (divergence_error, "return -torch.where(log_average", "return torch.where(log_average"),
    "correction unclipped": (weights_error, ".exp()).clamp(min=0)", ".exp())"),
    "ratio upside down": (weights_error, "(math.log(clip) - log_rho)", "(log_rho - math.log(clip))"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_the_functions_are_the_papers(error: Any) -> None:
    assert error(vars(acer)) < 1e-12


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    error, old, new = MUTATIONS[mutation]
    assert error(mutant(acer, old, new)) > 1e-3


def paper(q_return: float) -> dict[str, Any]:
    probs, behaviour, q_value = (torch.tensor(x, dtype=torch.float64) for x in PAPER)
    return {
        "probs": probs, "behaviour_probs": behaviour, "action": torch.tensor(0), "q_value": q_value,
        "q_return": torch.tensor(q_return, dtype=torch.float64),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("q_return", "gradient", "product", "projected"),
    [
        (2.0, [18.657143, 0, 0], -13.3265, [18.657143, 0, 0]),
        (-1.0, [-24.2, 0, 0], 17.285714, [-22.479245, 3.613585, 4.818113]),
    ],
)
def test_worked_numbers(q_return: float, gradient: list[float], product: float, projected: list[float]) -> None:
    average = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    case = paper(q_return)
    found = acer_gradient(**case)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)
    against = kl_gradient(log_average=average.log(), log_probs=case["probs"].log())
    torch.testing.assert_close(against, -average / case["probs"])
    assert float((against * found).sum()) == pytest.approx(product, abs=1e-4)
    z = trust_region(gradient=found, kl_gradient=against, delta=1.0)
    torch.testing.assert_close(z, torch.tensor(projected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0.1, 1.0, 10.0, math.inf])
def test_truncated_and_correcting_part_are_the_full_policy_gradient(clip: float) -> None:
    """Where Q^ret is Q: the mean of g over mu is Q - V, whatever the clip."""
    case = cases(5)
    mean = torch.zeros_like(case["probs"])
    for a in range(mean.shape[1]):
        action = torch.full((len(mean),), a)
        g = acer_gradient(
            probs=case["probs"], behaviour_probs=case["behaviour_probs"], action=action, q_value=case["q_value"],
            q_return=case["q_value"][:, a], clip=clip,
        )  # fmt: skip
        mean += case["behaviour_probs"][:, a : a + 1] * g
    value = (case["probs"] * case["q_value"]).sum(-1, keepdim=True)
    legal = case["probs"] > 0
    torch.testing.assert_close(mean[legal], (case["q_value"] - value)[legal])
    assert not mean[~legal].any()


def test_extremes_are_finite() -> None:
    """Ratios and divergences beyond float32's range, and an illegal action that was never taken."""
    weight, correction = truncated_weights(log_rho=torch.tensor([200.0, -200.0, math.nan]), clip=10.0)
    assert weight.tolist() == [10.0, 0.0, 0.0]
    assert correction.tolist() == [1.0, 0.0, 0.0]
    probs, behaviour = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    for action in range(3):
        g = acer_gradient(
            probs=probs, behaviour_probs=behaviour, action=torch.tensor(action), q_value=torch.ones(3),
            q_return=torch.tensor(2.0),
        )  # fmt: skip
        assert g.isfinite().all()
        assert g[2] == 0
    against = kl_gradient(log_average=torch.tensor([-1.0, -0.5]), log_probs=torch.tensor([-1e4, 0.0]))
    z = trust_region(gradient=torch.tensor([-3.0, 1.0]), kl_gradient=against, delta=1.0)
    assert z.isfinite().all()
    assert z[0].abs() < 1e-6, "nothing may take more from an action that the average policy still takes"
    zero = trust_region(gradient=torch.ones(2), kl_gradient=torch.zeros(2), delta=1.0)
    assert zero.tolist() == [1.0, 1.0]


def test_no_gradient_flows_in() -> None:
    case = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in cases(6).items()}
    average = case.pop("average")
    g = acer_gradient(**case)
    against = kl_gradient(log_average=average, log_probs=average)
    z = trust_region(gradient=g, kl_gradient=against, delta=1.0)
    weights = truncated_weights(log_rho=average, clip=1.0)
    assert not any(x.requires_grad for x in (g, against, z, *weights))


def stored(policy: Any, **kwargs: Any) -> TensorDict:
    """A rollout whose behaviour policy's logits are kept; its log-probabilities are theirs."""
    td = rollout(**kwargs)
    logits = torch.randn(*td.batch_size, ACTIONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    td["logits"] = logits
    td["action_log_prob"] = chosen(logits.log_softmax(-1), td)
    return td


@pytest.mark.parametrize("delta", [None, 0.2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_loss_equals_the_direct_sums(delta: float | None, masked: bool, reduction: str, normalize: bool) -> None:
    """The gradient of the logits, one step at a time."""
    policy = policy_of()
    td = stored(policy)
    td = with_valid(td) if masked else td
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    loss = ACERLoss(
        policy, estimator="retrace(lmbda=0.8)", gamma=GAMMA, value_coef=0.7, entropy_coef=0.03, clip=1.3, delta=delta,
        reduction=reduction, normalize_advantage=normalize,
    )  # fmt: skip
    average = loss.policy  # without a bound there is none, and it counts for nothing
    if delta is not None:
        average = loss.target("policy")
        with torch.no_grad():
            for parameter in loss.target_policy_params.values(True, True):
                parameter.add_(0.3 * torch.randn_like(parameter))
    out = loss(td)
    log_pi, q = network(loss.policy, td["observation"])
    log_average, _ = network(average, td["observation"])
    target, _ = direct(loss.policy, td, "retrace")
    pi, mu, taken = log_pi.exp(), td["logits"].softmax(-1), chosen(q, td)
    surrogate, projected, corrections = torch.zeros(5, 7, dtype=torch.float64), 0, 0.0
    size = 1.0
    if normalize:
        errors = [float(target[i] - (pi[i] * q[i]).sum()) ** 2 for i in map(tuple, valid.nonzero().tolist())]
        size = math.sqrt(sum(errors) / len(errors))
    for b in range(5):
        for t in range(7):
            case = {
                "probs": pi[b, t].detach()[None], "behaviour_probs": mu[b, t][None], "action": td["action"][b, t][None],
                "q_value": q[b, t].detach()[None], "q_return": target[b, t][None],
            }  # fmt: skip
            g = direct_gradient(case, 1.3)[0] / size
            against = -(log_average[b, t].exp() / pi[b, t]).detach()
            excess = float((against * g).sum()) - (math.inf if delta is None else delta)
            z = g - max(0.0, excess) / float(against.square().sum()) * against
            surrogate[b, t] = (z * pi[b, t]).sum()
            theta = log_pi[b, t].detach().requires_grad_()
            moved = [torch.autograd.grad((x * theta.softmax(-1)).sum(), theta)[0] for x in (g, z)]
            changed = float((moved[1] - moved[0]).norm()) > 0.01 * float(moved[0].norm())
            projected += int(changed and bool(valid[b, t]))
            if valid[b, t]:
                corrections += float((pi[b, t] * (1 - 1.3 * mu[b, t] / pi[b, t]).clamp(min=0)).sum())
    count = int(valid.sum())
    scale = 1 if reduction == "sum" else count
    entropy = -(pi * log_pi).sum(-1)
    torch.testing.assert_close(out["loss_policy"], -surrogate[valid].sum() / scale)
    torch.testing.assert_close(out["loss_value"], 0.7 * 0.5 * (target - taken).square()[valid].sum() / scale)
    torch.testing.assert_close(out["loss_entropy"], -0.03 * entropy[valid].sum() / scale)
    torch.testing.assert_close(float(out["bias_correction"]), corrections / count)
    rho = (chosen(log_pi, td) - td["action_log_prob"]).exp()
    torch.testing.assert_close(out["pg_rho_clipped"], (rho[valid] > 1.3).float().mean())
    if delta is not None:
        assert 0 < projected < count
        torch.testing.assert_close(float(out["projected"]), projected / count, rtol=1e-6, atol=0)
        kl = (log_average.exp() * (log_average - log_pi)).sum(-1)
        torch.testing.assert_close(out["kl_average"], kl[valid].mean().detach())
    assert set(loss.out_keys) == set(out.keys())
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)
    found = torch.autograd.grad(total(out), list(loss.policy_params.parameters()))
    wanted = -surrogate[valid].sum() / scale + 0.7 * 0.5 * (target - taken).square()[valid].sum() / scale
    wanted = wanted - 0.03 * entropy[valid].sum() / scale
    expected = torch.autograd.grad(wanted, list(loss.policy_params.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


STATES = 3


def tabular(logits: Tensor, q: Tensor) -> Any:
    """A policy of TorchRL's own modules whose logits and action values are tables."""

    def table(values: Tensor, *, values_of_actions: bool) -> nn.Module:
        linear = nn.Linear(STATES, ACTIONS, bias=False).double()
        linear.weight.data.copy_(values.t())
        return nn.Sequential(linear, nn.Unflatten(-1, (1, ACTIONS))) if values_of_actions else linear

    policy = TensorDictSequential(
        TensorDictModule(table(logits, values_of_actions=False), in_keys=["observation"], out_keys=["logits"]),
        TensorDictModule(table(q, values_of_actions=True), in_keys=["observation"], out_keys=["action_value"]),
    )
    return ProbabilisticActor(
        policy, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )


@pytest.mark.parametrize("clip", [0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_expected_update_is_the_policy_gradient_of_the_true_values(clip: float, steps: int) -> None:
    """On a random deterministic MDP whose critic is solved, under mu: sum over x of d(x) sum over a of grad pi Q^pi.

    Every sequence of ``steps`` actions stands in the batch as often as mu takes it, from every state, so the mean is
    the expectation. d is uniform over the states at the first step, and what follows from it at the second.
    """
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    reward = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    following = torch.randint(STATES, (STATES, ACTIONS), generator=g)
    share = torch.tensor([[1, 2, 1], [2, 1, 1], [1, 1, 2]])[:, :ACTIONS]  # quarters of mu
    pi, mu = logits.softmax(-1), share / share.sum(-1, keepdim=True)
    # Q = r + gamma sum over b of pi(b|x') Q(x', b), solved
    size = STATES * ACTIONS
    transition = torch.zeros(size, size, dtype=torch.float64)
    for x in range(STATES):
        for a in range(ACTIONS):
            for b in range(ACTIONS):
                transition[x * ACTIONS + a, int(following[x, a]) * ACTIONS + b] = pi[following[x, a], b]
    q = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - GAMMA * transition, reward.flatten())
    q = q.view(STATES, ACTIONS)
    rows: list[list[tuple[int, int]]] = []
    for x in range(STATES):
        for a in range(ACTIONS):
            for b in range(ACTIONS) if steps == 2 else [0]:
                y = int(following[x, a])
                path = [(x, a), (y, b)][:steps]
                rows += [path] * math.prod(int(share[state, action]) for state, action in path)
    state, action = (torch.tensor([[step[part] for step in row] for row in rows]) for part in (0, 1))
    one_hot = nn.functional.one_hot(state, STATES).double()
    ends = torch.zeros(*state.shape, 1, dtype=torch.bool)
    td = TensorDict(
        {
            "observation": one_hot, "action": action, "logits": mu.double().log()[state],
            "action_log_prob": mu.double()[state, action].log(),
            "next": {
                "observation": nn.functional.one_hot(following[state, action], STATES).double(),
                "reward": reward[state, action].unsqueeze(-1), "terminated": ends, "done": ends.clone(),
            },
        },
        list(state.shape),
    )  # fmt: skip
    loss = ACERLoss(tabular(logits, q), gamma=GAMMA, clip=clip, delta=None)
    out = loss(td)
    assert float(out["loss_value"]) < 1e-20, "the critic is a fixed point"
    weight = next(p for p in loss.policy_params.parameters() if p.shape == (ACTIONS, STATES))
    (found,) = torch.autograd.grad(out["loss_policy"], weight)
    visits = torch.bincount(state.flatten(), minlength=STATES) / state.numel()
    theta = logits.clone().requires_grad_()
    objective = (visits.unsqueeze(-1) * theta.softmax(-1) * q).sum()
    torch.testing.assert_close(-found.t(), torch.autograd.grad(objective, theta)[0])


def test_the_average_policy_follows_and_is_not_trained() -> None:
    policy = policy_of()
    loss = ACERLoss(policy, gamma=GAMMA)
    updater = FastSoftUpdate(loss, tau=0.01)
    before = [x.clone() for x in loss.target_policy_params.values(True, True)]
    total(loss(stored(policy))).backward()
    with torch.no_grad():
        for parameter in loss.policy_params.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    updater.step()
    pairs = zip(
        before, loss.target_policy_params.values(True, True), loss.policy_params.values(True, True), strict=True
    )
    for old, average, new in pairs:
        torch.testing.assert_close(average, 0.99 * old + 0.01 * new)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.policy_params.parameters()}


def test_at_the_average_policy_the_trust_region_does_not_act() -> None:
    """k is -1 for every action there: what it takes away does not move a distribution."""
    case = cases(9, illegal=False)
    g = acer_gradient(**{name: x for name, x in case.items() if name != "average"})
    against = kl_gradient(log_average=case["probs"].log(), log_probs=case["probs"].log())
    torch.testing.assert_close(against, -torch.ones_like(against))
    z = trust_region(gradient=g, kl_gradient=against, delta=1.0)
    theta = case["probs"].log().requires_grad_()
    f = theta.softmax(-1)
    first, second = (torch.autograd.grad((x * f).sum(), theta, retain_graph=True)[0] for x in (g, z))
    torch.testing.assert_close(first, second)


def test_what_moves_no_logit_counts_as_no_projection() -> None:
    """Of the policy that is the average one every projection is a shift; of another one some are not."""
    policy = policy_of()
    loss, td = ACERLoss(policy, gamma=GAMMA, delta=1e-3), stored(policy)
    assert loss(td)["projected"] == 0
    with torch.no_grad():
        for parameter in loss.target_policy_params.values(True, True):
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert loss(td)["projected"] > 0


@pytest.mark.parametrize("recurrent", [None, 6])
def test_the_average_policy_leaves_what_the_policy_wrote(recurrent: int | None) -> None:
    policy, seen = policy_of(recurrent=recurrent), []
    loss, td = ACERLoss(policy, gamma=GAMMA), stored(policy, ends=0.5)
    with torch.no_grad():
        for parameter in loss.target_policy_params.values(True, True):
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unroll, "evaluate_rollout", lambda *x, **y: seen.append(evaluate_rollout(*x, **y)) or seen[-1])
        loss(td)
    (evaluated,) = seen
    torch.testing.assert_close(evaluated.unroll.steps(evaluated.output["logits"]), evaluated.params["logits"])


@pytest.mark.parametrize("recurrent", [None, 6])
def test_the_average_policy_is_computed_at_the_steps(recurrent: int | None) -> None:
    """Its parameters at the steps are those that it has in the whole sequence; no more is computed than they need."""
    policy = policy_of(recurrent=recurrent)
    loss, td = ACERLoss(policy, gamma=GAMMA), stored(policy, ends=0.5)
    with torch.no_grad(), set_recurrent_mode(True):
        for parameter in loss.target_policy_params.values(True, True):
            parameter.add_(0.3 * torch.randn_like(parameter))
        evaluated = evaluate_rollout(loss, td)
        sequence = evaluated.unroll
        whole = loss.target("policy").get_dist_params(sequence.inputs.select(*policy.in_keys))
        if recurrent is None:
            loss.target("policy").network.value_head = None
        (logits,) = acer.average_parameters(loss, evaluated)
    torch.testing.assert_close(logits, sequence.steps(whole["logits"]))
    assert not torch.allclose(logits, evaluated.params["logits"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.0}, "clip must be positive; inf never clips, got 0"),
        ({"delta": -1.0}, "delta must be positive and finite, or None, got -1"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"estimator": "n_step(n=3)"}, "learns from every step of a rollout"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ACERLoss(policy_of(), **options)


def test_a_policy_without_action_values_is_refused() -> None:
    with pytest.raises(ValueError, match="ACERLoss needs a policy over discrete actions that writes 'action_value'"):
        ACERLoss(make())


def test_a_batch_without_the_whole_behaviour_is_refused() -> None:
    policy = policy_of()
    batch: TensorDictBase = stored(policy).exclude("logits")
    with pytest.raises(
        KeyError, match=r"reads 'logits', of the behaviour policy's whole distribution, .* keep the entry"
    ):
        ACERLoss(policy)(batch)


def test_what_stands_in_invalid_steps_reaches_nothing() -> None:
    policy = policy_of()
    td = with_valid(stored(policy))
    clean = gradients(ACERLoss(policy, gamma=GAMMA), td.clone())
    invalid = ~td["valid"].squeeze(-1)
    for key in ("logits", "action_log_prob", ("next", "reward")):
        td[key][invalid] = math.nan
    torch.testing.assert_close(gradients(ACERLoss(policy, gamma=GAMMA), td), clean)
