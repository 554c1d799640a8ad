"""The loss of IMPALA."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor

from offtrace.modules.losses.offpolicy import check_arguments
from offtrace.modules.losses.policy_gradient import Estimate, PolicyGradientLoss
from offtrace.modules.losses.rollout import Reading
from offtrace.modules.returns import (
    clipped_fraction,
    effective_sample_size,
    gae,
    importance_trace,
    trace_reach,
    vtrace,
)
from offtrace.modules.returns.checks import check_clips

Estimator = Literal["vtrace", "importance_sampling", "one_step", "none"]

_OPTIONS = {"vtrace": ("rho_clip", "c_clip", "pg_rho_clip", "leak"), "one_step": ("pg_rho_clip",)}
_UNCLIPPED: dict[str, Any] = {"rho_clip": math.inf, "c_clip": math.inf, "pg_rho_clip": math.inf, "leak": 1.0}


class ImpalaLoss(PolicyGradientLoss):
    """V-trace policy gradient, value and entropy terms over one shared actor-critic, called once per batch.

    Over the valid steps of a rollout [B, T], with the target v and advantage A held constant::

        loss_policy  = sum of  -A log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (v - V(x))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    Espeholt et al. 2018, arXiv 1802.01561. The total loss is the sum of the three. The paper sums; under ``"mean"``
    each is divided by the number of valid steps: learning rate, gradient clip and RMSProp's epsilon then have another
    scale.

    v and A, by ``estimator`` (table 2 of the paper compares them):

    * ``"vtrace"``: :func:`offtrace.modules.returns.vtrace`;
    * ``"importance_sampling"``: the same with plain ratios, no clip: unbiased, its variance has no bound;
    * ``"one_step"``: v is the uncorrected lambda return, and A, the step's own min(pg_rho_clip, rho) times that
      return's advantage: values of the behaviour policy, gradient weighted by one step;
    * ``"none"``: every ratio is 1.

    The network runs once over x_0, ..., x_{T-1} and the successor of the last step; the final observation of a step
    truncated inside the rollout is inserted behind it, so a recurrent net meets it with the state after x_t.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives: its deterministic part writes the
            parameters of the distribution and the state value.
        estimator: see above.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        lmbda: trace decay.
        rho_clip, c_clip, leak: of V-trace alone.
        pg_rho_clip: of V-trace and ``"one_step"``.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: (A - m w) / (std + 1e-8) over the valid steps of the batch passed in, with w the ratio that
            multiplies the advantage in A, and m = sum A / sum w: of the advantages before their ratio the weighted
            mean is taken away, so that an action which the policy has left keeps its weight of 0. On-policy, the usual.
        policy_clip: where pi/mu has already moved beyond 1 +- policy_clip in the direction the advantage asks for, the
            step gives no policy gradient: the trust region of PPO (Schulman et al. 2017, arXiv 1707.06347) on V-trace
            advantages, which makes several passes over a rollout safe. None: as in the paper.

    Reads (names change by :meth:`set_keys`) the inputs of the policy, ``"action"``, ``"action_log_prob"`` [B, T] and
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; ``"valid"`` [B, T, 1] where there is one,
    and TorchRL's own masks. Parameters of the behaviour distribution give the exact KL; without them it is estimated
    from the actions.

    Returns the three losses and, detached scalars over the valid steps: ``ess``, effective sample size as a fraction in
    (0, 1]; ``ratio_mean`` of pi/mu, ``inf`` where it
    overflows; ``rho_clipped``, ``c_clipped`` and ``pg_rho_clipped``, fractions of ratios above
    the clips that the estimator has; ``trace_length`` in steps and ``contraction`` of the value's operator, by
    :func:`offtrace.modules.returns.trace_reach`; ``entropy`` in nats; ``kl`` of behaviour to target in nats;
    ``explained_variance`` of the targets by the value; ``advantage_std``, before normalisation; ``policy_clipped``,
    fraction of steps outside the trust region; ``valid_count``.

    Raises:
        ValueError: on an argument out of range, a clip that the estimator has not, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str = "vtrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "sum",
        lmbda: float = 1.0,
        rho_clip: float = 1.0,
        c_clip: float = 1.0,
        pg_rho_clip: float = 1.0,
        leak: float = 1.0,
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        policy_clip: float | None = None,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")
        given: dict[str, Any] = {"rho_clip": rho_clip, "c_clip": c_clip, "pg_rho_clip": pg_rho_clip, "leak": leak}
        has = _OPTIONS.get(estimator, ())
        for name, value in given.items():
            if value != 1 and name not in has:
                raise ValueError(f"estimator {estimator!r} has no {name}: leave it at 1, got {value}")
        check_arguments(reduction=reduction, leak=leak)
        check_clips(rho_clip=rho_clip, c_clip=c_clip, pg_rho_clip=pg_rho_clip)
        clipped = [f"{name}ped" for name in has if name != "leak"]
        super().__init__(
            policy,
            told=["ess", "trace_length", "contraction", *clipped],
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
        self.estimator = estimator
        self._clipped = clipped
        self._options = _UNCLIPPED if estimator == "importance_sampling" else given

    def _estimate(self, reading: Reading) -> Estimate:
        values = self._entry(reading.output, self.tensor_keys.value).squeeze(-1)
        value, next_value = reading.unroll.at(values), reading.unroll.behind(values).detach()
        reward, terminated, done, valid = reading.batch.time_first()
        known: dict[str, Any] = {
            "reward": reward.to(value.dtype),
            "value": value.detach().t(),
            "next_value": next_value.t(),
            "terminated": terminated,
            "done": done,
            "gamma": self.gamma,
            "lmbda": self.lmbda,
            "valid": valid,
        }
        log_rho = reading.log_rho.to(value.dtype).t()
        if self.estimator in ("vtrace", "importance_sampling"):
            target, advantage = (x.t() for x in vtrace(log_rho=log_rho, **self._options, **known))
        else:
            target, advantage = (x.t() for x in gae(**known))
            if self.estimator == "one_step":
                advantage = self._weighted(advantage, reading)
        return Estimate(value, target, advantage, self._tell(log_rho, done, valid))

    def _weight(self, reading: Reading) -> Tensor:
        if self.estimator == "none":
            return torch.ones_like(reading.log_rho)
        if self.estimator == "one_step":
            return super()._weight(reading)
        ratio, leak = importance_trace(log_rho=reading.log_rho), self._options["leak"]
        clipped = ratio.clamp(max=self._options["pg_rho_clip"])
        return clipped if leak == 1 else leak * clipped + (1 - leak) * ratio

    @torch.no_grad()
    def _tell(self, log_rho: Tensor, done: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        options, told = self._options, {"ess": effective_sample_size(log_rho, valid=valid)}
        fractions: dict[float, Tensor] = {}
        for name in self._clipped:
            limit = options[name.removesuffix("ped")]
            if limit not in fractions:  # usually they are all the same
                fractions[limit] = clipped_fraction(log_rho, limit, valid=valid)
            told[name] = fractions[limit]
        if self.estimator in ("vtrace", "importance_sampling"):
            ratio, leak = importance_trace(log_rho=log_rho), options["leak"]
            rho, c = (ratio.clamp(max=options[name]) for name in ("rho_clip", "c_clip"))
            if leak < 1:
                rho, c = (leak * x + (1 - leak) * ratio for x in (rho, c))
        else:
            rho = c = torch.ones_like(log_rho)
        bounded = self.estimator != "importance_sampling" and options["leak"] == 1 and options["c_clip"] <= 1
        told["trace_length"], told["contraction"] = trace_reach(
            trace=c if self.lmbda == 1 else self.lmbda * c, done=done, gamma=self.gamma, rho=rho, valid=valid,
            bounded=bounded,
        )  # fmt: skip
        return told
