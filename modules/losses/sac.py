"""Soft actor-critic for continuous actions."""

from __future__ import annotations

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.sites import Sites, States
from offtrace.modules.losses.soft import SoftLoss, entropy_target, least
from offtrace.modules.losses.stats import Stats
from offtrace.modules.networks.control_heads import TanhNormal


class SACLoss(SoftLoss):
    """Soft actor-critic with K critics and a learnt temperature (v2), on transitions or sequences.

    With fresh actions a~ of the policy, Q' the target critics, and alpha as it is before the update::

        V(x')       = min Q'(x', a~') - alpha log pi(a~'|x')
        loss_critic = sum over critics of 1/2 (Q(x, a) - y)^2
        loss_actor  = alpha log pi(a~|x) - min Q(x, a~)
        loss_alpha  = -alpha (log pi(a~|x) + target_entropy)

    each the mean over valid steps; the total loss is their sum. No term reaches parameters of another: the target y is
    constant, the actor's term sees the critics with their parameters detached, the last one reaches only log alpha.

    Haarnoja et al. 2018, arXiv 1812.05905. The target y, by ``target``:

    * ``"one_step"``: kappa r + gamma (1 - terminated) V(x'), on transitions [N] or every step of [N, T];
    * ``"n_step"``: sum of ``n_step`` rewards and V where they end, for the first step of each sequence [N, T]; cut
      at an episode's end and before a step that is not valid. Not corrected for being off-policy, and without the
      entropies of the steps in between, which the other targets count: its values are lower by about alpha times them;
    * ``"retrace"``, ``"importance_sampling"``, ``"q_lambda"``: every step of [N, T] by
      :func:`offtrace.modules.returns.q_return` (Munos et al. 2016, arXiv 1606.02647) with the trace of that name and
      decay ``lmbda``, from the ratio pi/mu to the stored log-probability; the Q of the trace is the minimum of the
      target critics, as in the bootstrap. (Tree backup needs probabilities: :class:`DiscreteSACLoss` has it.)

    Time limits are not terminal: only ``"terminated"`` takes the bootstrap away.

    Args:
        actor: policy whose distribution has ``rsample``; what :func:`build_actor` gives.
        critic: reads the observation and ``"action"``, writes ``"state_action_value"`` [*B, K].
        gamma: discount per step.
        target, n_step, lmbda: see above.
        num_samples: actions over which V(x') is averaged.
        alpha_init: temperature at the start.
        fixed_alpha: a temperature that does not learn; there is no ``loss_alpha`` then.
        target_entropy: in nats; ``"auto"``: minus the action's dimension.
        alpha_loss: what the temperature's loss multiplies: ``"alpha"`` (the paper) or ``"log_alpha"`` (softlearning,
            TorchRL): the same fixed point, other steps. Either way log alpha is the parameter.
        reduction: ``"mean"`` or ``"sum"`` over valid steps.
        reward_scale: kappa.

    Reads (names change by :meth:`set_keys`) what actor and critic read, also under ``"next"``; ``"action"`` [*B, A];
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [*B, 1]; ``"valid"`` [*B, 1] where there is one, and
    TorchRL's own masks; for a trace ``"action_log_prob"`` [*B] and, of a tanh policy, ``"pre_tanh"`` [*B, A].

    Returns the losses and, detached scalars over the valid steps: ``entropy`` of the policy in nats, ``alpha``,
    ``q_value``, ``td_error`` (mean absolute), ``valid_count``; ``ess``, the effective sample size of pi/mu as a
    fraction (NaN where the batch lacks what it is computed from, which one-step and n-step targets can do without);
    ``trace_length``, steps that a trace, or an n-step window, carries beyond the first; ``contraction`` of the critic's
    operator (not for ``"q_lambda"``, which need not contract); for Retrace ``c_clipped``, the fraction of ratios above
    its clip, 1.

    Raises:
        ValueError: on an argument out of range, networks for discrete actions, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    critic_key = k.STATE_ACTION_VALUE

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        gamma: float = 0.99,
        target: str = "one_step",
        n_step: int = 5,
        lmbda: float = 0.95,
        num_samples: int = 1,
        alpha_init: float = 1.0,
        fixed_alpha: float | None = None,
        target_entropy: float | str = "auto",
        alpha_loss: str = "alpha",
        reduction: str = "mean",
        reward_scale: float = 1.0,
    ) -> None:
        check_continuous(self, actor)
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        super().__init__(
            actor,
            critic,
            gamma=gamma,
            target=target,
            n_step=n_step,
            lmbda=lmbda,
            reward_scale=reward_scale,
            alpha=alpha_init if fixed_alpha is None else fixed_alpha,
            learn_alpha=fixed_alpha is None,
            alpha_loss=alpha_loss,
            target_entropy=_target_entropy(actor, target_entropy, fixed_alpha),
            reduction=reduction,
            target_critic=True,
            frozen_critic=True,
        )
        self.num_samples = num_samples

    def _state_value(self, states: States, alpha: Tensor) -> Tensor:
        policy, s = self._policy(states), self.num_samples
        if s > 1:
            states = {key: x.repeat(s, *(1,) * (x.ndim - 1)) for key, x in states.items()}
        action, log_prob = sample(policy, s)
        value = least(self._values(self.target("critic"), states, action)) - alpha * log_prob
        return value if s == 1 else value.view(s, -1).mean(0)

    def _improve(
        self, out: dict[str, Tensor], policy: Distribution, sites: Sites, values: Tensor, alpha: Tensor, stats: Stats
    ) -> Tensor:
        action, log_prob = sample(policy)
        value = least(self._values(self.frozen("critic"), sites.root, action))
        out["loss_actor"] = self._reduce(alpha * log_prob - value, stats)
        return log_prob.detach()


def sample(policy: Distribution, number: int = 1) -> tuple[Tensor, Tensor]:
    """Actions [number * M, A] with gradient to the policy's parameters, and their log-probabilities [number * M]."""
    shape = (number,) if number > 1 else ()
    if isinstance(policy, TanhNormal):
        action, log_prob, _ = policy.rsample_with_log_prob(shape)
    else:
        action = policy.rsample(torch.Size(shape))
        log_prob = policy.log_prob(action)
    return (action.flatten(0, 1), log_prob.flatten()) if shape else (action, log_prob)


def check_continuous(loss: SoftLoss, actor: ProbabilisticTensorDictSequential) -> None:
    if getattr(actor, "num_actions", None) is not None:
        raise ValueError(
            f"{type(loss).__name__} needs continuous actions, got an actor of discrete ones: use DiscreteSACLoss"
        )


def _target_entropy(actor: ProbabilisticTensorDictSequential, given: float | str, fixed: float | None) -> float:
    dim = getattr(actor, "action_dim", None)
    if given == "auto" and dim is None and fixed is None:
        raise ValueError("target_entropy='auto' needs an actor with an attribute action_dim; give a number instead")
    return entropy_target(given, -float(dim or 0))
