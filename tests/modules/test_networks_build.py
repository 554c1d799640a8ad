"""The builder: plain values, networks by name or import path, dictionary observations, errors."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode

import offtrace.modules.networks
from offtrace.modules.networks import (
    CRITICS,
    HEADS,
    MLP,
    NETWORKS,
    LayerNormMLP,
    Policy,
    ShallowConv,
    build_critic,
    build_policy,
    build_value,
    share_normalizer,
)

IMAGE, VECTOR = [3, 36, 36], [5]
DISCRETE, CONTINUOUS = {"num_actions": 3}, {"action_dim": 2}
JOINED = {"speed": [2], "place": [2, 3], "clock": []}
MIXED = {"camera": IMAGE, "speed": [2]}


def own_encoder(shape: tuple[int, ...], hidden: Any) -> nn.Module:
    assert shape == (5,)
    return MLP(shape[0], (hidden,) if isinstance(hidden, int) else hidden)


class OwnMixed(nn.Module):
    """A user's network of an image and a vector."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], hidden: list[int]) -> None:
        super().__init__()
        assert shapes == {"camera": (3, 36, 36), "speed": (2,)}
        self.conv = nn.Conv2d(3, 2, 8, 8)
        self.linear = nn.Linear(2 * 4 * 4 + 2, hidden[-1])
        self.out_features = hidden[-1]

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        assert list(x) == ["camera", "speed"]
        return self.linear(torch.cat([self.conv(x["camera"].float() / 255).flatten(1), x["speed"]], -1)).relu()


def narrow(shape: Any) -> nn.Module:
    return nn.Flatten()


def without_width(shape: Any, hidden: Any) -> nn.Module:
    return nn.Flatten()


def broken(shape: Any, hidden: Any) -> nn.Module:
    raise AttributeError("a fault of the user's own")


OWN, OWN_MIXED = f"{__name__}:own_encoder", f"{__name__}:OwnMixed"


def inputs(shape: Any, *batch: int) -> TensorDict:
    def draw(one: list[int]) -> Tensor:
        return torch.randint(256, (*batch, *one)).byte() if len(one) == 3 else torch.randn(*batch, *one)

    shapes = isinstance(shape, dict)
    observation = TensorDict({n: draw(one) for n, one in shape.items()}, batch) if shapes else draw(shape)
    return TensorDict({"observation": observation, "action_mask": torch.ones(*batch, 3).bool()}, batch)


ACTIONS_OF = {head: DISCRETE if head in ("categorical", "greedy") else CONTINUOUS for head in HEADS}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "categorical": [{}, {"epsilon": 0.1}],
    "greedy": [{}, {"epsilon": 0.5}],
    "normal": [{}, {"init_scale": 0.5, "state_dependent": True}],
    "tanh": [{}, {"log_scale": "tanh"}],
    "gaussian": [{}, {"init_scale": 0.5, "min_scale": 0.1}],
    "full_gaussian": [{}, {"init_scale": 0.5, "min_scale": 0.1}],
}
CRITIC_OPTIONS: dict[Any, list[dict[str, Any]]] = {
    "v": [{}, {"popart": True}],
    "q": [{}, {"dueling": True, "atoms": 0, "v_max": 3.0}, {"dueling": True, "atoms": 5, "v_max": 3.0}],
    None: [{}],
}
POLICIES = [
    {"head": head, "head_options": options, "critic": critic, "critic_options": extra, **ACTIONS_OF[head]}
    for head, critic in itertools.product(HEADS, CRITICS)
    if (critic != "q" or ACTIONS_OF[head] is DISCRETE) and (head != "greedy" or critic == "q")
    for options, extra in itertools.product(OPTIONS[head], CRITIC_OPTIONS[critic])
]


