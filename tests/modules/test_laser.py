"""LASER's trust region: divergence and masked V-trace against direct sums, and where V-trace alone goes wrong."""

from __future__ import annotations

import inspect
import math
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from offtrace.modules.estimators import GAE, NStepReturn, Retrace, TreeBackup, VTrace, WeightedGAE, base
from offtrace.modules.estimators import NStep as NStepQ
from offtrace.modules.estimators.base import Outcome
from offtrace.modules.losses import ImpalaLoss, impala, truncated_policy_kl
from tests.modules.test_impala_loss import ACTIONS, LOSSES, gradients, make, network, rollout
from tests.modules.test_returns_mutations import mutant
from tests.modules.test_returns_tabular import GAMMA as DISCOUNT
from tests.modules.test_returns_tabular import MDP, sample

GAMMA, BOUND = 0.9, 0.08


def cases(seed: int, number: int = 400, actions: int = 4, illegal: bool = True) -> tuple[Tensor, Tensor]:
    """log pi and log mu of random states in float64; one action is illegal in each, where wanted."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, number, actions, generator=g, dtype=torch.float64)
    if illegal:
        logits[:, torch.arange(number), torch.randint(actions, (number,), generator=g)] = -torch.inf
    log_pi, log_mu = logits.log_softmax(-1)
    return log_pi, log_mu


def direct_kl(pi: list[float], mu: list[float], clip: float) -> float:
    """The definition, one action at a time."""
    truncated = [min(clip * m, p) for p, m in zip(pi, mu, strict=True)]
    total = sum(truncated)
    return sum(p * math.log(p / (t / total)) for p, t in zip(pi, truncated, strict=True) if p > 0)


def kl_error(module: dict[str, Any]) -> float:
    worst = 0.0
    for clip in (0.4, 1.0, 2.5):
        log_pi, log_mu = cases(1)
        found = module["truncated_policy_kl"](log_probs=log_pi, behaviour_log_probs=log_mu, rho_clip=clip)
        expected = [direct_kl(p.tolist(), m.tolist(), clip) for p, m in zip(log_pi.exp(), log_mu.exp(), strict=True)]
        worst = max(worst, float((found - torch.tensor(expected, dtype=torch.float64)).abs().max()))
    return worst


def replayed(seed: int = 1, *, valid: bool = True) -> TensorDict:
    """A rollout of another policy, whose whole distribution is kept; two of its five rows come from a replay."""
    td = rollout(seed=seed)
    g = torch.Generator().manual_seed(seed + 10)
    td["logits"] = torch.randn(*td.batch_size, ACTIONS, generator=g, dtype=torch.float64)
    td["action_log_prob"] = td["logits"].log_softmax(-1).gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    td["index"] = torch.where(torch.arange(5) < 3, -1, 7).unsqueeze(1).expand(5, 7)
    if valid:
        td["valid"] = torch.rand(5, 7, 1, generator=g) < 0.8
    return td


def direct_loss(policy: Any, td: TensorDict, *, clip: float, lmbda: float, bound: float, value_coef: float) -> Any:
    """The losses' sums by the recursion, one step at a time, the last first; and which steps are learnt from."""
    with torch.no_grad():
        after = network(policy, td["next", "observation"])[1]
    dist, values = network(policy, td["observation"])
    log_pi = dist.log_prob(td["action"])
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td["valid"].squeeze(-1) if "valid" in td else torch.ones(td.batch_size, dtype=torch.bool)
    batch, time = reward.shape
    policy_term, value_term = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    inside = torch.zeros(batch, time, dtype=torch.bool)
    for b in range(batch):
        correction, v = 0.0, values[b].detach()
        for s in reversed(range(time)):
            mu = td["logits"][b, s].softmax(-1).tolist()
            m = direct_kl(dist.probs[b, s].tolist(), mu, clip) < bound
            inside[b, s] = m
            going = s < time - 1 and not done[b, s] and bool(valid[b, s + 1])
            g = 0.0 if terminated[b, s] else GAMMA
            ahead = v[s + 1] + lmbda * correction if going else after[b, s]
            rho = float((log_pi[b, s] - td["action_log_prob"][b, s]).exp())
            if m and valid[b, s]:
                advantage = min(1.0, rho) * (reward[b, s] + g * ahead - v[s])
                delta = min(clip, rho) * (reward[b, s] + g * after[b, s] - v[s])
                correction = float(delta) + (GAMMA * lmbda * min(1.0, rho) * correction if going else 0.0)
                policy_term = policy_term - float(advantage) * log_pi[b, s]
                value_term = value_term + value_coef / 2 * (float(v[s]) + correction - values[b, s]) ** 2
            else:
                correction = 0.0
    return policy_term, value_term, dist.entropy(), inside, valid


