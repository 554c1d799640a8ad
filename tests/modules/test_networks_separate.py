"""Policy and critic over one encoder: a core of each, where the policy's gradient ends, and its uniform share."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode

from offtrace.modules.losses import ReactorLoss
from offtrace.modules.networks import CategoricalHead, LSTMCore, Policy, SeparateCores, build_policy
from offtrace.modules.networks import core as networks_core
from offtrace.modules.networks.distributions import MASKED_LOGIT
from tests.modules.test_impala_loss import ACTIONS, make
from tests.modules.test_networks import Recall
from tests.modules.test_networks_build import VECTOR, assert_unrolls_as_it_steps, inputs
from tests.modules.test_reactor_loss import stored

H = 3


def split(**kwargs: Any) -> Policy:
    """A policy in float64 whose two cores have states of 3 and 3 numbers."""
    return make(critic="q", recurrent=H, separate_cores=True, **kwargs)


def groups(policy: Policy) -> dict[str, list[Tensor]]:
    net = policy.network
    found = {name: list(getattr(net, name).parameters()) for name in ("encoder", "head", "value_head")}
    if isinstance(net.core, SeparateCores):
        found |= {
            "core of the policy": [*net.core.policy_cell.parameters()],
            "core of the critic": [*net.core.cell.parameters()],
        }
    elif net.core is not None:
        found["core"] = list(net.core.parameters())
    return found


def reached(policy: Policy, term: Tensor) -> set[str]:
    """Parts of the network to which ``term`` gives a gradient: of all their parameters, or of none."""
    found = set()
    for name, parameters in groups(policy).items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        there = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert all(there) or not any(there), name
        found |= {name} if all(there) else set()
    return found


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("kind", ["feed-forward", "one core", "separate cores"])
@pytest.mark.parametrize("atoms", [0, 5])
def test_the_paths_of_both_gradients(kind: str, detach: bool, atoms: int) -> None:
    options: dict[str, Any] = {"feed-forward": {}, "one core": {"recurrent": 2 * H}, "separate cores": {"recurrent": H}}
    policy = make(
        critic="q", critic_options={"atoms": atoms, "dueling": True}, detach_policy=detach,
        separate_cores=kind == "separate cores", **options[kind],
    )  # fmt: skip
    loss = ReactorLoss(policy)
    out = loss(stored())
    core = {"feed-forward": set(), "one core": {"core"}}
    shared = {"encoder"} | core.get(kind, set())
    own = {"head"} | ({"core of the policy"} if kind == "separate cores" else set())
    policys = own if detach else own | shared
    for name in ("loss_policy", "loss_entropy"):
        assert reached(loss.policy, out[name]) == policys, name
    critics = {"value_head"} | shared | ({"core of the critic"} if kind == "separate cores" else set())
    assert reached(loss.policy, out["loss_value"]) == critics


@pytest.mark.parametrize("detach", [False, True])
def test_stopping_the_gradient_changes_no_output(detach: bool) -> None:
    td = stored().select("observation", "is_init", "last_action", "last_reward", "recurrent_h", "recurrent_c")
    outputs = []
    for value in (False, detach):
        policy = split(detach_policy=value)
        with set_recurrent_mode(True):
            outputs.append(policy.get_dist_params(td.clone()).select("logits", "action_value"))
    assert (outputs[0] == outputs[1]).all()


@pytest.mark.parametrize("core", [LSTMCore(5, 4, num_actions=3), SeparateCores(5, 4, num_actions=3)])
def test_one_step_after_another_is_the_unrolled_sequence(core: LSTMCore) -> None:
    g = torch.Generator().manual_seed(0)
    x, first = torch.randn(6, 9, 9, generator=g), torch.rand(6, 9, 1, generator=g) < 0.3
    h, c = torch.randn(2, 6, core.hidden_size, generator=g)
    out = core.unroll(x, first, h, c)
    assert out.shape == (6, 9, core.hidden_size)
    for t in range(9):
        h, c = core.step(x[:, t], first[:, t], h, c)
        assert torch.equal(out[:, t], h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "core", [LSTMCore(5, 4, num_actions=3), SeparateCores(5, 4, num_actions=3, detach_policy=True)], ids=["one", "two"]
)
def test_a_sequence_without_resets_inside_is_one_call(
    core: LSTMCore, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features and gradients as of the loop, which stays where an episode starts behind the first step."""
    core, called = copy.deepcopy(core).to(dtype), []
    for name in ("_fused", "_looped"):
        found = getattr(networks_core, name)
        monkeypatch.setattr(networks_core, name, lambda *a, n=name, f=found: called.append(n) or f(*a))
    g = torch.Generator().manual_seed(0)
    first = torch.zeros(6, 9, 1, dtype=torch.bool)
    first[::2, 0] = True
    inputs = [torch.randn(*shape, generator=g, dtype=dtype) for shape in ((6, 9, 9), *[(6, core.hidden_size)] * 2)]
    x, h, c = (tensor.requires_grad_() for tensor in inputs)
    out = core.unroll(x, first, h, c)
    assert set(called) == {"_fused"}
    steps, state = [], (h, c)
    for t in range(9):
        state = core.step(x[:, t], first[:, t], *state)
        steps.append(state[0])
    expected, leaves = torch.stack(steps, 1), [x, h, c, *core.parameters()]
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected, **close)
    weight = torch.randn(out.shape, generator=g, dtype=dtype)
    pairs = zip(*(torch.autograd.grad((y * weight).mean(), leaves) for y in (out, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **close)

    called.clear()
    first[1, 4] = True
    core.unroll(x, first, h, c)
    assert set(called) == {"_looped"}


def test_the_halves_are_two_cores_that_know_nothing_of_each_other() -> None:
    """Each is an LSTMCore of its own weights, over its own half of the state."""
    both = SeparateCores(5, 4, num_actions=3)
    assert (both.out_features, both.hidden_size) == (4, 8)
    g = torch.Generator().manual_seed(1)
    x, first = torch.randn(6, 7, 9, generator=g), torch.rand(6, 7, 1, generator=g) < 0.3
    h, c = torch.randn(2, 6, 8, generator=g)
    out = both.unroll(x, first, h, c).chunk(2, -1)
    for part, cell, half in zip(out, (both.policy_cell, both.cell), (slice(0, 4), slice(4, 8)), strict=True):
        one = LSTMCore(5, 4, num_actions=3)
        one.cell.load_state_dict(cell.state_dict())
        torch.testing.assert_close(part, one.unroll(x, first, h[:, half], c[:, half]), rtol=1e-6, atol=1e-6)
    bias = (both.policy_cell.bias_ih + both.policy_cell.bias_hh).unflatten(0, (4, 4))
    assert (bias[1] == 1).all()
    assert not bias[[0, 2, 3]].any()


def test_each_head_reads_its_own_half() -> None:
    td = TensorDict(
        {
            "observation": torch.randn(6, 4).double(), "is_init": torch.zeros(6, 1, dtype=torch.bool),
            "last_action": torch.zeros(6).long(), "last_reward": torch.zeros(6, 1).double(),
            "recurrent_h": torch.randn(6, 2 * H).double(), "recurrent_c": torch.randn(6, 2 * H).double(),
        },
        [6],
    )  # fmt: skip
    policy = split()
    before = policy.get_dist_params(td.clone())
    for half, stays, moves in ((slice(0, H), "action_value", "logits"), (slice(H, 2 * H), "logits", "action_value")):
        moved = td.clone()
        moved["recurrent_h"][:, half] += 1
        after = policy.get_dist_params(moved)
        assert torch.equal(after[stays], before[stays])
        assert not (after[moves] == before[moves]).all(-1).any()
        other = slice(H, 2 * H) if half.start == 0 else slice(0, H)
        assert torch.equal(after["next", "recurrent_c"][:, other], before["next", "recurrent_c"][:, other])


def test_the_learner_recomputes_what_an_actor_with_two_cores_did() -> None:
    torch.manual_seed(0)
    policy = build_policy(
        network="mlp", observation_shape=[2], num_actions=2, hidden=[16], recurrent=8, critic="q", separate_cores=True,
        detach_policy=True, head_options={"epsilon": 0.1}, critic_options={"atoms": 5},
    )  # fmt: skip
    policy.network.head.linear.weight.data.mul_(100)
    collector = Collector(
        Recall(6, mixed=True), policy, frames_per_batch=66, total_frames=198, auto_register_policy_transforms=True
    )
    loss = ReactorLoss(policy)
    for number, batch in enumerate(collector):
        assert batch["recurrent_h"].shape == (6, 11, 16)
        assert batch["recurrent_h"][:, 0].any() or number == 0
        torch.testing.assert_close(
            batch["action_log_prob"], batch["logits"].log_softmax(-1).gather(-1, batch["action"][..., None])[..., 0]
        )
        assert batch["logits"].softmax(-1).min() >= 0.05 - 1e-6
        out = loss(batch)
        torch.testing.assert_close(out["ratio_mean"], torch.tensor(1.0), rtol=0, atol=1e-5)
        assert out["kl"].abs() < 1e-6
    collector.shutdown()


def test_a_policy_with_two_cores_is_built_again_from_json_and_unrolls_as_it_steps() -> None:
    values = {
        "observation_shape": VECTOR, "num_actions": 3, "recurrent": 2, "separate_cores": True, "detach_policy": True,
        "critic": "q", "critic_options": {"atoms": 5, "dueling": True}, "head_options": {"epsilon": 0.05},
    }  # fmt: skip
    torch.manual_seed(1)
    first = build_policy(**values)  # type: ignore[arg-type]
    torch.manual_seed(1)
    second = build_policy(**json.loads(json.dumps(values)))
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    td = inputs(VECTOR, 6)
    td["last_reward"], td["last_action"] = torch.zeros(6, 1), torch.zeros(6, dtype=torch.long)
    assert_unrolls_as_it_steps(first, td)


@pytest.mark.parametrize("masked", [False, True])
def test_the_policy_is_the_mixture(masked: bool) -> None:
    """Probabilities, log-probabilities, samples and gradients are those of (1 - epsilon) softmax + epsilon / n."""
    torch.manual_seed(0)
    head = CategoricalHead(4, 5, epsilon=0.2, masked=masked).double()
    head.linear.weight.data.mul_(300)
    x = torch.randn(50, 4, dtype=torch.float64)
    mask = torch.rand(50, 5) < 0.6 if masked else torch.ones(50, 5, dtype=torch.bool)
    mask[:, 2] = True
    (logits,) = head(x, mask if masked else None)
    raw = head.linear(x).masked_fill(~mask, -math.inf)
    expected = 0.8 * raw.softmax(-1) + 0.2 * mask / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), expected)
    torch.testing.assert_close(logits.exp(), expected, msg="logits are its logarithm")
    assert (logits[~mask] == MASKED_LOGIT).all()
    assert (logits.softmax(-1)[~mask] == 0).all()
    dist = head.distribution(logits)
    assert torch.equal(dist.deterministic_sample, raw.argmax(-1))
    weight = torch.randn(50, 5, dtype=torch.float64)
    found = torch.autograd.grad((weight * dist.logits.exp()).sum(), head.linear.weight, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((weight * expected).sum(), head.linear.weight))
    counts = torch.bincount(torch.stack([dist.sample()[0] for _ in range(4000)]), minlength=5) / 4000
    torch.testing.assert_close(counts.double(), expected[0].detach(), rtol=0, atol=0.03)


