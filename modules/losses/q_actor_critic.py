"""The loss of an actor-critic whose critic values actions."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential

from offtrace.modules import keys as k
from offtrace.modules.losses.policy_gradient import Estimate, PolicyGradientLoss
from offtrace.modules.losses.rollout import Reading
from offtrace.modules.losses.traces import TRACES, told_of, traced
from offtrace.modules.returns import clipped_fraction, q_return


class QActorCriticLoss(PolicyGradientLoss):
    """Policy gradient, action value and entropy terms over one shared network, on rollouts of discrete actions.

    With V(x) = sum over a of pi(a|x) Q(x, a), and over the valid steps of a rollout [B, T]::

        loss_policy  = sum of  -min(pg_rho_clip, rho) (G - V(x)) log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (G - Q(x, a))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    where G is :func:`offtrace.modules.returns.q_return` of the network's own Q, with a trace by name; G, V and rho are
    constant. The total loss is the sum of the three; under ``"mean"`` each is divided by the number of valid steps.

    With ``trace="retrace"`` these are critic and policy gradient of ACER (Wang et al. 2017, arXiv 1611.01224) without
    its bias correction, average network and replay; the operator: Munos et al. 2016, arXiv 1606.02647. Unlike V-trace's
    value, which moves by min(1, rho) of an error, Q(x, a) learns from every action taken as much as from any other.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives for ``critic="q"``: its deterministic part
            writes the parameters of a distribution over discrete actions and ``"action_value"`` [*B, 1, A].
        trace: ``"retrace"``, ``"importance_sampling"``, ``"q_lambda"`` (ACER's Q^opc with ``lmbda`` 1) or
            ``"tree_backup"``.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        lmbda: trace decay.
        pg_rho_clip: clip of the ratio in the policy gradient; ACER's c.
        reward_clip, normalize_advantage, policy_clip: as of :class:`ImpalaLoss`.

    Reads what :class:`ImpalaLoss` reads. Where actions can be illegal the mask is read behind a step as well, for the
    policy's values there.

    Returns the three losses and the detached scalars of :class:`ImpalaLoss`, with these differences: of the clips,
    ``pg_rho_clipped`` and, for Retrace, ``c_clipped``; ``contraction`` is that of the action values' operator, and left
    out for ``"q_lambda"``, which need not contract; ``explained_variance`` is of the targets by Q(x, a).

    Raises:
        ValueError: on an argument out of range, a policy that does not fit, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        trace: str = "retrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "sum",
        lmbda: float = 1.0,
        pg_rho_clip: float = 1.0,
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        policy_clip: float | None = None,
    ) -> None:
        if trace not in TRACES:
            raise ValueError(f"trace must be one of {TRACES}, got {trace!r}")
        if k.ACTION_VALUE not in policy.out_keys or list(policy[-1].in_keys) != [k.LOGITS]:
            raise ValueError(
                f"QActorCriticLoss needs a policy over discrete actions that writes {k.ACTION_VALUE!r}, got one that "
                f"writes {policy.out_keys}: use build_policy(..., num_actions=..., critic='q')"
            )
        super().__init__(
            policy,
            told=[*told_of(trace), "pg_rho_clipped"],
            gamma=gamma,
            lmbda=lmbda,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
            reduction=reduction,
            pg_rho_clip=pg_rho_clip,
            reward_clip=reward_clip,
            normalize_advantage=normalize_advantage,
            policy_clip=policy_clip,
        )
        self.trace = trace

    def _read(self, tensordict: TensorDictBase) -> Reading:
        if k.ACTION_MASK in self.policy.in_keys:  # the policy's value behind a step needs it there too
            self._entry(tensordict, (k.NEXT, k.ACTION_MASK))
        return super()._read(tensordict)

    def _estimate(self, reading: Reading) -> Estimate:
        unroll, batch = reading.unroll, reading.batch
        q_values = self._entry(reading.output, self.tensor_keys.action_value).squeeze(-2)
        chosen = unroll.at(q_values).gather(-1, reading.action.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            prob = reading.output.get(k.LOGITS).softmax(-1)
            values = (prob * q_values).sum(-1)
            known, told = traced(
                self.trace,
                log_pi=reading.log_pi,
                log_rho=reading.log_rho,
                batch=batch,
                gamma=self.gamma,
                lmbda=self.lmbda,
            )
            taken, following = (x.to(batch.reward.dtype).t() for x in (chosen, unroll.behind(values)))
            target = q_return(q_value=taken, next_state_value=following, **known).t()
            advantage = self._weighted(target - unroll.at(values), reading)
            told["pg_rho_clipped"] = clipped_fraction(reading.log_rho, self.pg_rho_clip, valid=batch.valid)
        return Estimate(chosen, target, advantage, told)
