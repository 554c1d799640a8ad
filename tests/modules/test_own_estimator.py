"""Estimators defined outside the package: in every loss of their kind, as objects and by their import path."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import A2CLoss as TorchRLA2CLoss
from torchrl.objectives import ClipPPOLoss

from offtrace.modules import estimators
from offtrace.modules.estimators import (
    GAE,
    ActionValueEstimator,
    Retrace,
    StateValueEstimator,
    TraceEstimator,
    TreeBackup,
    VTrace,
    make_estimator,
)
from offtrace.modules.estimators.names import check_spec, find_named, parse_spec
from offtrace.modules.losses import (
    A2CLoss,
    DiscreteMPOLoss,
    DiscreteSACLoss,
    ImpalaLoss,
    MPOLoss,
    PPOLoss,
    QActorCriticLoss,
    SACLoss,
    VMPOLoss,
)
from offtrace.modules.returns import gae, q_lambda_trace, q_return, retrace_trace
from tests.modules import test_a2c_loss as a2c
from tests.modules import test_impala_loss as impala
from tests.modules import test_mpo_loss as mpo
from tests.modules import test_q_actor_critic_loss as q_actor_critic
from tests.modules import test_sac_loss as sac
from tests.modules import test_trpo_loss as trpo
from tests.modules import test_vmpo_loss as vmpo

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
GAMMA = 0.9


# ------------------------------------------------------------------------------------------- what a user would write
class SmoothVTrace(StateValueEstimator):
    """V-trace whose ratios are clipped by 1 - exp(-rho), one step of the recursion after the other."""

    def __init__(self, *, lmbda: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.lmbda = lmbda

    def weight(self, log_rho: Tensor) -> Tensor:
        return -torch.expm1(-log_rho.exp())

    def compute(
        self,
        *,
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        gamma: float,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        known = torch.ones_like(done) if valid is None else valid
        rho = self.weight(log_rho)
        next_value = torch.where(terminated | ~known, 0, next_value)
        delta = torch.where(known, reward + gamma * next_value - value, 0)
        target, advantage = value.clone(), torch.zeros_like(value)
        correction = torch.zeros_like(value[0])
        for t in reversed(range(len(reward))):
            onward = ~(done | ~known)[t]
            carried = gamma * self.lmbda * onward * correction
            advantage[t] = rho[t] * (delta[t] + carried)
            correction = torch.where(known[t], rho[t] * (delta[t] + carried), 0)
            target[t] = value[t] + correction
        return target, advantage


class RootRetrace(TraceEstimator):
    """Retrace with a root: one method."""

    bounded = True

    def __init__(self, *, root: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.root = root

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        return self.lmbda * (log_rho / self.root).exp().clamp(max=1)


class PengsQLambda(ActionValueEstimator):
    """Peng and Williams' Q(lambda), not corrected: G_t = r_t + gamma ((1 - lmbda) E_pi Q(x') + lmbda G_{t+1})."""

    uses_behaviour = False
    uses_log_pi = False
    uses_q_value = False

    def __init__(self, *, lmbda: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.lmbda = lmbda

    def compute(self, *, reward: Tensor, next_value: Tensor, **known: Any) -> Tensor:
        valid = known["valid"]
        ends = known["done"] if valid is None else known["done"] | ~valid
        if valid is not None:
            reward, next_value = torch.where(valid, reward, 0), torch.where(valid, next_value, 0)
        target, following = torch.zeros_like(reward), next_value[-1]
        for t in reversed(range(len(reward))):
            goes_on = ~ends[t] & (torch.ones_like(ends[t]) if valid is None or t + 1 == len(reward) else valid[t + 1])
            mixed = torch.where(goes_on, (1 - self.lmbda) * next_value[t] + self.lmbda * following, next_value[t])
            target[t] = reward[t] + known["gamma"] * torch.where(known["terminated"][t], 0, mixed)
            following = target[t]
        return target


class Wrong(StateValueEstimator):
    """Gives one row too few."""

    def compute(self, **known: Any) -> tuple[Tensor, Tensor]:
        return known["value"][1:], known["value"][1:]


HERE = __name__


def ways(kind: type, **options: Any) -> list[Any]:
    """The object, and the text that names it."""
    inside = ", ".join(f"{name}={value}" for name, value in options.items())
    return [kind(**options), f"{HERE}:{kind.__name__}({inside})"]


def all_gradients(loss: Any, td: Any) -> list[Tensor]:
    loss.zero_grad()
    torch.manual_seed(0)
    out = loss(td)
    sum(x for name, x in out.items() if name.startswith("loss_")).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in loss.parameters() if p.grad is not None]


# --------------------------------------------------------------------------------------------------------- state values
STATE_LOSSES: dict[str, Callable[..., tuple[Any, TensorDict]]] = {
    "impala": lambda **o: (ImpalaLoss(impala.make(), **o), impala.rollout()),
    "impala-lstm": lambda **o: (ImpalaLoss(impala.make(recurrent=6), normalize_advantage=True, **o), impala.rollout()),
    "a2c": lambda **o: (A2CLoss(impala.make(action_dim=2), **o), impala.rollout(dim=2)),
    "ppo": lambda **o: (PPOLoss(impala.make(), **o), impala.rollout()),
    "trpo": lambda **o: trpo.make(**o),
    "vmpo": lambda **o: (VMPOLoss(vmpo.make(), **o).double(), vmpo.rollout()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", STATE_LOSSES)
def test_an_own_estimator_of_state_values_trains_every_loss_of_them(name: str, masked: bool) -> None:
    results = []
    for spec in ways(SmoothVTrace, lmbda=0.8):
        loss, td = STATE_LOSSES[name](estimator=spec, gamma=GAMMA)
        if masked:
            td["valid"] = torch.rand(*td.batch_size, 1, generator=torch.Generator().manual_seed(3)) < 0.8
            td["action_log_prob"][~td["valid"].squeeze(-1)] = math.nan
        assert loss.estimator is not spec
        assert loss.estimator.gamma == GAMMA
        results.append(all_gradients(loss, td))
        assert all(g.isfinite().all() for g in results[-1])
        assert set(loss.out_keys) == set(loss(td).keys())
    torch.testing.assert_close(*results)
    other, _ = STATE_LOSSES[name](gamma=GAMMA)
    assert any(not torch.allclose(a, b) for a, b in zip(results[0], all_gradients(other, td), strict=True))


def test_the_loss_learns_what_the_own_estimator_says() -> None:
    """Targets by the recursion, one row and step at a time."""
    policy, td = impala.make(), impala.rollout()
    loss = ImpalaLoss(policy, estimator=SmoothVTrace(lmbda=0.8), gamma=GAMMA, value_coef=1.0)
    dist, value = impala.network(policy, td["observation"])
    after = impala.network(policy, td["next", "observation"])[1].detach()
    rho = (dist.log_prob(td["action"]) - td["action_log_prob"]).exp().detach()
    weight, v = 1 - (-rho).exp(), value.detach()
    reward, terminated, done = (td["next", key].squeeze(-1) for key in ("reward", "terminated", "done"))
    target, advantage = v.clone(), torch.zeros_like(v)
    for b in range(5):
        for t in reversed(range(7)):
            tail = 0.0 if done[b, t] or t == 6 else GAMMA * 0.8 * (target[b, t + 1] - v[b, t + 1])
            boot = 0.0 if terminated[b, t] else GAMMA * after[b, t]
            advantage[b, t] = weight[b, t] * (reward[b, t] + boot - v[b, t] + tail)
            target[b, t] = v[b, t] + advantage[b, t]
    out = loss(td)
    torch.testing.assert_close(out["loss_value"], 0.5 * (target - value).square().sum())
    torch.testing.assert_close(out["loss_policy"], -(advantage * dist.log_prob(td["action"])).sum())


@pytest.mark.parametrize("kind", [TorchRLA2CLoss, ClipPPOLoss])
def test_an_own_estimator_trains_torchrls_losses(kind: Any) -> None:
    actor, value, _ = a2c.torchrl_networks()
    td = impala.rollout()
    loss = kind(actor, value)
    estimator = SmoothVTrace(gamma=GAMMA, lmbda=0.8, value_network=value, actor_network=actor)
    loss.make_value_estimator(estimator)
    given = estimator(td.clone())
    ours, expected = loss(td.clone()), loss(given)
    losses = [name for name in ours.keys() if name.startswith("loss_")]  # noqa: SIM118 - a TensorDict
    for name in losses:
        torch.testing.assert_close(ours[name], expected[name])
    sum(ours[name] for name in losses).backward()
    assert all(p.grad.any() for p in loss.actor_network_params.parameters())
    plain = kind(actor, value)
    plain.make_value_estimator(GAE(gamma=GAMMA, value_network=value))
    assert not torch.allclose(plain(td.clone())["loss_critic"], ours["loss_critic"])


# -------------------------------------------------------------------------------------------------------- action values
def finite(td: Any) -> Any:
    return td.apply(lambda x: x.nan_to_num() if x.is_floating_point() else x)


ACTION_LOSSES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "q-actor-critic": lambda **o: (QActorCriticLoss(q_actor_critic.policy_of(), **o), impala.rollout()),
    "sac": lambda **o: (sac.apart(SACLoss(*sac.networks(), **o)), finite(sac.replay(6, 5, valid=True))),
    "discrete-sac": lambda **o: (
        sac.apart(DiscreteSACLoss(*sac.networks(discrete=True), **o)),
        finite(sac.replay(6, 5, kinds=3, valid=True)),
    ),
    "mpo": lambda **o: (
        MPOLoss(mpo.make_policy(), mpo.make_critic(), action_dim=mpo.DIM, **o).double(),
        mpo.with_valid(mpo.data()),
    ),
    "discrete-mpo": lambda **o: (
        DiscreteMPOLoss(mpo.make_policy("discrete"), mpo.make_critic("discrete"), **o).double(),
        mpo.with_valid(mpo.data(discrete=True)),
    ),
}


@pytest.mark.parametrize("kind", [RootRetrace, PengsQLambda])
@pytest.mark.parametrize("name", ACTION_LOSSES)
def test_own_estimators_of_action_values_train_every_loss_of_them(name: str, kind: Any) -> None:
    results = []
    for spec in ways(kind, lmbda=0.6):
        torch.manual_seed(0)
        loss, td = ACTION_LOSSES[name](estimator=spec, gamma=GAMMA)
        results.append(all_gradients(loss, td))
        assert all(g.isfinite().all() for g in results[-1])
        assert set(loss.out_keys) == set(loss(td).keys())
    torch.testing.assert_close(*results)
    torch.manual_seed(0)
    other, _ = ACTION_LOSSES[name](estimator="retrace(lmbda=0.6)", gamma=GAMMA)
    assert any(not torch.allclose(a, b) for a, b in zip(results[0], all_gradients(other, td), strict=True))


def test_the_own_root_is_the_packages() -> None:
    found = [ACTION_LOSSES["q-actor-critic"](estimator=x, gamma=GAMMA) for x in (RootRetrace(), Retrace(root=2))]
    (own, td), (theirs, _) = found
    torch.testing.assert_close(all_gradients(own, td), all_gradients(theirs, td))


def test_pengs_q_lambda_is_the_lambda_return_without_trace_corrections() -> None:
    """On transitions that follow one another, with the next state's value as the value of the action taken there."""
    g = torch.Generator().manual_seed(0)
    value = torch.randn(9, 4, generator=g)
    done = torch.rand(8, 4, generator=g) < 0.2
    reward = torch.randn(8, 4, generator=g)
    known: dict[str, Any] = {"terminated": done, "done": done, "gamma": GAMMA, "valid": None}
    found = PengsQLambda(lmbda=0.6).compute(reward=reward, next_value=value[1:], **known)
    expected = gae(reward=reward, value=value[:-1], next_value=value[1:], lmbda=0.6, **known).target
    torch.testing.assert_close(found, expected)


