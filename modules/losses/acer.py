"""ACER's loss on discrete actions, and the functions that it is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictParams, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.losses.arguments import check_arguments, check_clip, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry
from offtrace.modules.losses.unroll import EvaluatedPolicy, check_action_values, evaluate_action_values
from offtrace.modules.networks import Policy
from offtrace.modules.returns import clipped_fraction

_LARGEST_LOG_RATIO = 80.0
"""exp of it is a float32; no policy that trains has moved this far from the average one."""


def truncated_weights(*, log_rho: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The truncated importance weight min(c, rho), and the weight [1 - c / rho]_+ of its bias correction.

    Equation 7 of Wang et al. 2017, arXiv 1611.01224: for any f, the mean over mu of min(c, rho) f plus the mean over pi
    of [1 - c / rho]_+ f is the mean of f over pi.

    Args:
        log_rho: log pi(a|x) - log mu(a|x), ``[*B]``. NaN, where both probabilities are 0, gives 0 and 0.
        clip: c, above 0; inf never truncates.

    Returns:
        Weight and correction, ``[*B]``, without gradient.
    """
    log_rho = log_rho.detach()
    weight = log_rho.exp().clamp(max=clip)
    correction = (1 - (math.log(clip) - log_rho).exp()).clamp(min=0)
    return weight.nan_to_num(nan=0.0, posinf=math.inf), correction.nan_to_num(nan=0.0)


@torch.no_grad()
def correction_weights(*, probs: Tensor, behaviour_probs: Tensor, clip: float) -> Tensor:
    """[1 - c / rho]_+ of all actions, what the truncation at c = ``clip`` leaves to the bias correction, ``[*B, A]``.

    Arguments as of :func:`acer_gradient`. No small number is added: probs > c mu implies probs > 0; where c mu is
    inf * 0 the ratio is unbounded and nothing truncates.
    """
    bound = clip * behaviour_probs
    return torch.where(probs > bound, 1 - bound / probs, 0)


@torch.no_grad()
def acer_gradient(
    *,
    probs: Tensor,
    behaviour_probs: Tensor,
    action: Tensor,
    q_value: Tensor,
    q_return: Tensor,
    clip: float = 10.0,
) -> Tensor:
    """The direction g in which the probabilities f shall go, before the trust region (an ascent direction)::

        g = min(c, rho(a)) grad_f log f(a) (Q^ret - V)
            + sum over b of [1 - c / rho(b)]_+ f(b) grad_f log f(b) (Q(b) - V)

    with V = sum over b of f(b) Q(b) and grad_f log f(b) = 1 / f(b) at b: equation 9 of Wang et al. 2017, arXiv
    1611.01224, with respect to the statistics f, which are the probabilities themselves. min(c, rho) / f is computed as
    min(c / f, 1 / mu), which needs no small number added. An action with f = mu = 0, an illegal one, gets 0.

    Args:
        probs: f(.|x), ``[*B, A]``.
        behaviour_probs: mu(.|x), ``[*B, A]``.
        action: a, drawn from mu, int64 ``[*B]``.
        q_value: Q(x, .), ``[*B, A]``.
        q_return: Q^ret, ``[*B]``.
        clip: c, above 0; inf never truncates.

    Returns:
        g, ``[*B, A]``.
    """
    value = (probs * q_value).sum(-1, keepdim=True)
    gradient = correction_weights(probs=probs, behaviour_probs=behaviour_probs, clip=clip) * (q_value - value)
    # of the action that was taken
    index = action.unsqueeze(-1)
    chosen, behaviour = probs.gather(-1, index), behaviour_probs.gather(-1, index)
    weight = torch.minimum(clip / chosen, 1 / behaviour)
    weight = torch.where((chosen > 0) | (behaviour > 0), weight, 0)
    return gradient.scatter_add(-1, index, weight * (q_return.unsqueeze(-1) - value))


@torch.no_grad()
def trust_region(*, gradient: Tensor, kl_gradient: Tensor, delta: float) -> Tensor:
    """The nearest direction z to g that does not raise the divergence by more than delta, to first order::

        minimise 1/2 |g - z|^2  subject to  k . z <= delta:    z = g - max(0, (k . g - delta) / |k|^2) k

    Equation 12 of Wang et al. 2017, arXiv 1611.01224, for every state by itself.

    Args:
        gradient: g, ``[*B, A]``.
        kl_gradient: k, the gradient of the KL from the average policy with respect to the same statistics, ``[*B, A]``.
        delta: above 0; inf leaves g as it is.

    Returns:
        z, ``[*B, A]``.
    """
    # in units of the largest entry: |k|^2 would overflow
    scale = kl_gradient.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    unit = kl_gradient / scale
    excess = ((unit * gradient).sum(-1, keepdim=True) - delta / scale).clamp(min=0)
    square = unit.square().sum(-1, keepdim=True)
    return gradient - torch.where(square > 0, excess / square, 0) * unit


