"""Reactor: beta-LOO against autograd and its expectations, the loss against direct sums in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from offtrace.modules.losses import FastHardUpdate, ReactorLoss, reactor
from offtrace.modules.losses.reactor import beta_loo
from offtrace.modules.networks import Policy
from offtrace.modules.replay import LazyPrioritized
from tests.modules.reference import distributional_sums, q_return_sums
from tests.modules.test_acer_loss import PAPER, cases
from tests.modules.test_impala_loss import ACTIONS, FEATURES, LOSSES, gradients, make, rollout, total
from tests.modules.test_q_actor_critic_loss import chosen, with_valid
from tests.modules.test_returns_mutations import mutant

GAMMA, LMBDA = 0.9, 0.8
ATOMS, V_MAX = 7, 3.0
CRITICS = ("values", "distributions")


def softmax_gradient(logits: Tensor, index: int) -> Tensor:
    """grad of pi(index) with respect to the logits, in closed form."""
    pi = logits.softmax(-1)
    return pi[index] * (nn.functional.one_hot(torch.tensor(index), len(pi)) - pi)


def direct_gradient(case: dict[str, Tensor], clip: float) -> Tensor:
    """beta (R - Q(A)) grad pi(A) + sum of Q(a) grad pi(a), one state and one action at a time."""
    out = torch.zeros_like(case["probs"])
    for n, pi in enumerate(case["probs"]):
        logits, a, q = pi.log(), int(case["action"][n]), case["q_value"][n]
        beta = min(clip, 1 / float(case["behaviour_probs"][n, a]))
        out[n] = beta * (float(case["q_return"][n]) - float(q[a])) * softmax_gradient(logits, a)
        for b in range(len(pi)):
            if pi[b] > 0:
                out[n] += float(q[b]) * softmax_gradient(logits, b)
    return out


def found_gradient(module: dict[str, Any], case: dict[str, Tensor], clip: float) -> Tensor:
    logits = case["probs"].log().requires_grad_()
    surrogate = module["beta_loo"](**{**case, "probs": logits.softmax(-1)}, clip=clip)
    return torch.autograd.grad(surrogate.sum(), logits)[0].nan_to_num()


def random_cases(seed: int, **options: Any) -> dict[str, Tensor]:
    case = cases(seed, **options)
    del case["average"]
    return case


def gradient_error(module: dict[str, Any]) -> float:
    worst = 0.0
    for seed, clip in enumerate((0.5, 1.0, 1.7, 5.0, math.inf)):
        case = random_cases(seed)
        found, expected = found_gradient(module, case, clip), direct_gradient(case, clip)
        worst = max(worst, float(((found - expected).abs() / (1 + expected.abs())).max()))
    return worst


def value_error(module: dict[str, Any]) -> float:
    """The surrogate itself, as a finite sum."""
    worst = 0.0
    for seed, clip in enumerate((1.0, 3.0)):
        case = random_cases(10 + seed)
        found = module["beta_loo"](**case, clip=clip)
        for n, value in enumerate(found.tolist()):
            a = int(case["action"][n])
            beta = min(clip, 1 / float(case["behaviour_probs"][n, a]))
            expected = beta * float((case["q_return"][n] - case["q_value"][n, a]) * case["probs"][n, a])
            expected += sum(float(q * p) for q, p in zip(case["q_value"][n], case["probs"][n], strict=True))
            worst = max(worst, abs(value - expected) / (1 + abs(expected)))
    return worst


MUTATIONS = {
    "1 / mu": (gradient_error, ".clamp(max=clip)", ""),
    "the larger of the two": (gradient_error, ".clamp(max=clip)", ".clamp(min=min(clip, 9.0))"),
    "mu for 1 / mu": (gradient_error, "(1 / behaviour)", "behaviour"),
    "pi for mu": (gradient_error, "behaviour = behaviour_probs.gather", "behaviour = probs.gather"),
    "log pi(A)": (gradient_error, "(error * probs.gather(-1, index))", "(error * probs.gather(-1, index).log())"),
    "sign of Q(A)": (gradient_error, "- q_value.gather", "+ q_value.gather"),
    "no Q(A)": (gradient_error, "- q_value.gather", "- 0 * q_value.gather"),
    "sign of the return": (gradient_error, "beta * (q_return", "beta * (-q_return"),
    "no leave-one-out term": (gradient_error, " + (every * probs).sum(-1)", ""),
    "the term with mu": (gradient_error, "(every * probs)", "(every * behaviour_probs)"),
    "the term over log pi": (gradient_error, "(every * probs)", "(every * (probs + 1e-9).log())"),
    "a part of the term": (value_error, " + (every * probs)", " + 0.9 * (every * probs)"),
}


@pytest.mark.parametrize("error", [gradient_error, value_error])
def test_beta_loo_is_the_papers(error: Any) -> None:
    assert error(vars(reactor)) < 1e-12


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    error, old, new = MUTATIONS[mutation]
    assert error(mutant(reactor, old, new)) > 1e-3


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [0.42, -0.18, -0.24]), (5.0, [1.26, -0.74, -0.52])])
def test_worked_numbers(clip: float, expected: list[float]) -> None:
    probs, behaviour, q_value = (torch.tensor(x, dtype=torch.float64) for x in PAPER)
    case = {"behaviour_probs": behaviour, "action": torch.tensor(0), "q_value": q_value}
    logits = probs.log().requires_grad_()
    found = beta_loo(probs=logits.softmax(-1), q_return=torch.tensor(2.0).double(), **case, clip=clip)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("clip", [1.0, 2.5, math.inf])
def test_the_mean_over_mu_is_the_policy_gradient_and_a_known_bias(clip: float) -> None:
    """With Q^pi(A) for a return and any Q: unbiased where beta is 1 / mu, else off by what the paper says."""
    case = random_cases(5, illegal=False)
    true = torch.randn(case["probs"].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    logits, mu = case["probs"].log().requires_grad_(), case["behaviour_probs"]
    mean = torch.zeros_like(mu)
    for a in range(mu.shape[1]):
        surrogate = beta_loo(
            probs=logits.softmax(-1), behaviour_probs=mu, action=torch.full((len(mu),), a), q_value=case["q_value"],
            q_return=true[:, a], clip=clip,
        )  # fmt: skip
        mean += mu[:, a : a + 1] * torch.autograd.grad(surrogate.sum(), logits)[0]
    gradient = torch.autograd.grad((logits.softmax(-1) * true).sum(), logits)[0]
    left = 1 - mu * (1 / mu).clamp(max=clip)
    bias = torch.autograd.grad((logits.softmax(-1) * left * (case["q_value"] - true)).sum(), logits)[0]
    torch.testing.assert_close(mean, gradient + bias)
    assert (float(bias.abs().max()) > 0.1) == (clip < math.inf)
    torch.testing.assert_close(
        beta_loo(**{**case, "q_return": case["q_value"][:, 0], "action": torch.zeros(len(mu)).long()}, clip=clip),
        (case["probs"] * case["q_value"]).sum(-1), msg="where the return is Q, Q alone decides",
    )  # fmt: skip


def test_only_the_probabilities_get_a_gradient_and_illegal_actions_give_nothing() -> None:
    case = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in random_cases(7).items()}
    illegal = (case["probs"] == 0) & (case["behaviour_probs"] == 0)
    assert illegal.any(-1).all()
    case["q_value"].data[illegal] = math.nan
    beta_loo(**case).sum().backward()
    assert all(case[name].grad is None for name in ("behaviour_probs", "q_value", "q_return"))
    assert case["probs"].grad is not None
    assert case["probs"].grad.isfinite().all()
    assert not case["probs"].grad[illegal].any()
    assert case["probs"].grad[~illegal].all()
    # taken as the padding of an invalid step takes it
    action = illegal.int().argmax(-1)
    with torch.no_grad():
        found = beta_loo(**{**case, "action": action})
    torch.testing.assert_close(found, (case["probs"] * case["q_value"].nan_to_num()).sum(-1).detach())


def policy_of(critic: str = "distributions", **kwargs: Any) -> Policy:
    if critic == "distributions":
        kwargs["critic_options"] = {"atoms": ATOMS, "v_max": V_MAX, **kwargs.get("critic_options", {})}
    return make(critic="q", **kwargs)


def stored(weights: bool = False, **kwargs: Any) -> TensorDict:
    """Sequences whose behaviour policy's logits are kept; its log-probabilities are theirs."""
    td = rollout(**kwargs)
    g = torch.Generator().manual_seed(7)
    td["logits"] = torch.randn(*td.batch_size, ACTIONS, generator=g, dtype=torch.float64)
    td["action_log_prob"] = chosen(td["logits"].log_softmax(-1), td)
    if weights:
        td["weight"] = (0.2 + 3 * torch.rand(td.batch_size[0], 1, generator=g)).expand(td.batch_size)
    return td


