"""The loss of V-MPO, the on-policy member of the family."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.estimators.state_values import StateValueEstimator
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.arguments import check_arguments, check_not_negative, check_positive
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry
from offtrace.modules.losses.unroll import evaluate_rollout, state_values
from offtrace.modules.losses.views import is_squashed
from offtrace.modules.networks.value_heads import PopArtHead


class VMPOLoss(Loss):
    """V-MPO over a shared actor-critic, called once per batch of rollouts [B, T].

    With advantages A = G - V(x) held constant, D the valid steps and D~ the half of them with the greatest advantages::

        psi_i = exp(A_i / eta) / sum over D~ of exp(A / eta)
        loss_policy = -sum over D~ of psi_i log pi(a_i|x_i)  +  mean over D of alpha KL(pi_t || pi)
        loss_value  = value_coef * mean over D of 1/2 (G - V(x))^2
        loss_dual   = eta epsilon + eta log( mean over D~ of exp(A / eta) ) + mean over D of alpha (epsilon_kl - KL)

    Song et al. 2020, arXiv 1909.12238. No entropy bonus. The KL of a Gaussian is decoupled, with one multiplier for its
    mean and one for its covariance. The target policy pi_t is the behaviour policy: its distribution parameters are
    read from the batch, so T_target of the paper is the number of updates between two pushes of weights to the actors
    (epochs times minibatches of a rollout), and no second network is kept.

    The multipliers are softplus of a parameter; the paper clips them to 1e-8 instead.

    With a policy whose value head is a :class:`PopArtHead`, as the paper has it, loss_value is divided by the variance
    of the returns, and :meth:`update_values` is called after every optimiser step. Without one ``value_coef`` has to
    fit the size of the returns.

    Args:
        policy: what :func:`offtrace.modules.networks.make_policy` gives; discrete, or an unsquashed normal.
        estimator: of state values, gives G and A: ``"gae"``, with its lmbda of 1 the n-step returns of the paper up to
            the end of the rollout; ``"n_step(n=5)"``; ``"vtrace"``, whose ratios correct data that has gone stale, in
            the advantages too; an import path, or an object.
        gamma: discount per step.
        epsilon: bound of the temperature's dual, in nats.
        epsilon_kl: bound of the KL of discrete policies.
        epsilon_mean, epsilon_cov: bounds of the two parts of a normal's KL, summed over dimensions.
        top_fraction: of the valid steps that are in D~; at least one step is.
        value_coef: weight of the value term.
        temperature, alpha: initial values of eta and of every alpha.
        reduction: ``"mean"`` as above, or ``"sum"``, every term times ``valid_count``.

    Reads what :class:`offtrace.modules.losses.impala.ImpalaLoss` reads, and the parameters of the behaviour
    distribution (``"logits"``; ``"loc"`` with ``"scale"`` or ``"scale_tril"``).

    Returns the three losses and, detached: ``temperature``; ``alpha``, or ``alpha_mean`` and ``alpha_cov``; ``kl``, or
    ``kl_mean`` and ``kl_cov``; ``kl_improved`` of psi to uniform on D~, and ``ess_improved``, the effective sample size
    of psi as a fraction of D~; ``threshold``, the smallest advantage in D~; ``entropy``; ``explained_variance``;
    ``advantage_std``; ``valid_count``; and those of the estimator: ``ess``, the effective sample size of pi/mu as a
    fraction of D; ``trace_length`` in steps and ``contraction`` of the value's operator; fractions of ratios above the
    clips that it has.

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | StateValueEstimator = "gae",
        gamma: float = 0.99,
        epsilon: float = 0.01,
        epsilon_kl: float = 0.01,
        epsilon_mean: float = 0.01,
        epsilon_cov: float = 1e-5,
        top_fraction: float = 0.5,
        value_coef: float = 1.0,
        temperature: float = 1.0,
        alpha: float = 5.0,
        reduction: str = "mean",
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must be in (0, 1], got {top_fraction}")
        params = list(policy[-1].in_keys)
        bounds = {"kl": epsilon_kl} if params == [k.LOGITS] else {"mean": epsilon_mean, "cov": epsilon_cov}
        if params not in ([k.LOGITS], [k.LOC, k.SCALE], [k.LOC, k.SCALE_TRIL]) or is_squashed(policy):
            raise ValueError(f"VMPOLoss needs a discrete or an unsquashed normal policy, got parameters {params}")
        check_not_negative(value_coef=value_coef)
        check_positive(epsilon=epsilon, temperature=temperature, alpha=alpha)
        check_positive(**{f"epsilon_{name}": bound for name, bound in bounds.items()})
        super().__init__()
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.epsilon, self.bounds, self.top_fraction = epsilon, bounds, top_fraction
        self.value_coef, self.reduction = value_coef, reduction
        self._sums: Tensor | None = None
        self.temperature = m.Multiplier.at(temperature, name="temperature")
        self.alphas = nn.ModuleDict({name: m.Multiplier.at(alpha, name="alpha") for name in bounds})
        self.bind_networks()
        suffixes = ["" if name == "kl" else f"_{name}" for name in bounds]
        parts = [f"{name}{suffix}" for name in ("alpha", "kl") for suffix in suffixes]
        losses = ["loss_policy", "loss_dual", "loss_value", "temperature", *parts]
        diagnostics = ["kl_improved", "ess_improved", "threshold", "entropy", "explained_variance", "advantage_std"]
        self.out_keys = [*losses, *diagnostics, "valid_count", *self.estimator.diagnostic_keys]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor_critic"`` and ``"duals"``."""
        duals = [*self.temperature.parameters(), *self.alphas.parameters()]
        return {"actor_critic": list(self.policy.parameters()), "duals": duals}

    def read_keys(self) -> list[Any]:
        """Entries that are read."""
        return [*super().read_keys(), *self.policy[-1].in_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        # one call of the network over the steps and their successors; the target policy is the behaviour policy
        policy = evaluate_rollout(self, tensordict)
        valid = policy.outcome.valid
        behaviour = {key: zero_invalid(entry(self, tensordict, key), valid) for key in policy.params}
        value, next_value = state_values(self, policy)
        stats = Stats(valid, policy.outcome.reward)
        times = stats.count if self.reduction == "sum" else 1

        # target and advantage, constant
        estimate = self.estimator.estimate(policy.outcome, value=value, next_value=next_value, log_rho=policy.log_rho)
        error = estimate.target - value

        # temperature: weights of the half with the greatest advantages
        temperature = self.temperature()
        weights, dual, out = select_top(
            estimate.advantage, temperature, self.epsilon, self.top_fraction, valid=valid, stats=stats
        )

        # multipliers: how far the policy may leave the target policy
        penalty = constraint = torch.zeros_like(stats.count)
        for (name, bound), part in zip(self.bounds.items(), kl_parts(policy.params, behaviour, valid), strict=True):
            alpha, kl = self.alphas[name]().squeeze(), stats.mean(part)
            penalty = penalty + alpha.detach() * kl
            constraint = constraint + alpha * (bound - kl.detach()) * (stats.count > 0)
            suffix = "" if name == "kl" else f"_{name}"
            out[f"alpha{suffix}"], out[f"kl{suffix}"] = alpha.detach(), kl.detach()

        # the three terms
        out["loss_policy"] = times * (penalty - (weights * policy.log_pi).sum())
        out["loss_dual"] = times * (dual + constraint)
        value_coef = self._scaled_value_coef(estimate.target, stats)
        out["loss_value"] = (times * 0.5 * value_coef) * stats.mean(error.square())

        # diagnostics
        out |= rollout_diagnostics(
            stats, entropy=policy.dist.entropy(), advantage=estimate.advantage, target=estimate.target, error=error
        )
        return TensorDict(out | estimate.diagnostics, [])

    @property
    def _popart(self) -> PopArtHead | None:
        head = getattr(self.policy[0], "value_head", None)
        return head if isinstance(head, PopArtHead) else None

    def _scaled_value_coef(self, target: Tensor, stats: Stats) -> Any:
        """``value_coef`` in units of the returns' variance, where the value head keeps it; their sums are noted."""
        if self._popart is None:
            return self.value_coef
        exact = target.double()
        count = stats.count.to(exact.dtype)
        self._sums = count * torch.stack([stats.mean(exact), stats.mean(exact.square()), torch.ones_like(count)])
        return (self.value_coef / self._popart.scale.square()).to(target.dtype)

    @torch.no_grad()
    def update_values(self) -> None:
        """Let a :class:`PopArtHead` take in the returns of the last batch, of all ranks; without one do nothing."""
        if self._popart is None or self._sums is None:
            return
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._popart.update(sums[0] / sums[2], sums[1] / sums[2], where=sums[2] > 0)


def select_top(
    advantage: Tensor, temperature: Tensor, epsilon: float, fraction: float, *, valid: Tensor | None, stats: Stats
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weights psi [B, T], 0 outside D~; the temperature's dual; diagnostics."""
    flat = advantage.flatten()
    ranked = flat if valid is None else flat.masked_fill(~valid.flatten(), -math.inf)
    size = (stats.count * fraction).floor().clamp(min=1)
    # by rank, so that equal advantages do not make the half larger
    rank = ranked.argsort(descending=True, stable=True).argsort()
    top = rank < size
    log_prior = torch.where(top, -size.log(), -math.inf).to(flat.dtype)
    step = m.e_step(value=flat, temperature=temperature, epsilon=epsilon, log_prior=log_prior)
    # a batch without a valid step still ranks one first
    some = (stats.count > 0).to(flat.dtype)
    out = {
        "temperature": temperature.detach().squeeze(),
        "kl_improved": some * step.kl,
        "ess_improved": some / (size * step.weights.square().sum()),
        "threshold": some * flat.masked_fill(~top, math.inf).amin(),
    }
    return some * step.weights.view_as(advantage), some * step.dual, out


def kl_parts(params: dict[Any, Tensor], behaviour: dict[Any, Tensor], valid: Tensor | None) -> list[Tensor]:
    """KL of behaviour to online policy at each step, [B, T]: whole, or a normal's, of its mean and its covariance.

    Args:
        params, behaviour: parameters of both distributions, [B, T, ...] by their keys.
        valid: bool [B, T] or None; the behaviour of other steps is replaced by one that can be evaluated.
    """
    if k.LOGITS in params:
        logits, stored = params[k.LOGITS].log_softmax(-1), behaviour[k.LOGITS].log_softmax(-1)
        return [m.categorical_kl(logits, stored).squeeze(-1)]
    if k.SCALE in params:
        stored = behaviour[k.SCALE] if valid is None else behaviour[k.SCALE].masked_fill(~valid.unsqueeze(-1), 1)
        found = m.diagonal_kl(params[k.LOC], params[k.SCALE], behaviour[k.LOC], stored)
        return [part.sum(-1) for part in found]
    stored = behaviour[k.SCALE_TRIL]
    if valid is not None:
        identity = torch.eye(stored.shape[-1], dtype=stored.dtype, device=stored.device)
        stored = torch.where(valid[..., None, None], stored, identity)
    found = m.full_kl(params[k.LOC], params[k.SCALE_TRIL], behaviour[k.LOC], stored)
    return [part.squeeze(-1) for part in found]
