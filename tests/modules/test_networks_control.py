"""Actors and critics for control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.transforms import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.utils import get_env_transforms_from_module

from offtrace.modules.networks import (
    LayerNormMLP,
    ObservationNormalizer,
    Policy,
    TanhNormal,
    build_critic,
    build_policy,
    build_value,
    share_normalizer,
)
from offtrace.modules.networks.ensembles import _relu

FEATURES, ACTIONS = 5, 3


def actor(head: str = "tanh", *, normalize: bool = False, smoothing: float = 0.0, **head_options: Any) -> Policy:
    actions = {"num_actions": ACTIONS} if head == "categorical" else {"action_dim": ACTIONS}
    return build_policy(
        head=head, critic=None, observation_shape=[FEATURES], hidden=8, activation="relu", head_options=head_options,
        normalize=normalize, smoothing=smoothing, **actions,
    )  # fmt: skip


def states(*batch: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*batch, FEATURES), "is_init": torch.zeros(*batch, 1).bool()}, batch)


def direct_log_prob(loc: np.ndarray, scale: np.ndarray, u: np.ndarray) -> np.ndarray:
    """log N(u) - log(4 / (e^u + e^-u)^2), in float64."""
    normal = -0.5 * ((u - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    return (normal - (np.log(4) - 2 * np.logaddexp(u, -u))).sum(-1)


def test_tanh_log_prob_where_the_tanh_saturates() -> None:
    u = torch.tensor([0.0, 1e-3, -0.5, 3.0, -8.0, 9.5, -15.0, 30.0, 80.0]).unsqueeze(-1)
    for loc, scale in ((0.0, 1.0), (6.0, 0.3), (-9.0, 2.0)):
        parameters = torch.full_like(u, loc), torch.full_like(u, scale)
        found = TanhNormal(*parameters).log_prob_pre_tanh(u)
        wanted = direct_log_prob(*(x.double().numpy() for x in (*parameters, u)))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-5)


def test_sample_and_its_log_prob_belong_together() -> None:
    torch.manual_seed(0)
    loc, scale = torch.randn(1000, ACTIONS) * 4, torch.rand(1000, ACTIONS) + 0.1
    action, log_prob, u = TanhNormal(loc, scale).rsample_with_log_prob()
    torch.testing.assert_close(action, u.tanh())
    assert (action == 1).any()  # saturated ones are among them
    wanted = direct_log_prob(*(x.double().numpy() for x in (loc, scale, u)))
    np.testing.assert_allclose(log_prob.numpy(), wanted, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(TanhNormal(loc, scale).log_prob_pre_tanh(u).numpy(), wanted, rtol=1e-5, atol=2e-4)
    inner = loc.abs() < 1
    few = TanhNormal(loc * inner, scale * 0.3)
    sample = few.rsample_with_log_prob()
    torch.testing.assert_close(few.log_prob(sample.action), sample.log_prob, rtol=1e-4, atol=1e-3)


def test_gradient_of_the_reparameterised_log_prob() -> None:
    """With u = loc + scale noise: d/dloc = 2 tanh(u), d/dscale = 2 tanh(u) noise - 1 / scale."""
    loc = torch.randn(50, ACTIONS, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(50, ACTIONS, dtype=torch.float64) + 0.1).requires_grad_()
    _, log_prob, u = TanhNormal(loc, scale).rsample_with_log_prob()
    log_prob.sum().backward()
    noise = ((u - loc) / scale).detach()
    torch.testing.assert_close(loc.grad, 2 * u.detach().tanh())
    torch.testing.assert_close(scale.grad, 2 * u.detach().tanh() * noise - 1 / scale.detach())


def test_density_integrates_to_one() -> None:
    a = torch.linspace(-1 + 1e-9, 1 - 1e-9, 400_001, dtype=torch.float64)
    dist = TanhNormal(torch.full((1,), 0.4, dtype=torch.float64), torch.full((1,), 0.8, dtype=torch.float64))
    density = dist.log_prob(a.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, a) == pytest.approx(1, abs=1e-6)


def test_divergence_of_tanh_normals_is_that_of_the_normals() -> None:
    p = TanhNormal(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    q = TanhNormal(torch.full((1,), 0.5, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64))
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64).unsqueeze(-1)
    weight = torch.exp(-0.5 * u.square().squeeze(-1)) / np.sqrt(2 * np.pi)
    integral = torch.trapezoid(weight * (p.log_prob_pre_tanh(u) - q.log_prob_pre_tanh(u)), u.squeeze(-1))
    assert torch.distributions.kl_divergence(p, q) == pytest.approx(float(integral), abs=1e-6)


@pytest.mark.parametrize("kind", ["tanh", "gaussian", "categorical"])
def test_acting_writes_what_replay_stores(kind: str) -> None:
    torch.manual_seed(0)
    policy, td = actor(kind), states(4, 2)
    written = policy(td.clone())
    assert set(policy.out_keys) == set(written.keys()) - set(td.keys())
    assert written["action"].dtype == (torch.int64 if kind == "categorical" else torch.float32)
    assert written["action_log_prob"].shape == (4, 2)
    assert not written["action"].requires_grad
    dist = policy.get_dist(td)
    if kind == "tanh":
        torch.testing.assert_close(written["action"], written["pre_tanh"].tanh())
        wanted = dist.log_prob_pre_tanh(written["pre_tanh"])  # type: ignore[attr-defined]
    else:
        wanted = dist.log_prob(written["action"])
    torch.testing.assert_close(written["action_log_prob"], wanted)
    rebuilt = policy.build_dist_from_params(policy.get_dist_params(td.clone()))
    torch.testing.assert_close(rebuilt.log_prob(written["action"]), written["action_log_prob"], rtol=1e-3, atol=1e-3)
    assert not torch.equal(policy(td.clone())["action"].double(), written["action"].double())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        mode = policy(td.clone())["action"]
    params = policy.get_dist_params(td.clone())
    best = {"tanh": lambda: params["loc"].tanh(), "gaussian": lambda: params["loc"]}
    torch.testing.assert_close(mode, best[kind]() if kind in best else params["logits"].argmax(-1))


def test_scales_start_and_stay_where_they_should() -> None:
    td = states(6)
    assert actor().get_dist(td).scale.sub(1).abs().max() < 0.1  # type: ignore[attr-defined]
    assert actor(log_scale="tanh").get_dist(td).scale.log().add(1.5).abs().max() < 0.1  # type: ignore[attr-defined]
    gaussian = actor("gaussian", init_scale=0.5, min_scale=0.01)
    assert gaussian.get_dist_params(td)["scale"].sub(0.51).abs().max() < 0.03
    for policy, low, high in ((actor(), -20, 2), (actor(log_scale="tanh"), -5, 2)):
        for bias, wanted in ((1e3, high), (-1e3, low)):
            nn.init.constant_(policy.network.head.linear.bias, bias)  # type: ignore[union-attr, arg-type]
            scale = policy.get_dist_params(td)["scale"]
            torch.testing.assert_close(scale.log(), torch.full_like(scale, wanted))
    nn.init.constant_(gaussian.network.head.linear.bias, -1e3)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(gaussian.get_dist_params(td)["scale"], torch.full((6, ACTIONS), 0.01))


def test_layer_norm_mlp_is_linear_norm_tanh_then_elu() -> None:
    torch.manual_seed(0)
    net, x = LayerNormMLP(FEATURES, (8, 6, 4)).double(), torch.randn(7, FEATURES, dtype=torch.float64)
    nn.init.normal_(net.norm.weight)
    first, second, third = net.layers
    h = x @ first.weight.t() + first.bias
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = torch.tanh(h * net.norm.weight + net.norm.bias)
    for layer in (second, third):
        h = h @ layer.weight.t() + layer.bias
        h = torch.where(h > 0, h, h.exp() - 1)
    torch.testing.assert_close(net(x), h)


def member(ensemble: Any, i: int, x: Tensor) -> Tensor:
    """Member ``i`` as an MLP of its own."""
    for number, layer in enumerate(ensemble.layers):
        x = x @ layer.weight[i] + layer.bias[i]
        if not ensemble.layer_norm:
            x = x.relu()
        elif number == 0:
            x = nn.functional.layer_norm(x, x.shape[-1:], ensemble.norm_weight[i, 0], ensemble.norm_bias[i, 0]).tanh()
        else:
            x = nn.functional.elu(x)
    return x @ ensemble.last.weight[i] + ensemble.last.bias[i]


@pytest.mark.parametrize("network", ["mlp", "layernorm_mlp"])
@pytest.mark.parametrize("discrete", [False, True])
def test_batched_critics_equal_separate_ones(network: str, discrete: bool) -> None:
    torch.manual_seed(0)
    actions = {"num_actions": ACTIONS} if discrete else {"action_dim": ACTIONS}
    critic = build_critic(network=network, observation_shape=[FEATURES], hidden=[8, 6], critics=3, **actions).double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter)
    td = states(4, 2).double().set("action", torch.randn(4, 2, ACTIONS, dtype=torch.float64))
    out = critic(td)["action_value" if discrete else "state_action_value"]
    x = td["observation"] if discrete else torch.cat([td["observation"], td["action"]], -1)
    wanted = torch.stack([member(critic.ensemble, i, x) for i in range(3)], 2)
    torch.testing.assert_close(out, wanted if discrete else wanted.squeeze(-1))
    found = torch.autograd.grad(out[:, :, 1].square().sum(), list(critic.parameters()), retain_graph=True)
    direct = torch.autograd.grad(wanted[:, :, 1].square().sum(), list(critic.parameters()))
    for a, b in zip(found, direct, strict=True):
        torch.testing.assert_close(a, b)
        assert not a[0].any()  # a critic's error does not reach the others
        assert not a[2].any()


@pytest.mark.parametrize("network", ["mlp", "layernorm_mlp"])
def test_critics_start_independently(network: str) -> None:
    critic = build_critic(network=network, observation_shape=[FEATURES], action_dim=ACTIONS, hidden=[8])
    for layer in (*critic.ensemble.layers, critic.ensemble.last):
        assert not torch.isclose(layer.weight[0], layer.weight[1]).any()


@pytest.mark.parametrize("options", [{"action_dim": 6}, {"num_actions": 6}, {"action_dim": 6, "atoms": 51}])
def test_values_behind_a_layer_norm_start_near_zero(options: dict[str, int]) -> None:
    """What differs between actions at the start is noise, which must not exceed the first rewards."""
    torch.manual_seed(0)
    td = TensorDict({"observation": torch.randn(500, 24), "action": torch.rand(500, 6) * 2 - 1}, [500])
    critic = build_critic(network="layernorm_mlp", observation_shape=[24], hidden=[256] * 3, **options)
    (key,) = critic.out_keys
    assert 0.01 < critic(td)[key].std() < 0.1


@pytest.mark.slow
def test_compiled_relu_is_relu_but_for_the_gradient_at_0() -> None:
    torch._dynamo.reset()
    values = torch.tensor([-2.0, 0.0, 3.0])
    found = []
    for function in (_relu, torch.compile(_relu, backend="aot_eager")):
        x = values.clone().requires_grad_()
        y = function(x * 1)
        y.sum().backward()
        found.append((y.tolist(), x.grad.tolist()))
    assert found == [([0, 0, 3], [0, 0, 1]), ([0, 0, 3], [0, 0.5, 1])]


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_pixels(batch: tuple[int, ...]) -> None:
    shape = (6, 48, 48)
    td = TensorDict({"observation": torch.randint(256, (*batch, *shape)).byte()}, batch)
    options: dict[str, Any] = {"network": "shallow", "observation_shape": shape, "hidden": [32, 16]}
    policy = build_policy(head="tanh", critic=None, action_dim=2, **options)
    assert policy(td)["action"].shape == (*batch, 2)
    assert build_critic(action_dim=2, **options)(td)["state_action_value"].shape == (*batch, 2)
    assert build_critic(num_actions=4, **options)(td)["action_value"].shape == (*batch, 2, 4)
    assert build_value(**options)(td)["state_value"].shape == (*batch, 1)


def test_normaliser_equals_numpy_over_merged_batches() -> None:
    rng = np.random.default_rng(0)
    parts = [
        1e4 * rng.normal(size=FEATURES) + rng.normal(size=(n, FEATURES)) * [1, 1e-2, 5, 1e3, 1] for n in (1, 50, 7)
    ]
    net = ObservationNormalizer([FEATURES], clip=2.0)
    x = torch.randn(9, FEATURES)
    torch.testing.assert_close(net(x), x.clamp(-2, 2))  # nothing is known yet
    for part in parts:
        net.update(torch.tensor(part))
    merged = np.concatenate(parts)
    np.testing.assert_allclose(net.mean.numpy(), merged.mean(0), rtol=1e-12)
    np.testing.assert_allclose(net.variance.numpy(), merged.var(0), rtol=1e-9)
    assert net.count == len(merged)
    wanted = ((merged - merged.mean(0)) / np.sqrt(merged.var(0) + 1e-8)).clip(-2, 2)
    np.testing.assert_allclose(net(torch.tensor(merged)).numpy(), wanted, atol=1e-3)
    assert net(x).dtype == torch.float32


def test_normaliser_leaves_out_what_is_not_valid_and_forward_changes_nothing() -> None:
    x, valid = torch.randn(4, 3, FEATURES), torch.rand(4, 3, 1) > 0.5
    net, other = ObservationNormalizer([FEATURES]), ObservationNormalizer([FEATURES])
    net.update(x.masked_fill(~valid, float("nan")), valid)
    other.update(x[valid.squeeze(-1)])
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(x)
    net.update(x[:0].reshape(0, FEATURES))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="observations must be"):
        net.update(torch.zeros(3, FEATURES + 1))


def test_normaliser_is_saved_with_the_policy_and_shared_with_the_critic() -> None:
    policy = actor(normalize=True)
    critic = build_critic(network="mlp", observation_shape=[FEATURES], action_dim=ACTIONS, normalize=True)
    share_normalizer(policy.network, critic)
    policy.network.normalizer.update(5 + 3 * torch.randn(100, FEATURES))  # type: ignore[union-attr]
    assert critic.normalizer.count == 100  # type: ignore[union-attr]
    other = actor(normalize=True)
    other.load_state_dict(policy.state_dict())
    td = states(4)
    torch.testing.assert_close(other.get_dist_params(td.clone())["loc"], policy.get_dist_params(td.clone())["loc"])
    with pytest.raises(ValueError, match="has no normalizer"):
        share_normalizer(actor().network, critic)


@pytest.mark.parametrize("kind", ["tanh", "gaussian"])
def test_smoothing_is_a_low_pass_and_states_its_density(kind: str) -> None:
    torch.manual_seed(0)
    policy, beta = actor(kind, smoothing=0.7).double(), 0.7
    td = states(4).double()
    td["is_init"] = torch.tensor([[True], [False], [False], [False]])
    td["smoothed_action"] = before = torch.rand(4, ACTIONS, dtype=torch.float64) - 0.5
    torch.manual_seed(1)
    out = policy(td.clone())
    torch.manual_seed(1)
    policy.smoother, smoother = None, policy.smoother
    raw = policy(td.clone())
    policy.smoother = smoother
    wanted = beta * before + (1 - beta) * raw["action"]
    wanted[0] = raw["action"][0]
    torch.testing.assert_close(out["action"], wanted)
    torch.testing.assert_close(out["next", "smoothed_action"], wanted)
    # executed = beta before + (1 - beta) raw, so the density is divided by (1 - beta)^A
    volume = ACTIONS * np.log(1 - beta) * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(out["action_log_prob"], raw["action_log_prob"] - volume)
    if kind == "tanh":
        torch.testing.assert_close(out["pre_tanh"].tanh(), wanted)


class _Chain(EnvBase):
    """Three steps an episode; shows what a policy with a state needs of an environment."""

    def __init__(self) -> None:
        super().__init__(batch_size=[2])
        self.observation_spec = Composite(observation=Unbounded((2, FEATURES)), shape=(2,))
        self.action_spec = Bounded(-1, 1, (2, ACTIONS))
        self.reward_spec = Unbounded((2, 1))
        self.steps = 0

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        self.steps = 0
        return TensorDict({"observation": torch.randn(2, FEATURES)}, [2])

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.steps += 1
        done = torch.full((2, 1), self.steps % 3 == 0)
        entries = {"observation": torch.randn(2, FEATURES), "reward": torch.zeros(2, 1), "done": done}
        return TensorDict({**entries, "terminated": done.clone()}, [2])

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


def test_smoothing_carries_its_state_through_an_environment() -> None:
    policy = actor(smoothing=0.5)
    env = TransformedEnv(_Chain(), get_env_transforms_from_module(policy))
    actions = env.rollout(9, policy, break_when_any_done=False)["action"]
    samples = 2 * actions[:, 1:] - actions[:, :-1]  # where the low pass ran, this is the sample: inside (-1, 1)
    assert samples[:, [0, 1, 3, 4, 6, 7]].abs().max() < 1
    with pytest.raises(KeyError, match="does not carry the last action"):
        policy(states(2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_vectors_of_every_dtype_are_normalised(dtype: torch.dtype) -> None:
    net, x = ObservationNormalizer([2]), torch.tensor([[0, 1], [1, 1], [0, 0]])
    net.update(x.to(dtype))
    torch.testing.assert_close(net(x.to(dtype)), net(x.float()))
