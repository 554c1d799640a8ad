"""Soft actor-critic for discrete actions."""

from __future__ import annotations

import math

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torch.distributions import Categorical, Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.sites import Sites, States, evaluate
from offtrace.modules.losses.soft import Network, SoftLoss, entropy_target, least
from offtrace.modules.losses.stats import Stats


class DiscreteSACLoss(SoftLoss):
    """Soft actor-critic with every expectation over actions exact, on transitions or sequences.

    ::

        V(x')       = sum over a of pi(a|x') (min Q'(x', a) - alpha log pi(a|x'))
        loss_critic = sum over critics of 1/2 (Q(x, a) - y)^2
        loss_actor  = sum over a of pi(a|x) (alpha log pi(a|x) - min Q(x, a))
        loss_alpha  = -alpha (sum over a of pi(a|x) log pi(a|x) + target_entropy)

    Summed over actions, then the mean over valid steps. Christodoulou 2019, arXiv 1910.07207 (whose code multiplies
    log alpha: ``alpha_loss="log_alpha"``). Targets, entries read and diagnostics are those of :class:`SACLoss`, and
    there is ``target="tree_backup"``, whose trace lmbda pi(a|x) needs no behaviour policy (``ess`` still does).

    Args:
        actor: policy with a categorical distribution.
        critic: reads the observation, writes ``"action_value"`` [*B, K, A].
        target_entropy: in nats; ``"auto"``: ``entropy_fraction`` log A.
        entropy_fraction: of the largest entropy; the author's 0.98.
        gamma, target, n_step, lmbda, alpha_init, fixed_alpha, alpha_loss, reduction, reward_scale: as :class:`SACLoss`.

    Raises:
        ValueError: on an argument out of range, networks for continuous actions, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    critic_key = k.ACTION_VALUE

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        gamma: float = 0.99,
        target: str = "one_step",
        n_step: int = 5,
        lmbda: float = 0.95,
        alpha_init: float = 1.0,
        fixed_alpha: float | None = None,
        target_entropy: float | str = "auto",
        entropy_fraction: float = 0.98,
        alpha_loss: str = "alpha",
        reduction: str = "mean",
        reward_scale: float = 1.0,
    ) -> None:
        if getattr(actor, "action_dim", None) is not None:
            raise ValueError("DiscreteSACLoss needs discrete actions, got an actor of continuous ones: use SACLoss")
        actions = getattr(actor, "num_actions", None)
        if target_entropy == "auto" and actions is None and fixed_alpha is None:
            raise ValueError(
                "target_entropy='auto' needs an actor with an attribute num_actions; give a number instead"
            )
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
            target_entropy=entropy_target(target_entropy, entropy_fraction * math.log(actions or 1)),
            reduction=reduction,
            target_critic=True,
            frozen_critic=False,
        )

    def _values(self, critic: Network, states: States, action: Tensor | None) -> Tensor:
        return evaluate(critic, self.critic_key, states)

    def _chosen(self, values: Tensor, action: Tensor) -> Tensor:
        index = action.long().view(-1, 1, 1).expand(-1, values.shape[1], 1)
        return values.gather(-1, index).squeeze(-1)

    def _state_value(self, states: States, alpha: Tensor) -> Tensor:
        log_prob = _log_probs(self._policy(states))
        value = least(self._values(self.target("critic"), states, None).transpose(-1, -2))
        return (log_prob.exp() * (value - alpha * log_prob)).sum(-1)

    def _improve(
        self, out: dict[str, Tensor], policy: Distribution, sites: Sites, values: Tensor, alpha: Tensor, stats: Stats
    ) -> Tensor:
        log_prob = _log_probs(policy)
        prob, value = log_prob.exp(), least(values.detach().transpose(-1, -2))
        out["loss_actor"] = self._reduce((prob * (alpha * log_prob - value)).sum(-1), stats)
        return (prob * log_prob).detach().sum(-1)


def _log_probs(policy: Distribution) -> Tensor:
    """log pi(a|x) of every action, [M, A]."""
    if not isinstance(policy, Categorical):
        raise TypeError(f"DiscreteSACLoss needs an actor with a categorical distribution, got {type(policy).__name__}")
    logits: Tensor = policy.logits  # torch normalises them
    return logits if logits.dtype.is_floating_point else logits.to(torch.float32)
