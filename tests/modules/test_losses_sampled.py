"""What holds for every loss on sampled batches: importance weights, priorities, masked actions, TorchRL's modules."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import (
    LSTMModule,
    MaskedCategorical,
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
)
from torchrl.modules import TanhNormal as RLTanhNormal

from offtrace.modules.losses import DiscreteMPOLoss, DiscreteSACLoss, DQNLoss, MPOLoss, SACLoss
from offtrace.modules.networks.distributions import Categorical, mask_logits
from tests.modules import test_dqn_loss as dqn
from tests.modules import test_mpo_loss as mpo
from tests.modules import test_sac_loss as sac

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
Case = tuple[Any, TensorDict]


def finite(td: TensorDictBase) -> TensorDict:
    return td.apply(lambda x: x.nan_to_num() if x.is_floating_point() else x)  # type: ignore[return-value]


CASES: dict[str, Callable[..., Case]] = {
    "sac": lambda **o: (sac.sac(**o), finite(sac.replay(6))),
    "sac-n-step": lambda **o: (sac.sac("n_step", **o), finite(sac.replay(6, 5))),
    "sac-retrace": lambda **o: (sac.sac("retrace", **o), finite(sac.replay(6, 5))),
    "sac-v1": lambda **o: (sac.v1(**o), finite(sac.replay(6))),
    "discrete-sac": lambda **o: (sac.discrete(**o), finite(sac.replay(6, kinds=3))),
    "mpo": lambda **o: (mpo.make(target="one_step", critics=2, **o), mpo.data(6, None)),
    "mpo-root": lambda **o: (mpo.make(policy_states="root", **o), mpo.data(6, 5)),
    "dmpo": lambda **o: (mpo.make(critic="categorical", target="retrace", **o), mpo.data(6, 5)),
    "discrete-mpo": lambda **o: (mpo.make("discrete", "discrete", **o), mpo.data(6, 5, discrete=True)),
    "dqn": lambda **o: (dqn.dqn(**o), finite(dqn.batch(6))),
    "c51": lambda **o: (dqn.dqn(atoms=7, estimator="n_step(n=3)", **o), finite(dqn.batch(6, 5))),
}
UNWEIGHTED = ("loss_alpha", "loss_dual")


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def seeded(loss: Any, td: TensorDictBase) -> TensorDictBase:
    torch.manual_seed(3)
    return loss(td)


def test_weights_scale_the_losses_of_the_items(name: str) -> None:
    """The loss is linear in them: with all weight on one item it is that item's, of which others know nothing."""
    loss, td = CASES[name]()
    weight, shape = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.1, 3.0]), td.batch_size
    per_step = weight.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    single = []
    for n in range(6):
        alone = torch.zeros(6).index_fill(0, torch.tensor(n), 1.0).view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        single.append(seeded(loss, td.clone().set("weight", alone)))
    out, plain = seeded(loss, td.clone().set("weight", per_step)), seeded(loss, td)
    again = seeded(loss, td.clone().set("weight", 7 * per_step.unsqueeze(-1)))
    for key, value in plain.items():
        if key.startswith("loss_") and key not in UNWEIGHTED:
            expected = sum(float(w) / 4 * one[key] for w, one in zip(weight, single, strict=True))
            torch.testing.assert_close(out[key], expected)
            torch.testing.assert_close(sum(one[key] for one in single), value)
            torch.testing.assert_close(again[key], out[key])
            assert not torch.isclose(out[key], value)
        else:
            torch.testing.assert_close(out[key], value, equal_nan=True, rtol=0, atol=0)


