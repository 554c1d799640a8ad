"""What holds for every loss: entries are named when they are missing or do not fit, and how far off-policy is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.modules import TanhNormal as RLTanhNormal

from offtrace.modules.estimators import VTrace
from offtrace.modules.losses import A2CLoss, ACERLoss, ImpalaLoss, PPOLoss, QActorCriticLoss, TRPOLoss
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import trust_region
from offtrace.modules.losses.vmpo import VMPOLoss
from offtrace.modules.networks import critics, encoders, ensembles
from offtrace.modules.networks.distributions import TanhNormal
from tests.modules import test_dqn_loss as dqn
from tests.modules import test_impala_loss as impala
from tests.modules import test_laser as laser
from tests.modules import test_mpo_loss as mpo
from tests.modules import test_q_actor_critic_loss as q_actor_critic
from tests.modules import test_reactor_loss as reactor
from tests.modules import test_sac_loss as sac
from tests.modules import test_trpo_loss as trpo
from tests.modules import test_vmpo_loss as vmpo

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
Case = tuple[Loss, TensorDict]
CASES: dict[str, Callable[[], Case]] = {
    "impala": lambda: (ImpalaLoss(impala.make()), impala.rollout()),
    "impala-continuous": lambda: (ImpalaLoss(impala.make(action_dim=2)), impala.rollout(dim=2)),
    "impala-laser": lambda: (
        ImpalaLoss(impala.make(), max_kl=0.1, entropy_on_replay=False),
        laser.replayed(valid=False),
    ),
    "a2c": lambda: (A2CLoss(impala.make()), impala.rollout()),
    "a2c-vtrace": lambda: (A2CLoss(impala.make(action_dim=2), estimator="vtrace"), impala.rollout(dim=2)),
    "ppo": lambda: (PPOLoss(impala.make()), impala.rollout()),
    "ppo-value-clip": lambda: (PPOLoss(impala.make(action_dim=2), value_clip=0.2), impala.rollout(dim=2)),
    "acer": lambda: (ACERLoss(q_actor_critic.policy_of()).double(), reactor.stored()),
    "q-actor-critic": lambda: (q_actor_critic.QActorCriticLoss(q_actor_critic.policy_of()), impala.rollout()),
    "reactor": lambda: (reactor.reactor_loss(reactor.policy_of()), reactor.stored()),
    "reactor-values": lambda: (reactor.reactor_loss(reactor.policy_of("values")), reactor.stored()),
    "trpo": lambda: trpo.make(),
    "trpo-continuous": lambda: trpo.make("continuous"),
    "vmpo": lambda: (VMPOLoss(vmpo.make()).double(), vmpo.rollout()),
    "vmpo-diagonal": lambda: (VMPOLoss(vmpo.make("diagonal")).double(), vmpo.rollout("diagonal")),
    "sac": lambda: (sac.sac("retrace"), finite(sac.replay(6, 5))),
    "sac-one-step": lambda: (sac.sac("one_step"), finite(sac.replay(6))),
    "sac-v1": lambda: (sac.v1(), finite(sac.replay(6))),
    "discrete-sac": lambda: (sac.discrete("retrace"), finite(sac.replay(6, 5, kinds=3))),
    "mpo": lambda: (mpo.make(target="retrace"), mpo.data()),
    "mpo-n-step": lambda: (mpo.make(target="n_step"), mpo.data()),
    "dmpo": lambda: (mpo.make(critic="categorical", target="retrace"), mpo.data()),
    "discrete-mpo": lambda: (mpo.make("discrete", "discrete", target="retrace"), mpo.data(discrete=True)),
}


def finite(td: TensorDictBase) -> TensorDict:
    return td.apply(lambda x: x.nan_to_num() if x.is_floating_point() else x)  # type: ignore[return-value]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_each_entry_that_is_read_is_named_when_it_is_missing(case: Case) -> None:
    loss, td = case
    loss(td.select(*loss.in_keys))
    for key in loss.in_keys:
        message = f"reads .*{words(key)}.*, which the (batch|rollout) lacks|but the rollout lacks .*{words(key)}"
        with pytest.raises(KeyError, match=message):
            loss(td.exclude(key))


def test_shapes_and_kinds_that_do_not_fit_are_named(case: Case) -> None:
    loss, td = case
    shape = list(td.batch_size)
    for key in (("next", "reward"), ("next", "done"), ("next", "terminated"), "action_log_prob"):
        if key in loss.in_keys:
            wrong = td.clone().set(key, torch.cat([td[key].reshape(*shape, 1)] * 2, -1))
            with pytest.raises(ValueError, match=rf"{words(key)}.* must be \[.*\] or \[.*, 1\], got \[.*, 2\]"):
                loss(wrong)
    with pytest.raises(TypeError, match=r"'next', 'reward'.* must be a floating-point tensor, got torch.int64"):
        loss(td.clone().set(("next", "reward"), td["next", "reward"].long()))
    with pytest.raises(TypeError, match=r"'next', 'done'.* must be a bool tensor, got torch.float32"):
        loss(td.clone().set(("next", "done"), td["next", "done"].float()))


def test_entries_elsewhere_and_masks_of_another_kind_are_named(case: Case) -> None:
    loss, td = case
    for key in loss.in_keys:
        with pytest.raises(ValueError, match=rf"{words(key)}.* is on meta, the networks are on cpu"):
            loss(td.clone().set(key, td[key].to("meta")))
    for mask in (torch.ones(*td.batch_size, 1), torch.ones(*td.batch_size, 1, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"'valid' must be a bool tensor on cpu, got torch"):
            loss(td.clone().set("valid", mask))
    with pytest.raises(ValueError, match=r"the batch is empty, \[0"):
        loss(td[:0])


def gradients(loss: Loss, td: TensorDictBase, *inputs: Tensor) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Of the sum of the terms: by the parameters, and by ``inputs``."""
    torch.manual_seed(0)
    if isinstance(loss, PPOLoss):
        loss.prepare(td)
    out = loss(td)
    total = torch.stack([value for name, value in out.items() if name.startswith("loss_")]).sum()
    parameters = [p for p in loss.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, [*parameters, *inputs], allow_unused=True)
    own = [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, found, strict=False)]
    return own, found[len(parameters) :]


