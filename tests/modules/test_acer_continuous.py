"""ACER on continuous actions: its functions against autograd, its loss against direct sums in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal

from offtrace.modules.losses import ContinuousACERLoss
from offtrace.modules.losses.acer_continuous import gaussian_kl_gradient, gaussian_score
from offtrace.modules.losses.unroll import evaluate_rollout
from offtrace.modules.networks import build_critic, build_policy, build_value
from tests.modules.test_impala_loss import FEATURES, LOSSES, rollout, total

GAMMA, DIM, SAMPLES = 0.9, 2, 3
BOUNDS = (-0.9, 0.8)  # some of the means and of the actions lie beyond


def networks(seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    shapes: dict[str, Any] = {"network": "mlp", "observation_shape": [FEATURES], "hidden": [16]}
    policy = build_policy(critic=None, action_dim=DIM, head_options={"init_scale": 0.6}, **shapes).double()
    for parameter in policy.module[0].head.loc.parameters():
        parameter.data += torch.randn_like(parameter)
    value = build_value(**shapes).double()
    advantage = build_critic(action_dim=DIM, critics=1, **shapes).double()
    return policy, value, advantage


def stored(masked: bool = False) -> TensorDict:
    """A rollout with the behaviour policy's parameters and its own log-probabilities."""
    td = rollout(dim=DIM)
    g = torch.Generator().manual_seed(7)
    td["loc"] = 0.3 * torch.randn(*td.batch_size, DIM, generator=g, dtype=torch.float64)
    td["scale"] = 0.5 + torch.rand(*td.batch_size, DIM, generator=g, dtype=torch.float64)
    td["action_log_prob"] = Normal(td["loc"], td["scale"]).log_prob(td["action"]).sum(-1)
    if masked:
        td["valid"] = torch.rand(*td.batch_size, 1, generator=g) < 0.8
    return td


