"""Soft actor-critic for discrete actions."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_positive
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import min_q, of_action
from offtrace.modules.losses.sac import add_temperature, check_temperature, temperature_loss, wanted_entropy, with_alpha
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import States, log_ratio, read_log_prob, read_steps, weighted, write_priority
from offtrace.modules.losses.views import (
    check_categorical,
    check_feed_forward,
    distribution_of,
    mask_key_of,
    state_keys_of,
    values_of,
    zero_illegal,
)


class DiscreteSACLoss(Loss):
    """Soft actor-critic with every expectation over actions exact, on transitions or sequences.

    ::

        V(x')       = sum over a of pi(a|x') (min Q'(x', a) - alpha log pi(a|x'))
        loss_critic = sum over critics of 1/2 (Q(x, a) - y)^2
        loss_actor  = sum over a of pi(a|x) (alpha log pi(a|x) - min Q(x, a))
        loss_alpha  = -alpha (sum over a of pi(a|x) log pi(a|x) + target_entropy)

    Summed over actions, then the mean over valid steps. Christodoulou 2019, arXiv 1910.07207 (whose code multiplies
    log alpha: ``alpha_loss="log_alpha"``). Targets, entries read and diagnostics are those of
    :class:`offtrace.modules.losses.sac.SACLoss`, and there is ``estimator="tree_backup"``, whose trace lmbda pi(a|x)
    needs no behaviour policy (``ess`` still does). Of a policy that reads ``"action_mask"`` illegal actions have
    probability 0, and nothing that stands at them is looked at.

    Args:
        actor: policy with a categorical distribution over indices.
        critic: reads the observation, writes ``"action_value"`` [*B, K, A].
        target_entropy: in nats; ``"auto"``: ``entropy_fraction`` log A, with A the number of actions that are legal in
            the state.
        entropy_fraction: of the largest entropy; the author's 0.98.
        estimator, gamma, alpha_init, fixed_alpha, alpha_loss, reduction, reward_scale, priorities: as of
            :class:`offtrace.modules.losses.sac.SACLoss`.

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
    log_alpha: Tensor

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        estimator: str | ActionValueEstimator = "one_step",
        gamma: float = 0.99,
        alpha_init: float = 1.0,
        fixed_alpha: float | None = None,
        target_entropy: float | str = "auto",
        entropy_fraction: float = 0.98,
        alpha_loss: str = "alpha",
        reduction: str = "mean",
        reward_scale: float = 1.0,
        priorities: bool = False,
    ) -> None:
        check_categorical(self, actor, "SACLoss")
        check_feed_forward(self, actor, critic)
        if k.ACTION_VALUE not in critic.out_keys:
            raise ValueError(f"DiscreteSACLoss needs a critic that writes {k.ACTION_VALUE!r}, got {critic.out_keys}")
        check_temperature(alpha_init, fixed_alpha, alpha_loss)
        check_arguments(reduction=reduction, gamma=gamma, entropy_fraction=entropy_fraction)
        check_positive(reward_scale=reward_scale)
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma)
        self.add_network("actor", actor)
        self.add_network("critic", critic, target=True)
        self.mask_key = mask_key_of(actor)
        self.state_keys = state_keys_of(actor, critic, mask_key=self.mask_key)
        self._policy = distribution_of(self.actor)
        self._q, self._target_q = (
            values_of(network, k.ACTION_VALUE) for network in (self.critic, self.target("critic"))
        )
        self.learn_alpha = add_temperature(self, alpha_init, fixed_alpha)
        self.alpha_loss, self.target_entropy = alpha_loss, wanted_entropy(target_entropy)
        self.entropy_fraction = entropy_fraction
        self.reduction = reduction
        self.reward_scale = reward_scale
        self.priorities = priorities
        terms = ["loss_critic", "loss_actor", *(["loss_alpha"] if self.learn_alpha else [])]
        values = ["entropy", "alpha", "q_value", "td_error"]
        self.out_keys = [*terms, *values, *self.estimator.diagnostic_keys, "valid_count"]

    @property
    def alpha(self) -> Tensor:
        """The temperature, a detached scalar."""
        return self.log_alpha.detach().exp()

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor"``, ``"critic"``, and ``"alpha"`` if it learns."""
        return with_alpha(super().param_groups())

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        steps = read_steps(self, tensordict, discrete=True, reward_scale=self.reward_scale)
        x, action, next_x = steps.observation, steps.action, steps.next_observation
        stats, alpha = Stats(steps.valid, steps.selection.reward, self.reduction), self.alpha
        policy, legal = self._policy(x), self._legal(x)

        # target
        with torch.no_grad():
            next_value = self._soft_value(next_x, alpha)
            log_mu = read_log_prob(self, tensordict, steps)
            log_pi = policy.log_prob(action)
            estimate = self.estimator.estimate(
                steps.selection,
                next_value=next_value,
                q_value=min_q(of_action(self._target_q(x), action)) if self.estimator.uses_q_value else None,
                log_pi=log_pi,
                log_rho=log_ratio(log_pi, log_mu),
            )

        # critics
        every_q = self._q(x)
        q_value = of_action(every_q, action)
        error = q_value - estimate.target.unsqueeze(-1)
        loss_critic = 0.5 * stats.reduce(weighted(error.square().sum(-1), steps.weight))

        # actor
        prob, log_prob = _probabilities(policy.logits, legal)  # type: ignore[attr-defined]
        q_values = zero_illegal(min_q(every_q.detach().transpose(-1, -2)), legal)
        loss_actor = stats.reduce(weighted((prob * (alpha * log_prob - q_values)).sum(-1), steps.weight))

        # temperature
        out = {"loss_critic": loss_critic, "loss_actor": loss_actor, "valid_count": stats.count, "alpha": alpha}
        out["entropy"] = entropy = -stats.mean((prob * log_prob).detach().sum(-1))
        if self.learn_alpha:
            out["loss_alpha"] = temperature_loss(self, entropy - self._wanted_entropy(prob, legal, stats), stats)

        # diagnostics
        with torch.no_grad():
            out["q_value"] = stats.mean(q_value)
            out["td_error"] = stats.mean(error.abs())
            if self.priorities:
                write_priority(self, tensordict, error.abs().mean(-1), steps.valid)
        return TensorDict(out | estimate.diagnostics, [])

    def _soft_value(self, states: States, alpha: Tensor) -> Tensor:
        """E_pi [min Q' - alpha log pi], [M]."""
        legal = self._legal(states)
        prob, log_prob = _probabilities(self._policy(states).logits, legal)  # type: ignore[attr-defined]
        value = zero_illegal(min_q(self._target_q(states).transpose(-1, -2)), legal)
        return (prob * (value - alpha * log_prob)).sum(-1)

    def _legal(self, states: States) -> Tensor | None:
        return None if self.mask_key is None else states[self.mask_key]

    def _wanted_entropy(self, prob: Tensor, legal: Tensor | None, stats: Stats) -> float | Tensor:
        if self.target_entropy is not None:
            return self.target_entropy
        if legal is None:
            return self.entropy_fraction * math.log(prob.shape[-1])
        return self.entropy_fraction * stats.mean(legal.sum(-1).to(prob.dtype).log())


def _probabilities(log_prob: Tensor, legal: Tensor | None) -> tuple[Tensor, Tensor]:
    """pi and log pi of every action, [M, A] each; both 0 where the action is illegal, so that 0 log 0 is 0."""
    return zero_illegal(log_prob.exp(), legal), zero_illegal(log_prob, legal)