def test_a_batch_that_was_acted_with_gradients_is_learnt_from_alike(case: Case) -> None:
    """No gradient goes into what the behaviour policy wrote, whose graph may lead to the same weights."""
    loss, td = case
    expected, _ = gradients(loss, td.clone())
    names = {"action", "action_log_prob", "logits", "loc", "scale", "pre_tanh"}
    keys = [key for key in loss.in_keys if key in names and td[key].is_floating_point()]
    acted = td.clone()
    for key in keys:
        acted[key] = td[key].clone().requires_grad_()
    found, into = gradients(loss, acted, *(acted[key] for key in keys))
    assert dict(zip(keys, into, strict=True)) == dict.fromkeys(keys)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_actions_are_integers_of_any_kind(case: Case) -> None:
    loss, td = case
    if td["action"].is_floating_point():
        return
    expected, _ = gradients(loss, td.clone())
    for dtype in (torch.uint8, torch.int32):
        found, _ = gradients(loss, td.clone().set("action", td["action"].to(dtype)))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(TypeError, match=r"needs discrete actions, as integers; 'action' is torch.float32"):
        gradients(loss, td.clone().set("action", td["action"].float()))


@pytest.mark.parametrize("clip", [1.0, 7.0])
def test_no_ratio_is_below_a_clip_of_one(clip: float) -> None:
    log_rho = torch.tensor([-300.0, -30.0, 0.0, 30.0])
    kept, outside = trust_region(torch.full((4,), -2.0), log_rho, clip)
    assert (kept == -2).all()
    assert not outside.any()
    _, outside = trust_region(torch.full((4,), 2.0), log_rho, clip)
    assert outside.tolist() == [0, 0, 0, 1]


def test_weights_of_steps_that_do_not_count_have_no_effect(case: Case) -> None:
    """Losses of replayed steps read the weights of the steps that count; losses of whole rollouts read none."""
    loss, td = case
    rollouts = isinstance(loss, ImpalaLoss | A2CLoss | PPOLoss | ACERLoss | QActorCriticLoss | TRPOLoss | VMPOLoss)
    shape = td.batch_size
    valid = torch.ones(*shape, 1, dtype=torch.bool)
    valid[0] = False
    weight = torch.linspace(0.2, 0.9, shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    td = td.clone().set("valid", valid)
    plain, _ = gradients(loss, td.clone())
    expected, _ = gradients(loss, td.clone().set("weight", weight))
    assert any(x.any() for x in expected)
    assert rollouts == all(torch.equal(x, y) for x, y in zip(plain, expected, strict=True))
    for odd in (1e6, math.nan):
        weight[0] = odd
        found, _ = gradients(loss, td.clone().set("weight", weight))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    found, _ = gradients(loss, td.clone().set("weight", torch.zeros(shape)))
    assert all(x.isfinite().all() for x in found)


def test_rewards_and_log_probabilities_of_another_precision_are_converted(case: Case) -> None:
    loss, td = case
    loss.float()
    torch.manual_seed(0)
    expected = loss(td.apply(lambda x: x.float() if x.is_floating_point() else x))
    mixed = td.apply(lambda x: x.float() if x.is_floating_point() else x)
    for key in ("action_log_prob", ("next", "reward")):
        mixed[key] = mixed[key].double()
    torch.manual_seed(0)
    for name, value in loss(mixed).items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], equal_nan=True)