@torch.no_grad()
def kl_gradient(*, log_average: Tensor, log_probs: Tensor) -> Tensor:
    """k = grad_f KL(f_avg || f) = -f_avg / f, with respect to the probabilities f; 0 where f_avg is 0.

    Args:
        log_average: log f_avg(.|x), ``[*B, A]``.
        log_probs: log f(.|x), ``[*B, A]``.

    Returns:
        k, ``[*B, A]``.
    """
    ratio = (log_average - log_probs).clamp(max=_LARGEST_LOG_RATIO).exp()
    return -torch.where(log_average.exp() > 0, ratio, 0)


@torch.no_grad()
def is_changed(*, before: Tensor, change: Tensor) -> Tensor:
    """1 where the vector ``change`` ``[*B, D]`` is longer than 1 % of ``before``, else 0, ``[*B]``."""
    return (change.norm(dim=-1) > 0.01 * before.norm(dim=-1)).to(before.dtype)


@torch.no_grad()
def average_parameters(loss: Loss, evaluated: EvaluatedPolicy) -> list[Tensor]:
    """The parameters of the average policy, ``loss.target("policy")``, at the steps.

    A feed-forward policy computes nothing else; of any other the network runs over the whole sequence.

    Args:
        loss: whose target it is.
        evaluated: the rollout, which stays as it is.

    Returns:
        in the order of the distribution's keys, ``[B, T, ...]`` each.
    """
    average, unroll = loss.target("policy"), evaluated.unroll
    if isinstance(average, Policy) and average.network.core is None:
        states = {key: unroll.steps(unroll.inputs.get(key)).flatten(0, 1) for key in average.in_keys}
        found = [x.unflatten(0, evaluated.log_pi.shape) for x in average.parameters_at(states)]
    else:
        output = average.get_dist_params(unroll.inputs.select(*average.in_keys))
        found = [unroll.steps(output.get(key)) for key in average[-1].in_keys]
    return [x.to(loss.dtype) for x in found]


def behaviour_parameter(loss: Loss, tensordict: TensorDictBase, key: str) -> Tensor:
    """The entry ``key`` of the behaviour policy's distribution, in the type of the networks.

    Raises:
        KeyError: when it is missing.
    """
    if tensordict.get(key, None) is None:
        raise KeyError(
            f"{type(loss).__name__} reads {key!r}, of the behaviour policy's whole distribution, which the batch "
            "lacks: collect with a policy that writes it, as build_policy's does, and keep the entry in the replay"
        )
    return entry(loss, tensordict, key).detach().to(loss.dtype)