def test_without_a_uniform_share_the_logits_are_the_layers() -> None:
    head = CategoricalHead(4, 3)
    x = torch.randn(7, 4)
    assert torch.equal(head(x)[0], head.linear(x))


def test_where_nothing_is_legal_nothing_is_nan() -> None:
    head = CategoricalHead(4, 3, epsilon=0.1, masked=True)
    (logits,) = head(torch.randn(2, 4), torch.tensor([[False] * 3, [True] * 3]))
    logits.log_softmax(-1)[1].sum().backward()
    assert logits.isfinite().all()
    assert head.linear.weight.grad is not None
    assert head.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"separate_cores": True, "critic": "q"}, r"separate_cores=True needs recurrent, the size of each core"),
        ({"separate_cores": True, "recurrent": 4, "critic": None}, r"separate_cores=True needs a policy and a critic"),
        ({"detach_policy": True, "critic": None}, r"detach_policy=True needs a policy and a critic .* critic=None"),
        ({"detach_policy": True, "critic": "q", "head": "greedy"}, r"detach_policy=True needs .* got head='greedy'"),
        ({"head_options": {"epsilon": 1.0}}, r"epsilon must be at least 0 and below 1, got 1\.0"),
        ({"head_options": {"epsilon": -0.1}}, r"epsilon must be at least 0 and below 1, got -0\.1"),
    ],
)
def test_what_makes_no_sense_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_policy(network="mlp", observation_shape=[4], num_actions=ACTIONS, **options)