@pytest.mark.parametrize("recurrent", [None, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p['head']}-{p['critic']}-{len(p['critic_options'])}")
def test_every_head_is_built_again_from_json(policy: dict[str, Any], recurrent: int | None) -> None:
    """The same values give the same weights, and the policy acts: one step, then a sequence of them."""
    discrete = "num_actions" in policy
    values = {"observation_shape": VECTOR, "recurrent": recurrent, "masked": discrete, "normalize": True, **policy}
    torch.manual_seed(1)
    first = build_policy(**values)
    torch.manual_seed(1)
    second = build_policy(**json.loads(json.dumps(values)))
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    td = inputs(VECTOR, 6)
    td["is_init"] = torch.ones(6, 1, dtype=torch.bool)
    td["last_reward"] = torch.zeros(6, 1)
    td["last_action"] = torch.zeros(6, dtype=torch.long) if discrete else torch.zeros(6, 2)
    assert set(first.in_keys) - {"recurrent_h", "recurrent_c"} <= set(td.keys())
    out = first(td.clone())
    assert set(first.out_keys) <= set(out.keys(include_nested=True))
    assert out["action_log_prob"].isfinite().all()
    if recurrent:
        assert_unrolls_as_it_steps(first, td)


def assert_unrolls_as_it_steps(policy: Policy, td: TensorDict) -> None:
    steps: list[TensorDict] = []
    carried: dict[str, Tensor] = {}
    for number in range(4):
        now = td.clone().update({"observation": torch.randn(6, 5), **carried})
        now["is_init"] = torch.tensor([[number in (0, start)] for start in (0, 1, 2, 3, 2, 1)])
        out = policy(now.clone())
        carried = {key: out["next", key] for key in ("recurrent_h", "recurrent_c")}
        steps.append(now.exclude(*carried).set("expected", out[key := policy.network.head.out_keys[0]]))
    sequence = torch.stack(steps, 1)
    sequence.update({name: torch.zeros(6, 4, 4) for name in carried})
    with set_recurrent_mode(True):
        torch.testing.assert_close(policy.get_dist_params(sequence)[key], sequence["expected"])


@pytest.mark.parametrize("network", [*NETWORKS, OWN])
@pytest.mark.parametrize("hidden", [None, 16, [16, 8, 4]])
def test_every_network_in_every_builder(network: str, hidden: Any) -> None:
    if network == OWN and hidden is None:
        hidden = [16]
    shape = IMAGE if network in ("shallow", "resnet") else VECTOR
    values: dict[str, Any] = {"observation_shape": shape, "network": network, "hidden": hidden}
    td = inputs(shape, 2, 3).set("action", torch.randn(2, 3, 2))
    assert build_policy(**values, **DISCRETE)(td.clone())["action"].shape == (2, 3)
    assert build_policy(**values, head="tanh", critic=None, **CONTINUOUS)(td.clone())["action"].shape == (2, 3, 2)
    assert build_value(**values)(td.clone())["state_value"].shape == (2, 3, 1)
    for kind, key, shape in (
        (DISCRETE, "action_value", (2, 3, 2, 3)),
        (CONTINUOUS, "state_action_value", (2, 3, 2)),
        ({**CONTINUOUS, "atoms": 5}, "value_logits", (2, 3, 2, 5)),
    ):
        torch.manual_seed(0)
        critic: Any = build_critic(**values, **kind)
        torch.manual_seed(0)
        again: Any = build_critic(**json.loads(json.dumps({**values, **kind})))
        found = critic(td.clone())[key]
        assert found.shape == shape
        assert torch.equal(again(td.clone())[key], found)
        plain = {"observation": td["observation"].flatten(0, 1)}
        action = () if kind is DISCRETE else (td["action"].flatten(0, 1),)
        torch.testing.assert_close(critic.values(plain, *action), found.flatten(0, 1))


@pytest.mark.parametrize(
    ("network", "given", "expected"),
    [
        ("resnet", None, True),
        ("shallow", False, False),
        pytest.param("resnet", False, False, marks=pytest.mark.slow),
        ("shallow", True, True),
    ],
)
def test_memory_format_of_an_image_network(network: str, given: bool | None, expected: bool) -> None:
    """Of weights and of what the convolutions give; left to the ResNet, the one that is faster on a CPU."""
    values: dict[str, Any] = {"observation_shape": [4, 84, 84], "network": network, "channels_last": given}
    built = [build_policy(**values, **DISCRETE), build_value(**values), build_critic(**values, **CONTINUOUS)]
    for module in built:
        formats = []
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                formats.append(layer.weight.is_contiguous(memory_format=torch.channels_last))
                layer.register_forward_hook(
                    lambda layer, args, out, formats=formats: formats.append(
                        out.is_contiguous(memory_format=torch.channels_last)
                    )
                )
        td = inputs([4, 84, 84], 2).set("action", torch.randn(2, 2))
        module(td)
        assert formats
        assert set(formats) == {expected}


def test_the_shallow_net_has_its_channels_last_where_a_cpu_learns_in_float32() -> None:
    torch.manual_seed(0)
    net = ShallowConv()
    formats: list[bool] = []
    for layer in (net.conv1, net.conv2):
        layer.register_forward_hook(
            lambda layer, args, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    x = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    learnt = net(x)
    with torch.no_grad():
        acted = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    learnt.sum().backward()
    assert net.conv1.weight.is_contiguous()
    assert net.conv1.weight.grad.is_contiguous()  # type: ignore[union-attr]
    net.double()(x)
    assert formats == [True, True] + [False] * 6
    torch.testing.assert_close(learnt, acted)


def test_widths_behind_a_convolutional_net_are_a_layer_norm_mlp() -> None:
    values: dict[str, Any] = {"observation_shape": IMAGE, "network": "shallow", **DISCRETE}
    encoder: Any = build_policy(**values, hidden=[24, 16, 8]).network.encoder
    assert encoder.conv.out_features == 24
    assert isinstance(encoder.mlp, LayerNormMLP)
    assert [layer.out_features for layer in encoder.mlp.layers] == [16, 8]
    assert build_policy(**values, hidden=[24]).network.encoder.out_features == 24
    critic = build_critic(**values, hidden=[24, 16, 8])
    assert critic.encoder.out_features == 24  # type: ignore[union-attr]
    assert [layer.weight.shape[1:] for layer in critic.ensemble.layers] == [(24, 16), (16, 8)]


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu", "gelu"])
def test_an_activation_is_that_of_policies_and_critics(activation: str) -> None:
    values: dict[str, Any] = {"observation_shape": VECTOR, "activation": activation, "hidden": [4]}
    td = inputs(VECTOR, 6)
    function = getattr(nn.functional, activation)
    net = build_policy(**values, **DISCRETE).network
    layer: Any = net.encoder.layers[0]  # type: ignore[index]
    torch.testing.assert_close(net.encoder(td["observation"]), function(layer(td["observation"])))
    critic = build_critic(**values, **DISCRETE, critics=1)
    hidden = function(critic.ensemble.layers[0](td["observation"]))
    torch.testing.assert_close(critic.ensemble(td["observation"]), critic.ensemble.last(hidden))


@pytest.mark.parametrize("network", ["mlp", "layernorm_mlp"])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_of_a_dictionary_are_read_as_one_in_its_order(network: str, normalize: bool) -> None:
    values: dict[str, Any] = {"network": network, "hidden": [8, 8], "normalize": normalize}
    td = inputs(JOINED, 2, 3).set("action", torch.randn(2, 3, 2))
    one = td.clone().set("observation", torch.cat([td["observation", n].reshape(2, 3, -1) for n in JOINED], -1))
    for build, kind in (
        (build_policy, DISCRETE), (build_policy, {**CONTINUOUS, "head": "tanh"}), (build_value, {}),
        (build_critic, DISCRETE), (build_critic, CONTINUOUS),
    ):  # fmt: skip
        make: Any = build
        torch.manual_seed(0)
        split = make(observation_shape=json.loads(json.dumps(JOINED)), **values, **kind)
        torch.manual_seed(0)
        whole = make(observation_shape=[9], **values, **kind)
        assert [key for key in split.in_keys if key != "action"] == [("observation", name) for name in JOINED]
        torch.manual_seed(2)
        found = split(td.clone())
        torch.manual_seed(2)
        wanted = whole(one.clone())
        for key in whole.out_keys:
            torch.testing.assert_close(found[key], wanted[key])


def test_a_users_network_of_a_dictionary_in_every_builder() -> None:
    values: dict[str, Any] = {
        "observation_shape": MIXED, "network": OWN_MIXED, "hidden": [8], "normalize": True,
    }  # fmt: skip
    td = inputs(MIXED, 4).set("action", torch.randn(4, 2))
    policy = build_policy(**json.loads(json.dumps(values)), **DISCRETE)
    assert policy.in_keys == [("observation", "camera"), ("observation", "speed")]
    assert isinstance(policy.network.encoder, OwnMixed)
    out = policy(td.clone())
    assert out["action"].shape == (4,)
    plain = {key: td[key] for key in policy.in_keys}
    torch.testing.assert_close(policy.distribution_at(plain).log_prob(out["action"]), out["action_log_prob"])
    critic = build_critic(**values, **CONTINUOUS)
    torch.testing.assert_close(critic.values(plain, td["action"]), critic(td.clone())["state_action_value"])
    value = build_value(**values)
    torch.testing.assert_close(value.values(plain), value(td.clone())["state_value"])
    # one normaliser of the vectors serves all, and leaves images alone
    share_normalizer(policy.network, critic, value)
    policy.network.normalizer.update(policy.network.observation(td))  # type: ignore[union-attr, operator, arg-type]
    seen = value.normalizer(value.observation(td))  # type: ignore[misc]
    assert torch.equal(seen["camera"], td["observation", "camera"])
    torch.testing.assert_close(seen["speed"].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    with pytest.raises(KeyError, match="speed"):
        policy(td.exclude(("observation", "speed")))


def test_a_name_with_a_dot_is_a_name() -> None:
    policy = build_policy(observation_shape={"a.b": [2], "c": [1]}, normalize=True, **DISCRETE)
    td = TensorDict({"observation": {"a.b": torch.randn(3, 2), "c": torch.randn(3, 1)}}, [3])
    assert policy(td)["action"].shape == (3,)


def test_who_has_images_is_not_sent_to_a_network_of_vectors() -> None:
    with pytest.raises(ValueError, match=r"needs observations \[channels, height, width\], got \(4, 84, 84, 3\)$"):
        build_policy(observation_shape=[4, 84, 84, 3], network="resnet", **DISCRETE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "shalow"}, "did you mean shallow"),
        ({"network": "layernorm-mlp"}, "did you mean layernorm_mlp"),
        ({"network": "shallow"}, "needs observations [channels, height, width], got (3,); use 'mlp'"),
        ({"network": "resnet"}, "needs observations [channels, height, width], got (3,); use 'mlp'"),
        ({"network": "shallow", "observation_shape": [4, 8, 8]}, "at least 20x20, got (8, 8); use 'resnet'"),
        ({"network": "nowhere.module:net"}, "cannot be imported"),
        ({"network": f"{__name__}:absent"}, "cannot be imported"),
        ({"network": f"{__name__}:narrow"}, "must take (observation_shape, hidden), and takes (shape)"),
        ({"network": f"{__name__}:without_width"}, "must give a module with an int 'out_features', got Flatten"),
        ({"observation_shape": [4, 84, 84]}, "is an image, (4, 84, 84); use 'shallow' or 'resnet'"),
        ({"observation_shape": [4, 84, 84], "network": "layernorm_mlp"}, "'layernorm_mlp' reads vectors, and the obs"),
        ({"observation_shape": MIXED}, "give a network of your own"),
        ({"observation_shape": {"speed": [2]}, "network": "shallow"}, "give a network of your own"),
        ({"observation_shape": [0]}, "sizes of an observation must be positive"),
        ({"observation_shape": {}}, "sizes of an observation must be positive"),
        ({"hidden": [0]}, "must be positive"),
        ({"hidden": []}, "and one at least"),
        ({"activation": "relo"}, "activation must be one of"),
        ({"num_actions": None}, "give num_actions or action_dim"),
        ({"action_dim": 2}, "give num_actions or action_dim"),
        ({"normalize": True, "normalize_clip": 0.0}, "clip must be positive"),
    ],
)
@pytest.mark.parametrize("build", [build_policy, build_critic, build_value])
def test_what_no_builder_can_do_is_named(build: Any, values: dict[str, Any], message: str) -> None:
    given = {"observation_shape": [3], **DISCRETE, **values}
    if build is build_value:
        if {"num_actions", "action_dim"} & set(values):
            return
        given.pop("num_actions")
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": "tanhh", **CONTINUOUS}, "did you mean tanh"),
        ({"head": "categorical", **CONTINUOUS}, "head 'categorical' needs num_actions"),
        ({"head": "greedy", **CONTINUOUS}, "head 'greedy' needs num_actions"),
        ({"head": "tanh", **DISCRETE}, "head 'tanh' needs action_dim"),
        ({"head": "greedy", **DISCRETE}, "head 'greedy' needs critic='q'"),
        ({"critic": "w", **DISCRETE}, "critic must be 'v', 'q' or None, got 'w'"),
        ({"critic": "q", **CONTINUOUS}, "critic='q' needs discrete actions"),
        ({"masked": True, **CONTINUOUS}, "masked=True needs discrete actions"),
        ({"head_options": {"inti_scale": 0.1}, **CONTINUOUS}, "did you mean init_scale"),
        ({"head_options": {"init_scale": 0.006}, **CONTINUOUS}, "is 0.006; it must be from 0.006738 to 7.389"),
        ({"head_options": {"init_scale": 8.0}, **CONTINUOUS}, "init_scale is 8.0; it must be from 0.006738 to 7.389"),
        ({"head": "gaussian", "head_options": {"init_scale": math.inf}, **CONTINUOUS}, "init_scale > 0"),
        ({"head": "full_gaussian", "head_options": {"init_scale": math.nan}, **CONTINUOUS}, "init_scale > 0"),
        ({"head": "tanh", "head_options": {"init_scale": 0.1}, **CONTINUOUS}, "its options are ['log_scale']"),
        ({"head_options": {"masked": True}, **DISCRETE}, "head 'categorical' has no option 'masked'"),
        ({"critic_options": {"popartt": True}, **DISCRETE}, "did you mean popart"),
        ({"critic": "q", "critic_options": {"popart": True}, **DISCRETE}, "critic='q' has no option 'popart'"),
        ({"critic": "q", "critic_options": {"dualing": True}, **DISCRETE}, "did you mean dueling"),
        ({"critic_options": {"atoms": 51}, **DISCRETE}, "critic='v' has no option 'atoms'"),
        ({"critic": "q", "critic_options": {"atoms": 1}, **DISCRETE}, "atoms >= 2"),
        ({"critic": "q", "critic_options": {"atoms": 2, "v_max": math.inf}, **DISCRETE}, "a finite v_max > 0"),
        ({"observation_shape": [], **DISCRETE}, "observation_shape is (); it must have a dimension"),
        ({"network": "layernorm_mlp", "hidden": 1, **DISCRETE}, "the first layer needs 2, got 1"),
        ({"head": "tanh", "head_options": {"log_scale": "none"}, **CONTINUOUS}, "log_scale must be one of"),
        ({"recurrent": 0, **DISCRETE}, "hidden_size of the recurrent core"),
        ({"smoothing": 1.0, **CONTINUOUS}, "smoothing must be in"),
        ({"smoothing": 0.5, **DISCRETE}, "smoothing=0.5 needs continuous actions"),
    ],
)
def test_policies_that_make_no_sense_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_policy(**{"observation_shape": [3], **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"critics": 0, **DISCRETE}, "critics must be at least 1"),
        ({"num_actions": 0}, "num_actions is 0; it must be at least 1"),
        ({"action_dim": 0}, "action_dim is 0; it must be at least 1"),
        ({"atoms": 51, "v_max": math.inf, **CONTINUOUS}, "finite low < high"),
        ({"observation_shape": [], **CONTINUOUS}, "observation_shape is (); it must have a dimension"),
        ({"atoms": 51, **DISCRETE}, "needs continuous actions"),
        ({"network": "shallow", "observation_shape": IMAGE, "hidden": [16], **DISCRETE}, "got hidden=[16]"),
    ],
)
def test_critics_that_make_no_sense_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_critic(**{"observation_shape": [3], **values})