class ACERLoss(Loss):
    """Critic and policy gradient of ACER (Wang et al. 2017, arXiv 1611.01224), on rollouts of discrete actions.

    Over the valid steps of a rollout [B, T], fresh or replayed, with V(x) = sum over a of pi(a|x) Q(x, a)::

        loss_policy  = sum of  -sum over a of z(a) pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (Q^ret - Q(x, a))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    z is constant: the gradient g of :func:`acer_gradient`, projected by :func:`trust_region` against the average
    policy, ``target("policy")``, which has to follow after every update: ``FastSoftUpdate(loss, tau=0.01)`` for the
    paper's alpha of 0.99. Q^ret is the target of the estimator, constant, from the network's own Q. The total loss is
    the sum of the three; under ``"mean"`` each is divided by the number of valid steps.

    The entropy stands beside the projection, not inside it: the paper's boxes have none, and where it is folded into g
    by a gradient with respect to logits, as in the implementations of OpenAI, it has no effect.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives for ``critic="q"``: its deterministic part
            writes ``"logits"`` and ``"action_value"`` [*B, 1, A].
        estimator: of action values, of every step of a rollout; ``"retrace"`` is the paper's.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        clip: c, of the importance weights in the policy gradient.
        delta: bound of the trust region; None for none, and then there is no average policy.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: divide g by the root mean square of Q^ret - V over the valid steps, before the projection:
            then ``delta`` does not depend on the size of the rewards. The paper does not.

    Reads (names change by :meth:`set_keys`) what the network reads, also under ``"next"``; ``"action"`` [B, T];
    of the behaviour policy ``"action_log_prob"`` and all ``"logits"`` [B, T, A]; ``("next", ...)`` ``"reward"``,
    ``"terminated"``, ``"done"`` [B, T, 1]; where there is one, ``"valid"`` [B, T, 1].

    Returns the three losses and, detached scalars over the valid steps: ``entropy``, ``kl`` of behaviour to target,
    ``ratio_mean``, ``explained_variance`` of Q^ret by Q(x, a), ``advantage_std`` of Q^ret - V, ``pg_rho_clipped``
    (share of ratios above c), ``bias_correction`` (mean of the sum over a of pi [1 - c / rho]_+), ``projected`` (share
    of steps at which the trust region changes the gradient of the logits, f (z - sum over b of f(b) z(b)), by more
    than 1 % of its norm: k is near -1 for all actions near the average policy, and what is taken from all alike moves
    no logit), ``kl_average`` of the average policy to the target, ``valid_count``, and those of the estimator.

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | ActionValueEstimator = "retrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        reduction: str = "mean",
        clip: float = 10.0,
        delta: float | None = 1.0,
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_clip(clip=clip)
        check_positive_or_none(reward_clip=reward_clip, delta=delta)
        check_action_values(policy, "ACERLoss")
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, every_step=True)
        self.state_keys = list(policy.in_keys)
        self.add_network("policy", policy, target=delta is not None)
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.clip, self.delta, self.reward_clip = clip, delta, reward_clip
        self.normalize_advantage = normalize_advantage
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "pg_rho_clipped"]
        average = ["projected", "kl_average"] if delta is not None else []
        self.out_keys = [
            *losses,
            *diagnostics,
            "bias_correction",
            *average,
            "valid_count",
            *self.estimator.diagnostic_keys,
        ]

    def read_keys(self) -> list[Any]:
        """Entries that are read."""
        return [*super().read_keys(), k.LOGITS]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        behaviour_probs = behaviour_parameter(self, tensordict, k.LOGITS).softmax(-1)

        # one call of the network over the steps and their successors
        policy, log_rho = evaluate_action_values(self, tensordict, reward_clip=self.reward_clip)
        valid = policy.outcome.valid
        stats = Stats(valid, policy.outcome.reward, self.reduction)
        q_values = entry(self, policy.output, self.tensor_keys.action_value).squeeze(-2)
        q_value = policy.unroll.steps(q_values)
        q_taken = q_value.gather(-1, policy.action.unsqueeze(-1)).squeeze(-1)
        everywhere = entry(self, policy.output, k.LOGITS).log_softmax(-1)
        log_probs = policy.unroll.steps(everywhere)
        probs = log_probs.exp()

        # Q^ret, constant
        with torch.no_grad():
            values = (everywhere.exp() * q_values).sum(-1)
            value, next_value = policy.unroll.steps(values), policy.unroll.successors(values)
            estimate = self.estimator.estimate(
                self.estimator.select(policy.outcome, gamma=self.gamma),
                q_value=q_taken.flatten(),
                next_value=next_value.flatten(),
                log_pi=policy.log_pi.flatten(),
                log_rho=log_rho.flatten(),
            )
            q_return = estimate.target.view_as(q_taken)

        # truncated gradient with its bias correction, then the trust region
        gradient = acer_gradient(
            probs=probs,
            behaviour_probs=behaviour_probs,
            action=policy.action,
            q_value=q_value,
            q_return=q_return,
            clip=self.clip,
        )
        if self.normalize_advantage:
            gradient = gradient / stats.root_mean_square(q_return - value)
        projected = gradient
        if self.delta is not None:
            (logits,) = average_parameters(self, policy)
            log_average = logits.log_softmax(-1)
            against = kl_gradient(log_average=log_average, log_probs=log_probs)
            projected = trust_region(gradient=gradient, kl_gradient=against, delta=self.delta)

        # the three terms
        entropy, error = policy.dist.entropy(), q_return - q_taken
        out = {
            "loss_policy": -stats.reduce((zero_invalid(projected, valid) * probs).sum(-1)),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(error.square()),
            "loss_entropy": -self.entropy_coef * stats.reduce(entropy),
        }

        # diagnostics
        with torch.no_grad():
            out |= rollout_diagnostics(stats, entropy=entropy, advantage=q_return - value, target=q_return, error=error)
            out["pg_rho_clipped"] = clipped_fraction(log_rho, self.clip, valid=valid)
            correction = correction_weights(probs=probs, behaviour_probs=behaviour_probs, clip=self.clip)
            out["bias_correction"] = stats.mean((probs * correction).sum(-1))
            if self.delta is not None:
                before, change = (_of_logits(x, probs) for x in (gradient, projected - gradient))
                out["projected"] = stats.mean(is_changed(before=before, change=change))
                out["kl_average"] = stats.mean((log_average.exp() * (log_average - log_probs)).sum(-1))
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats) | estimate.diagnostics, [])


def _of_logits(gradient: Tensor, probs: Tensor) -> Tensor:
    """The gradient of the logits, [*B, A], that one of the probabilities makes: f times what exceeds its f-mean."""
    return probs * (gradient - (probs * gradient).sum(-1, keepdim=True))
