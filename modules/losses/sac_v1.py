"""The first soft actor-critic, with a state value and a fixed temperature."""

from __future__ import annotations

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams
from torch import Tensor
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.sac import check_continuous, sample
from offtrace.modules.losses.sites import Sites, States, evaluate
from offtrace.modules.losses.soft import SoftLoss, least
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.traces import TRACES


class SACv1Loss(SoftLoss):
    """Soft actor-critic with a state value network, whose target is the only target network (v1).

    With fresh actions a~ of the policy, V' the target value, and rewards scaled by kappa in place of a temperature::

        loss_value  = 1/2 (V(x) - [min Q(x, a~) - log pi(a~|x)])^2
        loss_critic = sum over critics of 1/2 (Q(x, a) - [kappa r + gamma (1 - terminated) V'(x')])^2
        loss_actor  = log pi(a~|x) - Q(x, a~)

    Haarnoja et al. 2018, arXiv 1801.01290. What is in brackets is constant; the mean over valid steps.

    Args:
        actor, critic: as :class:`SACLoss`.
        value: reads the observation, writes ``"state_value"`` [*B, 1].
        gamma, n_step, reduction: as there.
        target: ``"one_step"`` or ``"n_step"``; a trace needs target critics, which v1 has not.
        reward_scale: kappa; the paper: 5 for most Gym tasks, 20 for Humanoid.
        actor_value: the Q of the actor's term: ``"first"`` critic, as the author's code, or ``"min"``.

    Reads and returns what :class:`SACLoss` does, and ``loss_value``.

    Raises:
        ValueError: on an argument out of range, networks for discrete actions, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    critic_key = k.STATE_ACTION_VALUE

    value: TensorDictModule
    value_params: TensorDictParams
    target_value_params: TensorDictParams

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        value: TensorDictModule,
        *,
        gamma: float = 0.99,
        target: str = "one_step",
        n_step: int = 5,
        reward_scale: float = 5.0,
        actor_value: str = "first",
        reduction: str = "mean",
    ) -> None:
        check_continuous(self, actor)
        if target in TRACES:
            raise ValueError(f"target={target!r} needs target critics, which SACv1Loss has not: use SACLoss")
        if actor_value not in ("first", "min"):
            raise ValueError(f"actor_value must be 'first' or 'min', got {actor_value!r}")
        super().__init__(
            actor,
            critic,
            gamma=gamma,
            target=target,
            n_step=n_step,
            lmbda=1.0,
            reward_scale=reward_scale,
            alpha=1.0,
            learn_alpha=False,
            alpha_loss="alpha",
            target_entropy=0.0,
            reduction=reduction,
            target_critic=False,
            frozen_critic=True,
        )
        self.actor_value = actor_value
        self.add_network("value", value, target=True)
        self.out_keys = ["loss_value", *self.out_keys]

    def _state_value(self, states: States, alpha: Tensor) -> Tensor:
        return evaluate(self.target("value"), k.VALUE, states).squeeze(-1)

    def _improve(
        self, out: dict[str, Tensor], policy: Distribution, sites: Sites, values: Tensor, alpha: Tensor, stats: Stats
    ) -> Tensor:
        action, log_prob = sample(policy)
        found = self._values(self.frozen("critic"), sites.root, action)
        smallest = least(found)
        out["loss_actor"] = self._reduce(log_prob - (smallest if self.actor_value == "min" else found[:, 0]), stats)
        with torch.no_grad():
            target = smallest - log_prob
        value = evaluate(self.value, k.VALUE, sites.root).squeeze(-1)
        out["loss_value"] = 0.5 * self._reduce((value - target).square(), stats)
        return log_prob.detach()