def loss_error(module: dict[str, Any], estimator: type[VTrace] = VTrace) -> float:
    worst = 0.0
    for seed in range(20):
        policy, td = make(seed=seed), replayed(seed, valid=seed % 2 == 0)
        options = {"clip": 1.2, "lmbda": 0.8, "value_coef": 0.7}
        loss = module["ImpalaLoss"](
            policy, estimator=estimator(lmbda=0.8, rho_clip=1.2), gamma=GAMMA, value_coef=0.7, entropy_coef=0.3,
            reduction="mean", max_kl=BOUND, entropy_on_replay=False,
        )  # fmt: skip
        out = loss(td)
        policy_term, value_term, entropy, inside, valid = direct_loss(policy, td, bound=BOUND, **options)
        count = int(valid.sum())
        expected = {
            "loss_policy": policy_term / count,
            "loss_value": value_term / count,
            "loss_entropy": -0.3 * entropy[:3][valid[:3]].sum() / count,
            "outside": 1 - inside[valid].double().mean(),
            "entropy": entropy[valid].mean(),
            "valid_count": torch.tensor(float(count)),
        }
        for name, value in expected.items():
            worst = max(worst, float((out[name] - value).abs()))
        wanted = torch.autograd.grad(sum(expected[name] for name in LOSSES), list(policy.parameters()))
        for one, other in zip(gradients(loss, td), wanted, strict=True):
            worst = max(worst, float((one - other).abs().max()))
    return worst


def masking(old: str = "", new: str = "") -> type[VTrace]:
    """V-trace whose masking is that of the source with one change."""
    source = textwrap.dedent(inspect.getsource(base.ReturnEstimator._masked))
    assert old in source
    names: dict[str, Any] = {}
    exec(source.replace(old, new), {**vars(base)}, names)
    return type("Masking", (VTrace,), names)


MUTATIONS = {
    "KL the other way round": (kl_error, "(log_probs - bound)", "(bound - log_probs)"),
    "expectation under mu": (kl_error, "probs = log_probs.exp()", "probs = behaviour_log_probs.exp()"),
    "not normalised": (kl_error, "(divergence + covered)", "divergence"),
    "sign of the normaliser": (kl_error, "(divergence + covered)", "(divergence - covered)"),
    "not truncated": (kl_error, "(log_probs - bound).clamp(min=0)", "(log_probs - bound)"),
    "clip forgotten": (kl_error, "+ math.log(rho_clip)", "+ 0 * math.log(rho_clip)"),
    "mu for the truncated policy": (kl_error, "torch.fmin(log_probs, bound)", "bound"),
    "mask by the action": (
        loss_error, "return divergence < self.max_kl", "return policy.log_rho.abs() < self.max_kl",
    ),
    "the other steps": (loss_error, "divergence < self.max_kl", "divergence >= self.max_kl"),
    "clip of the trace": (loss_error, "rho_clip=self.estimator.rho_clip", "rho_clip=self.estimator.c_clip"),
    "trace goes on": (loss_error, "trace_mask=inside", "trace_mask=None"),
    "entropy of replayed rows": (loss_error, "batch_size) == -1", "batch_size) >= 0"),
    "entropy of what is left out": (loss_error, "self._fresh(tensordict))),", "inside)),"),
    "mean over what is learnt from": (loss_error, "-stats.reduce(", "-learnt.reduce("),
    "count of what is learnt from": (loss_error, '"valid_count": stats.count', '"valid_count": learnt.count'),
}  # fmt: skip


