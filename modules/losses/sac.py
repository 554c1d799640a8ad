"""Soft actor-critic for continuous actions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.estimators.action_values import ActionValueEstimator
from offtrace.modules.losses.arguments import check_arguments, check_count, check_positive
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.critics import min_q
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import (
    Steps,
    log_ratio,
    read_log_prob,
    read_pre_tanh,
    read_steps,
    weighted,
    write_priority,
)
from offtrace.modules.losses.views import (
    check_feed_forward,
    distribution_of,
    keeps_pre_tanh,
    state_keys_of,
    values_of,
)

ALPHA_LOSSES = ("alpha", "log_alpha")
Sampler = Callable[[Distribution, int], tuple[Tensor, Tensor]]


class SACLoss(Loss):
    """Soft actor-critic with K critics and a learnt temperature (v2), on transitions or sequences.

    With fresh actions a~ of the policy, Q' the target critics, and alpha as it is before the update::

        V(x')       = min Q'(x', a~') - alpha log pi(a~'|x')
        loss_critic = sum over critics of 1/2 (Q(x, a) - y)^2
        loss_actor  = alpha log pi(a~|x) - min Q(x, a~)
        loss_alpha  = -alpha (log pi(a~|x) + target_entropy)

    each the mean over valid steps; the total loss is their sum. No term reaches parameters of another: the target y is
    constant, the actor's term sees the critics with their parameters detached, the last one reaches only log alpha.

    Haarnoja et al. 2018, arXiv 1812.05905. The target y, by ``estimator``:

    * ``"one_step"``: kappa r + gamma (1 - terminated) V(x'), on transitions [N] or every step of [N, T];
    * ``"n_step(n=5)"``: sum of n rewards and V where they end, for the first step of each sequence [N, T]; cut at an
      episode's end and before a step that is not valid. Not corrected for being off-policy, and without the entropies
      of the steps in between, which the other targets count: its values are lower by about alpha times them;
    * ``"retrace(lmbda=1.0)"``, ``"importance_sampling"``, ``"q_lambda"``: every step of [N, T] by
      :func:`offtrace.modules.returns.q_return` (Munos et al. 2016, arXiv 1606.02647), from the ratio pi/mu to the
      stored log-probability; the Q of the trace is the minimum of the target critics, as in the bootstrap. (Tree backup
      needs probabilities: :class:`DiscreteSACLoss` has it.)

    Time limits are not terminal: only ``"terminated"`` takes the bootstrap away.

    Args:
        actor: policy whose distribution has ``rsample``; what :func:`build_actor` gives, or one of TorchRL's.
        critic: reads the observation and ``"action"``, writes ``"state_action_value"`` [*B, K].
        estimator: of action values, by its name or an object, see above.
        gamma: discount per step.
        num_samples: actions over which V(x') is averaged.
        alpha_init: temperature at the start.
        fixed_alpha: a temperature that does not learn; there is no ``loss_alpha`` then.
        target_entropy: in nats; ``"auto"``: minus the action's dimension.
        alpha_loss: what the temperature's loss multiplies: ``"alpha"`` (the paper) or ``"log_alpha"`` (softlearning,
            TorchRL): the same fixed point, other steps. Either way log alpha is the parameter.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        reward_scale: kappa.
        priorities: write the mean absolute TD error of each item into the batch, as ``"td_error"``.

    Reads (names change by :meth:`set_keys`) what actor and critic read, also under ``"next"``; ``"action"`` [*B, A];
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [*B, 1]; ``"valid"`` [*B, 1] where there is one, and
    TorchRL's own masks; ``"weight"`` [*B] where there is one: divided by the largest of the batch, it multiplies the
    terms of critic and actor; for a trace ``"action_log_prob"`` [*B] and, of a tanh policy, ``"pre_tanh"`` [*B, A].

    Returns the losses and, detached scalars over the valid steps: ``entropy`` of the policy in nats, ``alpha``,
    ``q_value``, ``td_error`` (mean absolute), ``valid_count``; ``ess``, the effective sample size of pi/mu as a
    fraction (NaN where the batch lacks what it is computed from, which one-step and n-step targets can do without);
    ``trace_length``, steps that a trace, or an n-step window, carries beyond the first; ``contraction`` of the critic's
    operator (not for ``"q_lambda"``, which need not contract); for Retrace ``c_clipped``, the fraction of ratios above
    its clip, 1.

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
        num_samples: int = 1,
        alpha_init: float = 1.0,
        fixed_alpha: float | None = None,
        target_entropy: float | str = "auto",
        alpha_loss: str = "alpha",
        reduction: str = "mean",
        reward_scale: float = 1.0,
        priorities: bool = False,
    ) -> None:
        check_continuous(self, actor, critic)
        check_temperature(alpha_init, fixed_alpha, alpha_loss)
        check_arguments(reduction=reduction, gamma=gamma)
        check_positive(reward_scale=reward_scale)
        check_count(num_samples=num_samples)
        check_feed_forward(self, actor, critic)
        super().__init__()
        self.bind_estimator(estimator, "action", gamma=gamma, discrete=False)
        self.add_network("actor", actor)
        self.add_network("critic", critic, target=True, frozen=True)
        self.state_keys = state_keys_of(self.actor, self.critic)
        self.keeps_pre_tanh = keeps_pre_tanh(actor)
        self._policy = distribution_of(self.actor)
        self._sample = sampler_of(actor)
        self._q, self._target_q, self._frozen_q = (
            values_of(network, k.STATE_ACTION_VALUE)
            for network in (self.critic, self.target("critic"), self.frozen("critic"))
        )
        self.learn_alpha = add_temperature(self, alpha_init, fixed_alpha)
        self.alpha_loss, self.target_entropy = alpha_loss, wanted_entropy(target_entropy)
        self.num_samples = num_samples
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
        steps = read_steps(self, tensordict, discrete=False, reward_scale=self.reward_scale)
        x, action, next_x = steps.observation, steps.action, steps.next_observation
        stats, alpha = Stats(steps.valid, steps.selection.reward, self.reduction), self.alpha
        policy = self._policy(x)

        # target
        with torch.no_grad():
            next_action, next_log_prob = self._sample(self._policy(next_x), self.num_samples)
            next_value = min_q(self._target_q(next_x, next_action)) - alpha * next_log_prob
            log_pi, log_rho = behaviour_ratio(self, tensordict, policy, steps)
            estimate = self.estimator.estimate(
                steps.selection,
                next_value=next_value if self.num_samples == 1 else next_value.mean(0),
                q_value=min_q(self._target_q(x, action)) if self.estimator.uses_q_value else None,
                log_pi=log_pi,
                log_rho=log_rho,
            )

        # critics
        q_value = self._q(x, action)
        error = q_value - estimate.target.unsqueeze(-1)
        loss_critic = 0.5 * stats.reduce(weighted(error.square().sum(-1), steps.weight))

        # actor
        fresh, log_prob = self._sample(policy, 1)
        fresh_q = min_q(self._frozen_q(x, fresh))
        loss_actor = stats.reduce(weighted(alpha * log_prob - fresh_q, steps.weight))

        # temperature
        out = {"loss_critic": loss_critic, "loss_actor": loss_actor, "valid_count": stats.count, "alpha": alpha}
        out["entropy"] = entropy = -stats.mean(log_prob.detach())
        if self.learn_alpha:
            wanted = -float(action.shape[-1]) if self.target_entropy is None else self.target_entropy
            out["loss_alpha"] = temperature_loss(self, entropy - wanted, stats)

        # diagnostics
        with torch.no_grad():
            out["q_value"] = stats.mean(q_value)
            out["td_error"] = stats.mean(error.abs())
            if self.priorities:
                write_priority(self, tensordict, error.abs().mean(-1), steps.valid)
        return TensorDict(out | estimate.diagnostics, [])


def behaviour_ratio(
    loss: Any, tensordict: TensorDictBase, policy: Distribution, steps: Steps
) -> tuple[Tensor | None, Tensor | None]:
    """log pi and log pi - log mu of the batch's actions, [M]; None where the batch lacks what only diagnostics need."""
    needs_pi = loss.estimator.uses_behaviour or loss.estimator.uses_log_pi
    log_mu = read_log_prob(loss, tensordict, steps)
    if log_mu is None and not needs_pi:
        return None, None
    if loss.keeps_pre_tanh:  # not to be recovered from an action at the bounds
        pre_tanh = read_pre_tanh(loss, tensordict, steps, needed=needs_pi)
        if pre_tanh is None:
            return None, None
        log_pi = policy.log_prob_pre_tanh(pre_tanh)  # type: ignore[attr-defined]
    else:
        log_pi = policy.log_prob(steps.action)
    return log_pi, log_ratio(log_pi, log_mu)


def sampler_of(actor: ProbabilisticTensorDictSequential) -> Sampler:
    """Draws S actions of the distributions of ``actor``, with gradient to their parameters, and log-probabilities.

    [M, A] and [M] of one action, [S, M, A] and [S, M] of more.
    """
    return _sample_pre_tanh if keeps_pre_tanh(actor) else _sample


def _sample_pre_tanh(policy: Distribution, number: int) -> tuple[Tensor, Tensor]:
    drawn = policy.rsample_with_log_prob((number,) if number > 1 else ())  # type: ignore[attr-defined]
    return drawn.action, drawn.log_prob


def _sample(policy: Distribution, number: int) -> tuple[Tensor, Tensor]:
    action = policy.rsample(torch.Size((number,) if number > 1 else ()))
    return action, policy.log_prob(action)


def add_temperature(loss: nn.Module, alpha_init: float, fixed_alpha: float | None) -> bool:
    """Registers ``log_alpha`` with ``loss``: a parameter, or a buffer if it is fixed; whether it learns."""
    alpha = alpha_init if fixed_alpha is None else fixed_alpha
    log_alpha = torch.tensor(math.log(alpha) if alpha else -math.inf)
    if fixed_alpha is None:
        loss.log_alpha = nn.Parameter(log_alpha)
    else:
        loss.register_buffer("log_alpha", log_alpha)
    return fixed_alpha is None


def temperature_loss(loss: Any, surplus: Tensor, stats: Stats) -> Tensor:
    """alpha, or log alpha, times the ``surplus`` of the mean entropy over its target; reaches only log alpha."""
    coefficient = loss.log_alpha.exp() if loss.alpha_loss == "alpha" else loss.log_alpha
    return coefficient * (surplus * (stats.count if loss.reduction == "sum" else stats.count.clamp(max=1)))


def with_alpha(groups: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Groups of parameters, in which the temperature's is called ``"alpha"``."""
    return {("alpha" if name == "log_alpha" else name): parameters for name, parameters in groups.items()}


def check_continuous(loss: object, actor: ProbabilisticTensorDictSequential, critic: Any) -> None:
    """Refuse networks of discrete actions.

    Raises:
        ValueError: one sentence.
    """
    name = type(loss).__name__
    if k.LOGITS in actor[-1].in_keys:
        raise ValueError(f"{name} needs continuous actions, got an actor of discrete ones: use DiscreteSACLoss")
    if k.STATE_ACTION_VALUE not in critic.out_keys:
        raise ValueError(f"{name} needs a critic that writes {k.STATE_ACTION_VALUE!r}, got {critic.out_keys}")


def wanted_entropy(given: float | str) -> float | None:
    """``given``, or None where it is ``"auto"``, which depends on the actions.

    Raises:
        ValueError: on another text, or a number that is not finite.
    """
    if given == "auto":
        return None
    if isinstance(given, str) or not math.isfinite(given):
        raise ValueError(f"target_entropy must be a finite number or 'auto', got {given!r}")
    return given


def check_temperature(alpha_init: float, fixed_alpha: float | None, alpha_loss: str) -> None:
    """Refuse a temperature out of range, and how it learns if that is not known.

    Raises:
        ValueError: one sentence.
    """
    alpha = alpha_init if fixed_alpha is None else fixed_alpha
    if not 0 <= alpha < math.inf or (fixed_alpha is None and alpha == 0):
        raise ValueError(f"the temperature must be positive (fixed: at least 0) and finite, got {alpha}")
    if alpha_loss not in ALPHA_LOSSES:
        raise ValueError(f"alpha_loss must be one of {ALPHA_LOSSES}, got {alpha_loss!r}")
