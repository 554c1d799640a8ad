"""The loss of V-MPO, the on-policy member of the family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.offpolicy import OffPolicyLoss, check_arguments, cleared
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import Unroll
from offtrace.modules.returns import (
    clipped_fraction,
    effective_sample_size,
    gae,
    n_step_return,
    trace_reach,
    vtrace,
)

_LOSSES = ("loss_policy", "loss_dual", "loss_value")
_DIAGNOSTICS = ("kl_improved", "ess_improved", "threshold", "entropy", "explained_variance", "advantage_std", "ess")
_REACH = ("trace_length", "contraction")
_TARGETS = ("lambda", "n_step", "vtrace")


class VMPOLoss(OffPolicyLoss):
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

    Args:
        policy: what :func:`offtrace.modules.networks.make_policy` gives; discrete, or an unsquashed normal.
        gamma: discount per step.
        target: G: ``"lambda"``, TD(lambda), with ``lmbda`` 1 the n-step returns of the paper up to the end of the
            rollout; ``"n_step"`` with ``n_step``; ``"vtrace"``, whose ratios correct data that has gone stale, in the
            advantages too.
        lmbda: of ``"lambda"`` and ``"vtrace"``.
        n_step: of ``"n_step"``.
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
    of psi as a fraction of D~; ``threshold``, the least advantage in D~; ``entropy``; ``explained_variance``;
    ``advantage_std``; ``ess``, the effective sample size of pi/mu as a fraction of D; ``valid_count``. With traces,
    ``"lambda"`` and ``"vtrace"``: ``trace_length`` in steps and ``contraction``; with V-trace's clips: ``rho_clipped``
    and ``c_clipped``, fractions of ratios above them (both are at 1).

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    @dataclass
    class _AcceptedKeys:
        action: Any = k.ACTION
        sample_log_prob: Any = k.LOG_PROB
        value: Any = k.VALUE
        valid: Any = k.VALID
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        gamma: float = 0.99,
        target: str = "lambda",
        lmbda: float = 1.0,
        n_step: int = 5,
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
        super().__init__()
        check_arguments(reduction=reduction, gamma=gamma, lmbda=lmbda)
        if target not in _TARGETS:
            raise ValueError(f"target must be one of {_TARGETS}, got {target!r}")
        if n_step < 1 or not 0 < top_fraction <= 1:
            raise ValueError(
                f"n_step must be 1 or more and top_fraction in (0, 1], got n_step={n_step}, top_fraction={top_fraction}"
            )
        params = list(policy[-1].in_keys)
        bounds = {"kl": epsilon_kl} if params == [k.LOGITS] else {"mean": epsilon_mean, "cov": epsilon_cov}
        if params not in ([k.LOGITS], [k.LOC, k.SCALE], [k.LOC, k.SCALE_TRIL]) or k.PRE_TANH in policy.out_keys:
            raise ValueError(f"VMPOLoss needs a discrete or an unsquashed normal policy, got parameters {params}")
        for name, value in {"epsilon": epsilon, **{f"epsilon_{x}": y for x, y in bounds.items()}}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in {"temperature": temperature, "alpha": alpha}.items():
            if value <= 0:
                raise ValueError(f"{name} must start positive, got {value}")
        self.policy = policy
        self.gamma, self.target_kind, self.lmbda, self.n_step = gamma, target, lmbda, n_step
        self.epsilon, self.bounds, self.top_fraction = epsilon, bounds, top_fraction
        self.value_coef, self.reduction = value_coef, reduction
        self.temperature = m.Dual.at(temperature)
        self.alphas = nn.ModuleDict({name: m.Dual.at(alpha) for name in bounds})
        self._set_in_keys()
        suffixes = ["" if name == "kl" else f"_{name}" for name in bounds]
        parts = [f"{name}{suffix}" for name in ("alpha", "kl") for suffix in suffixes]
        told = {"n_step": [], "lambda": _REACH, "vtrace": [*_REACH, "rho_clipped", "c_clipped"]}[target]
        self.out_keys = [*_LOSSES, "temperature", *parts, *_DIAGNOSTICS, *told, "valid_count"]

    @property
    def functional(self) -> bool:
        """The policy is a plain submodule; its parameters are not copied."""
        return False

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor_critic"`` and ``"duals"``."""
        duals = [*self.temperature.parameters(), *self.alphas.parameters()]
        return {"actor_critic": list(self.policy.parameters()), "duals": duals}

    def set_keys(self, **kwargs: Any) -> None:
        """Rename entries, see ``_AcceptedKeys``."""
        super().set_keys(**kwargs)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        names = self.tensor_keys
        observed = [*self.policy.in_keys, *((k.NEXT, key) for key in self.policy.in_keys)]
        ends = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        self._in_keys = [*observed, names.action, names.sample_log_prob, *self.policy[-1].in_keys, *ends]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        if tensordict.ndim != 2:
            raise ValueError(f"the batch must be [B, T], environments then time; got {list(tensordict.batch_size)}")
        names, sampler = self.tensor_keys, self.policy[-1]
        reward, terminated, done = (
            tensordict.get((k.NEXT, key)).squeeze(-1) for key in (names.reward, names.terminated, names.done)
        )
        valid = self._valid(tensordict)
        unroll = Unroll(tensordict, self.policy, terminated=terminated, done=done, valid=valid)
        output = self.policy.get_dist_params(unroll.inputs)
        values = output.get(names.value).squeeze(-1)
        value, next_value = unroll.at(values), unroll.behind(values).detach()
        params = {key: unroll.at(output.get(key)) for key in sampler.in_keys}
        behaviour = {key: cleared(self._stored(tensordict, key), valid) for key in sampler.in_keys}
        dist = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
        log_prob = dist.log_prob(cleared(tensordict.get(names.action), valid))
        log_rho = cleared(log_prob.detach() - tensordict.get(names.sample_log_prob), valid)
        target, advantage = self._targets(reward, value.detach(), next_value, log_rho, terminated, done, valid)

        stats = Stats(valid, reward)
        times = stats.count if self.reduction == "sum" else 1
        weights, dual, out = self._select(advantage, valid, stats)
        penalty, constraint = self._constrain(params, behaviour, valid, stats, out)
        out["loss_policy"] = times * (penalty - (weights * log_prob).sum())
        out["loss_dual"] = times * (dual + constraint)
        out["loss_value"] = (times * 0.5 * self.value_coef) * stats.mean((target - value).square())
        with torch.no_grad():
            out["entropy"] = stats.mean(dist.entropy())
            out["advantage_std"] = stats.std(advantage)
            out["explained_variance"] = 1 - stats.variance(target - value) / stats.variance(target).clamp(min=1e-8)
        out["valid_count"] = stats.count
        self._tell(out, log_rho.t(), done.t(), None if valid is None else valid.t())
        return TensorDict(out, [])

    @torch.no_grad()
    def _tell(self, out: dict[str, Tensor], log_rho: Tensor, done: Tensor, valid: Tensor | None) -> None:
        """Adds how far off-policy the rollout is, from what stands time first."""
        out["ess"] = effective_sample_size(log_rho, valid=valid)
        if self.target_kind == "n_step":
            return
        rho = log_rho.clamp(max=0).exp() if self.target_kind == "vtrace" else torch.ones_like(log_rho)
        out["trace_length"], out["contraction"] = trace_reach(
            trace=self.lmbda * rho, done=done, gamma=self.gamma, rho=rho, valid=valid, bounded=True
        )
        if self.target_kind == "vtrace":
            out["rho_clipped"] = out["c_clipped"] = clipped_fraction(log_rho, 1.0, valid=valid)

    def _stored(self, tensordict: TensorDictBase, key: Any) -> Tensor:
        found = tensordict.get(key, None)
        if found is None:
            raise KeyError(f"V-MPO reads {key!r} of the behaviour policy, its target policy, which the rollout lacks")
        return found

    def _select(
        self, advantage: Tensor, valid: Tensor | None, stats: Stats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights psi [B, T], 0 outside D~; the temperature's dual; diagnostics."""
        flat = advantage.flatten()
        ranked = flat if valid is None else flat.masked_fill(~valid.flatten(), -math.inf)
        size = (stats.count * self.top_fraction).floor().clamp(min=1)
        # by rank, so that equal advantages do not make the half larger
        rank = ranked.argsort(descending=True, stable=True).argsort()
        chosen = rank < size
        temperature = self.temperature()
        log_prior = torch.where(chosen, -size.log(), -math.inf).to(flat.dtype)
        step = m.e_step(value=flat, temperature=temperature, epsilon=self.epsilon, log_prior=log_prior)
        # a batch without a valid step still ranks one first
        some = (stats.count > 0).to(flat.dtype)
        out = {
            "temperature": temperature.detach().squeeze(),
            "kl_improved": some * step.kl,
            "ess_improved": some / (size * step.weights.square().sum()),
            "threshold": some * flat.masked_fill(~chosen, math.inf).amin(),
        }
        return some * step.weights.view_as(advantage), some * step.dual, out

    def _constrain(
        self,
        params: dict[Any, Tensor],
        behaviour: dict[Any, Tensor],
        valid: Tensor | None,
        stats: Stats,
        out: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The KL penalty for the policy and its dual for the multipliers, means over the valid steps."""
        if k.LOGITS in params:
            logits, stored = params[k.LOGITS].log_softmax(-1), behaviour[k.LOGITS].log_softmax(-1)
            parts = [m.categorical_kl(logits, stored).squeeze(-1)]
        elif k.SCALE in params:
            stored = behaviour[k.SCALE] if valid is None else behaviour[k.SCALE].masked_fill(~valid.unsqueeze(-1), 1)
            found = m.diagonal_kl(params[k.LOC], params[k.SCALE], behaviour[k.LOC], stored)
            parts = [part.sum(-1) for part in found]
        else:
            stored = behaviour[k.SCALE_TRIL]
            if valid is not None:
                identity = torch.eye(stored.shape[-1], dtype=stored.dtype, device=stored.device)
                stored = torch.where(valid[..., None, None], stored, identity)
            found = m.full_kl(params[k.LOC], params[k.SCALE_TRIL], behaviour[k.LOC], stored)
            parts = [part.squeeze(-1) for part in found]
        penalty = dual = torch.zeros_like(stats.count)
        for (name, bound), part in zip(self.bounds.items(), parts, strict=True):
            alpha, kl = self.alphas[name]().squeeze(), stats.mean(part)
            suffix = "" if name == "kl" else f"_{name}"
            penalty = penalty + alpha.detach() * kl
            dual = dual + alpha * (bound - kl.detach()) * (stats.count > 0)
            out[f"alpha{suffix}"], out[f"kl{suffix}"] = alpha.detach(), kl.detach()
        return penalty, dual

    def _targets(
        self,
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return and advantage [B, T], 0 advantage where not valid; the one place where time changes its dimension."""
        known: dict[str, Any] = {
            "reward": reward.to(value.dtype).t(),
            "next_value": next_value.t(),
            "terminated": terminated.t(),
            "done": done.t(),
            "gamma": self.gamma,
            "valid": None if valid is None else valid.t(),
        }
        if self.target_kind == "n_step":
            target = n_step_return(n=self.n_step, **known).t()
            return target, cleared(target - value, valid)
        if self.target_kind == "lambda":
            found: Any = gae(value=value.t(), lmbda=self.lmbda, **known)
        else:
            found = vtrace(value=value.t(), log_rho=log_rho.to(value.dtype).t(), lmbda=self.lmbda, **known)
        return found.target.t(), cleared(found.advantage.t(), valid)
