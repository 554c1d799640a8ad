"""The first soft actor-critic, with a state value and a fixed temperature."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_positive
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import min_q
from offtrace.modules.losses.sac import behaviour_ratio, check_continuous, sampler_of
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import read_steps, weighted, write_priority
from offtrace.modules.losses.views import check_feed_forward, distribution_of, keeps_pre_tanh, state_keys_of, values_of


class SACv1Loss(Loss):
    """Soft actor-critic with a state value network, whose target is the only target network (v1).

    With fresh actions a~ of the policy, V' the target value, and rewards scaled by kappa in place of a temperature::

        loss_value  = 1/2 (V(x) - [min Q(x, a~) - log pi(a~|x)])^2
        loss_critic = sum over critics of 1/2 (Q(x, a) - [kappa r + gamma (1 - terminated) V'(x')])^2
        loss_actor  = log pi(a~|x) - Q(x, a~)

    Haarnoja et al. 2018, arXiv 1801.01290. What is in brackets is constant; the mean over valid steps.

    Args:
        actor, critic: as of :class:`offtrace.modules.losses.sac.SACLoss`.
        value: reads the observation, writes ``"state_value"`` [*B, 1].
        estimator: ``"one_step"``, ``"n_step(n=5)"`` or an object that needs no Q of the batch's actions: a trace needs
            target critics, which v1 has not.
        gamma, reduction, priorities: as there.
        reward_scale: kappa; the paper: 5 for most Gym tasks, 20 for Humanoid.
        actor_value: the Q of the actor's term: ``"first"`` critic, as the author's code, or ``"min"``.

    Reads what :class:`offtrace.modules.losses.sac.SACLoss` does, and returns ``loss_value`` in place of ``loss_alpha``
    and ``alpha``. Importance weights multiply all three terms.

    Raises:
        ValueError: on an argument out of range, networks that do not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    actor: ProbabilisticTensorDictSequential
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams
    critic: TensorDictModule
    critic_params: TensorDictParams
    target_critic_params: TensorDictParams
    value: TensorDictModule
    value_params: TensorDictParams
    target_value_params: TensorDictParams
    has_target_critics = False

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        value: TensorDictModule,
        *,
        estimator: str | ActionValueEstimator = "one_step",
        gamma: float = 0.99,
        reward_scale: float = 5.0,
        actor_value: str = "first",
        reduction: str = "mean",
        priorities: bool = False,
    ) -> None:
        check_continuous(self, actor, critic)
        check_arguments(reduction=reduction, gamma=gamma)
        check_positive(reward_scale=reward_scale)
        check_feed_forward(self, actor, critic, value)
        if actor_value not in ("first", "min"):
            raise ValueError(f"actor_value must be 'first' or 'min', got {actor_value!r}")
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, discrete=False)
        self.add_network("actor", actor)
        self.add_network("critic", critic, frozen=True)
        self.add_network("value", value, target=True)
        self.state_keys = state_keys_of(self.actor, self.critic, self.value)
        self.keeps_pre_tanh = keeps_pre_tanh(actor)
        self._policy = distribution_of(self.actor)
        self._sample = sampler_of(actor)
        self._q, self._frozen_q = (
            values_of(network, k.STATE_ACTION_VALUE) for network in (self.critic, self.frozen("critic"))
        )
        self._value, self._target_value = (
            values_of(network, k.VALUE) for network in (self.value, self.target("value"))
        )
        self.reward_scale = reward_scale
        self.actor_value = actor_value
        self.reduction = reduction
        self.priorities = priorities
        values = ["entropy", "q_value", "td_error"]
        self.out_keys = [
            "loss_value",
            "loss_critic",
            "loss_actor",
            *values,
            *self.estimator.diagnostic_keys,
            "valid_count",
        ]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        steps = read_steps(self, tensordict, discrete=False, reward_scale=self.reward_scale)
        x, stats = steps.observation, Stats(steps.valid, steps.selection.reward, self.reduction)
        policy = self._policy(x)

        # critics
        with torch.no_grad():
            next_value = self._target_value(steps.next_observation).squeeze(-1)
            log_pi, log_rho = behaviour_ratio(self, tensordict, policy, steps)
            estimate = self.estimator.estimate(steps.selection, next_value=next_value, log_pi=log_pi, log_rho=log_rho)
        q_value = self._q(x, steps.action)
        error = q_value - estimate.target.unsqueeze(-1)
        out = {"loss_critic": 0.5 * stats.reduce(weighted(error.square().sum(-1), steps.weight))}

        # actor
        fresh, log_prob = self._sample(policy, 1)
        fresh_q = self._frozen_q(x, fresh)
        smallest_q = min_q(fresh_q)
        actor_q = smallest_q if self.actor_value == "min" else fresh_q[:, 0]
        out["loss_actor"] = stats.reduce(weighted(log_prob - actor_q, steps.weight))

        # state value
        value_error = self._value(x).squeeze(-1) - (smallest_q - log_prob).detach()
        out["loss_value"] = 0.5 * stats.reduce(weighted(value_error.square(), steps.weight))

        # diagnostics
        with torch.no_grad():
            out["entropy"] = -stats.mean(log_prob)
            out["q_value"] = stats.mean(q_value)
            out["td_error"] = stats.mean(error.abs())
            out["valid_count"] = stats.count
            if self.priorities:
                write_priority(self, tensordict, error.abs().mean(-1), steps.valid)
        return TensorDict(out | estimate.diagnostics, [])