@pytest.mark.parametrize("error", [kl_error, loss_error])
def test_it_is_the_papers(error: Any) -> None:
    assert error(vars(impala)) < 1e-12


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    error, old, new = MUTATIONS[mutation]
    assert error(mutant(impala, old, new)) > 1e-3


def test_mutations_of_the_mask_are_caught() -> None:
    assert loss_error(vars(impala), masking()) < 1e-12
    assert loss_error(vars(impala), masking("~trace_mask", "trace_mask")) > 1e-3
    assert loss_error(vars(impala), masking("-math.inf", "0.0")) > 1e-3


def test_steps_on_both_sides_of_the_bound_are_seen() -> None:
    policy, td = make(), replayed()
    inside = direct_loss(policy, td, clip=1.2, lmbda=0.8, bound=BOUND, value_coef=0.7)[3]
    assert 0.2 < inside.double().mean() < 0.8


BANDIT = (4.0, 5.0, 0.0), (0.45, 0.05, 0.5)


def bandit() -> tuple[Any, TensorDict]:
    """One state, after which the episode ends; twenty rows hold the actions as often as mu takes them."""
    policy = make()
    net = policy.module[0]
    for parameter in (*net.head.parameters(), *net.value_head.parameters()):
        parameter.data.zero_()
    q, mu = (torch.tensor(x, dtype=torch.float64) for x in BANDIT)
    truncated = torch.minimum(mu, torch.full((3,), 1 / 3, dtype=torch.float64))
    truncated /= truncated.sum()
    torch.testing.assert_close(truncated, torch.tensor([0.4651, 0.0698, 0.4651]).double(), rtol=0, atol=5e-5)
    value = float(truncated @ q)
    assert value == pytest.approx(2.2093, abs=5e-5)
    list(net.value_head.parameters())[-1].data.fill_(value)
    action = torch.tensor([0] * 9 + [1] + [2] * 10).unsqueeze(1)
    ones = torch.ones(20, 1, 1, dtype=torch.bool)
    return policy, TensorDict(
        {
            "observation": torch.zeros(20, 1, 4, dtype=torch.float64),
            "action": action,
            "logits": mu.log().expand(20, 1, 3),
            "action_log_prob": mu.log()[action],
            "next": {
                "observation": torch.zeros(20, 1, 4, dtype=torch.float64),
                "reward": q[action].unsqueeze(-1),
                "terminated": ones,
                "done": ones,
            },
        },
        [20, 1],
    )


def bandit_gradient(max_kl: float | None, *, on_policy: bool = False) -> tuple[Tensor, TensorDict]:
    """Ascent direction of the logits."""
    policy, td = bandit()
    if on_policy:
        rows = torch.tensor([0, 9, 10])  # each action once
        td = td[rows]
        td["logits"] = torch.zeros_like(td["logits"])
        td["action_log_prob"] = torch.full((3, 1), -math.log(3), dtype=torch.float64)
    loss = ImpalaLoss(policy, gamma=1.0, value_coef=0.0, entropy_coef=0.0, reduction="mean", max_kl=max_kl)
    out = loss(td)
    out["loss_policy"].backward()
    bias = policy.module[0].head.linear.bias
    return -bias.grad, out.detach()


def test_where_vtrace_prefers_the_worse_action_the_state_is_left_out() -> None:
    """Q* = (4, 5, 0), mu = (.45, .05, .5), pi uniform: V-trace moves most towards action 0."""
    _, mu = (torch.tensor(x, dtype=torch.float64) for x in BANDIT)
    kl = truncated_policy_kl(
        log_probs=torch.full((3,), 1 / 3, dtype=torch.float64).log(), behaviour_log_probs=mu.log(), rho_clip=1.0
    )
    assert float(kl) == pytest.approx(0.2992, abs=5e-5)
    wrong, _ = bandit_gradient(None)
    torch.testing.assert_close(wrong, torch.tensor([0.597, 0.140, -0.736]).double(), rtol=0, atol=6e-4)
    right, _ = bandit_gradient(None, on_policy=True)
    torch.testing.assert_close(right, torch.tensor([1 / 3, 2 / 3, -1.0]).double(), rtol=0, atol=1e-6)
    kept, out = bandit_gradient(0.2993)
    assert torch.equal(kept, wrong)
    assert out["outside"] == 0
    left_out, out = bandit_gradient(0.2991)
    assert not left_out.any()
    assert out["outside"] == 1
    same, out = bandit_gradient(0.2991, on_policy=True)
    torch.testing.assert_close(same, right)
    assert out["outside"] == 0