def test_alone_on_a_rollout_an_own_estimator_works_too() -> None:
    shape = (3, 6, 1)
    done = torch.rand(shape) < 0.2
    ends = {"reward": torch.randn(shape), "done": done, "terminated": done, "state_value": torch.randn(shape)}
    data = TensorDict(
        {
            "chosen_action_value": torch.randn(shape),
            "target_log_prob": torch.randn(shape[:-1]),
            "action_log_prob": torch.randn(shape[:-1]),
            "next": ends,
        },
        [3, 6],
    )
    log_rho = (data["target_log_prob"] - data["action_log_prob"]).t()
    own = RootRetrace(gamma=GAMMA, lmbda=0.6)(data.clone())["value_target"].squeeze(-1)
    known = {key: ends[key].squeeze(-1).t() for key in ("reward", "done", "terminated")}
    values = {
        "q_value": data["chosen_action_value"].squeeze(-1).t(),
        "next_state_value": ends["state_value"][..., 0].t(),
    }
    trace = retrace_trace(log_rho=log_rho, lmbda=0.6, action_dim=2)
    torch.testing.assert_close(own, q_return(trace=trace, gamma=GAMMA, **values, **known).t())
    constant = q_lambda_trace(log_rho=log_rho, lmbda=0.6)
    assert not torch.allclose(own, q_return(trace=constant, gamma=GAMMA, **values, **known).t())


