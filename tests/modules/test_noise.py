"""Noise that lasts: a step keeps its distribution, what follows on changes, and the density is of what was done."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torchrl.envs import ExplorationType, set_exploration_type

from offtrace.modules import make_collector
from offtrace.modules.collectors import ServerOptions
from offtrace.modules.envs import GymEnv
from offtrace.modules.networks import CorrelatedNoise, Policy, TanhNormalHead, build_policy
from tests.modules.test_smoothing import Recording

RHO, ACTIONS = 0.8, 2
HEADS = ("tanh", "gaussian", "full_gaussian", "normal")


def actor(head: str, **more: Any) -> Policy:
    options = {"head": head, "critic": None, "observation_shape": [3], "action_dim": ACTIONS, "hidden": [8]}
    return build_policy(**{**options, "noise_correlation": RHO, **more})


def tril_of(out: TensorDict) -> Tensor:
    return out["scale_tril"] if "scale_tril" in out else out["scale"].diag_embed()


def noise_of(out: TensorDict) -> Tensor:
    """The standard noise in what was executed, from the definition."""
    u = out["pre_tanh"] if "pre_tanh" in out else out["action"]
    return torch.linalg.solve(tril_of(out), (u - out["loc"]).unsqueeze(-1)).squeeze(-1)


def density(out: TensorDict, before: Tensor, first: Tensor) -> Tensor:
    """log mu(action | x, noise before), from the definition: u = loc + L noise, noise ~ N(rho before, 1 - rho^2)."""
    tril = tril_of(out)
    shift = (tril @ before.unsqueeze(-1)).squeeze(-1)
    loc = torch.where(first, out["loc"], out["loc"] + RHO * shift)
    spread = torch.where(first.unsqueeze(-1), tril, math.sqrt(1 - RHO**2) * tril)
    u = out["pre_tanh"] if "pre_tanh" in out else out["action"]
    volume = torch.log1p(-u.tanh().square()).sum(-1) if "pre_tanh" in out else 0
    return MultivariateNormal(loc, scale_tril=spread).log_prob(u) - volume


@pytest.mark.parametrize("head", HEADS)
def test_the_density_is_that_given_the_noise_before(head: str) -> None:
    torch.manual_seed(0)
    policy = actor(head).double()
    first = torch.tensor([[True], *[[False]] * 7])
    td = TensorDict({"observation": torch.randn(8, 3).double(), "is_init": first}, [8])
    td["action_noise"] = before = torch.randn(8, ACTIONS).double()
    out = policy(td)
    assert not out["action"].requires_grad, "as of other policies: what acts takes no gradient"
    torch.testing.assert_close(out["next", "action_noise"], noise_of(out))
    torch.testing.assert_close(out["action_log_prob"], density(out, before, first), rtol=0, atol=1e-12)


def test_every_noise_is_standard_normal_and_follows_on_the_one_before() -> None:
    """Over 60,000 steps: mean 0, variance 1, correlation rho^k with the one k steps before, none across a start."""
    torch.manual_seed(0)
    noise, drawn = CorrelatedNoise(1, RHO), list[Tensor]()
    td = TensorDict({"is_init": torch.ones(2000, 1, dtype=torch.bool)}, [2000])
    for step in range(60):
        drawn.append(noise(td, torch.empty(2000, 1))[0])
        td["action_noise"] = td["next", "action_noise"]
        td["is_init"] = torch.full((2000, 1), step == 29)
    x = torch.stack(drawn)[..., 0]
    assert x.mean().abs() < 0.03
    assert (x.var(1) - 1).abs().max() < 0.2, "at every step"
    for lag in (1, 2, 5):
        found = (x[: 30 - lag] * x[lag:30]).mean()
        assert abs(found - RHO**lag) < 0.02, lag
    assert (x[29] * x[30]).mean().abs() < 0.1, "an episode begins anew"


def recording(seed: int) -> GymEnv:
    return GymEnv(Recording, 1, seed=seed, rescale_actions=True)


@pytest.mark.parametrize(
    "way", [{"num_workers": 0}, {"num_workers": 1}, {"num_workers": 1, "server": ServerOptions()}],
    ids=["in process", "an actor process", "a server"],
)  # fmt: skip
def test_what_is_stored_is_what_was_executed(way: dict[str, Any]) -> None:
    """Through a collector: states are carried by the environment, and begin anew with an episode."""
    torch.manual_seed(0)
    policy = actor("tanh")
    with make_collector(recording, policy, frames_per_batch=12, **way) as collector:
        rollout = next(collector)[0].double()
    noise, first = noise_of(rollout), rollout["is_init"].bool()
    assert first.nonzero()[:, 0].tolist() == [0, 5, 10]
    before = torch.cat([torch.zeros(1, ACTIONS), noise[:-1]])
    wanted = density(rollout, before, first)
    torch.testing.assert_close(rollout["action_log_prob"], wanted, rtol=0, atol=1e-3)
    free = Normal(rollout["loc"], rollout["scale"]).log_prob(rollout["pre_tanh"]).sum(-1)
    free = free - torch.log1p(-rollout["action"].square()).sum(-1)
    assert (wanted - free)[~first[:, 0]].abs().min() > 1e-3, "as of independent noise it would be another number"


@pytest.mark.parametrize("head", HEADS)
def test_what_acts_deterministically_has_no_noise(head: str) -> None:
    policy, plain = actor(head), actor(head, noise_correlation=0.0)
    plain.load_state_dict(policy.state_dict())
    td = TensorDict({"observation": torch.randn(4, 3), "is_init": torch.zeros(4, 1, dtype=torch.bool)}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out, wanted = policy(td.clone()), plain(td.clone())
    for key in ("action", "action_log_prob"):
        torch.testing.assert_close(out[key], wanted[key])
    assert not out["next", "action_noise"].any()


@pytest.mark.parametrize("head", HEADS)
def test_where_no_state_is_carried_the_noise_is_independent(head: str) -> None:
    """As of one observation, or in an environment of one's own."""
    torch.manual_seed(0)
    out = actor(head).double()(TensorDict({"observation": torch.randn(4, 3).double()}, [4]))
    wanted = density(out, torch.zeros(4, ACTIONS).double(), torch.ones(4, 1, dtype=torch.bool))
    torch.testing.assert_close(out["action_log_prob"], wanted, rtol=0, atol=1e-12)


class Beta(torch.distributions.Independent):
    """A distribution of the user's own."""


class BetaHead(TanhNormalHead):
    distribution: Any = Beta


def test_a_distribution_that_takes_no_noise_is_refused_at_once() -> None:
    network = actor("tanh").network
    network.head = BetaHead(8, ACTIONS)
    with pytest.raises(ValueError, match=r"noise_correlation=0.8 needs a distribution with at_noise, .* Beta has none"):
        Policy(network, noise_correlation=RHO)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_correlation": 1.0}, "noise_correlation must be in"),
        ({"action_dim": None, "num_actions": 3, "head": "categorical"}, "noise_correlation=0.8 needs continuous"),
        ({"smoothing": 0.5}, "smoothing=0.5 and noise_correlation=0.8 both make actions last: one of them must be 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        actor(**{"head": "tanh", **options})