def test_a_fault_inside_a_users_network_is_shown_as_it_is() -> None:
    with pytest.raises(AttributeError, match="a fault of the user's own"):
        build_policy(observation_shape=[3], network=f"{__name__}:broken", **DISCRETE)


def test_networks_know_nothing_but_each_other_names_of_entries_and_what_the_host_may_read() -> None:
    folder = Path(offtrace.modules.networks.__file__).parent
    known = tuple(f"offtrace.modules.{name}" for name in ("networks", "keys", "naming", "host"))
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("offtrace") or name.startswith(known), f"{path.name} imports {name}"


@pytest.mark.parametrize("outside", [-9.0, 7.0])
def test_a_scale_that_has_left_its_range_comes_back(outside: float) -> None:
    """As a step of the optimiser may leave it; a clamp alone would hold it there for ever."""
    policy = build_policy(observation_shape=[3], action_dim=2, hidden=[4])
    scale = policy.module[0].head.log_scale
    scale.data.fill_(outside)
    optimizer = torch.optim.SGD([scale], lr=0.1)
    for _ in range(5):
        found = policy.get_dist_params(TensorDict({"observation": torch.zeros(1, 3)}, [1]))["scale"]
        assert -5.001 < found.log().min() <= found.log().max() < 2.001
        optimizer.zero_grad()
        found.log().sum().mul(1.0 if outside > 0 else -1.0).backward()
        optimizer.step()
    # five steps of 0.1 from the bound, where the range begins
    torch.testing.assert_close(scale.detach(), torch.full((2,), 1.5 if outside > 0 else -4.5))
