"""Deep Q-learning: double, n-step or with traces, of values or of distributions."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams, dispatch
from torch import Tensor
from torch.nn import functional as F

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_positive, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import categorical_terms, divergence, mean_of, min_critic, min_q, of_action
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import States, Steps, log_ratio, read_log_prob, read_steps, weighted, write_priority
from offtrace.modules.losses.views import (
    action_values_of,
    check_feed_forward,
    check_indices,
    mask_key_of,
    state_keys_of,
    support_of,
    value_network_of,
)

LOSS_FUNCTIONS = ("huber", "l2")


class DQNLoss(Loss):
    """Q-learning with a target network, on transitions or sequences.

    With Q' the target network, and the maximum over legal actions::

        a*     = argmax Q(x', .)       (double; else argmax Q'(x', .))
        y      = kappa r + gamma (1 - terminated) Q'(x', a*)
        loss_q = h(Q(x, a) - y)        h(e) = 1/2 e^2 where |e| < 1, else |e| - 1/2

    the mean over valid steps. Mnih et al. 2015, doi 10.1038/nature14236; double: van Hasselt et al. 2016, arXiv
    1509.06461. The target y, by ``estimator``: ``"one_step"``, as above; ``"n_step(n=3)"``, of the first step of each
    sequence; or a trace, of every step, whose target policy takes the online network's best action: by ``"retrace"``
    c = lmbda where the batch's action is the best, else 0: Watkins' Q(lambda).

    What the network writes says what is learnt: ``"action_value"`` [*B, K, A] or [*B, A], dueling or not; or
    ``"value_logits"`` [*B, K, A, atoms] beside a buffer ``support`` [atoms]: a distribution over returns (C51), whose
    loss is the cross entropy to the projected target. Bellemare et al. 2017, arXiv 1707.06887. Of K networks the
    smallest value counts, and all are learnt; 1 is usual.

    Args:
        policy: the Q-network, without a recurrent state, which also acts: a policy with a greedy head, TorchRL's
            ``QValueActor`` with categorical actions, or any TensorDict module that writes one of these entries.
        estimator: of action values, by its name or an object.
        gamma: discount per step.
        double: the online network chooses the action that the target network values.
        loss_function: h of values, ``"huber"`` or ``"l2"``, 1/2 e^2; a distribution has its own.
        epsilon_start, epsilon_end, epsilon_fraction: :meth:`set_progress` moves the policy's buffer ``epsilon``, if it
            has one, from the first to the second, linearly over that fraction of the training.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        reward_scale: kappa.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip] before that; None leaves them.
        priorities: write the mean absolute TD error of each item into the batch, as ``"td_error"``; of a distribution
            its divergence from the target.

    Reads (names change by :meth:`set_keys`) what the network reads, also under ``"next"``, ``"action_mask"`` bool
    [*B, A] among it; ``"action"`` int64 [*B]; ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [*B, 1];
    where there are any, ``"valid"`` [*B, 1], TorchRL's own masks, and ``"weight"`` [*B]: divided by the largest of the
    batch, it multiplies the loss; for traces ``"action_log_prob"`` [*B].

    Returns ``loss_q`` and, detached scalars over the valid steps: ``q_value`` and ``target_value`` of the batch's
    actions, ``td_error`` (mean absolute), ``epsilon`` where the policy has one, ``valid_count``, and those of the
    estimator, ``ess`` (of the greedy policy's ratios; NaN without ``"action_log_prob"``) and ``trace_length`` among
    them.

    Raises:
        ValueError: on an argument out of range, a network that does not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    policy: TensorDictModule
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    support: Tensor | None

    def __init__(
        self,
        policy: TensorDictModule,
        *,
        estimator: str | ActionValueEstimator = "one_step",
        gamma: float = 0.99,
        double: bool = True,
        loss_function: str = "huber",
        epsilon_start: float = 1.0,
        epsilon_end: float = 0.05,
        epsilon_fraction: float = 0.1,
        reduction: str = "mean",
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        priorities: bool = False,
    ) -> None:
        check_positive_or_none(reward_clip=reward_clip)
        check_positive(reward_scale=reward_scale)
        check_arguments(reduction=reduction, gamma=gamma, epsilon_start=epsilon_start, epsilon_end=epsilon_end)
        if not 0 < epsilon_fraction <= 1:
            raise ValueError(f"epsilon_fraction must be above 0 and at most 1, got {epsilon_fraction}")
        if loss_function not in LOSS_FUNCTIONS:
            raise ValueError(f"loss_function must be one of {LOSS_FUNCTIONS}, got {loss_function!r}")
        key = next((key for key in (k.VALUE_LOGITS, k.ACTION_VALUE) if key in policy.out_keys), None)
        if key is None:
            raise ValueError(
                f"DQNLoss needs a network that writes {k.ACTION_VALUE!r} or {k.VALUE_LOGITS!r}, got {policy.out_keys}"
            )
        check_indices(self, policy)
        check_feed_forward(self, policy)
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma)
        self.add_network("policy", policy, target=True)
        self.register_buffer("support", support_of(policy) if key == k.VALUE_LOGITS else None)
        self._q, self._target_q = (action_values_of(network, key) for network in (self.policy, self.target("policy")))
        self.mask_key = mask_key_of(policy)
        self.state_keys = state_keys_of(value_network_of(policy, key), mask_key=self.mask_key)
        self.is_double = double
        self.loss_function = loss_function
        self.epsilon_start, self.epsilon_end, self.epsilon_fraction = epsilon_start, epsilon_end, epsilon_fraction
        buffers = (name for name, _ in self.policy.named_buffers())
        self._epsilon = next((name for name in buffers if name.rpartition(".")[2] == "epsilon"), None)
        self.reduction = reduction
        self.reward_scale, self.reward_clip = reward_scale, reward_clip
        self.priorities = priorities
        values = ["q_value", "target_value", "td_error", *([] if self._epsilon is None else ["epsilon"])]
        self.out_keys = ["loss_q", *values, *self.estimator.diagnostic_keys, "valid_count"]
        self.set_progress(0.0)

    def set_progress(self, fraction: float) -> None:
        """Give the acting policy the epsilon of a training of which ``fraction``, 0 to 1, is done."""
        if self._epsilon is not None:
            done = min(max(fraction / self.epsilon_fraction, 0.0), 1.0)
            epsilon = self.epsilon_start + (self.epsilon_end - self.epsilon_start) * done
            self.policy.get_buffer(self._epsilon).fill_(epsilon)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        steps = read_steps(
            self, tensordict, discrete=True, reward_scale=self.reward_scale, reward_clip=self.reward_clip
        )
        x, action, next_x = steps.observation, steps.action, steps.next_observation
        stats = Stats(steps.valid, steps.selection.reward, self.reduction)
        outputs = self._q(x)

        # target: the value of the best action where the step bootstraps
        with torch.no_grad():
            next_outputs = self._target_q(next_x)
            best = self._greedy(self._q(next_x) if self.is_double else next_outputs, next_x)
            log_pi, log_rho = self._log_ratio(tensordict, outputs, steps)
            estimate = self.estimator.estimate(
                steps.selection,
                next_value=min_critic(of_action(next_outputs, best), self.support).bootstrap,
                q_value=min_critic(of_action(self._target_q(x), action), self.support).bootstrap
                if self.estimator.uses_q_value
                else None,
                log_pi=log_pi,
                log_rho=log_rho,
                support=self.support,
            )

        # loss
        taken, target = of_action(outputs, action), estimate.target
        if self.support is None:
            q_value, value = taken.detach(), target
            distance = F.smooth_l1_loss if self.loss_function == "huber" else _half_square
            terms = distance(taken, target.unsqueeze(-1).expand_as(taken), reduction="none").sum(-1)
        else:
            terms, q_value, value = categorical_terms(taken, target, self.support)
        out = {"loss_q": stats.reduce(weighted(terms, steps.weight)), **estimate.diagnostics}

        # diagnostics
        with torch.no_grad():
            error = (q_value - value.unsqueeze(-1)).abs().mean(-1)
            out["q_value"], out["target_value"] = stats.mean(q_value), stats.mean(value)
            out["td_error"], out["valid_count"] = stats.mean(error), stats.count
            if self._epsilon is not None:
                out["epsilon"] = self.policy.get_buffer(self._epsilon).clone()
            if self.priorities:
                priority = error if self.support is None else divergence(terms, target, taken.shape[1])
                write_priority(self, tensordict, priority, steps.valid)
        return TensorDict(out, [])

    def _greedy(self, outputs: Tensor, states: States) -> Tensor:
        """The legal action [M] of the largest value, the smallest of K networks'.

        Args:
            outputs: values [M, K, A], or logits [M, K, A, atoms].
            states: may hold the mask of legal actions.
        """
        values = outputs.detach() if self.support is None else mean_of(outputs.detach().softmax(-1), self.support)
        values = min_q(values.transpose(-1, -2))
        if self.mask_key is not None:
            values = values.masked_fill(~states[self.mask_key], -torch.inf)
        return values.argmax(-1)

    def _log_ratio(
        self, tensordict: TensorDictBase, outputs: Tensor, steps: Steps
    ) -> tuple[Tensor | None, Tensor | None]:
        """log pi of the batch's actions, 0 of the best and -inf of others, and log pi - log mu, [M]."""
        log_mu = read_log_prob(self, tensordict, steps)
        if log_mu is None and not self.estimator.uses_log_pi:
            return None, None
        best = self._greedy(outputs, steps.observation) == steps.action
        log_pi = torch.zeros_like(steps.selection.reward).masked_fill(~best, -torch.inf)
        return log_pi, log_ratio(log_pi, log_mu)


def _half_square(value: Tensor, target: Tensor, *, reduction: str) -> Tensor:
    return 0.5 * F.mse_loss(value, target, reduction=reduction)