def test_under_autocast_every_loss_is_close_to_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, td = case
    # a generator gives other numbers in half precision, and one draw is far from another
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape).to(x.dtype))
    loss.float()
    td = td.apply(lambda x: x.float() if x.is_floating_point() else x)
    torch.manual_seed(0)
    expected = loss(td)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(td)
    for name, value in found.items():
        assert value.isfinite().all() or not expected[name].isfinite()
        if name in ("loss_critic", "loss_value"):
            torch.testing.assert_close(value.float(), expected[name], rtol=0.1, atol=0.05)


EXACT = {
    **CASES,
    "mpo-full": lambda: (mpo.make("full"), mpo.data()),
    "vmpo-full": lambda: (VMPOLoss(vmpo.make("full")).double(), vmpo.rollout("full")),
    "dqn-traces": lambda: (dqn.dqn(atoms=7, estimator="q_lambda"), finite(dqn.batch(6, 5))),
    "dqn-n-step": lambda: (dqn.dqn(atoms=7, estimator="n_step(n=3)"), finite(dqn.batch(6, 5))),
}


@pytest.mark.parametrize("name", EXACT)
def test_autocast_is_for_networks_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers that leave it each number is the same, to the last bit; Lightning has it on in the whole step."""
    loss, td = EXACT[name]()
    loss.float()
    td = td.apply(lambda x: x.float() if x.is_floating_point() else x)

    def exact(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return forward(*args, **kwargs)

        return call

    for layer in (nn.Linear, *(kind for part in (critics, encoders, ensembles) for kind in vars(part).values())):
        if isinstance(layer, type) and issubclass(layer, nn.Module) and "forward" in vars(layer):
            monkeypatch.setattr(layer, "forward", exact(layer.forward))
    results = []
    for half in (False, True):
        given = td.clone()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = loss(given)
        loss.zero_grad()
        sum(value for key, value in found.items() if key.startswith("loss_")).backward()
        results.append((found.detach(), given, [p.grad for p in loss.parameters() if p.grad is not None]))
    (one, written, gradient), (other, written_half, gradient_half) = results
    for plain, half in ((one, other), (written, written_half)):
        assert {key: value.dtype for key, value in plain.items(True, True)} == {
            key: value.dtype for key, value in half.items(True, True)
        }
        for key, value in plain.items(True, True):
            torch.testing.assert_close(half[key], value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient_half, gradient, rtol=0, atol=0)


def test_a_termination_is_an_end(case: Case) -> None:
    """An environment may forget to say done."""
    loss, td = case
    both, only = td.clone(), td.clone()
    both["next", "done"] = td["next", "done"] | td["next", "terminated"]
    only["next", "done"] = td["next", "done"] & ~td["next", "terminated"]
    assert (both["next", "done"] != only["next", "done"]).any()
    results = []
    for x in (both, only):
        torch.manual_seed(0)
        results.append(loss(x))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], equal_nan=True)


def test_actions_of_the_other_kind_are_named(case: Case) -> None:
    loss, td = case
    continuous = td["action"].is_floating_point()
    other = torch.zeros(td.batch_size, dtype=torch.int64) if continuous else torch.zeros(*td.batch_size, 2)
    with pytest.raises((TypeError, ValueError), match=r"'action' (must be|is)|'action' is torch"):
        loss(td.clone().set("action", other))


def words(key: Any) -> str:
    return "'" + (key if isinstance(key, str) else "', '".join(key)) + "'"


def test_discrete_actions_may_have_a_last_dimension_of_one(case: Case) -> None:
    loss, td = case
    if td["action"].is_floating_point():
        return
    expected, _ = gradients(loss, td.clone())
    found, _ = gradients(loss, td.clone().set("action", td["action"].unsqueeze(-1)))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"'action' must hold indices of actions, \[.*\], got \[.*, 2\]; of one-hot"):
        gradients(loss, td.clone().set("action", torch.stack([td["action"]] * 2, -1)))


@pytest.mark.parametrize("name", ["impala-continuous", "trpo-continuous", "vmpo-diagonal"])
def test_continuous_actions_of_another_shape_are_named(name: str) -> None:
    loss, td = CASES[name]()
    with pytest.raises(ValueError, match=r"'action' must be \[\d, \d, 2\], got \[\d, \d, 2, 1\]"):
        loss(td.clone().set("action", td["action"].unsqueeze(-1)))


def test_vtraces_clips_are_those_of_the_estimator() -> None:
    for estimator, message in (
        ("vtrace(c_clip=2.0)", "c_clip must be at most rho_clip, 1.0, got 2.0"),
        ("vtrace(rho_clip=0.5)", "c_clip must be at most rho_clip, 0.5, got 1.0"),
        ("vtrace(c_clip=-1.0)", "c_clip must be above 0"),
        ("vtrace(pg_rho_clip=0.0)", "pg_rho_clip must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImpalaLoss(impala.make(), estimator=estimator)
    with pytest.raises(ValueError, match="rho_clip must be above 0, got nan"):
        VTrace(rho_clip=math.nan)


def log_ratio(name: str, loss: Any, td: TensorDict) -> Tensor:
    """log pi - log mu of every step, by torch's own distributions; of MPO pi is the target policy."""
    if name == "sac":
        actor = loss.actor.get_dist(td.select("observation"))
        log_pi = actor.log_prob_pre_tanh(td["pre_tanh"])
    elif name == "discrete-sac":
        log_pi = loss.actor.get_dist(td.select("observation")).log_prob(td["action"])
    else:
        log_pi = mpo.policy_at(loss.target("policy"), td["observation"]).log_prob(td["action"])
    return (log_pi - td["action_log_prob"]).detach()