def test_on_policy_nothing_is_left_out_and_nothing_changes() -> None:
    """Bit for bit, diagnostics included."""
    policy, td = make(), replayed()
    dist, _ = network(policy, td["observation"])
    td["logits"] = dist.logits.detach()
    td["action_log_prob"] = dist.log_prob(td["action"]).detach()
    plain = ImpalaLoss(policy, normalize_advantage=True, policy_clip=0.2)(td)
    masked = ImpalaLoss(policy, normalize_advantage=True, policy_clip=0.2, max_kl=1e-9)(td)
    assert masked["outside"] == 0
    for name, value in plain.items():
        assert torch.equal(value, masked[name]), name


def solved(close: float) -> tuple[MDP, Tensor, Any, dict[str, Tensor]]:
    """Trajectories of a random MDP, and the mask of its states."""
    mdp = MDP.random(11, states=4, actions=3, close=close)
    pi, mu = torch.tensor(mdp.target), torch.tensor(mdp.behaviour)
    kl = truncated_policy_kl(log_probs=pi.log(), behaviour_log_probs=mu.log(), rho_clip=1.0)
    state, action, following = (torch.tensor(x) for x in sample(mdp, episodes=6000, length=50, seed=3))
    data = {"state": state, "action": action, "following": following}
    return mdp, kl, (pi.log() - mu.log())[state, action], data


def estimate(mdp: MDP, value: np.ndarray, log_rho: Tensor, data: dict[str, Tensor], mask: Tensor | None) -> Any:
    none = torch.zeros(log_rho.shape, dtype=torch.bool)
    reward = torch.tensor(mdp.reward)[data["state"], data["action"]]
    values = torch.tensor(value)
    return VTrace(gamma=DISCOUNT).estimate(
        Outcome(reward.t(), none.t(), none.t(), None), value=values[data["state"]].t(),
        next_value=values[data["following"]].t(), log_rho=log_rho.t(),
        trace_mask=None if mask is None else mask[data["state"]].t(),
    )  # fmt: skip


def test_expected_update_on_a_solved_mdp() -> None:
    """With mu = pi nothing is left out, it is plain V-trace, and V^pi is its fixed point."""
    mdp, kl, log_rho, data = solved(close=1.0)
    value = (mdp.target * mdp.q_of(mdp.target)).sum(-1)
    assert (kl < 1e-12).all()
    masked, plain = (estimate(mdp, value, log_rho, data, mask) for mask in (kl < 1e-9, None))
    assert torch.equal(masked.target, plain.target)
    assert torch.equal(masked.advantage, plain.advantage)
    first, taken = data["state"][0], data["action"][0]
    update, advantage = masked.target[:, 0] - torch.tensor(value)[first], masked.advantage[:, 0]
    truth = mdp.q_of(mdp.target) - value[:, None]
    for s in range(4):
        mine = update[first == s]
        assert abs(float(mine.mean())) < 4 * float(mine.std()) / math.sqrt(len(mine))
        for a in range(3):
            mine = advantage[(first == s) & (taken == a)]
            if len(mine) > 100:
                assert abs(float(mine.mean()) - truth[s, a]) < 4 * float(mine.std()) / math.sqrt(len(mine))


def test_expected_update_where_states_are_left_out() -> None:
    """The operator whose rho and c are 0 there; those states keep their values."""
    mdp, kl, log_rho, data = solved(close=0.0)
    mask = kl < float(kl.median()) + 1e-9
    assert 0 < int(mask.sum()) < 4
    value = np.random.default_rng(0).normal(size=4)
    ratio = mdp.clipped(1.0) * mask.numpy()[:, None]
    expected = mdp.value_operator(value, ratio, ratio)
    found = estimate(mdp, value, log_rho, data, mask).target[:, 0]
    first = data["state"][0]
    for s in range(4):
        mine = found[first == s]
        if not mask[s]:
            assert (mine == value[s]).all()
            continue
        bias = DISCOUNT**50 * 10
        assert abs(float(mine.mean()) - expected[s]) < 4 * float(mine.std()) / math.sqrt(len(mine)) + bias