@pytest.mark.slow
def test_the_mean_of_two_ranks_is_the_joined_batch(tmp_path: Path) -> None:
    """Two ranks, each with half of the batch, whose largest weights differ: the losses' mean is that of one rank.

    Of DQN, which draws nothing; every loss reads weights by the same function.
    """
    loss, td = CASES["dqn"]()
    td["weight"] = torch.tensor([0.5, 2.0, 1.0, 0.1, 4.0, 3.0])
    joined = loss(td.clone())["loss_q"]
    torch.save((loss, td), tmp_path / "case.pt")
    command = [sys.executable, "-m", "tests.modules.weights_script", str(tmp_path)]
    root = Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=root) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    halves = [torch.load(tmp_path / f"loss{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, joined.detach())


def test_weights_of_another_shape_or_kind_are_named(name: str) -> None:
    loss, td = CASES[name]()
    with pytest.raises(ValueError, match=r"'weight' must be \[.*\] or \[.*, 1\], got \[.*, 2\]"):
        loss(td.clone().set("weight", torch.ones(*td.batch_size, 2)))
    with pytest.raises(TypeError, match="'weight' must be a floating-point tensor, got torch"):
        loss(td.clone().set("weight", torch.ones(td.batch_size).long()))


def test_priorities_are_written_where_they_are_wanted(name: str) -> None:
    loss, td = CASES[name]()
    before = set(td.keys(True))
    plain = seeded(loss, td)
    assert set(td.keys(True)) == before
    loss, td = CASES[name](priorities=True)
    out = seeded(loss, td)
    assert all(torch.equal(out[key], plain[key]) or out[key].isnan() for key in set(plain.keys()))
    priority = td["td_error"]
    assert priority.shape == td.batch_size
    assert (priority >= 0).all()
    assert not priority.requires_grad
    first = priority if priority.ndim == 1 else priority[:, 0]
    if priority.ndim == 2:
        assert torch.equal(priority, first.unsqueeze(1).expand_as(priority))
    if name not in ("dmpo", "c51"):  # whose priorities are divergences
        torch.testing.assert_close(first.mean(), out["td_error"])
    loss.set_keys(priority="p")
    seeded(loss, td)
    assert torch.equal(td["p"], priority)


def test_priorities_count_valid_steps_only() -> None:
    loss, td = CASES["sac-retrace"](priorities=True)
    seeded(loss, td)
    every = td["td_error"].clone()
    td["valid"] = torch.ones(6, 5, 1, dtype=torch.bool)
    td["valid"][0] = False
    td["valid"][1, 3:] = False
    out = seeded(loss, td)
    assert not td["td_error"][0].any()
    assert torch.equal(td["td_error"][2:], every[2:])
    counts = torch.tensor([0, 3, 5, 5, 5, 5])
    torch.testing.assert_close((td["td_error"][:, 0] * counts).sum() / counts.sum(), out["td_error"])


# -------------------------------------------------------------------------------------------------------- legal actions
FEATURES, ACTIONS = 4, 3


class Logits(nn.Module):
    """Logits of a policy whose illegal actions have probability 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, ACTIONS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask_logits(self.linear(x), mask)


class Values(nn.Module):
    """Q of two critics; NaN for an illegal action, so that whoever looks there is found out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 2 * ACTIONS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (2, ACTIONS)).masked_fill(~mask.unsqueeze(-2), math.nan)


def masked_networks(kind: str) -> Any:
    torch.manual_seed(0)
    critic = TensorDictModule(Values(), ["observation", "action_mask"], ["action_value"])
    options: dict[str, Any] = {"out_keys": ["action"], "return_log_prob": True, "log_prob_key": "action_log_prob"}
    if kind == "ours":
        net = TensorDictModule(Logits(), ["observation", "action_mask"], ["logits"])
        sampler = ProbabilisticTensorDictModule(in_keys=["logits"], distribution_class=Categorical, **options)
    else:
        net = TensorDictModule(nn.Linear(FEATURES, ACTIONS), ["observation"], ["logits"])
        keys = {"logits": "logits", "mask": "action_mask"}
        sampler = ProbabilisticTensorDictModule(in_keys=keys, distribution_class=MaskedCategorical, **options)
    return ProbabilisticTensorDictSequential(net, sampler).double(), critic.double()


def enumerated(loss: Any, network: str, td: TensorDictBase, where: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, their logarithms and Q, the smallest of the critics, of legal actions; 0 of the others."""
    policy, critic = (loss.actor, loss.critic) if isinstance(loss, DiscreteSACLoss) else (loss.policy, loss.critic)
    if network == "target":
        critic = loss.target("critic")
        policy = policy if isinstance(loss, DiscreteSACLoss) else loss.target("policy")
    x, mask = (td[where][key] if where else td[key] for key in ("observation", "action_mask"))
    linears = [next(m for m in module.modules() if isinstance(m, nn.Linear)) for module in (policy, critic)]
    logits, q = linears[0](x), linears[1](x).unflatten(-1, (2, ACTIONS)).amin(-2)
    weight = logits.exp() * mask
    prob = weight / weight.sum(-1, keepdim=True)
    return prob, torch.where(mask, prob.clamp(min=1e-300).log(), 0), torch.where(mask, q, 0)


def masked_batch(*shape: int, valid: bool = False) -> TensorDict:
    return dqn.batch(*shape, masked=True, valid=valid)


@pytest.mark.parametrize("kind", ["ours", "torchrl"])
@pytest.mark.parametrize("estimator", ["one_step", "retrace", "tree_backup"])
def test_masked_soft_actor_critic_by_sums_over_legal_actions(estimator: str, kind: str) -> None:
    alpha = 6.0  # times the logarithm of a probability of next to nothing it would overflow
    loss = DiscreteSACLoss(*masked_networks(kind), estimator=estimator, gamma=0.9, alpha_init=alpha).double()
    td = masked_batch(12, 5)
    assert not td["action_mask"].all()
    out = loss(td)
    assert {"action_mask", ("next", "action_mask")} <= set(loss.in_keys)
    with torch.no_grad():
        td = td.clone()
        ends = td["next", "terminated"]
        td["next", "action_mask"] = torch.where(ends, True, td["next", "action_mask"])
        td["next", "observation"] = td["next", "observation"].nan_to_num()
        prob, log_prob, q = enumerated(loss, "target", td, "next")
        following = (prob * (q - alpha * log_prob)).sum(-1)
        y = td["next", "reward"].squeeze(-1) + torch.where(ends.squeeze(-1), 0, 0.9 * following)
    prob, log_prob, q = enumerated(loss, "online", td, None)
    torch.testing.assert_close(out["loss_actor"], (prob * (alpha * log_prob - q.detach())).sum(-1).mean())
    entropy = -(prob * log_prob).sum(-1).mean()
    torch.testing.assert_close(out["entropy"], entropy.detach())
    wanted = 0.98 * td["action_mask"].sum(-1).double().log().mean()
    torch.testing.assert_close(out["loss_alpha"], alpha * (entropy - wanted).detach())
    if estimator == "one_step":
        critic = next(m for m in loss.critic.modules() if isinstance(m, nn.Linear))
        chosen = critic(td["observation"]).unflatten(-1, (2, ACTIONS))
        chosen = chosen.gather(-1, td["action"][..., None, None].expand(-1, -1, 2, 1)).squeeze(-1)
        torch.testing.assert_close(out["loss_critic"], 0.5 * (chosen - y.unsqueeze(-1)).square().sum(-1).mean())
    check_gradients(loss, out)


@pytest.mark.parametrize("kind", ["ours", "torchrl"])
@pytest.mark.parametrize("states", ["next", "root"])
@pytest.mark.parametrize("estimator", ["n_step(n=1)", "retrace", "tree_backup"])
def test_masked_mpo_by_sums_over_legal_actions(estimator: str, states: str, kind: str) -> None:
    loss = DiscreteMPOLoss(*masked_networks(kind), estimator=estimator, gamma=0.9, policy_states=states).double()
    for p in loss.policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    td = masked_batch(12, 1)
    out = loss(td)
    ends = td["next", "terminated"]
    for key in ("action_mask", "observation"):
        td["next", key] = torch.where(ends, td[key], td["next", key])
    where = "next" if states == "next" else None
    pi, log_pi, _ = enumerated(loss, "online", td, where)
    with torch.no_grad():
        old, log_old, q = enumerated(loss, "target", td, where)
        eta, alpha = loss.temperature(), loss.alpha()
        raw = old * (q / eta).exp()
        best = raw / raw.sum(-1, keepdim=True)
    kl = (old * (log_old - log_pi)).sum(-1)
    torch.testing.assert_close(out["loss_policy"], (alpha.detach() * kl - (best * log_pi).sum(-1)).mean())
    torch.testing.assert_close(out["kl_policy"], kl.mean().detach())
    torch.testing.assert_close(out["entropy"], -(pi * log_pi).sum(-1).mean().detach())
    dual = eta * (0.1 + raw.sum(-1).log()) + alpha * (2.5e-3 - kl.detach())
    torch.testing.assert_close(out["loss_dual"].detach(), dual.mean())
    torch.testing.assert_close(
        out["kl_improved"], (best * (best / old.clamp(min=1e-300)).clamp(min=1e-300).log()).sum(-1).mean()
    )
    check_gradients(loss, out)


def test_small_temperatures_keep_their_digits_beside_illegal_actions() -> None:
    """What stands at an illegal action is not the best to which values are compared."""
    loss = DiscreteMPOLoss(*masked_networks("ours"), estimator="one_step", policy_states="root").float()
    linear = next(m for m in loss.target("critic").modules() if isinstance(m, nn.Linear))
    linear.bias.sub_(1000)
    loss.temperature.raw.data.fill_(-18.0)
    td = masked_batch(12).apply(lambda x: x.float() if x.is_floating_point() else x)
    assert not td["action_mask"].all()
    prob, _, q = enumerated(loss, "target", td, None)
    best = torch.where(td["action_mask"], q, -math.inf).argmax(-1, keepdim=True)
    torch.testing.assert_close(loss(td)["kl_improved"], -prob.gather(-1, best).log().mean().detach(), atol=1e-3, rtol=0)


def check_gradients(loss: Any, out: TensorDictBase) -> None:
    """All finite, but for the critic's own at illegal actions, which are NaN times 0 there."""
    named = [(name, p) for name, p in loss.named_parameters() if not name.startswith("critic")]
    total = sum(x for key, x in out.items() if key.startswith("loss_"))
    gradients = torch.autograd.grad(total, [p for _, p in named])  # type: ignore[arg-type]
    assert all(g.isfinite().all() and g.any() for g in gradients)
    assert all(x.isfinite().all() for key, x in out.items() if key != "ess")


@pytest.mark.parametrize("kind", ["ours", "torchrl"])
@pytest.mark.parametrize("make", [DiscreteSACLoss, DiscreteMPOLoss])
def test_masks_of_steps_that_are_not_valid_reach_nothing(make: Any, kind: str) -> None:
    loss, results = make(*masked_networks(kind), estimator="retrace", gamma=0.9).double(), []
    poisoned = masked_batch(8, 5, valid=True)
    clean = poisoned.apply(lambda x: x.nan_to_num(123.0) if x.is_floating_point() else x)
    clean["action_mask"] |= ~clean["valid"]
    for td in (poisoned, clean):
        loss.zero_grad()
        out = loss(td)
        sum(x for key, x in out.items() if key.startswith("loss_")).backward()
        results.append([*(out[key].detach() for key in loss.out_keys), *(p.grad.clone() for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- TorchRL
def rl_actor(distribution: Any = RLTanhNormal, outputs: int = 2) -> ProbabilisticActor:
    torch.manual_seed(0)
    normal = distribution is RLTanhNormal
    net = nn.Sequential(nn.Linear(FEATURES, outputs * (1 + normal)), *([NormalParamExtractor()] if normal else []))
    keys = ["loc", "scale"] if normal else ["logits"]
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], keys),
        in_keys=keys,
        distribution_class=distribution,
        return_log_prob=True,
    )


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES + 2, 2)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        return self.linear(torch.cat([x, action], -1))


def test_the_entropy_target_of_torchrls_actors_needs_no_attribute() -> None:
    actor = rl_actor()
    assert not hasattr(actor, "action_dim")
    critic = TensorDictModule(Cat(), ["observation", "action"], ["state_action_value"])
    loss = SACLoss(actor, critic, alpha_init=1.0).double()
    td = finite(sac.replay(8, ends=0.0))
    out = loss(td)
    torch.testing.assert_close(out["loss_alpha"].detach(), out["entropy"] + 2)
    number = SACLoss(rl_actor(), critic, target_entropy=0.5).double()(td)
    torch.testing.assert_close(number["loss_alpha"].detach(), number["entropy"] - 0.5)

    torch.manual_seed(0)
    critic = TensorDictModule(dqn.QNetwork(), ["observation"], ["action_value"])
    loss = DiscreteSACLoss(rl_actor(torch.distributions.Categorical, 3), critic, entropy_fraction=0.5).double()
    out = loss(finite(dqn.batch(8)))
    torch.testing.assert_close(out["loss_alpha"].detach(), out["entropy"] - 0.5 * math.log(3))


@pytest.mark.parametrize("make", [DiscreteSACLoss, DiscreteMPOLoss])
def test_one_hot_actions_are_refused(make: Any) -> None:
    critic = TensorDictModule(dqn.QNetwork(), ["observation"], ["action_value"])
    with pytest.raises(ValueError, match="needs actions as indices, got a policy of one-hot ones, OneHotCategorical"):
        make(rl_actor(OneHotCategorical, 3), critic)
    loss = make(rl_actor(torch.distributions.Categorical, 3), critic, estimator="one_step").double()
    td = finite(dqn.batch(4))
    hot = td.clone().set("action", nn.functional.one_hot(td["action"], 3))
    with pytest.raises(ValueError, match="of one-hot actions take argmax"):
        loss(hot)
    column = td.clone().set("action", td["action"].unsqueeze(-1))
    assert torch.equal(loss(column)["loss_critic"], loss(td)["loss_critic"])
    assert CategoricalSpec(3).rand((4,)).shape == td["action"].shape


@pytest.mark.parametrize("make", [SACLoss, MPOLoss])
def test_actions_without_a_dimension_are_refused(make: Any) -> None:
    loss, td = CASES["sac" if make is SACLoss else "mpo"]()
    with pytest.raises(ValueError, match=r"'action' must be \[6, 'A'\], got \[6\]"):
        loss(td.clone().set("action", td["action"][:, 0]))


@pytest.mark.parametrize("name", ["dqn", "discrete-sac", "discrete-mpo"])
def test_torchrls_recurrent_networks_are_refused(name: str) -> None:
    """Of single states an LSTM would take the batch for time."""
    core = LSTMModule(input_size=4, hidden_size=8, in_key="observation", out_key="embed")
    if name == "dqn":
        spec = CategoricalSpec(3)
        network = TensorDictSequential(core, QValueActor(nn.Linear(8, 3), in_keys=["embed"], spec=spec))
        with pytest.raises(ValueError, match="DQNLoss needs networks without a recurrent state, got one that reads"):
            DQNLoss(network)
        return
    head = TensorDictModule(nn.Linear(8, 3), in_keys=["embed"], out_keys=["logits"])
    sampler = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical)
    loss, _ = CASES[name]()
    with pytest.raises(ValueError, match=r"Loss needs networks without a recurrent state, got one that reads 'rec"):
        type(loss)(ProbabilisticTensorDictSequential(core, head, sampler), loss.critic)