class Seen(ActionValueEstimator):
    """Keeps what it is given."""

    def compute(self, **known: Any) -> Tensor:
        self.known = known
        return known["q_value"]


@pytest.mark.parametrize("name", ["sac", "discrete-sac", "mpo", "discrete-mpo"])
def test_an_own_estimator_meets_no_ratio_of_steps_that_are_no_data(name: str) -> None:
    loss, td = ACTION_LOSSES[name](estimator=Seen(), gamma=GAMMA)
    td["action_log_prob"] = td["action_log_prob"].masked_fill(~td["valid"].squeeze(-1), math.nan)
    loss(td)
    known, valid = loss.estimator.known, td["valid"].squeeze(-1).t()
    assert not valid.all()
    assert set(known) == {
        "reward", "q_value", "next_value", "log_pi", "log_rho", "terminated", "done", "gamma", "valid",
    }  # fmt: skip
    assert torch.equal(known["valid"], valid)
    assert known["log_rho"].shape == known["reward"].shape == valid.shape
    assert not known["log_rho"][~valid].any()
    assert known["log_rho"][valid].all()


# ---------------------------------------------------------------------------------------------------- what a loss binds
def test_a_loss_has_its_own_copy_that_is_no_part_of_its_state() -> None:
    given = VTrace(lmbda=0.9)
    assert given.tensor_keys.reward == "reward"
    policy = impala.make()
    first, second = ImpalaLoss(policy, estimator=given, gamma=0.8), ImpalaLoss(policy, estimator=given, gamma=0.9)
    assert (given.gamma, first.estimator.gamma, second.estimator.gamma) == (None, 0.8, 0.9)
    assert first.state_dict().keys() == {f"policy.{key}" for key in policy.state_dict()}
    first.set_keys(reward="r")
    assert first.estimator.tensor_keys.reward == "r"
    assert second.estimator.tensor_keys.reward == given.tensor_keys.reward == "reward"
    assert first.value_estimator is first.estimator
    td = impala.rollout()
    for copied in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert copied.estimator is not second.estimator
        torch.testing.assert_close(copied(td), second(td))


