"""The loss of MPO for discrete actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.arguments import check_arguments
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import of_action
from offtrace.modules.losses.mpo import LOSSES, VALUES, check_mpo, critic_terms, groups_with_duals
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import States, Steps, log_ratio, read_log_prob, read_steps, weighted, write_priority
from offtrace.modules.losses.views import (
    check_categorical,
    check_feed_forward,
    distribution_of,
    mask_key_of,
    state_keys_of,
    values_of,
    zero_illegal,
)
from offtrace.modules.networks.distributions import mask_logits

_DUALS = ("temperature", "alpha", "kl_improved", "kl_policy", "entropy")


class DiscreteMPOLoss(Loss):
    """MPO over discrete actions, with sums over all of them in place of samples.

    With the target networks' pi_t and Q_t (the smallest of its K values)::

        q(a|x) = pi_t(a|x) exp(Q_t(x, a) / eta) / Z,   E_pi Q = sum_a pi_t(a|x) Q_t(x, a)
        loss_policy = mean_i [ -sum_a q(a|x_i) log pi(a|x_i) + alpha KL(pi_t || pi) ]
        loss_dual   = mean_i [ eta (epsilon + log sum_a pi_t exp(Q_t / eta)) + alpha (epsilon_policy - KL) ]
        loss_critic = mean of 1/2 (y - Q_k)^2, summed over k

    Abdolmaleki et al. 2018, arXiv 1806.06920, as Acme has it for discrete actions.

    Args:
        policy: has a categorical distribution over A indices.
        critic: reads the observation; writes ``"action_value"`` [*, K, A].
        epsilon, epsilon_policy: bounds of the E-step and of the M-step, in nats.
        raw_temperature, raw_alpha: initial multipliers before the softplus.

    Of a policy that reads ``"action_mask"`` illegal actions have probability 0, and nothing that stands at them is
    looked at. The other arguments, the layout of the batch and what is returned are those of
    :class:`offtrace.modules.losses.mpo.MPOLoss`; the diagnostics are ``temperature``, ``alpha``, ``kl_improved`` (of q
    to pi_t), ``kl_policy``, ``entropy`` (nats), ``q_value``, ``target_value``, ``td_error``, ``valid_count``, and those
    of the traces, to which ``estimator="tree_backup"`` comes here.

    Raises:
        ValueError: on an argument out of range, networks that do not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    critic: TensorDictModule
    critic_params: TensorDictParams
    target_critic_params: TensorDictParams
    support = None

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        estimator: str | ActionValueEstimator = "n_step(n=5)",
        gamma: float = 0.99,
        epsilon: float = 0.1,
        epsilon_policy: float = 2.5e-3,
        policy_states: str = "next",
        raw_temperature: float = 3.0,
        raw_alpha: float = 3.0,
        reduction: str = "mean",
        priorities: bool = False,
    ) -> None:
        check_categorical(self, policy, "MPOLoss")
        check_feed_forward(self, policy, critic)
        check_arguments(reduction=reduction, gamma=gamma)
        bounds = {"epsilon": epsilon, "epsilon_policy": epsilon_policy}
        check_mpo(self, critic, (k.ACTION_VALUE,), policy_states=policy_states, **bounds)
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma)
        self.add_network("policy", policy, target=True)
        self.add_network("critic", critic, target=True)
        self._policy_at, self._target_policy = (
            distribution_of(network) for network in (self.policy, self.target("policy"))
        )
        self._q, self._target_q = (
            values_of(network, k.ACTION_VALUE) for network in (self.critic, self.target("critic"))
        )
        self.mask_key = mask_key_of(policy)
        self.state_keys = state_keys_of(policy, critic, mask_key=self.mask_key)
        self.epsilon, self.epsilon_policy = epsilon, epsilon_policy
        self.policy_states = policy_states
        self.temperature = m.Multiplier(raw_temperature)
        self.alpha = m.Multiplier(raw_alpha)
        self.reduction = reduction
        self.priorities = priorities
        self.out_keys = [*LOSSES, *_DUALS, *VALUES, *self.estimator.diagnostic_keys, "valid_count"]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to, for different learning rates: ``"actor"``, ``"critic"``, ``"duals"``."""
        return groups_with_duals(self)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        steps = read_steps(self, tensordict, discrete=True)
        x, next_x, action = steps.observation, steps.next_observation, steps.action
        size, stats = len(action), Stats(steps.valid, steps.selection.reward, self.reduction)
        at_steps = self.policy_states == "root"

        with torch.no_grad():
            # the target policy where the critic bootstraps, and at the steps where something needs it
            log_mu = read_log_prob(self, tensordict, steps)
            needs_steps = at_steps or log_mu is not None or self.estimator.uses_log_pi
            both = {key: torch.cat([next_x[key], x[key]]) for key in x} if needs_steps else next_x
            target_both = self._log_probs(self._target_policy, both)
            log_pi = target_both[size:].gather(-1, action.unsqueeze(-1)).squeeze(-1) if needs_steps else None
            # what the target critic expects of every action, and of the target policy
            states, target = (both, target_both) if at_steps else (next_x, target_both[:size])
            values = zero_illegal(self._target_q(states).amin(-2), self._legal(states))
            bootstrap = (target.exp() * values).sum(-1)
            # target
            estimate = self.estimator.estimate(
                steps.selection,
                next_value=bootstrap[:size],
                q_value=of_action(self._target_q(x), action).amin(-1) if self.estimator.uses_q_value else None,
                log_pi=log_pi,
                log_rho=log_ratio(log_pi, log_mu),
            )

        # critics
        terms, error = critic_terms(self, of_action(self._q(x), action), estimate.target, steps, stats)
        if self.priorities:
            write_priority(self, tensordict, error, steps.valid)

        # E-step, M-step and duals, in the states where the policy is improved
        improved = x if at_steps else next_x
        if at_steps:
            target, values = target[size:], values[size:]
        duals = self._improve(improved, target, values, steps, stats)
        return TensorDict({**terms, **duals, **estimate.diagnostics, "valid_count": stats.count}, [])

    def _log_probs(self, policy: Any, states: States) -> Tensor:
        """log pi of every action, [M, A]; finite, with probability 0, where one is illegal."""
        logits, legal = policy(states).logits, self._legal(states)
        return logits if legal is None else mask_logits(logits, legal)

    def _legal(self, states: States) -> Tensor | None:
        return None if self.mask_key is None else states[self.mask_key]

    def _improve(self, states: States, target: Tensor, values: Tensor, steps: Steps, stats: Stats) -> dict[str, Tensor]:
        """``loss_policy``, ``loss_dual`` and diagnostics; ``target``: log pi_t, ``values``: Q_t of every action."""
        legal, log_prob = self._legal(states), self._log_probs(self._policy_at, states)
        temperature, alpha = self.temperature(), self.alpha()
        prior = target if legal is None else target.masked_fill(~legal, -math.inf)
        step = m.e_step(value=values.t(), temperature=temperature, epsilon=self.epsilon, log_prior=prior.t())
        kl = m.categorical_kl(log_prob, target)
        bound = m.kl_penalty(kl=kl, alpha=alpha, epsilon=self.epsilon_policy)
        terms = bound.penalty - (step.weights.t() * log_prob).sum(-1)
        out = {"loss_policy": stats.reduce(weighted(terms, steps.weight))}
        out["loss_dual"] = stats.reduce(step.dual + bound.dual)
        with torch.no_grad():
            out["temperature"], out["alpha"] = temperature.detach().squeeze(), alpha.detach().squeeze()
            out["kl_improved"], out["kl_policy"] = stats.mean(step.kl), stats.mean(kl.squeeze(-1))
            out["entropy"] = -stats.mean((log_prob.exp() * log_prob).sum(-1))
        return out
