"""The full-covariance head and the categorical critic."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import distributions as D
from torchrl.envs.utils import ExplorationType, set_exploration_type

from offtrace.modules.networks import (
    CategoricalCritic,
    CholeskyHead,
    EnsembleMLP,
    FullNormal,
    LayerNormMLP,
    Policy,
    PolicyNetwork,
    build_critic,
)


def test_full_normal_is_torchs_multivariate_normal() -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    loc, tril = (
        torch.randn(2, 5, 3, dtype=torch.float64),
        raw.tril(-1) + torch.diag_embed(raw.diagonal(0, -2, -1).exp()),
    )
    p, q = FullNormal(loc, tril), D.MultivariateNormal(loc, scale_tril=tril, validate_args=False)
    value = torch.randn(7, 2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(value), q.log_prob(value))
    torch.testing.assert_close(p.entropy(), q.entropy())
    other = FullNormal(value[0], 2 * tril)
    expected = D.kl_divergence(q, D.MultivariateNormal(value[0], scale_tril=2 * tril))
    torch.testing.assert_close(D.kl_divergence(p, other), expected)
    draws = p.sample((200_000,))
    assert not draws.requires_grad
    torch.testing.assert_close(draws.mean(0), loc, atol=0.1, rtol=0.05)
    spread = torch.einsum("nbci,nbcj->bcij", draws - loc, draws - loc) / len(draws)
    torch.testing.assert_close(spread, q.covariance_matrix, atol=0.15, rtol=0.05)


def test_cholesky_head_starts_near_a_diagonal_and_gives_a_lower_triangle() -> None:
    torch.manual_seed(0)
    head = CholeskyHead(8, 3, init_scale=0.5)
    loc, tril = head(torch.randn(4, 8))
    assert loc.shape == (4, 3)
    assert tril.shape == (4, 3, 3)
    torch.testing.assert_close(tril, 0.5 * torch.eye(3).expand(4, 3, 3), atol=0.03, rtol=0)
    assert (tril.triu(1) == 0).all()
    wild, tril = head(100_000 * torch.randn(50, 8))
    assert (tril.diagonal(dim1=-2, dim2=-1) >= 1e-4).all()
    assert (tril.tril(-1) != 0).any()
    tril.square().sum().backward()
    assert head.linear.weight.grad is not None
    assert head.linear.weight.grad.isfinite().all()
    assert wild.isfinite().all()
    loc, tril = CholeskyHead(8, 1)(torch.randn(4, 8))
    assert tril.shape == (4, 1, 1)
    with pytest.raises(ValueError, match="action_dim"):
        CholeskyHead(8, 0)


def test_policy_with_full_covariance_acts() -> None:
    torch.manual_seed(0)
    policy = Policy(PolicyNetwork(LayerNormMLP(5, (8,)), CholeskyHead(8, 3)))
    td = policy(TensorDict({"observation": torch.randn(6, 5)}, [6]))
    expected = D.MultivariateNormal(td["loc"], scale_tril=td["scale_tril"]).log_prob(td["action"])
    torch.testing.assert_close(td["action_log_prob"], expected)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        torch.testing.assert_close(policy(td.clone())["action"], td["loc"])


def test_categorical_critic_shapes_and_independence_of_its_members() -> None:
    torch.manual_seed(0)
    critic = build_critic(
        network="layernorm_mlp", observation_shape=(5,), action_dim=2, hidden=(8, 8), critics=3, atoms=7
    )
    td = TensorDict({"observation": torch.randn(4, 6, 5), "action": torch.randn(4, 6, 2)}, [4, 6])
    logits = critic(td)["value_logits"]
    assert logits.shape == (4, 6, 3, 7)
    torch.testing.assert_close(critic.support, torch.linspace(-150, 150, 7))
    torch.testing.assert_close(critic(td[1].clone())["value_logits"], logits[1])
    assert "support" in critic.state_dict()
    grads = torch.autograd.grad(logits[..., 1, :].sum(), list(critic.parameters()), allow_unused=True)
    for grad in grads:
        assert grad is not None
        assert not grad[0].any()
        assert not grad[2].any()
    with pytest.raises(ValueError, match="low < high"):
        CategoricalCritic(EnsembleMLP(1, 7, (8,), 7), low=1, high=1, atoms=7)


@pytest.mark.parametrize("atoms", [0, 7])
def test_many_actions_at_one_image_are_valued_with_one_call_of_the_encoder(atoms: int) -> None:
    torch.manual_seed(0)
    critic = build_critic(network="shallow", observation_shape=(3, 48, 48), action_dim=2, hidden=(16, 8), atoms=atoms)
    images, actions = torch.randint(256, (4, 3, 48, 48)).byte(), torch.randn(5, 4, 2)
    seen: list[int] = []
    critic.encoder.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    found = critic.values({"observation": images}, actions)
    assert seen == [4]
    assert found.shape == (5, 4, 2, 7)[: 4 if atoms else 3]
    one_by_one = [critic.values({"observation": images}, action) for action in actions]
    torch.testing.assert_close(found, torch.stack(one_by_one))