def test_what_is_called_on_tensors_gives_what_the_tensordict_gives() -> None:
    policy = make(critic="q", detach_policy=True)
    states = {"observation": torch.randn(6, 4, dtype=torch.float64)}
    written = policy.get_dist_params(TensorDict(states, [6]))
    (logits,) = policy.parameters_at(states)
    assert torch.equal(logits, written["logits"])
    assert torch.equal(policy.distribution_at(states).logits, logits.log_softmax(-1))
    assert torch.equal(policy.network.values(states), written["action_value"])
    gradients = torch.autograd.grad(logits.sum(), list(policy.network.encoder.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("options", [{"separate_cores": True}, {}, {"recurrent": None}], ids=["two", "one", "none"])
def test_the_critic_alone_says_the_same_without_the_policy(options: dict[str, Any]) -> None:
    """With resets inside and without; neither the policy's core nor its head runs."""
    torch.manual_seed(0)
    policy = build_policy(
        network="mlp", observation_shape=[4], num_actions=3, hidden=[8], critic="q",
        critic_options={"dueling": True, "atoms": 5, "v_max": 2.0}, **{"recurrent": 6, **options},
    )  # fmt: skip
    net, first = policy.network, torch.zeros(5, 7, 1, dtype=torch.bool)
    size = 0 if net.core is None else net.core.hidden_size
    td = TensorDict(
        {
            "observation": torch.randn(5, 7, 4), "is_init": first, "last_action": torch.randint(3, (5, 7)),
            "last_reward": torch.randn(5, 7, 1), "recurrent_h": torch.randn(5, 7, size),
            "recurrent_c": torch.randn(5, 7, size),
        },
        [5, 7],
    )  # fmt: skip
    for resets in (False, True):
        td["is_init"][2, 3] = resets
        with set_recurrent_mode(True):
            expected = policy.get_dist_params(td.clone())
        found = net.critic(td.clone())
        for key in ("action_value", "value_logits"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        assert "logits" not in found
    cells = [cell for cell in (net.head, getattr(net.core, "policy_cell", None)) if cell is not None]
    for part in cells:
        for parameter in part.parameters():
            parameter.data.fill_(math.nan)
    assert net.critic(td.clone())["action_value"].isfinite().all()
    with pytest.raises(ValueError, match="the policy network has no value head"):
        build_policy(network="mlp", observation_shape=[4], num_actions=3, critic=None).network.critic(td)