def reactor_loss(policy: Policy, kind: Any = ReactorLoss, **options: Any) -> ReactorLoss:
    """A loss whose target network differs from its network."""
    loss: ReactorLoss = kind(policy, estimator=f"retrace(lmbda={LMBDA})", gamma=GAMMA, **options)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in loss.target_policy_params.values(True, True):
            if parameter.dim() > 0 and parameter.shape != (ATOMS,):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return loss


def network(policy: Any, observation: Tensor) -> tuple[Tensor, Tensor]:
    """log pi [B, T, A], and what the critic gives of every action: values [B, T, A] or logits [B, T, A, atoms]."""
    net = policy.module[0]
    features = net.encoder(observation.reshape(-1, FEATURES))
    values = net.value_head(features)
    values = values.squeeze(1).view(*observation.shape[:-1], *values.shape[2:])
    return net.head(features)[0].log_softmax(-1).view(*observation.shape[:-1], -1), values


@torch.no_grad()
def direct_target(loss: ReactorLoss, td: TensorDict) -> Tensor:
    """q* [B, T, atoms] or R [B, T], a row at a time, by the sums of the papers."""
    log_pi, _ = network(loss.policy, td["observation"])
    next_pi = network(loss.policy, td["next", "observation"])[0].exp()
    known, after = (network(loss.target("policy"), td[key])[1] for key in ("observation", ("next", "observation")))
    rho = (chosen(log_pi, td) - td["action_log_prob"]).exp()
    rows = []
    for b in range(len(td)):
        names: dict[str, Any] = {
            name: td["next", name][b].squeeze(-1).numpy() for name in ("reward", "terminated", "done")
        }
        names["trace"] = (LMBDA * rho[b].clamp(max=1)).numpy()
        names["valid"] = td["valid"][b].squeeze(-1).numpy() if "valid" in td else None
        steps = torch.arange(td.shape[1])
        if loss.support is None:
            names["q_value"] = known[b, steps, td["action"][b]].numpy()
            names["next_state_value"] = (next_pi[b] * after[b]).sum(-1).numpy()
            rows.append(q_return_sums(**names, gamma=GAMMA)[0])
        else:
            names["q_dist"] = known[b, steps, td["action"][b]].softmax(-1).numpy()
            names["next_state_dist"] = (next_pi[b].unsqueeze(-1) * after[b].softmax(-1)).sum(1).numpy()
            rows.append(distributional_sums(**names, gamma=GAMMA, support=loss.support.numpy()))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weights", [False, True])