def lengths(td: TensorDict, n: int) -> Tensor:
    """Steps of the n-step window at the first step of each row."""
    return torch.tensor([last + 1 for _, _, last in mpo.windows(td, n)], dtype=torch.float64)


@pytest.mark.parametrize("target", ["one_step", "n_step"])
@pytest.mark.parametrize("name", ["sac", "discrete-sac", "mpo", "discrete-mpo"])
def test_uncorrected_targets_tell_how_far_off_policy_they_are(name: str, target: str) -> None:
    if name.endswith("sac"):
        loss: Any = sac.sac(target) if name == "sac" else sac.discrete(target)
        td, gamma, n = finite(sac.replay(40, 5, kinds=None if name == "sac" else 3)), sac.GAMMA, 3
    else:
        kinds = ("discrete", "discrete") if name == "discrete-mpo" else ()
        loss = mpo.make(*kinds, target=target, n=3)
        td, gamma, n = mpo.data(40, discrete=name == "discrete-mpo"), mpo.GAMMA, 3
    td = mpo.with_valid(td)
    out, valid = loss(td), td["valid"].squeeze(-1)
    assert set(out.keys()) == set(loss.out_keys)
    log_rho = log_ratio(name, loss, td)
    if target == "n_step":
        log_rho, valid = log_rho[:, 0], valid[:, 0]
        length = lengths(td, n)[valid]
    else:
        length = torch.ones(int(valid.sum()), dtype=torch.float64)
    rho = log_rho[valid].exp()
    torch.testing.assert_close(out["ess"], rho.sum() ** 2 / (len(rho) * rho.square().sum()))
    torch.testing.assert_close(out["trace_length"], (length - 1).mean())
    torch.testing.assert_close(out["contraction"], (gamma**length).mean())
    assert (target == "one_step") == (out["trace_length"] == 0)
    without = loss(td.exclude("action_log_prob"))
    assert without["ess"].isnan()
    assert set(without.keys()) == set(loss.out_keys)


def test_the_tanh_without_its_sample_leaves_only_the_ratio_out() -> None:
    loss, td = CASES["sac-one-step"]()
    assert not loss(td)["ess"].isnan()
    out = loss(td.exclude("pre_tanh"))
    assert out["ess"].isnan()
    assert out["loss_critic"].isfinite()