def make(**options: Any) -> ContinuousACERLoss:
    loss = ContinuousACERLoss(*networks(), gamma=GAMMA, num_samples=SAMPLES, action_bounds=BOUNDS, **options)
    with torch.no_grad():
        for name, parameter in loss.named_buffers():  # of targets there are no parameters
            if name.startswith("target_"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return loss


def parameters_of(policy: Any, observation: Tensor) -> tuple[Tensor, Tensor]:
    net = policy.module[0]
    loc, scale = net.head(net.encoder(observation.reshape(-1, FEATURES)))
    return loc.view(*observation.shape[:-1], DIM), scale.view(*observation.shape[:-1], DIM)


@pytest.mark.parametrize("part", ["score", "kl"])
def test_the_gradients_of_a_gaussian_are_autograds(part: str) -> None:
    g = torch.Generator().manual_seed(1)
    loc, log_scale, action, other, other_log = torch.randn(5, 200, DIM, generator=g, dtype=torch.float64)
    statistics = torch.cat([loc, log_scale], -1).requires_grad_()
    dist = Normal(statistics[:, :DIM], statistics[:, DIM:].exp())
    if part == "score":
        objective = dist.log_prob(action).sum()
        found = gaussian_score(action=action, loc=loc, scale=log_scale.exp())
    else:
        objective = torch.distributions.kl_divergence(Normal(other, other_log.exp()), dist).sum()
        found = gaussian_kl_gradient(
            average_loc=other, average_scale=other_log.exp(), loc=loc, scale=log_scale.exp()
        )  # fmt: skip
    torch.testing.assert_close(found, torch.autograd.grad(objective, statistics)[0])


def test_of_the_means_it_is_the_papers_kl_gradient() -> None:
    loc, average, scale = torch.randn(3, 10, DIM, dtype=torch.float64).unbind()
    scale = scale.exp()
    found = gaussian_kl_gradient(average_loc=average, average_scale=scale, loc=loc, scale=scale)
    torch.testing.assert_close(found[:, :DIM], (loc - average) / scale**2)


def test_the_dueling_critic_has_the_policys_mean_in_v() -> None:
    """Over the actions that the baseline is made of, Q~ is V on average."""
    loss = make()
    td = stored()
    policy = evaluate_rollout(loss, td)
    actions = torch.randn(SAMPLES, 5, 7, DIM, dtype=torch.float64)
    found = [loss._critic(policy, action, actions, loss.value, loss.advantage) for action in actions]
    torch.testing.assert_close(torch.stack([one.q_fresh for one in found]).mean(0), found[0].value)
    td["action"] = actions[1]
    again = loss._critic(evaluate_rollout(loss, td), actions[0], actions, loss.value, loss.advantage)
    torch.testing.assert_close(again.q_value, found[1].q_fresh)


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("delta", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("average_critic", [False, True])
def test_loss_equals_the_direct_sums(
    learn_scale: bool, delta: float | None, masked: bool, reduction: str, normalize: bool, average_critic: bool
) -> None:
    """One step at a time, in the order of the paper's box, from the same draws."""
    options = {"learn_scale": learn_scale, "delta": delta, "reduction": reduction, "normalize_advantage": normalize}
    options["average_critic"] = average_critic
    options["bound_coef"], (low, high) = 0.6 if average_critic else 0.0, BOUNDS
    lmbda = 0.8 if average_critic else 1.0
    options["estimator"] = f"retrace(lmbda={lmbda})"
    entropy_coef = 0.03 if learn_scale else 0.0
    loss, td = make(clip=1.2, value_coef=0.7, entropy_coef=entropy_coef, **options), stored(masked)
    torch.manual_seed(5)
    out = loss(td)
    loc, scale = parameters_of(loss.policy, td["observation"])
    torch.manual_seed(5)
    fresh = (loc + scale * torch.randn(1 + SAMPLES, *loc.shape, dtype=torch.float64)).detach()
    of = loss.policy if delta is None else loss.target("policy")  # without a bound it counts for nothing
    average = [x.detach() for x in parameters_of(of, td["observation"])]
    observation, action = td["observation"], td["action"]

    def critic(value: Any, advantage: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V of the steps and behind them, Q~ of the action and of a'."""
        flat = observation.reshape(-1, FEATURES)
        v, after = (
            value.values({"observation": x.reshape(-1, FEATURES)}).view(5, 7)
            for x in (observation, td["next", "observation"])
        )
        executed = [a.clamp(low, high).reshape(-1, DIM) for a in (action, *fresh)]
        of = [advantage.values({"observation": flat}, a).view(5, 7) for a in executed]
        baseline = torch.stack(of[2:]).mean(0)
        return v, after, v + of[0] - baseline, v + of[1] - baseline

    learnt = critic(loss.value, loss.advantage)
    known = learnt
    if average_critic:
        known = critic(loss.target("value"), loss.target("advantage"))
    value, following, q, q_fresh = (x.detach() for x in known)
    dist, behaviour = Normal(loc, scale), Normal(td["loc"], td["scale"])
    rho = (dist.log_prob(action).sum(-1) - td["action_log_prob"]).exp().detach()
    fresh_rho = (dist.log_prob(fresh[0]) - behaviour.log_prob(fresh[0])).sum(-1).exp().detach()
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    valid = td["valid"].squeeze(-1) if masked else torch.ones(5, 7, dtype=torch.bool)
    count = int(valid.sum())
    size = 1.0
    if normalize:
        squares = []
        for b in range(5):
            opc = None
            for t in reversed(range(7)):
                if not valid[b, t]:
                    opc = None
                    continue
                if opc is None or done[b, t]:
                    opc = 0.0 if terminated[b, t] else float(following[b, t])
                opc = float(reward[b, t]) + GAMMA * opc
                squares.append((opc - float(value[b, t])) ** 2)
                opc = lmbda * (opc - float(q[b, t])) + float(value[b, t])
        size = math.sqrt(sum(squares) / count)
    policy_term = value_term = torch.zeros((), dtype=torch.float64)
    projected = beyond = 0
    corrections = 0.0
    for b in range(5):
        ret = opc = None
        for t in reversed(range(7)):
            if not valid[b, t]:
                ret = opc = None
                continue
            if ret is None or done[b, t]:
                after = 0.0 if terminated[b, t] else float(following[b, t])
                ret = opc = after
            ret, opc = float(reward[b, t]) + GAMMA * ret, float(reward[b, t]) + GAMMA * opc
            v, q_t = float(value[b, t]), float(q[b, t])
            statistics = torch.cat([loc[b, t], scale[b, t].log()])
            own = statistics.detach().requires_grad_()
            f = Normal(own[:DIM], own[DIM:].exp())
            weight = min(1.2, float(rho[b, t])) * (opc - v)
            objective = weight * f.log_prob(action[b, t]).sum()
            correction = max(0.0, 1 - 1.2 / float(fresh_rho[b, t]))
            corrections += correction
            log_prob = f.log_prob(fresh[0, b, t]).sum()
            objective = objective + correction * (float(q_fresh[b, t]) - v) * log_prob
            g = torch.autograd.grad(objective, own, retain_graph=True)[0] / size
            kl = torch.distributions.kl_divergence(Normal(average[0][b, t], average[1][b, t]), f).sum()
            k = torch.autograd.grad(kl, own)[0]
            if not learn_scale:
                g[DIM:], k[DIM:] = 0, 0
            z = g
            if delta is not None:
                excess = max(0.0, float(k @ g) - delta)
                projected += excess / float(k.norm()) > 0.01 * float(g.norm())
                z = g - excess / float(k @ k) * k
            policy_term = policy_term - z @ statistics
            for mean in loc[b, t]:
                outside = max(mean.item() - high, low - mean.item(), 0.0)
                beyond += outside > 0
                nearest = high if mean > high else low
                policy_term = policy_term + options["bound_coef"] * 0.5 * (mean - nearest) ** 2 * (outside > 0)
            target = min(1.0, float(rho[b, t])) * (ret - q_t) + v
            errors = ret - learnt[2][b, t], target - learnt[0][b, t]
            value_term = value_term + 0.7 * 0.5 * (errors[0] ** 2 + errors[1] ** 2)
            c = lmbda * min(1.0, float(rho[b, t]) ** (1 / DIM))
            ret, opc = c * (ret - q_t) + v, lmbda * (opc - q_t) + v
    scale_of = 1 if reduction == "sum" else count
    entropy = dist.entropy().sum(-1)[valid].sum()
    torch.testing.assert_close(out["loss_policy"], policy_term / scale_of)
    torch.testing.assert_close(out["loss_value"], value_term / scale_of)
    torch.testing.assert_close(out["loss_entropy"], -entropy_coef * entropy / scale_of)
    torch.testing.assert_close(float(out["bias_correction"]), corrections / count)
    assert set(loss.out_keys) == set(out.keys())
    assert 0 < beyond < DIM * count
    if delta is not None:
        assert 0 < projected < count
        torch.testing.assert_close(float(out["projected"]), projected / count, rtol=1e-6, atol=0)
    wanted = (policy_term + value_term - entropy_coef * entropy) / scale_of
    names = [p for name in ("policy", "value", "advantage") for p in getattr(loss, f"{name}_params").parameters()]
    found = torch.autograd.grad(total(out), names)
    for one, other in zip(found, torch.autograd.grad(wanted, names), strict=True):
        torch.testing.assert_close(one, other)
    assert not any(x.requires_grad for name, x in out.items() if name not in LOSSES)


def test_the_critic_reads_what_is_executed_and_the_mean_comes_back() -> None:
    """Beyond the bounds Q~ is that of the bound, and only ``bound_coef`` tells the mean to come back."""
    far = {"reward": torch.zeros(5, 7, 1, dtype=torch.float64)}
    gradients = {}
    for coef in (0.0, 2.0):
        loss, td = make(bound_coef=coef, delta=None), stored()
        td["next"].update(far)
        last = loss.policy_params["module", "0", "head", "loc", "bias"]
        with torch.no_grad():
            last += 50.0
            for critic in (loss.value_params, loss.advantage_params):
                for parameter in critic.values(True, True):
                    parameter.zero_()
        torch.manual_seed(0)
        loss(td)["loss_policy"].backward()
        gradients[coef] = last.grad
    assert not gradients[0.0].any()
    assert (gradients[2.0] > 2.0 * 30).all()  # its descent lowers the mean, in proportion to the distance


def test_a_fixed_scale_gets_no_gradient() -> None:
    loss = make()
    total(loss(stored())).backward()
    name = next(path for path in loss.policy_params.keys(True, True) if "log_scale" in path)
    assert not loss.policy_params.get(name).grad.any()
    with pytest.raises(
        ValueError, match=r"^entropy_coef is 0\.1; .* learn_scale=False fixes: it must be 0, or learn_scale"
    ):
        make(entropy_coef=0.1)
    loss = make(entropy_coef=0.1, learn_scale=True)
    total(loss(stored())).backward()
    assert loss.policy_params.get(name).grad.any()


def test_another_estimator_by_its_name_has_the_papers_root_too() -> None:
    loss = make()
    assert loss.estimator.root == DIM
    loss.make_value_estimator("retrace", lmbda=0.9)
    assert (loss.estimator.root, loss.estimator.lmbda) == (DIM, 0.9)
    assert (loss.uncorrected.gamma, loss.uncorrected.lmbda) == (GAMMA, 0.9)
    assert loss.make_value_estimator("retrace", root=3).estimator.root == 3
    assert loss.make_value_estimator("retrace(root=1)").estimator.root == 1
    assert set(loss(stored()).keys()) == set(loss.out_keys)


def test_what_stands_in_invalid_steps_reaches_nothing() -> None:
    def gradients(td: TensorDict) -> list[Tensor]:
        loss = make()
        torch.manual_seed(5)
        total(loss(td)).backward()
        return [p.grad for p in loss.parameters()]

    td = stored(masked=True)
    clean = gradients(td.clone())
    for key in ("loc", "scale", "action_log_prob", ("next", "reward"), "action"):
        td[key][~td["valid"].squeeze(-1)] = math.nan
    torch.testing.assert_close(gradients(td), clean)


@pytest.mark.parametrize("key", ["loc", "scale"])
def test_a_batch_without_the_whole_behaviour_is_refused(key: str) -> None:
    with pytest.raises(
        KeyError, match=rf"reads '{key}', of the behaviour policy's whole distribution, .* keep the entry"
    ):
        make()(stored().exclude(key))


def test_networks_that_do_not_fit_are_refused() -> None:
    _, value, advantage = networks()
    for head in ("tanh", "full_gaussian"):
        policy = build_policy(observation_shape=[FEATURES], action_dim=DIM, head=head, critic=None)
        with pytest.raises(ValueError, match="needs a policy that writes 'loc' and 'scale' of a diagonal normal"):
            ContinuousACERLoss(policy, value, advantage)
    with pytest.raises(ValueError, match="num_samples must be an int of 1 or more"):
        ContinuousACERLoss(*networks(), num_samples=0)
    two = build_critic(observation_shape=[FEATURES], action_dim=DIM, hidden=[8], critics=2)
    atoms = build_critic(observation_shape=[FEATURES], action_dim=DIM, hidden=[8], atoms=5)
    policy, *_ = networks()
    with pytest.raises(ValueError, match=r"needs one advantage, got 2: use build_critic\(critics=1\)"):
        ContinuousACERLoss(policy, value, two)
    with pytest.raises(ValueError, match="needs an advantage of build_critic, got CategoricalCritic"):
        ContinuousACERLoss(policy, value, atoms)
    with pytest.raises(ValueError, match="needs a value of build_value, got Critic"):
        ContinuousACERLoss(policy, advantage, advantage)