def test_loss_equals_the_direct_sums(critic: str, masked: bool, reduction: str, weights: bool) -> None:
    policy, td = policy_of(critic), stored(weights)
    td = with_valid(td) if masked else td
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    loss = reactor_loss(policy, value_coef=0.7, entropy_coef=0.03, clip=1.9, reduction=reduction)
    out = loss(td)
    log_pi, outputs = network(loss.policy, td["observation"])
    target, support = direct_target(loss, td), loss.support
    q = outputs if support is None else outputs.softmax(-1) @ support
    mean = target if support is None else target @ support
    if support is not None:
        assert (target < -0.01).any(), "negative entries must be seen"
    pi, mu, q_taken = log_pi.exp(), td["logits"].softmax(-1), chosen(q, td).detach()
    w = td["weight"] if weights else torch.ones(5, 7)
    policy_sum, value_sum, entropy_sum, clipped = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for b in range(5):
        for t in range(7):
            if not valid[b, t]:
                continue
            a = int(td["action"][b, t])
            beta = min(1.9, 1 / float(mu[b, t, a]))
            clipped += 1 / float(mu[b, t, a]) > 1.9
            first = beta * float(mean[b, t] - q_taken[b, t]) * pi[b, t, a]
            every = sum(float(q[b, t, i].detach()) * pi[b, t, i] for i in range(ACTIONS))
            policy_sum = policy_sum - w[b, t] * (first + every)
            if support is None:
                error = 0.5 * (mean[b, t] - q[b, t, a]) ** 2
            else:
                log_q = outputs[b, t, a].log_softmax(-1)
                error = -sum(float(target[b, t, i]) * log_q[i] for i in range(ATOMS))
            value_sum = value_sum + 0.7 * w[b, t] * error
            entropy_sum = entropy_sum + 0.03 * w[b, t] * (pi[b, t] * log_pi[b, t]).sum()
    count = int(valid.sum())
    scale = 1 if reduction == "sum" else count
    for name, value in zip(LOSSES, (policy_sum, value_sum, entropy_sum), strict=True):
        torch.testing.assert_close(out[name], value / scale)
    assert set(out.keys()) == set(loss.out_keys)
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)
    torch.testing.assert_close(float(out["beta_clipped"]), float(clipped) / count, rtol=1e-6, atol=0)
    assert 0 < float(clipped) < count
    error = (mean - q_taken)[valid]
    explained = 1 - error.var(correction=0) / mean[valid].var(correction=0)
    torch.testing.assert_close(out["explained_variance"], explained)
    advantage = (mean - (pi * q).sum(-1).detach())[valid]
    torch.testing.assert_close(out["advantage_std"], advantage.std(correction=0))
    torch.testing.assert_close(out["entropy"], -(pi * log_pi).sum(-1)[valid].mean().detach())
    torch.testing.assert_close(out["kl"], (mu * (mu.log() - log_pi)).sum(-1)[valid].mean().detach())
    rho = (chosen(log_pi, td) - td["action_log_prob"]).exp().detach()[valid]
    torch.testing.assert_close(out["ratio_mean"], rho.mean())
    torch.testing.assert_close(out["c_clipped"], (rho > 1).double().mean(), check_dtype=False)
    parameters = list(loss.policy_params.parameters())
    found = torch.autograd.grad(total(out), parameters)
    expected = torch.autograd.grad((policy_sum + value_sum + entropy_sum) / scale, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("priority", ["td", "total_variation"])
@pytest.mark.parametrize("masked", [False, True])
def test_priorities_are_those_of_the_sequences(priority: str, masked: bool) -> None:
    for critic in CRITICS if priority == "td" else CRITICS[1:]:
        policy, td = policy_of(critic), stored()
        td = with_valid(td) if masked else td
        valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
        loss = reactor_loss(policy, priorities=True, priority=priority)
        plain = td.clone()
        loss(td)
        assert "td_error" not in plain
        reactor_loss(policy, priority=priority)(plain)
        assert "td_error" not in plain, "nobody asked for them"
        target, outputs = direct_target(loss, td), network(loss.policy, td["observation"])[1].detach()
        taken = outputs[torch.arange(5)[:, None], torch.arange(7), td["action"]]
        if loss.support is None:
            error = (target - taken).abs()
        elif priority == "td":
            error = ((target - taken.softmax(-1)) @ loss.support).abs()
        else:
            error = 0.5 * (target - taken.softmax(-1)).abs().sum(-1)
        for b in range(5):
            torch.testing.assert_close(td["td_error"][b], error[b][valid[b]].mean().expand(7))


def loss_error(module: dict[str, Any]) -> float:
    """Distance of the mutant's losses and gradients from the direct ones, which the source's own are equal to."""
    policy, td = policy_of(), with_valid(stored(weights=True))
    results = []
    for kind in (ReactorLoss, module["ReactorLoss"]):
        loss = reactor_loss(
            policy, kind, clip=1.9, value_coef=0.7, entropy_coef=0.03, priorities=True, priority="total_variation"
        )
        batch = td.clone()
        out = loss(batch)
        for parameter in loss.parameters():
            parameter.grad = None
        total(out).backward()
        grads = [p.grad.flatten() for p in loss.policy_params.parameters()]
        results.append(torch.cat([batch["td_error"].flatten(), out["beta_clipped"].view(1), *grads]))
    return float((results[0] - results[1]).abs().max())


LOSS_MUTATIONS = {
    "target of the online network": ('critic_of(self.target("policy"))', "critic_of(self.policy)"),
    "mixed by the target's policy": (
        "mixed = next_probs if",
        'logits = self.target("policy").get_dist_params(inputs).get(k.LOGITS)\n'
        "            next_probs = unroll.successors(logits.softmax(-1))\n            mixed = next_probs if",
    ),
    "successors for steps": ("mixed * unroll.successors(known)", "mixed * unroll.steps(known)"),
    "negative entries cut off": ("errors = -(target *", "errors = -(target.clamp(min=0) *"),
    "behaviour of the target": ("behaviour_probs=behaviour_probs,", "behaviour_probs=probs.detach(),"),
    "no weights": ("weight = None if weight is None else", "weight = None if True else"),
    "weights divided by the largest": ("selection, relative=False)", "selection)"),
    "weights of the policy alone": ("weighted(errors, weight)", "weighted(errors, None)"),
    "sign of the policy": ('"loss_policy": -stats', '"loss_policy": stats'),
    "sign of the entropy": ("-self.entropy_coef *", "self.entropy_coef *"),
    "half of the variation": ("error = 0.5 * (target", "error = (target"),
    "clip of the share": ("math.log(self.clip) +", "-math.log(self.clip) +"),
}


@pytest.mark.parametrize("mutation", LOSS_MUTATIONS)
def test_every_mutation_of_the_loss_is_caught(mutation: str) -> None:
    assert loss_error(mutant(reactor, *LOSS_MUTATIONS[mutation])) > 1e-4


def test_of_the_target_network_the_critic_alone_runs() -> None:
    loss, called = reactor_loss(policy_of()), []
    for name, policy in (("online", loss.policy), ("target", loss.target("policy"))):
        policy.network.head.register_forward_hook(lambda *_, name=name: called.append(name))
    loss(stored())
    assert called == ["online"]


def test_the_expected_gradient_is_that_of_uniform_sampling() -> None:
    """Over batches of 4 that lazy priorities drew, with beta = 1; divided by a batch's largest weight it is not."""
    items, draws = 40, 400_000
    policy, td = policy_of(), torch.cat([stored(seed=seed) for seed in range(items // 5)])
    loss = reactor_loss(policy, entropy_coef=0.03)
    parameters = list(loss.policy_params.parameters())

    def gradient(batch: TensorDict) -> Tensor:
        found = torch.autograd.grad(total(loss(batch)), parameters)
        return torch.cat([x.flatten() for x in found])

    each = torch.stack([gradient(td[i : i + 1]) for i in range(items)])
    sampler, rng = LazyPrioritized(), np.random.default_rng(0)
    sampler.bind(items)
    sampler.add(np.arange(items))
    sampler.update(np.arange(items), np.exp(1.5 * rng.normal(size=items)))
    slots, weights = sampler.draw(draws, torch.Generator().manual_seed(0))
    slots, weight = torch.from_numpy(slots).view(-1, 4), torch.from_numpy(weights).double().view(-1, 4)
    assert weight.max() <= 10
    for rows, w in zip(slots[:10], weight[:10], strict=True):
        batch = td[rows].set("weight", w.unsqueeze(1).expand(4, 7))
        torch.testing.assert_close(gradient(batch), (w.unsqueeze(1) * each[rows]).mean(0))

    def expected(w: Tensor) -> Tensor:
        share = torch.zeros(items, dtype=torch.float64).scatter_add(0, slots.flatten(), w.flatten())
        return share @ each / draws

    uniform = each.mean(0)
    assert float((expected(weight) - uniform).norm() / uniform.norm()) < 0.02
    relative = weight / weight.amax(1, keepdim=True)
    assert float((expected(relative / relative.mean()) - uniform).norm() / uniform.norm()) > 0.1


STATES = 3


def tabular(logits: Tensor, q: Tensor) -> Any:
    """A policy of TorchRL's own modules whose logits and action values are tables."""

    def table(values: Tensor) -> nn.Linear:
        linear = nn.Linear(STATES, ACTIONS, bias=False).double()
        linear.weight.data.copy_(values.t())
        return linear

    policy = TensorDictSequential(
        TensorDictModule(table(logits), in_keys=["observation"], out_keys=["logits"]),
        TensorDictModule(
            nn.Sequential(table(q), nn.Unflatten(-1, (1, ACTIONS))), in_keys=["observation"], out_keys=["action_value"]
        ),
    )
    return ProbabilisticActor(
        policy, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )


def test_the_expected_update_is_the_policy_gradient_of_the_true_values() -> None:
    """On a random MDP whose critic is solved: whatever the clip, and 0 for the critic. One step from every state."""
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    reward = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    following = torch.randint(STATES, (STATES, ACTIONS), generator=g)
    share = torch.tensor([[1, 2, 1], [2, 1, 1], [1, 1, 2]])  # quarters of mu
    pi, mu = logits.softmax(-1), share.double() / 4
    size = STATES * ACTIONS
    transition = torch.zeros(size, size, dtype=torch.float64)
    for x in range(STATES):
        for a in range(ACTIONS):
            for b in range(ACTIONS):
                transition[x * ACTIONS + a, int(following[x, a]) * ACTIONS + b] = pi[following[x, a], b]
    q = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - GAMMA * transition, reward.flatten())
    rows = [(x, a) for x in range(STATES) for a in range(ACTIONS) for _ in range(int(share[x, a]))]
    state, action = torch.tensor(rows).unsqueeze(1).unbind(-1)
    ends = torch.zeros(*state.shape, 1, dtype=torch.bool)
    one_hot = nn.functional.one_hot
    td = TensorDict(
        {
            "observation": one_hot(state, STATES).double(), "action": action, "logits": mu.log()[state],
            "action_log_prob": mu[state, action].log(),
            "next": {
                "observation": one_hot(following[state, action], STATES).double(),
                "reward": reward[state, action].unsqueeze(-1), "terminated": ends, "done": ends.clone(),
            },
        },
        list(state.shape),
    )  # fmt: skip
    theta = logits.clone().requires_grad_()
    expected = torch.autograd.grad((theta.softmax(-1) * q.view(STATES, ACTIONS)).sum() / STATES, theta)[0]
    for clip in (1.0, math.inf):
        loss = ReactorLoss(tabular(logits, q.view(STATES, ACTIONS)), gamma=GAMMA, clip=clip)
        out = loss(td)
        assert float(out["loss_value"].detach()) < 1e-20, "the critic is a fixed point"
        weight = next(p for p in loss.policy_params.parameters() if p.shape == (ACTIONS, STATES))
        (found,) = torch.autograd.grad(out["loss_policy"], weight)
        torch.testing.assert_close(-found.t(), expected)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_target_follows_by_copies_alone(critic: str) -> None:
    loss = ReactorLoss(policy_of(critic), gamma=GAMMA)
    before = [x.clone() for x in loss.target_policy_params.values(True, True)]
    total(loss(stored())).backward()
    with torch.no_grad():
        for parameter in loss.policy_params.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    for old, target in zip(before, loss.target_policy_params.values(True, True), strict=True):
        assert torch.equal(old, target)
    FastHardUpdate(loss).step()
    pairs = zip(loss.policy_params.values(True, True), loss.target_policy_params.values(True, True), strict=True)
    assert all(torch.equal(new, target) for new, target in pairs)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.policy_params.parameters()}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("recurrent", [None, 6])
def test_only_the_entries_that_matter_are_read(critic: str, recurrent: int | None) -> None:
    """NaN in the successors inside an episode, of terminal steps and in all of an invalid step changes nothing."""
    loss = ReactorLoss(policy_of(critic, recurrent=recurrent), gamma=GAMMA, priorities=True, clip=math.inf)
    td = with_valid(stored(ends=0.5))
    valid, done, terminated = td["valid"], td["next", "done"], td["next", "terminated"]
    clean = td.clone()
    expected, grads = loss(clean), gradients(loss, clean.clone())
    needed = done & ~terminated & valid
    needed[:, -1] = (~terminated & valid)[:, -1]
    hidden = td.clone()
    for key in ("observation", "last_reward"):
        hidden["next", key] = td["next", key].masked_fill(~needed, math.nan)
    hidden["next", "reward"] = td["next", "reward"].masked_fill(~valid, math.nan)
    hidden["action_log_prob"] = td["action_log_prob"].masked_fill(~valid.squeeze(-1), math.nan)
    hidden["logits"] = td["logits"].masked_fill(~valid, math.nan)
    torch.testing.assert_close(loss(hidden), expected)
    torch.testing.assert_close(hidden["td_error"], clean["td_error"])
    torch.testing.assert_close(gradients(loss, hidden), grads)


@pytest.mark.parametrize("critic", CRITICS)
def test_illegal_actions_have_no_value_and_get_no_gradient(critic: str) -> None:
    policy, td = policy_of(critic, masked=True, head_options={"epsilon": 0.1}), stored()
    mask = torch.tensor([True, True, False]).expand(5, 7, 3)
    td["action_mask"], td["action"] = mask.clone(), td["action"].clamp(max=1)
    td["logits"] = td["logits"].masked_fill(~mask, -1e30)
    with pytest.raises(KeyError, match=r"next.*action_mask"):
        ReactorLoss(policy)(td)
    td["next", "action_mask"] = mask.clone()
    loss = ReactorLoss(policy, gamma=GAMMA)
    expected, grads = loss(td), gradients(loss, td)
    assert all(x.isfinite().all() for x in grads)
    head = loss.policy.network.value_head
    with torch.no_grad():
        head.linear.bias.view(ACTIONS, -1)[2] += torch.arange(ATOMS if critic == "distributions" else 1) * 10.0
    FastHardUpdate(loss).step()
    torch.testing.assert_close(loss(td), expected)
    torch.testing.assert_close(gradients(loss, td), grads)


def test_one_call_of_each_network() -> None:
    loss = ReactorLoss(policy_of(), gamma=GAMMA)
    seen: list[str] = []
    for name, network_ in (("online", loss.policy), ("target", loss.target("policy"))):
        network_.network.encoder.register_forward_hook(lambda *_, name=name: seen.append(name))
    loss(stored())
    assert seen == ["online", "target"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.0}, "clip must be positive; inf never clips, got 0"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"reduction": "max"}, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"estimator": "n_step(n=3)"}, "learns from every step of a rollout"),
        ({"priority": "kl"}, r"priority must be one of \('td', 'total_variation'\), got 'kl'"),
        (
            {"critic": "values", "priority": "total_variation"},
            "needs distributions, and the policy writes plain values",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    policy = policy_of(options.pop("critic", "distributions"))
    with pytest.raises(ValueError, match=words):
        ReactorLoss(policy, **options)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="ReactorLoss needs a policy over discrete actions that writes 'action_value'"):
        ReactorLoss(make())
    with pytest.raises(ValueError, match=r"the batch must be \[B, T\]"):
        ReactorLoss(policy_of())(stored()[:, 0])
    with pytest.raises(KeyError, match=r"reads 'logits', of the behaviour policy's whole distribution"):
        ReactorLoss(policy_of())(stored().exclude("logits"))


@pytest.mark.slow
@pytest.mark.parametrize("critic", CRITICS)
def test_compiled_equals_eager(critic: str) -> None:
    loss, td = ReactorLoss(policy_of(critic)), with_valid(stored(weights=True))
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(td), loss(td))