def test_a_mask_of_action_values_cuts_the_trace_alone() -> None:
    """Retrace's coefficient of a masked step is 0; its own target stays."""
    g = torch.Generator().manual_seed(0)
    reward, q_value, next_value, log_rho = torch.randn(4, 3, 6, generator=g, dtype=torch.float64)
    none, mask = torch.zeros(3, 6, dtype=torch.bool), torch.rand(3, 6, generator=g) < 0.6
    retrace = Retrace(lmbda=0.9, gamma=GAMMA)
    selection = retrace.select(Outcome(reward, none, none, None), gamma=GAMMA)
    known = {"q_value": q_value.flatten(), "next_value": next_value.flatten(), "log_pi": torch.zeros(18).double()}
    found = retrace.estimate(selection, **known, log_rho=log_rho.flatten(), trace_mask=mask.flatten())
    target = found.target.view(3, 6)
    for b in range(3):
        for s in reversed(range(6)):
            expected = reward[b, s] + GAMMA * next_value[b, s]
            if s < 5 and mask[b, s + 1]:
                trace = 0.9 * min(1.0, float(log_rho[b, s + 1].exp()))
                expected = expected + GAMMA * trace * (target[b, s + 1] - q_value[b, s + 1])
            torch.testing.assert_close(target[b, s], expected)
    assert all(x.isfinite() for x in found.diagnostics.values())


@pytest.mark.parametrize("estimator", [GAE(), WeightedGAE(), NStepReturn()])
def test_a_mask_is_refused_where_no_ratio_cuts_the_trace(estimator: Any) -> None:
    estimator.gamma = GAMMA
    x, no = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    words = f"^{type(estimator).__name__} got a trace_mask, and no ratio cuts its trace: .*, or use 'vtrace'$"
    with pytest.raises(ValueError, match=words):
        estimator.estimate(Outcome(x, no, no, None), value=x, next_value=x, log_rho=x, trace_mask=no)


@pytest.mark.parametrize("estimator", [TreeBackup(), NStepQ(n=2)])
def test_a_mask_is_refused_by_such_estimators_of_action_values(estimator: Any) -> None:
    estimator.gamma = GAMMA
    x, no = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    selection = estimator.select(Outcome(x, no, no, None), gamma=GAMMA)
    number = len(selection.reward)
    known = {name: torch.zeros(number) for name in ("q_value", "next_value", "log_pi", "log_rho")}
    with pytest.raises(ValueError, match=r"got a trace_mask, and no ratio cuts its trace: .* or use 'retrace'"):
        estimator.estimate(selection, **known, trace_mask=torch.zeros(number, dtype=torch.bool))


def test_extremes_are_finite_or_left_out() -> None:
    pi = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    mu = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = truncated_policy_kl(log_probs=pi.log(), behaviour_log_probs=mu.log(), rho_clip=1.0)
    assert found.tolist() == [0.0, 0.0, math.inf, math.inf]
    for clip in (0.3, 7.0):  # of the same policy
        log_pi, _ = cases(4)
        same = truncated_policy_kl(log_probs=log_pi, behaviour_log_probs=log_pi, rho_clip=clip)
        assert (same >= 0).all()
        assert (same < 1e-12).all()
    assert not truncated_policy_kl(log_probs=pi.log(), behaviour_log_probs=mu.log(), rho_clip=math.inf).any()
    log_pi, log_mu = (x.requires_grad_() for x in cases(5))
    assert not truncated_policy_kl(log_probs=log_pi, behaviour_log_probs=log_mu, rho_clip=1.0).requires_grad


