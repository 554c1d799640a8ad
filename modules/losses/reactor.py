"""Reactor's loss on sequences of discrete actions, and the policy gradient that it is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictParams, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses.acer import behaviour_parameter
from offtrace.modules.losses.arguments import check_arguments, check_clip, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import mean_of
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry, read_weight, weighted, write_priority
from offtrace.modules.losses.unroll import check_action_values, evaluate_action_values
from offtrace.modules.losses.views import critic_of, support_of

PRIORITIES = ("td", "total_variation")


def beta_loo(
    *,
    probs: Tensor,
    behaviour_probs: Tensor,
    action: Tensor,
    q_value: Tensor,
    q_return: Tensor,
    clip: float = 1.0,
) -> Tensor:
    """The surrogate whose gradient is the beta-leave-one-out estimate of the policy gradient, to be maximised::

        beta (R - Q(A)) pi(A)  +  sum over a of Q(a) pi(a)        beta = min(c, 1 / mu(A))

    with gradient through ``probs`` alone: beta (R - Q(A)) grad pi(A) + sum over a of Q(a) grad pi(a), section 3.1 of
    Gruslys et al. 2018, arXiv 1704.04651. For A drawn from mu and R of mean Q^pi(A), its mean is the policy gradient
    sum over a of Q^pi(a) grad pi(a) where beta is 1 / mu, whatever Q is; else it is off by the sum over a of
    (1 - mu(a) beta(a)) (Q(a) - Q^pi(a)) grad pi(a). An action with pi = mu = 0, an illegal one, gives 0.

    Args:
        probs: pi(.|x), ``[*B, A]``.
        behaviour_probs: mu(.|x), ``[*B, A]``.
        action: A, drawn from mu, int64 ``[*B]``.
        q_value: Q(x, .), ``[*B, A]``.
        q_return: R, ``[*B]``.
        clip: c, above 0, in the paper at least 1; inf never truncates.

    Returns:
        ``[*B]``.
    """
    with torch.no_grad():
        index = action.unsqueeze(-1)
        legal = (probs > 0) | (behaviour_probs > 0)
        behaviour = behaviour_probs.gather(-1, index)
        beta = (1 / behaviour).clamp(max=clip)
        error = torch.where(legal.gather(-1, index), beta * (q_return.unsqueeze(-1) - q_value.gather(-1, index)), 0)
        every = torch.where(legal, q_value, 0)
    return (error * probs.gather(-1, index)).squeeze(-1) + (every * probs).sum(-1)


class ReactorLoss(Loss):
    """Critic and policy gradient of Reactor (Gruslys et al. 2018, arXiv 1704.04651), on sequences of discrete actions.

    Over the valid steps of sequences [B, T], with w the importance weight of a sequence::

        loss_policy  = mean of  -w beta_loo         beta (R - Q(x, a)) pi(a|x) + sum over b of Q(x, b) pi(b|x)
        loss_value   = mean of  w value_coef * (-sum over i of q*_i log q_i(x, a)),   or 1/2 (R - Q(x, a))^2
        loss_entropy = mean of  -w entropy_coef * H(pi(.|x))

    The critic is what the policy's value head says: distributions over the atoms of its buffer ``support``, or plain
    values. q* is the target of the estimator, constant: of distributions the projected mixture whose single q*_i may be
    negative, and stay so; R is its mean. It is made of the target network, ``target("policy")``, in one call over the
    same sequence, from the same stored recurrent state: its distributions of the actions taken, and those of the
    successors, mixed by the *online* policy. Q in the policy gradient is that of the online network, constant. The
    total loss is the sum of the three.

    pi is the distribution that ``"logits"`` describe; the paper's (1 - epsilon) softmax + epsilon / |A| is
    ``build_policy(head_options={"epsilon": ...})``, which acts, is stored and is learnt as that.

    What the paper's text leaves open, and what is taken: the target is mixed by the online policy, not by a copy; the
    weights w multiply all three terms, as the sampler gave them; value_coef is 1. With beta = 1 the expected gradient
    is then that of uniform sampling. Divided by the largest of a batch, of 4 sequences in the paper, it would not be: a
    sequence would weigh most beside others of high priority. Lazy priorities bound w by epsilon^-beta.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives for ``critic="q"``: its deterministic part
            writes ``"logits"``, ``"action_value"`` [*B, 1, A] and, of distributions, ``"value_logits"``.
        estimator: of action values, of every step of a sequence; ``"retrace"`` is the paper's.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        clip: c, of beta; 1, the paper's, makes it 1.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip]; None leaves them.
        priorities: write a priority of each sequence into the batch, as ``"td_error"``.
        priority: its mean over the valid steps of ``"td"``, |R - Q(x, a)|; or, of distributions, of
            ``"total_variation"``, 1/2 sum over i of |q*_i - q_i(x, a)|.

    Reads (names change by :meth:`set_keys`) what the network reads, also under ``"next"``, of a recurrent state the
    first step's; ``"action"`` int64 [B, T]; of the behaviour policy ``"action_log_prob"`` and all ``"logits"``
    [B, T, A]; ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; where there are any, ``"valid"``
    [B, T, 1] and ``"weight"`` [B, T].

    Returns the three losses and, detached scalars over the valid steps: ``entropy``, ``kl`` of behaviour to target,
    ``ratio_mean``, ``explained_variance`` of R by Q(x, a), ``advantage_std`` of R - sum over b of pi(b|x) Q(x, b),
    ``beta_clipped`` (share of steps with 1 / mu above c), ``valid_count``, and those of the estimator.

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    support: Tensor | None
    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | ActionValueEstimator = "retrace",
        gamma: float = 0.99,
        value_coef: float = 1.0,
        entropy_coef: float = 0.01,
        reduction: str = "mean",
        clip: float = 1.0,
        reward_clip: float | None = None,
        priorities: bool = False,
        priority: str = "td",
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_clip(clip=clip)
        check_positive_or_none(reward_clip=reward_clip)
        check_action_values(policy, "ReactorLoss")
        distributional = k.VALUE_LOGITS in policy.out_keys
        if priority not in PRIORITIES:
            raise ValueError(f"priority must be one of {PRIORITIES}, got {priority!r}")
        if priority == "total_variation" and not distributional:
            raise ValueError(
                "priority 'total_variation' needs distributions, and the policy writes plain values: use 'td', or "
                "build_policy(..., critic_options={'atoms': ...})"
            )
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, every_step=True)
        self.state_keys = list(policy.in_keys)
        self.add_network("policy", policy, target=True)
        self.register_buffer("support", support_of(policy) if distributional else None)
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.clip, self.reward_clip = clip, reward_clip
        self.priorities, self.priority = priorities, priority
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "beta_clipped"]
        self.out_keys = [*losses, *diagnostics, "valid_count", *self.estimator.diagnostic_keys]

    def read_keys(self) -> list[Any]:
        """Entries that are read."""
        return [*super().read_keys(), k.LOGITS]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of sequences [B, T]."""
        behaviour_probs = behaviour_parameter(self, tensordict, k.LOGITS).softmax(-1)

        # one call of the network over the steps and their successors
        policy, log_rho = evaluate_action_values(self, tensordict, reward_clip=self.reward_clip)
        unroll, valid = policy.unroll, policy.outcome.valid
        stats = Stats(valid, policy.outcome.reward, self.reduction)
        selection = self.estimator.select(policy.outcome, gamma=self.gamma)
        probs = policy.params[k.LOGITS].softmax(-1)
        next_probs = unroll.successors(policy.output.get(k.LOGITS).detach().softmax(-1))
        taken = _of_action(unroll.steps(self._critic(policy.output)), policy.action)
        q_value = unroll.steps(entry(self, policy.output, self.tensor_keys.action_value).detach()).squeeze(-2)
        q_taken = _of_action(q_value, policy.action)

        # q* of the target network, constant
        with torch.no_grad():
            inputs = unroll.inputs.select(*self.policy.in_keys)  # what the online network wrote must stay
            known = self._critic(critic_of(self.target("policy"))(inputs))
            known = known if self.support is None else known.softmax(-1)
            mixed = next_probs if self.support is None else next_probs.unsqueeze(-1)
            estimate = self.estimator.estimate(
                selection,
                q_value=_of_action(unroll.steps(known), policy.action).flatten(0, 1),
                next_value=(mixed * unroll.successors(known)).sum(2).flatten(0, 1),
                log_pi=policy.log_pi.flatten(),
                log_rho=log_rho.flatten(),
                support=self.support,
            )
            target = estimate.target.view_as(taken)
            q_return = target if self.support is None else mean_of(target, self.support)

        # beta-LOO; of an invalid step nothing may be read
        if valid is not None:
            behaviour_probs = behaviour_probs.masked_fill(~valid.unsqueeze(-1), 1)
        surrogate = beta_loo(
            probs=probs,
            behaviour_probs=behaviour_probs,
            action=policy.action,
            q_value=q_value,
            q_return=q_return,
            clip=self.clip,
        )

        # the three terms
        if self.support is None:
            errors = 0.5 * (target - taken).square()
        else:
            errors = -(target * taken.log_softmax(-1)).sum(-1)
        entropy, weight = policy.dist.entropy(), read_weight(self, tensordict, selection, relative=False)
        weight = None if weight is None else weight.view_as(entropy)
        out = {
            "loss_policy": -stats.reduce(weighted(surrogate, weight)),
            "loss_value": self.value_coef * stats.reduce(weighted(errors, weight)),
            "loss_entropy": -self.entropy_coef * stats.reduce(weighted(entropy, weight)),
        }

        # diagnostics and priorities
        with torch.no_grad():
            value, error = (probs * q_value).sum(-1), q_return - q_taken
            out |= rollout_diagnostics(stats, entropy=entropy, advantage=q_return - value, target=q_return, error=error)
            truncated = math.log(self.clip) + _of_action(behaviour_probs, policy.action).log() < 0
            out["beta_clipped"] = stats.mean(truncated.to(probs.dtype))
            if self.priorities:
                if self.priority == "total_variation":
                    error = 0.5 * (target - taken.softmax(-1)).abs().sum(-1)
                write_priority(self, tensordict, error.abs(), valid)
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])

    def _critic(self, output: TensorDictBase) -> Tensor:
        """What is learnt of every action: values [B, T, A], or logits [B, T, A, atoms]."""
        if self.support is None:
            return entry(self, output, self.tensor_keys.action_value).squeeze(-2)
        return entry(self, output, k.VALUE_LOGITS).squeeze(-3)


def _of_action(x: Tensor, action: Tensor) -> Tensor:
    """Of ``x`` [B, T, A, ...] what belongs to ``action`` int64 [B, T], [B, T, ...]."""
    index = action.view(*action.shape, *(1,) * (x.ndim - 2)).expand(*action.shape, 1, *x.shape[3:])
    return x.gather(2, index).squeeze(2)