def test_make_value_estimator_is_the_argument_under_torchrls_name() -> None:
    policy, td = impala.make(), impala.rollout()
    loss = ImpalaLoss(policy)
    for call, spec in (
        (lambda: loss.make_value_estimator("gae", lmbda=0.7), "gae(lmbda=0.7)"),
        (lambda: loss.make_value_estimator(SmoothVTrace()), SmoothVTrace()),
        (lambda: loss.make_value_estimator(f"{HERE}:SmoothVTrace", lmbda=0.5), SmoothVTrace(lmbda=0.5)),
        (lambda: loss.make_value_estimator(), SmoothVTrace(lmbda=0.5)),
    ):
        assert call() is loss
        expected = ImpalaLoss(policy, estimator=spec)
        torch.testing.assert_close(loss(td), expected(td))
        assert set(loss.out_keys) == set(expected.out_keys)
    with pytest.raises(ValueError, match="options of an estimator need its name"):
        loss.make_value_estimator(lmbda=0.5)
    with pytest.raises(TypeError, match="options go with the name of an estimator, and VTrace is an object"):
        loss.make_value_estimator(VTrace(), lmbda=0.5)


BAD: list[tuple[Any, str, type[Exception], str]] = [
    (
        "vtrac",
        "state",
        ValueError,
        "no estimator 'vtrac' among those of state values, 'vtrace', .*; did you mean vtrace",
    ),
    ("v-trace", "state", ValueError, "an estimator is a name, options in brackets behind it, .*, got 'v-trace'"),
    ("Retrace", "action", ValueError, "no estimator 'Retrace' among those of action values, .*; did you mean retrace"),
    (
        "retrace",
        "state",
        ValueError,
        "estimator 'retrace' is of action values, and one of state values is needed: 'vtr",
    ),
    ("gae(lamda=0.9)", "state", ValueError, "'gae' has no option 'lamda', its options are 'lmbda'; did you mean lmbda"),
    ("one_step(n=3)", "action", ValueError, "estimator 'one_step' has no option 'n'"),
    ("gae(0.9)", "state", ValueError, r"options of an estimator go by their names, as .*, got 'gae\(0.9\)'"),
    ("gae(lmbda=x)", "state", ValueError, r"'x' is no literal that an estimator can be given, in 'gae\(lmbda=x\)'"),
    ("gae(lmbda=1, lmbda=0)", "state", ValueError, r"takes an option once, and 'lmbda' is given twice, in 'gae"),
    ("gae(lambda=1)", "state", ValueError, r"\(lmbda, not lambda\), got 'gae\(lambda=1\)'"),
    ("gae(lmbda=1.5)", "state", ValueError, r"lmbda must be in \[0, 1\], got 1.5"),
    ("gae(lmbda=None)", "state", TypeError, "lmbda must be a number, got None"),
    ("n_step(n=0)", "state", ValueError, "n must be 1 or more, and whole, got 0"),
    ("n_step(n=2.5)", "action", ValueError, "n must be 1 or more, and whole, got 2.5"),
    ("retrace(root=0)", "action", ValueError, "root must be 1 or more, and whole, got 0"),
    (
        "no.such.module:Trace",
        "state",
        ValueError,
        "the estimator 'no.such.module:Trace' cannot be imported: there is no module 'no'",
    ),
    (
        f"{HERE}:Nothing",
        "state",
        ValueError,
        "the estimator '.*:Nothing' cannot be imported: the module .* has no 'Nothing'",
    ),
    (
        f"{HERE}:SmoothVTrace(lamda=1)",
        "state",
        ValueError,
        "has no option 'lamda', its options are .*; did you mean lmbda",
    ),
    (f"{HERE}:GAMMA", "state", ValueError, "the estimator '.*:GAMMA' is no class and no function, but .* float"),
    (
        VTrace,
        "state",
        TypeError,
        "an object of the kind of VTrace.*, got the class VTrace, of which an object is needed",
    ),
    (None, "state", TypeError, "an estimator is a name, an import path, or an object .*, got NoneType"),
    (Retrace(), "state", ValueError, "Retrace estimates action values, and an estimator of state values is needed"),
    (GAE(), "action", ValueError, "GAE estimates state values, and an estimator of action values is needed"),
]