@pytest.mark.parametrize("everything", [False, True])
def test_diagnostics_of_what_is_learnt_from_and_of_all_ratios(everything: bool) -> None:
    """Those of the steps inside alone, NaN where all are left out; ratios are those of all valid steps."""
    policy, td = make(), replayed()
    bound = 1e-9 if everything else BOUND
    loss = ImpalaLoss(policy, gamma=GAMMA, max_kl=bound, normalize_advantage=True, policy_clip=0.1)
    out = loss(td)
    assert set(out.keys()) == set(loss.out_keys)
    whole = ImpalaLoss(policy, gamma=GAMMA)(td)
    for name in ("ess", "rho_clipped", "c_clipped", "pg_rho_clipped", "ratio_mean", "kl", "entropy"):
        torch.testing.assert_close(out[name], whole[name], msg=f"{name} is about all valid steps")
    learnt = {"explained_variance", "advantage_std", "policy_clipped", "trace_length", "contraction"}
    assert {name for name, value in out.items() if not value.isfinite()} == (learnt if everything else set())
    if everything:
        assert out["outside"] == 1
        assert out["loss_policy"] == out["loss_value"] == 0
        assert out["loss_entropy"] != 0
        assert not any(g.isnan().any() for g in gradients(loss, td))
        return
    inside, valid = direct_loss(policy, td, clip=1.0, lmbda=1.0, bound=bound, value_coef=0.5)[3:]
    kept = td.clone()
    kept["valid"] = (inside & valid).unsqueeze(-1)
    expected = ImpalaLoss(policy, gamma=GAMMA)(kept)
    for name in ("trace_length", "contraction"):
        torch.testing.assert_close(out[name], expected[name])


def test_ranks_average_to_the_joined_batch() -> None:
    """Under the mean, with unequal masks: each rank's loss times its share of the valid steps."""
    policy, td = make(), replayed()
    loss = ImpalaLoss(policy, gamma=GAMMA, reduction="mean", max_kl=BOUND, entropy_on_replay=False)
    whole = gradients(loss, td)
    count = float(loss(td)["valid_count"])
    parts = [(gradients(loss, part), float(loss(part)["valid_count"]) / count) for part in (td[:2], td[2:])]
    for place, expected in enumerate(whole):
        torch.testing.assert_close(sum(share * grads[place] for grads, share in parts), expected)


def test_without_an_index_all_rows_are_fresh() -> None:
    policy, td = make(), replayed()
    losses = [ImpalaLoss(policy, entropy_on_replay=on)(td)["loss_entropy"] for on in (True, False)]
    assert losses[0] != losses[1]
    plain = td.exclude("index")
    losses = [ImpalaLoss(policy, entropy_on_replay=on)(plain)["loss_entropy"] for on in (True, False)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_kl": 0.0}, "max_kl must be positive and finite, or None, got 0.0"),
        ({"max_kl": -1.0}, "max_kl must be positive and finite, or None, got -1.0"),
        ({"max_kl": 0.1, "estimator": "gae"}, "max_kl is 0.1; it needs an estimator that truncates ratios, and GAE as"),
        (
            {"max_kl": 0.1, "estimator": "one_step"},
            "max_kl is 0.1; .* WeightedGAE as it is here does not: use 'vtrace'",
        ),
        ({"max_kl": 0.1, "estimator": "importance_sampling"}, "max_kl is 0.1; .* VTrace as it is here does not"),
        ({"max_kl": 0.1, "estimator": "vtrace(leak=0.0)"}, "max_kl is 0.1; .* VTrace as .* not: .* with its leak of 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImpalaLoss(make(), **options)


def test_what_else_does_not_fit_is_refused() -> None:
    words = r"^max_kl is 0\.1; it needs a policy over discrete actions, and this one has \['loc', 'scale'\]: it must be"
    with pytest.raises(ValueError, match=words):
        ImpalaLoss(make(action_dim=2), max_kl=0.1)
    loss = ImpalaLoss(make(), max_kl=0.1)
    with pytest.raises(ValueError, match="it needs an estimator that truncates ratios"):
        loss.make_value_estimator("gae")
    with pytest.raises(
        KeyError, match="ImpalaLoss reads 'logits', of the behaviour policy's whole distribution, which"
    ):
        loss(replayed().exclude("logits"))
    with pytest.raises(ValueError, match=r"'index' must be \[5, 7\] or \[5, 7, 1\], got \[5, 7, 3\]"):
        ImpalaLoss(make(), entropy_on_replay=False)(replayed().set("index", torch.zeros(5, 7, 3)))
