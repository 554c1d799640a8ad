"""The loss of MPO for discrete actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.losses import mpo_duals as m
from offtrace.modules.losses.mpo_base import MPOBase, Proposal, States
from offtrace.modules.losses.stats import Stats


class DiscreteMPOLoss(MPOBase):
    """MPO over discrete actions, with sums over all of them in place of samples.

    With the target networks' pi_t and Q_t (the least of its K values)::

        q(a|x) = pi_t(a|x) exp(Q_t(x, a) / eta) / Z,   E_pi Q = sum_a pi_t(a|x) Q_t(x, a)
        loss_policy = mean_i [ -sum_a q(a|x_i) log pi(a|x_i) + alpha KL(pi_t || pi) ]
        loss_dual   = mean_i [ eta (epsilon + log sum_a pi_t exp(Q_t / eta)) + alpha (epsilon_policy - KL) ]
        loss_critic = mean of 1/2 (y - Q_k)^2, summed over k

    Abdolmaleki et al. 2018, arXiv 1806.06920, as Acme has it for discrete actions.

    Args:
        policy: writes ``"logits"`` [*, A].
        critic: reads the observation; writes ``"action_value"`` [*, K, A].
        epsilon, epsilon_policy: bounds of the E-step and of the M-step, in nats.
        raw_temperature, raw_alpha: initial multipliers before the softplus.

    The other arguments, the layout of the batch and what is returned are those of
    :class:`offtrace.modules.losses.mpo.MPOLoss`; the diagnostics are ``temperature``, ``alpha``, ``kl_improved`` (of q
    to pi_t), ``kl_policy``, ``entropy`` (nats), ``q_value``, ``target_value``, ``td_error``, ``valid_count``, and those
    of the traces, to which ``target="tree_backup"`` comes here.

    Raises:
        ValueError: on an argument out of range, networks that do not fit, or a batch of another shape.
        KeyError: when an entry is missing, by its name.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        gamma: float = 0.99,
        epsilon: float = 0.1,
        epsilon_policy: float = 2.5e-3,
        target: str = "n_step",
        n_step: int = 5,
        lmbda: float = 0.95,
        policy_states: str = "next",
        raw_temperature: float = 3.0,
        raw_alpha: float = 3.0,
        reduction: str = "mean",
    ) -> None:
        if list(policy[-1].in_keys) != [k.LOGITS]:
            raise ValueError(
                f"DiscreteMPOLoss needs a policy with parameters [{k.LOGITS!r}], got {list(policy[-1].in_keys)}; "
                "use MPOLoss for continuous actions"
            )
        for name, value in {"epsilon": epsilon, "epsilon_policy": epsilon_policy}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(
            policy,
            critic,
            value_keys=(k.ACTION_VALUE,),
            diagnostics=("temperature", "alpha", "kl_improved", "kl_policy", "entropy"),
            gamma=gamma,
            target=target,
            n_step=n_step,
            lmbda=lmbda,
            policy_states=policy_states,
            reduction=reduction,
        )
        self.epsilon = epsilon
        self.epsilon_policy = epsilon_policy
        self.temperature = m.Dual(raw_temperature)
        self.alpha = m.Dual(raw_alpha)

    def _policy_at(self, policy: Any, states: States) -> tuple[Tensor, ...]:
        (logits,) = super()._policy_at(policy, states)
        return (logits.log_softmax(-1),)

    def _propose(self, states: States, policy: Sequence[Tensor]) -> Proposal:
        value = self._critic_at(self.target("critic"), states).amin(-2)
        return Proposal(value.t(), (policy[0].exp() * value).sum(-1))

    def _chosen(self, critic: Any, states: States, action: Tensor) -> Tensor:
        found = self._critic_at(critic, states)
        index = action[:, None, None].expand(*found.shape[:-1], 1)
        return found.gather(-1, index).squeeze(-1)

    def _log_prob(self, policy: Sequence[Tensor], action: Tensor) -> Tensor:
        return policy[0].gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def _add_policy(
        self,
        out: dict[str, Tensor],
        online: Sequence[Tensor],
        target: Sequence[Tensor],
        proposal: Proposal,
        stats: Stats,
    ) -> None:
        """Adds ``loss_policy``, ``loss_dual`` and their diagnostics."""
        (log_prob,), (target_log_prob,) = online, target
        temperature, alpha = self.temperature(), self.alpha()
        step = m.e_step(
            value=proposal.value, temperature=temperature, epsilon=self.epsilon, log_prior=target_log_prob.t()
        )
        kl = m.categorical_kl(log_prob, target_log_prob)
        bound = m.kl_penalty(kl=kl, alpha=alpha, epsilon=self.epsilon_policy)
        out["loss_policy"] = self._reduce(bound.penalty - (step.weights.t() * log_prob).sum(-1), stats)
        out["loss_dual"] = self._reduce(step.dual + bound.dual, stats)
        with torch.no_grad():
            out["temperature"], out["alpha"] = temperature.detach().squeeze(), alpha.detach().squeeze()
            out["kl_improved"], out["kl_policy"] = stats.mean(step.kl), stats.mean(kl.squeeze(-1))
            out["entropy"] = -stats.mean((log_prob.exp() * log_prob).sum(-1))