@pytest.mark.parametrize(("spec", "kind", "error", "message"), BAD)
def test_what_names_no_estimator_is_told_in_one_sentence(
    spec: Any, kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        make_estimator(spec, kind)
    assert "\n" not in str(raised.value)


def test_what_a_loss_cannot_take_is_told_in_one_sentence() -> None:
    policy = impala.make()
    for options, message in (
        ({"estimator": VTrace(gamma=0.9)}, "ImpalaLoss has gamma=0.99 and its estimator VTrace gamma=0.9: leave the"),
        ({"estimator": "gae(gamma=0.5)", "gamma": 0.9}, "has gamma=0.9 and its estimator GAE gamma=0.5"),
        ({"estimator": GAE(value_network=policy)}, "ImpalaLoss evaluates its own networks: leave those of its estim"),
        ({"estimator": "tree_backup"}, "estimator 'tree_backup' is of action values"),
    ):
        with pytest.raises(ValueError, match=message):
            ImpalaLoss(policy, **options)  # type: ignore[arg-type]
    assert ImpalaLoss(policy, estimator=VTrace(gamma=0.9), gamma=0.9).estimator.gamma == 0.9
    for estimator in ("tree_backup", TreeBackup(lmbda=0.9)):
        with pytest.raises(
            ValueError, match="TreeBackup needs probabilities of discrete actions, and those of SACLoss"
        ):
            SACLoss(*sac.networks(), estimator=estimator)
    with pytest.raises(ValueError, match="SACLoss draws its own actions at its own temperature: leave num_samples and"):
        SACLoss(*sac.networks(), estimator=Retrace(num_samples=4))
    with pytest.raises(ValueError, match=r"Wrong.compute must give .* of the values' shape, \[7, 5\], got \[6, 5\]"):
        ImpalaLoss(policy, estimator=Wrong())(impala.rollout())


def test_what_the_batch_lacks_for_the_estimator_is_named() -> None:
    td = impala.rollout().exclude("action_log_prob")
    with pytest.raises(KeyError, match="A2CLoss reads 'action_log_prob', which the batch lacks"):
        A2CLoss(impala.make(), estimator=SmoothVTrace())(td)
    A2CLoss(impala.make(), estimator="n_step(n=3)")(td)
    loss, replay = ACTION_LOSSES["sac"](estimator=RootRetrace(), gamma=GAMMA)
    with pytest.raises(KeyError, match="SACLoss reads 'action_log_prob', which the batch lacks"):
        loss(replay.exclude("action_log_prob"))
    own, _ = ACTION_LOSSES["sac"](estimator=PengsQLambda(), gamma=GAMMA)
    assert own(replay.exclude("action_log_prob"))["ess"].isnan()


def test_texts_are_read_without_importing_what_they_name() -> None:
    assert parse_spec("vtrace") == ("vtrace", {})
    assert parse_spec(" vtrace( lmbda = 0.9, rho_clip=inf ) ") == ("vtrace", {"lmbda": 0.9, "rho_clip": math.inf})
    assert parse_spec("a.b:C.d(x=-1, y='z', w=[1, 2], v=-inf, u=None)") == (
        "a.b:C.d",
        {"x": -1, "y": "z", "w": [1, 2], "v": -math.inf, "u": None},
    )
    check_spec("no.such.module:Trace(x=1)", "state")
    check_spec("retrace(root=3, lmbda=0.5)", "action")
    for spec in ("retrase", "retrace(x=1)", "vtrace"):
        with pytest.raises(ValueError, match="estimator"):
            check_spec(spec, "action")


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("gae(lmbda=1.5)", "state", r"lmbda must be in \[0, 1\], got 1.5"),
        ("gae(lmbda=None)", "state", "lmbda must be a number, got None"),
        ("gae(lmbda=True)", "state", "lmbda must be a number, got True"),
        ("importance_sampling(lmbda=-1)", "state", r"lmbda must be in \[0, 1\], got -1"),
        ("vtrace(leak=inf)", "state", r"leak must be in \[0, 1\], got inf"),
        ("vtrace(rho_clip=-1)", "state", "rho_clip must be above 0, got -1"),
        ("vtrace(c_clip=0)", "state", "c_clip must be above 0, got 0"),
        ("vtrace(c_clip=2)", "state", "c_clip must be at most rho_clip, 1.0, got 2"),
        ("vtrace(rho_clip=0.5)", "state", "c_clip must be at most rho_clip, 0.5, got 1.0"),
        ("one_step(pg_rho_clip=0)", "state", "pg_rho_clip must be above 0, got 0"),
        ("n_step(n=0)", "state", "n must be 1 or more, and whole, got 0"),
        ("n_step(n=2.5)", "action", "n must be 1 or more, and whole, got 2.5"),
        ("retrace(root=0)", "action", "root must be 1 or more, and whole, got 0"),
        ("tree_backup(lmbda=2)", "action", r"lmbda must be in \[0, 1\], got 2"),
    ],
)
def test_a_text_and_the_class_that_it_names_refuse_the_same_values(spec: str, kind: str, message: str) -> None:
    name, options = parse_spec(spec)
    build: Any = attrgetter(find_named(name, kind).path.partition(":")[2])(estimators)
    for refuse in (lambda: check_spec(spec, kind), lambda: make_estimator(spec, kind), lambda: build(**options)):
        with pytest.raises((ValueError, TypeError), match=f"^{message}$"):
            refuse()


@pytest.mark.parametrize("name", ["gae", "one_step", "vtrace", f"{HERE}:SmoothVTrace"])
def test_what_a_loss_has_itself_is_refused_in_a_text_and_never_offered(name: str) -> None:
    with pytest.raises(ValueError, match=r"give loss.gamma, and leave it out of '.*gamma=0.9\)'"):
        check_spec(f"{name}(gamma=0.9)", "state")
    with pytest.raises(ValueError, match=r"has no option 'gama', its options are .*lmbda") as raised:
        make_estimator(f"{name}(gama=0.9)", "state")
    for argument in ("gamma", "value_network", "actor_network", "validate"):
        assert f"'{argument}'" not in str(raised.value)
