"""The loss of V-MPO, the on-policy member of the family."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.offpolicy import Batch, check_arguments, cleared, squashed
from offtrace.modules.losses.rollout import RolloutLoss
from offtrace.modules.losses.stats import Stats
from offtrace.modules.networks.heads import PopArtHead
from offtrace.modules.returns import (
    clipped_fraction,
    effective_sample_size,
    gae,
    n_step_return,
    trace_reach,
    vtrace,
)

_LOSSES = ("loss_policy", "loss_dual", "loss_value")
_DIAGNOSTICS = (
    "kl_improved",
    "ess_improved",
    "threshold",
    "entropy",
    "explained_variance",
    "advantage_std",
    "ess",
    "trace_length",
    "contraction",
)
_TARGETS = ("lambda", "n_step", "vtrace")


class VMPOLoss(RolloutLoss):
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

    ``torch.compile`` breaks the graph once, before the network: the number of states evaluated depends on the batch.

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
    ``advantage_std``; ``ess``, the effective sample size of pi/mu as a fraction of D; ``trace_length`` in
    steps and ``contraction`` of the value's operator; ``valid_count``; with V-trace's clips ``rho_clipped`` and
    ``c_clipped``, fractions of ratios above them (both are at 1).

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

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
        super().__init__(policy)
        check_arguments(reduction=reduction, gamma=gamma, lmbda=lmbda)
        if target not in _TARGETS:
            raise ValueError(f"target must be one of {_TARGETS}, got {target!r}")
        if n_step < 1 or not 0 < top_fraction <= 1:
            raise ValueError(
                f"n_step must be 1 or more and top_fraction in (0, 1], got n_step={n_step}, top_fraction={top_fraction}"
            )
        params = list(policy[-1].in_keys)
        bounds = {"kl": epsilon_kl} if params == [k.LOGITS] else {"mean": epsilon_mean, "cov": epsilon_cov}
        if params not in ([k.LOGITS], [k.LOC, k.SCALE], [k.LOC, k.SCALE_TRIL]) or squashed(policy):
            raise ValueError(f"VMPOLoss needs a discrete or an unsquashed normal policy, got parameters {params}")
        for name, value in {"epsilon": epsilon, **{f"epsilon_{x}": y for x, y in bounds.items()}}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in {"temperature": temperature, "alpha": alpha}.items():
            if value <= 0:
                raise ValueError(f"{name} must start positive, got {value}")
        self.gamma, self.target_kind, self.lmbda, self.n_step = gamma, target, lmbda, n_step
        self.epsilon, self.bounds, self.top_fraction = epsilon, bounds, top_fraction
        self.value_coef, self.reduction = value_coef, reduction
        self._moments: Tensor | None = None
        self.temperature = m.Dual.at(temperature)
        self.alphas = nn.ModuleDict({name: m.Dual.at(alpha) for name in bounds})
        suffixes = ["" if name == "kl" else f"_{name}" for name in bounds]
        parts = [f"{name}{suffix}" for name in ("alpha", "kl") for suffix in suffixes]
        told = ["rho_clipped", "c_clipped"] if target == "vtrace" else []
        self.out_keys = [*_LOSSES, "temperature", *parts, *_DIAGNOSTICS, *told, "valid_count"]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor_critic"`` and ``"duals"``."""
        duals = [*self.temperature.parameters(), *self.alphas.parameters()]
        return {"actor_critic": list(self.policy.parameters()), "duals": duals}

    @property
    def _popart(self) -> PopArtHead | None:
        head = getattr(self.policy[0], "value_head", None)
        return head if isinstance(head, PopArtHead) else None

    @torch.no_grad()
    def update_values(self) -> None:
        """Let a :class:`PopArtHead` take in the returns of the last batch, of all ranks; without one do nothing."""
        if self._popart is None or self._moments is None:
            return
        sums = self._moments * self._moments[2]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        if sums[2] > 0:
            self._popart.update(sums[0] / sums[2], sums[1] / sums[2])
        self._moments = None

    def _behaviour_keys(self) -> list[Any]:
        return [*super()._behaviour_keys(), *self.policy[-1].in_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        reading = self._read(tensordict)
        valid, log_rho = reading.batch.valid, reading.log_rho
        behaviour = {key: cleared(self._entry(tensordict, key), valid) for key in reading.params}
        values = self._entry(reading.output, self.tensor_keys.value).squeeze(-1)
        value, next_value = reading.unroll.at(values), reading.unroll.behind(values).detach()
        target, advantage = self._targets(reading.batch, value.detach(), next_value, log_rho)

        stats = Stats(valid, reading.batch.reward)
        value_coef: Any = self.value_coef
        if self._popart is not None:
            moments = [stats.mean(target), stats.mean(target.square()), (stats.count > 0).to(target.dtype)]
            self._moments = torch.stack(moments)
            value_coef = value_coef / self._popart.scale.square()
        times = stats.count if self.reduction == "sum" else 1
        weights, dual, out = self._select(advantage, valid, stats)
        penalty, constraint = self._constrain(reading.params, behaviour, valid, stats, out)
        out["loss_policy"] = times * (penalty - (weights * reading.log_pi).sum())
        out["loss_dual"] = times * (dual + constraint)
        out["loss_value"] = (times * 0.5 * value_coef) * stats.mean((target - value).square())
        with torch.no_grad():
            out["entropy"] = stats.mean(reading.dist.entropy())
            out["advantage_std"] = stats.std(advantage)
            out["explained_variance"] = 1 - stats.variance(target - value) / stats.variance(target).clamp(min=1e-8)
        out["valid_count"] = stats.count
        self._tell(out, log_rho.t(), reading.batch.time_first())
        return TensorDict(out, [])

    @torch.no_grad()
    def _tell(self, out: dict[str, Tensor], log_rho: Tensor, batch: Batch) -> None:
        """Adds how far off-policy the rollout is, from what stands time first."""
        _, terminated, done, valid = batch
        out["ess"] = effective_sample_size(log_rho, valid=valid)
        ones = torch.ones_like(log_rho)
        if self.target_kind == "n_step":
            stats = Stats(valid, ones)
            length = n_step_return(  # of rewards 1, the return is the number of steps
                reward=ones,
                next_value=0 * ones,
                terminated=terminated,
                done=done,
                gamma=1.0,
                n=self.n_step,
                valid=valid,
            )
            out["trace_length"] = stats.mean(length - 1)
            out["contraction"] = 1 - stats.mean(1 - self.gamma**length)
            return
        rho = log_rho.clamp(max=0).exp() if self.target_kind == "vtrace" else ones
        out["trace_length"], out["contraction"] = trace_reach(
            trace=self.lmbda * rho, done=done, gamma=self.gamma, rho=rho, valid=valid, bounded=True
        )
        if self.target_kind == "vtrace":
            out["rho_clipped"] = out["c_clipped"] = clipped_fraction(log_rho, 1.0, valid=valid)

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

    def _targets(self, batch: Batch, value: Tensor, next_value: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor]:
        """Return and advantage [B, T], 0 advantage where not valid; the one place where time changes its dimension."""
        reward, terminated, done, valid = batch.time_first()
        known: dict[str, Any] = {
            "reward": reward.to(value.dtype),
            "next_value": next_value.t(),
            "terminated": terminated,
            "done": done,
            "gamma": self.gamma,
            "valid": valid,
        }
        if self.target_kind == "n_step":
            target = n_step_return(n=self.n_step, **known).t()
            return target, cleared(target - value, batch.valid)
        if self.target_kind == "lambda":
            found: Any = gae(value=value.t(), lmbda=self.lmbda, **known)
        else:
            found = vtrace(value=value.t(), log_rho=log_rho.to(value.dtype).t(), lmbda=self.lmbda, **known)
        return found.target.t(), cleared(found.advantage.t(), batch.valid)