@pytest.mark.parametrize("recurrent", [None, 6])
@pytest.mark.parametrize("critic", ["v", "q"])
def test_observations_of_steps_that_are_no_data_reach_nothing(critic: str, recurrent: int | None) -> None:
    options: dict[str, Any] = {} if recurrent is None else {"recurrent": recurrent}
    policy = impala.make(critic=critic, **options)
    loss: Any = ImpalaLoss(policy) if critic == "v" else q_actor_critic.QActorCriticLoss(policy)
    td = impala.rollout(8, 9)
    # padding behind the end of an episode, as TorchRL's samplers give it, and before its start
    done = td["next", "done"].squeeze(-1)
    valid = torch.ones_like(done)
    valid[:4, 6:] = False
    valid[4:6, :2] = False
    done[:4, 5] = True
    td["next", "done"] = done.unsqueeze(-1)
    td["valid"] = valid.unsqueeze(-1)
    td["is_init"][4:6, 2] = True
    expected = impala.gradients(loss, td)
    assert any(g.any() for g in expected)
    for key in ("observation", "action_log_prob", ("next", "observation"), ("next", "reward")):
        mask = ~valid.view(8, 9, *(1,) * (td[key].ndim - 2))
        td[key] = td[key].masked_fill(mask, math.nan)
    for found, wanted in zip(impala.gradients(loss, td), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def remade(name: str, loss: Loss, **options: Any) -> Loss:
    """A loss of the same class, on the same networks, with other options."""
    if name == "mpo":
        options |= {"action_dim": mpo.DIM}
    parts = [getattr(loss, part) for part in ("policy", "actor", "critic", "value") if hasattr(loss, part)]
    if name == "trpo":
        parts = list(trpo.networks())
    return type(loss)(*parts, **options)


NUMBERS = {
    "impala": ("value_coef", "entropy_coef"),
    "a2c": ("value_coef", "entropy_coef"),
    "ppo": ("value_coef", "entropy_coef"),
    "q-actor-critic": ("value_coef", "entropy_coef"),
    "acer": ("value_coef", "entropy_coef", "clip"),
    "reactor": ("value_coef", "entropy_coef", "clip"),
    "vmpo": ("value_coef", "epsilon", "epsilon_kl", "temperature", "alpha"),
    "sac": ("alpha_init", "fixed_alpha", "target_entropy", "reward_scale", "num_samples"),
    "sac-v1": ("reward_scale",),
    "discrete-sac": ("alpha_init", "fixed_alpha", "target_entropy", "reward_scale"),
    "mpo": ("epsilon", "epsilon_mean", "epsilon_cov", "epsilon_penalty", "num_samples"),
    "discrete-mpo": ("epsilon", "epsilon_policy"),
}
WRITTEN = {"alpha_init": "temperature", "fixed_alpha": "temperature"}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    loss, _ = CASES[name]()
    for option in NUMBERS[name]:
        bad = [math.nan, -math.inf] + ([] if option == "clip" else [math.inf])
        for number in bad:
            with pytest.raises(ValueError, match=rf"{WRITTEN.get(option, option)} must be .* got {number}"):
                remade(name, loss, **{option: number})
    for option in {"clip", "num_samples"} & set(NUMBERS[name]):
        with pytest.raises(ValueError, match=f"{option} must be .*, got None"):
            remade(name, loss, **{option: None})


def test_another_gamma_is_the_losss_and_not_its_estimators(case: Case) -> None:
    loss, _ = case
    with pytest.raises(ValueError, match=rf"gamma is the loss's, {loss.gamma}: make another {type(loss).__name__}"):
        loss.make_value_estimator("one_step", gamma=0.5)


@pytest.mark.parametrize("name", ["impala", "a2c", "ppo", "trpo"])
@pytest.mark.parametrize("torchrls", [False, True], ids=["own", "torchrl"])
def test_a_policy_without_an_entropy_is_refused(name: str, torchrls: bool) -> None:
    policy: Any = impala.make(action_dim=2)
    policy[-1].distribution_class = RLTanhNormal if torchrls else TanhNormal
    value = [trpo.networks("continuous")[1]] if name == "trpo" else []
    loss = {"impala": ImpalaLoss, "a2c": A2CLoss, "ppo": PPOLoss, "trpo": TRPOLoss}[name]
    with pytest.raises(ValueError, match="needs the entropy of its policy, which TanhNormal has not in closed form"):
        loss(policy, *value)
