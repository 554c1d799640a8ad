"""The loss of trust region policy optimisation, and the step of its policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch
from torch import Tensor

from offtrace.modules.estimators.base import Outcome, zero_invalid
from offtrace.modules.estimators.state_values import StateValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_count, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.natural_gradient import (
    conjugate_gradients,
    differentiable,
    flat_gradient,
    line_search,
    step_length,
    sum_of_ranks,
    write,
)
from offtrace.modules.losses.policy_gradient import ratio_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry, read_outcome
from offtrace.modules.losses.unroll import EvaluatedPolicy, Unroll, evaluate_rollout
from offtrace.modules.losses.views import check_entropy, check_feed_forward, state_keys_of
from offtrace.modules.returns.checks import ratio


class TRPOLoss(Loss):
    """Trust region policy optimisation: a natural gradient step of the policy, and the loss of a value beside it.

    With rho = pi(a|x) / mu(a|x), the advantage A held constant, and pi_old the policy before the step, over the valid
    steps of a rollout [B, T], of all ranks::

        maximise  L = mean of  rho A   subject to   mean of  KL(pi_old || pi) <= delta

    :meth:`improve` makes the step: with g the gradient of L, and F the Hessian of the KL at pi_old, which is never
    formed, plus ``damping`` on its diagonal::

        x = F^-1 g  by conjugate gradients;   theta <- theta + s^i sqrt(2 delta / x.F x) x

    with the smallest i from 0 to ``backtracks`` - 1 at which L has risen and the KL is within ``delta``; without one
    the weights stay. :meth:`forward` is the loss of the value, loss_value = mean of 1/2 (R - V(x))^2, for an optimiser.

    Schulman et al. 2015, arXiv 1502.05477; the advantages are those of Schulman et al. 2016, arXiv 1506.02438.

    A and R are computed once per rollout, by :meth:`prepare`; a rollout that was not prepared is evaluated with the
    weights of the moment. Policy and value share no parameters: what the value learns would move the policy out of the
    region. The parameters of the policy no longer require a gradient once they are here: :meth:`improve` alone moves
    them, and no optimiser, nor DDP, is to wait for gradients of theirs.

    Args:
        policy: of ``build_policy(..., critic=None)``, or as of :class:`ImpalaLoss`; without a recurrent state.
        value: reads the observation, writes ``"state_value"`` [*B, 1]; of ``build_value``.
        estimator: of state values, gives R and A: ``"gae(lmbda=0.98)"`` ..., an import path, or an object; see
            :mod:`offtrace.modules.estimators`.
        gamma: discount per step.
        delta: largest mean KL of a step, in nats.
        damping: added to the diagonal of F.
        cg_iterations: products with F that x takes; each is one backward pass.
        backtracks: fractions of the step that are tried; each is one forward pass.
        shrink: s, each fraction as a part of the one before.
        normalize_advantage: (A - mean) / (std + 1e-8) over the valid steps of all ranks.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.

    Reads (names change by :meth:`set_keys`) what :class:`ImpalaLoss` reads, and what :meth:`prepare` writes:
    ``"advantage"`` and ``"value_target"``, [B, T, 1]. Where the advantage is there, nothing of the observations behind
    the steps is read.

    Returns ``loss_value`` and, detached scalars over the valid steps: ``explained_variance`` of the targets by the
    value; ``valid_count``. :meth:`improve` says what it returns, :meth:`prepare` the estimator's diagnostics.

    Raises:
        ValueError: on an argument out of range, a policy or an estimator that does not fit, or a batch that is not
            [B, T].
        KeyError: when an entry is missing, by its name.
    """

    reads_behaviour = True
    reduction = "mean"

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        value: TensorDictModuleBase,
        *,
        estimator: str | StateValueEstimator = "gae(lmbda=0.98)",
        gamma: float = 0.99,
        delta: float = 0.01,
        damping: float = 0.1,
        cg_iterations: int = 10,
        backtracks: int = 10,
        shrink: float = 0.5,
        normalize_advantage: bool = True,
        reward_clip: float | None = None,
    ) -> None:
        check_arguments(reduction=self.reduction, gamma=gamma)
        check_entropy(self, policy)
        check_positive_or_none(reward_clip=reward_clip)
        if not 0 < delta < float("inf"):
            raise ValueError(f"delta must be above 0 and finite, got {delta}")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be at least 0 and finite, got {damping}")
        check_count(cg_iterations=cg_iterations, backtracks=backtracks)
        if not 0 < shrink < 1:
            raise ValueError(f"shrink must be in (0, 1), got {shrink}")
        check_feed_forward(self, policy, value)
        if {*policy.parameters()} & {*value.parameters()}:
            raise ValueError(
                "TRPOLoss needs a policy and a value without common parameters, got some that both have: use "
                "build_policy(..., critic=None) and build_value"
            )
        super().__init__()
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy, self.value = policy.requires_grad_(False), value
        self.state_keys = state_keys_of(policy, value)
        self.bind_networks()
        self.delta, self.damping = delta, damping
        self.cg_iterations, self.backtracks, self.shrink = cg_iterations, backtracks, shrink
        self.normalize_advantage, self.reward_clip = normalize_advantage, reward_clip
        self.out_keys = ["loss_value", "explained_variance", "valid_count"]

    @torch.no_grad()
    def prepare(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Write ``"advantage"`` and ``"value_target"``, [B, T, 1], into a rollout [B, T], by the weights as they are.

        Returns:
            The estimator's diagnostics of the rollout, scalars by their names.

        Raises:
            KeyError, TypeError, ValueError: as :meth:`forward`.
        """
        policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip)
        unroll, values = self._values(tensordict, policy.outcome, successors=True)
        estimate = self.estimator.estimate(
            policy.outcome, value=unroll.steps(values), next_value=unroll.successors(values), log_rho=policy.log_rho
        )
        # the surrogate has the ratio itself: an estimator's weight would count it twice; where it is 0, so is the ratio
        weighted = estimate.weight != 0
        advantage = torch.where(weighted, estimate.advantage / estimate.weight, estimate.advantage)
        tensordict.set(self.tensor_keys.advantage, advantage.unsqueeze(-1))
        tensordict.set(self.tensor_keys.value_target, estimate.target.unsqueeze(-1))
        found: dict[str, Tensor] = estimate.diagnostics
        return found

    def improve(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """One step of the policy on a rollout [B, T], in place; the host reads one number for each fraction it tries.

        The ranks are those of ``torch.distributed``; every rank must call it as often as the others, with the same
        weights. They then make the step of the joined batch.

        Returns:
            Detached scalars: ``surrogate``, L before the step, and ``surrogate_new``; ``kl_new`` of the old policy to
            the new one in nats; ``step_fraction``, s^i or 0; ``line_search_failed``, 0 or 1; ``policy_grad_norm`` of
            g (the weights stay where it is not finite); and of this rank's policy before the step ``entropy`` in nats,
            ``kl`` of the behaviour to it, ``ratio_mean`` of pi/mu, and ``advantage_std``, before normalisation.

        Raises:
            KeyError, TypeError, ValueError: as :meth:`forward`.
        """
        tensordict = self._prepared(tensordict)
        weights = list(self.policy.parameters())
        with torch.autocast(self.device.type, enabled=False), differentiable(weights):
            # one call of the network: L, its gradient, and that of the KL, which is differentiated again
            policy = self._evaluate(tensordict)
            objective = self._objective(tensordict, policy)
            surrogate, kl = objective(policy)
            gradient = sum_of_ranks(flat_gradient(surrogate, weights))
            kl_gradient = flat_gradient(kl, weights, create_graph=True)

            def fisher(vector: Tensor) -> Tensor:
                image = flat_gradient(kl_gradient @ vector, weights)
                return sum_of_ranks(image) + self.damping * vector

            # x = F^-1 g, of the length at which the KL is delta
            direction = conjugate_gradients(fisher, gradient, iterations=self.cg_iterations)
            step = step_length(direction @ fisher(direction), delta=self.delta) * direction

        # as much of it as raises L and stays inside
        before = torch.cat([weight.detach().flatten() for weight in weights])

        def measure(fraction: float) -> tuple[Tensor, Tensor]:
            write(before + fraction * step, weights)
            found, kl = sum_of_ranks(torch.stack(objective(self._evaluate(tensordict)))).unbind()
            return found, kl

        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            surrogate = sum_of_ranks(surrogate.detach())
            tries = self.backtracks if step.isfinite().all() else 0
            try:
                move = line_search(measure, surrogate, delta=self.delta, tries=tries, shrink=self.shrink)
            except BaseException:  # a stop as well: what is saved then is no step that nobody accepted
                write(before, weights)
                raise
            if not move.fraction:
                write(before, weights)

            # diagnostics
            stats = Stats(policy.outcome.valid, policy.outcome.reward)
            out = {
                "surrogate": surrogate,
                "surrogate_new": move.surrogate,
                "kl_new": move.kl,
                "step_fraction": torch.full_like(surrogate, move.fraction),
                "line_search_failed": torch.full_like(surrogate, float(not move.fraction)),
                "policy_grad_norm": gradient.norm(),
                "entropy": stats.mean(policy.dist.entropy()),
                "advantage_std": stats.std(self._read(tensordict, self.tensor_keys.advantage, policy.outcome.valid)),
            }
            out |= ratio_diagnostics(self.policy, tensordict, policy, stats)
        return {name: x.detach() for name, x in out.items()}

    def _evaluate(self, tensordict: TensorDictBase) -> EvaluatedPolicy:
        """The policy as it is now, at the steps alone."""
        return evaluate_rollout(self, tensordict, reward_clip=self.reward_clip, successors=False)

    def _objective(
        self, tensordict: TensorDictBase, old: EvaluatedPolicy
    ) -> Callable[[EvaluatedPolicy], tuple[Tensor, Tensor]]:
        """This rank's parts of L and of the KL of ``old``, as a function of the policy; their sums are the means."""
        valid = old.outcome.valid
        stats = Stats(valid, old.outcome.reward)
        count = sum_of_ranks(stats.count).clamp(min=1)
        advantage = self._read(tensordict, self.tensor_keys.advantage, valid)
        if self.normalize_advantage:
            advantage = stats.standardised(advantage, zero_invalid(torch.ones_like(advantage), valid))
        params = TensorDict({key: x.detach() for key, x in old.params.items()}, tensordict.batch_size)
        fixed = self.policy[-1].build_dist_from_params(params)

        def objective(now: EvaluatedPolicy) -> tuple[Tensor, Tensor]:
            assert now.log_rho is not None
            log_rho = now.log_rho + (now.log_pi - now.log_pi.detach())  # the gradient is that of log pi
            surrogate = ratio(zero_invalid(log_rho, valid)) * advantage
            kl = torch.distributions.kl_divergence(fixed, now.dist)
            return stats.sum(surrogate) / count, stats.sum(kl) / count

        return objective

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of the value and diagnostics, all scalars, of a rollout [B, T]."""
        tensordict = self._prepared(tensordict)
        outcome = read_outcome(self, tensordict)
        unroll, values = self._values(tensordict, outcome, successors=False)
        stats = Stats(outcome.valid, outcome.reward)
        target = self._read(tensordict, self.tensor_keys.value_target, outcome.valid)
        error = target - unroll.steps(values)
        out = {"loss_value": 0.5 * stats.mean(error.square())}

        # diagnostics
        with torch.no_grad():
            out["explained_variance"] = 1 - stats.variance(error) / stats.variance(target).clamp(min=1e-8)
            out["valid_count"] = stats.count
        return TensorDict(out, [])

    def _prepared(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The rollout with what :meth:`prepare` writes."""
        if len(tensordict.batch_size) != 2:
            raise ValueError(f"the batch must be [B, T], environments then time; got {list(tensordict.batch_size)}")
        if tensordict.get(self.tensor_keys.advantage, None) is None:
            tensordict = tensordict.copy()
            self.prepare(tensordict)
        return tensordict

    def _read(self, tensordict: TensorDictBase, key: str, valid: Tensor | None) -> Tensor:
        """What :meth:`prepare` wrote, [B, T]."""
        return zero_invalid(entry(self, tensordict, key, tensordict.batch_size).detach(), valid).to(self.dtype)

    def _values(self, tensordict: TensorDictBase, outcome: Outcome, *, successors: bool) -> tuple[Unroll, Tensor]:
        """The sequence that the value's network ran on, and V there."""
        unroll = Unroll(
            tensordict,
            self.value,
            terminated=outcome.terminated,
            done=outcome.done,
            valid=outcome.valid,
            successors=successors,
        )
        values = entry(self, self.value(unroll.inputs), self.tensor_keys.value).squeeze(-1)
        return unroll, values.to(self.dtype)
