"""The mathematics of MPO against the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as D

from offtrace.modules.losses import mpo_duals as m


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(*batch: int, size: int, seed: int = 0) -> Tensor:
    raw = normal(*batch, size, size, seed=seed)
    return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).abs() + 0.3)


@pytest.mark.parametrize(
    ("eta", "weights", "dual", "slope"),
    [
        (0.5, (0.117059, 0.864955, 0.015842, 0.002144), 1.429392, -0.830866),
        (1.0, (0.236883, 0.643914, 0.087144, 0.032059), 1.153895, -0.338757),
    ],
)
def test_temperature_worked_example(eta: float, weights: tuple[float, ...], dual: float, slope: float) -> None:
    temperature = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    value = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64).unsqueeze(-1)
    step = m.e_step(value=value, temperature=temperature, epsilon=0.1)
    step.dual.sum().backward()
    torch.testing.assert_close(step.weights.squeeze(-1), torch.tensor(weights, dtype=torch.float64), atol=5e-7, rtol=0)
    assert step.dual.item() == pytest.approx(dual, abs=5e-7)
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx(slope, abs=5e-7)
    assert slope == pytest.approx(0.1 - step.kl.item(), abs=5e-7)


@pytest.mark.parametrize("prior", [False, True])
def test_temperature_dual_is_the_formula_and_its_slope_epsilon_minus_kl(prior: bool) -> None:
    value, eta = 5 * normal(7, 3), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    log_prior = normal(7, 3, seed=1).log_softmax(0) if prior else None
    p = torch.full((7, 3), 1 / 7, dtype=torch.float64) if log_prior is None else log_prior.exp()
    step = m.e_step(value=value, temperature=eta, epsilon=0.2, log_prior=log_prior)
    raw = p * (value / 0.8).exp()
    weights = raw / raw.sum(0)
    torch.testing.assert_close(step.weights, weights)
    torch.testing.assert_close(step.dual.detach(), 0.8 * (0.2 + raw.sum(0).log()))
    kl = (weights * (weights / p).log()).sum(0)
    torch.testing.assert_close(step.kl, kl)
    step.dual.sum().backward()
    assert eta.grad is not None
    torch.testing.assert_close(eta.grad, (0.2 - kl).sum())
    assert not step.weights.requires_grad
    assert not step.kl.requires_grad


def test_values_get_no_gradient_and_entries_left_out_no_weight() -> None:
    value, eta = normal(5, 2).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([True, True, False, True, False])
    log_prior = torch.where(kept, -math.log(3), -math.inf).unsqueeze(-1).expand(5, 2)
    step = m.e_step(value=value, temperature=eta, epsilon=0.1, log_prior=log_prior)
    step.dual.sum().backward()
    assert value.grad is None
    short = m.e_step(value=value[kept], temperature=eta, epsilon=0.1)
    torch.testing.assert_close(step.weights[kept], short.weights)
    torch.testing.assert_close(step.dual, short.dual)
    torch.testing.assert_close(step.kl, short.kl)
    assert (step.weights[~kept] == 0).all()
    assert eta.grad is not None
    assert eta.grad.isfinite()


def test_small_temperatures_keep_their_digits_in_float32() -> None:
    value = 1000 + normal(20, 4).float()
    eta = torch.tensor(1e-6, requires_grad=True)
    step = m.e_step(value=value, temperature=eta, epsilon=0.1)
    step.dual.sum().backward()
    assert eta.grad is not None
    # all weight on the best of 20
    torch.testing.assert_close(step.kl, torch.full((4,), math.log(20)), atol=1e-4, rtol=0)
    torch.testing.assert_close(eta.grad, torch.tensor(4 * (0.1 - math.log(20))), atol=1e-3, rtol=0)


def test_diagonal_parts_are_the_kl_of_normals_that_differ_in_one_part() -> None:
    loc, target_loc = normal(4, 3), normal(4, 3, seed=1)
    scale, target_scale = normal(4, 3, seed=2).abs() + 0.2, normal(4, 3, seed=3).abs() + 0.2
    kl = m.diagonal_kl(loc, scale, target_loc, target_scale)
    target = D.Normal(target_loc, target_scale)
    torch.testing.assert_close(kl.mean, D.kl_divergence(target, D.Normal(loc, target_scale)))
    torch.testing.assert_close(kl.covariance, D.kl_divergence(target, D.Normal(target_loc, scale)))
    assert not torch.allclose(kl.covariance, D.kl_divergence(D.Normal(target_loc, scale), target))


def test_full_parts_are_the_kl_of_normals_that_differ_in_one_part() -> None:
    loc, target_loc = normal(4, 3), normal(4, 3, seed=1)
    tril, target_tril = factor(4, size=3, seed=2), factor(4, size=3, seed=3)
    kl = m.full_kl(loc, tril, target_loc, target_tril)
    target = D.MultivariateNormal(target_loc, scale_tril=target_tril)
    mean = D.kl_divergence(target, D.MultivariateNormal(loc, scale_tril=target_tril))
    torch.testing.assert_close(kl.mean, mean.unsqueeze(-1))
    covariance = D.kl_divergence(target, D.MultivariateNormal(target_loc, scale_tril=tril))
    torch.testing.assert_close(kl.covariance, covariance.unsqueeze(-1))


def test_full_covariance_with_a_diagonal_factor_equals_the_diagonal_summed() -> None:
    loc, target_loc = normal(4, 3), normal(4, 3, seed=1)
    scale, target_scale = normal(4, 3, seed=2).abs() + 0.2, normal(4, 3, seed=3).abs() + 0.2
    full = m.full_kl(loc, torch.diag_embed(scale), target_loc, torch.diag_embed(target_scale))
    for found, parts in zip(full, m.diagonal_kl(loc, scale, target_loc, target_scale), strict=True):
        torch.testing.assert_close(found, parts.sum(-1, keepdim=True))
    action = normal(6, 4, 3, seed=5)
    torch.testing.assert_close(
        m.full_log_prob(action, loc, torch.diag_embed(scale)), m.diagonal_log_prob(action, loc, scale)
    )


def test_log_probabilities() -> None:
    loc, scale, tril, action = (
        normal(4, 3),
        normal(4, 3, seed=2).abs() + 0.2,
        factor(4, size=3),
        normal(6, 4, 3, seed=5),
    )
    torch.testing.assert_close(
        m.diagonal_log_prob(action, loc, scale), D.Independent(D.Normal(loc, scale), 1).log_prob(action)
    )
    expected = D.MultivariateNormal(loc, scale_tril=tril).log_prob(action)
    torch.testing.assert_close(m.full_log_prob(action, loc, tril), expected)


@pytest.mark.parametrize("full", [False, True])
def test_m_step_is_the_weighted_log_likelihood_of_the_samples(full: bool) -> None:
    loc, target_loc = normal(4, 3), normal(4, 3, seed=1)
    noise, weights = normal(6, 4, 3, seed=4), normal(6, 4, seed=5).abs()
    if full:
        scale, target_scale = factor(4, size=3, seed=2), factor(4, size=3, seed=3)
        action = target_loc + torch.einsum("bij,sbj->sbi", target_scale, noise)
        step, kl = m.full_m_step(noise, weights, loc, scale, target_loc, target_scale), m.full_kl

        def dist(mean: Tensor, spread: Tensor) -> D.Distribution:
            return D.MultivariateNormal(mean, scale_tril=spread)
    else:
        scale, target_scale = normal(4, 3, seed=2).abs() + 0.2, normal(4, 3, seed=3).abs() + 0.2
        action = target_loc + target_scale * noise
        step, kl = m.diagonal_m_step(noise, weights, loc, scale, target_loc, target_scale), m.diagonal_kl

        def dist(mean: Tensor, spread: Tensor) -> D.Distribution:
            return D.Independent(D.Normal(mean, spread), 1)

    both = dist(loc, target_scale).log_prob(action) + dist(target_loc, scale).log_prob(action)
    torch.testing.assert_close(step.fit, (weights * both).sum(0))
    for found, expected in zip(step.kl, kl(loc, scale, target_loc, target_scale), strict=True):
        torch.testing.assert_close(found, expected)


def test_kl_of_equal_policies_is_zero_and_targets_get_no_gradient() -> None:
    loc, tril = normal(4, 3).requires_grad_(), factor(4, size=3).requires_grad_()
    scale = (normal(4, 3, seed=2).abs() + 0.2).requires_grad_()
    logits = normal(4, 3).log_softmax(-1).requires_grad_()
    for kl in (m.diagonal_kl(loc, scale, loc, scale), m.full_kl(loc, tril, loc, tril)):
        for part in kl:
            assert part.abs().max() < 1e-12
    assert m.categorical_kl(logits, logits).abs().max() < 1e-12
    other = normal(4, 3, seed=7).log_softmax(-1).requires_grad_()
    m.categorical_kl(logits, other).sum().backward()
    assert other.grad is None
    assert logits.grad is not None
    expected = D.kl_divergence(D.Categorical(logits=other), D.Categorical(logits=logits)).unsqueeze(-1)
    torch.testing.assert_close(m.categorical_kl(logits, other), expected)


def test_penalty_and_dual_of_a_bound_have_closed_form_gradients() -> None:
    kl, alpha = normal(5, 3).abs().requires_grad_(), (normal(3, seed=1).abs() + 0.1).requires_grad_()
    penalty, dual = m.kl_penalty(kl=kl, alpha=alpha, epsilon=0.3)
    torch.testing.assert_close(penalty, (kl * alpha).sum(-1))
    torch.testing.assert_close(dual, (alpha * (0.3 - kl)).sum(-1))
    (grad_kl,) = torch.autograd.grad(penalty.sum(), kl, retain_graph=True)
    torch.testing.assert_close(grad_kl, alpha.detach().expand_as(kl))
    (grad_alpha,) = torch.autograd.grad(dual.sum(), alpha, retain_graph=True)
    torch.testing.assert_close(grad_alpha, (0.3 - kl.detach()).sum(0))
    assert torch.autograd.grad(penalty.sum(), alpha, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(dual.sum(), kl, allow_unused=True)[0] is None


def test_action_cost_is_minus_the_distance_to_the_bounds() -> None:
    action = torch.tensor([[0.5, -0.5], [2.0, -1.0], [4.0, -5.0]], dtype=torch.float64)
    torch.testing.assert_close(
        m.action_cost(action, action.clamp(-1, 1)), torch.tensor([0.0, -1.0, -5.0], dtype=torch.float64)
    )


def test_multiplier_is_softplus_of_a_parameter_that_stays_above_its_bound() -> None:
    dual = m.Multiplier(10.0, 3).double()
    torch.testing.assert_close(dual(), torch.full((3,), math.log1p(math.exp(10)) + 1e-8, dtype=torch.float64))
    dual.raw.data[0] = -400.0
    first = dual()
    assert dual.raw.data[0] == -18
    assert first[0].item() == pytest.approx(math.log1p(math.exp(-18)) + 1e-8)
    (first + dual()).sum().backward()  # read twice before the backward pass
    assert dual.raw.grad is not None
    torch.testing.assert_close(dual.raw.grad, 2 * torch.sigmoid(dual.raw.detach()))
    for value in (1e-3, 1.0, 5.0, 40.0):
        assert m.Multiplier.at(value)().item() == pytest.approx(value, rel=1e-4)
    m.Multiplier.at(2e-8)
    for value in (1.9e-8, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha is {value}; it must be at least 2e-08 and finite"):
            m.Multiplier.at(value, name="alpha")
    with pytest.raises(ValueError, match="-18"):
        m.Multiplier(-19.0)
