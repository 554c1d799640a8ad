"""The loss of IMPALA."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import zero_invalid
from offtrace.modules.estimators.state_values import OF_THE_TRACE, StateValueEstimator
from offtrace.modules.losses.acer import behaviour_parameter
from offtrace.modules.losses.arguments import check_arguments, check_not_negative, check_positive_or_none
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.policy_gradient import ratio_diagnostics, rollout_diagnostics, trust_region
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import entry
from offtrace.modules.losses.unroll import EvaluatedPolicy, evaluate_rollout, state_values
from offtrace.modules.losses.views import check_entropy

_OF_WHAT_IS_LEARNT = ("explained_variance", "advantage_std", "policy_clipped", *OF_THE_TRACE)


@torch.no_grad()
def truncated_policy_kl(*, log_probs: Tensor, behaviour_log_probs: Tensor, rho_clip: float) -> Tensor:
    """How far the policy that V-trace values is from the policy itself, at each state, in nats::

        pi_rho(a) = min(rho_clip mu(a), pi(a)) / sum over b of min(rho_clip mu(b), pi(b))

        KL(pi || pi_rho) = sum over a of pi(a) (log pi(a) - log(rho_clip mu(a)))_+
                           + log of the sum over b of min(rho_clip mu(b), pi(b))

    Schmitt et al. 2020, arXiv 1909.11583: where it is large, V-trace's gradient may point the wrong way. An action with
    pi = 0 adds nothing, an illegal one, with mu = 0 as well, neither; one with pi above 0 and mu = 0 gives infinity.

    Args:
        log_probs: log pi(.|x), ``[*B, A]``.
        behaviour_log_probs: log mu(.|x), ``[*B, A]``.
        rho_clip: above 0; inf truncates nothing, and gives 0.

    Returns:
        ``[*B]``, at least 0.
    """
    probs = log_probs.exp()
    bound = behaviour_log_probs + math.log(rho_clip)  # -inf + inf is NaN, and no bound
    above = torch.where(probs > 0, probs * (log_probs - bound).clamp(min=0), 0).nan_to_num(nan=0.0, posinf=math.inf)
    covered = torch.fmin(log_probs, bound).logsumexp(-1)
    divergence = above.sum(-1)
    return torch.where(divergence.isinf(), divergence, (divergence + covered).clamp(min=0))


class ImpalaLoss(Loss):
    """V-trace policy gradient, value and entropy terms over one shared actor-critic, called once per batch.

    Over the valid steps of a rollout [B, T], with the target v and advantage A held constant::

        loss_policy  = sum of  -A log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (v - V(x))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    Espeholt et al. 2018, arXiv 1802.01561. The total loss is the sum of the three. The paper sums; under ``"mean"``
    each is divided by the number of valid steps: learning rate, gradient clip and RMSProp's epsilon then have another
    scale.

    v and A are those of an estimator of state values; table 2 of the paper compares ``"vtrace"``,
    ``"importance_sampling"`` (plain ratios, no clip), ``"one_step"`` (values of the behaviour policy, gradient weighted
    by the step's own ratio) and ``"gae"`` (every ratio is 1).

    The network runs once over x_0, ..., x_{T-1} and the successor of the last step; the final observation of a step
    truncated inside the rollout is inserted behind it, so a recurrent net meets it with the state after x_t.

    Args:
        policy: what :func:`offtrace.modules.networks.build_policy` gives: its deterministic part writes the
            parameters of the distribution and the state value.
        estimator: of state values: a name with options, ``"vtrace(lmbda=0.95, c_clip=0.9)"``, an import path, or an
            object; see :mod:`offtrace.modules.estimators`.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: (A - m w) / (std + 1e-8) over the valid steps of the batch passed in, with w the ratio that
            multiplies the advantage in A, and m = sum A / sum w: of the advantages before their ratio the weighted
            mean is taken away, so that an action which the policy has left keeps its weight of 0. On-policy, the usual.
        policy_clip: where pi/mu has already moved beyond 1 +- policy_clip in the direction the advantage asks for, the
            step gives no policy gradient: the trust region of PPO (Schulman et al. 2017, arXiv 1707.06347) on V-trace
            advantages, which makes several passes over a rollout safe. None: as in the paper.
        max_kl: b of LASER's trust region (Schmitt et al. 2020, arXiv 1909.11583): a step counts only if
            KL(pi || pi_rho) of its state, by :func:`truncated_policy_kl` with the estimator's ``rho_clip``, is below
            it. The others leave policy and value term, and traces stop before them; under ``"mean"`` they still count
            in the number that is divided by. The test is about the state, over all its actions: one of the action taken
            would bias. The paper does not tell its b. Discrete actions only. None: no step is left out.
        entropy_on_replay: whether replayed rows have an entropy term; LASER gives it to fresh ones alone, which are
            those with ``"index"`` -1, and all of a batch without that entry. In number of steps divided by, nothing
            changes.

    Reads (names change by :meth:`set_keys`) the inputs of the policy, ``"action"``, ``"action_log_prob"`` [B, T] and
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; ``"valid"`` [B, T, 1] where there is one,
    and TorchRL's own masks. Parameters of the behaviour distribution give the exact KL; without them it is estimated
    from the actions; ``max_kl`` needs them, ``"logits"`` [B, T, A]. ``"index"`` [B, T] where there is one, without
    ``entropy_on_replay``.

    Returns the three losses and, detached scalars over the valid steps, those of the estimator (``ess``, effective
    sample size as a fraction in (0, 1]; ``trace_length`` in steps and ``contraction`` of the value's operator, by
    :func:`offtrace.modules.returns.trace_reach`; ``rho_clipped``, ``c_clipped`` and ``pg_rho_clipped``, fractions of
    ratios above the clips that it has); ``ratio_mean`` of pi/mu, ``inf`` where it overflows; ``entropy`` in nats;
    ``kl`` of behaviour to target in nats; ``explained_variance`` of the targets by the value; ``advantage_std``, before
    normalisation; ``policy_clipped``, fraction of steps outside the trust region; ``valid_count``. With ``max_kl``
    also ``outside``, the fraction of the valid steps that it leaves out; then ``explained_variance``,
    ``advantage_std``, ``policy_clipped``, ``trace_length`` and ``contraction`` are about the others, NaN where there
    are none, and all that is about ratios stays about all valid steps.

    Raises:
        ValueError: on an argument out of range, an estimator or a policy that does not fit, or a batch that is not
            [B, T].
        KeyError: when an entry is missing, by its name.
    """

    reads_behaviour = True

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
        estimator: str | StateValueEstimator = "vtrace",
        gamma: float = 0.99,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        reduction: str = "sum",
        reward_clip: float | None = None,
        normalize_advantage: bool = False,
        policy_clip: float | None = None,
        max_kl: float | None = None,
        entropy_on_replay: bool = True,
    ) -> None:
        check_arguments(reduction=reduction, gamma=gamma)
        check_entropy(self, policy)
        check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef)
        check_positive_or_none(reward_clip=reward_clip, policy_clip=policy_clip, max_kl=max_kl)
        if max_kl is not None and list(policy[-1].in_keys) != [k.LOGITS]:
            raise ValueError(
                f"max_kl is {max_kl}; it needs a policy over discrete actions, and this one has {policy[-1].in_keys}: "
                "it must be None"
            )
        super().__init__()
        self.max_kl, self.entropy_on_replay = max_kl, entropy_on_replay
        self.bind_estimator(estimator, "state", gamma=gamma)
        self.policy = policy
        self.state_keys = list(policy.in_keys)
        self.bind_networks()
        self.value_coef, self.entropy_coef, self.reduction = value_coef, entropy_coef, reduction
        self.reward_clip, self.normalize_advantage, self.policy_clip = reward_clip, normalize_advantage, policy_clip
        losses = ["loss_policy", "loss_value", "loss_entropy"]
        diagnostics = ["entropy", "kl", "ratio_mean", "explained_variance", "advantage_std", "policy_clipped"]
        outside = ["outside"] if max_kl is not None else []
        self.out_keys = [*losses, *diagnostics, *outside, "valid_count", *self.estimator.diagnostic_keys]

    def bind_estimator(self, spec: Any, kind: str, **options: Any) -> None:
        """As :meth:`Loss.bind_estimator`; with ``max_kl`` one that truncates ratios.

        Raises:
            ValueError: it does not.
        """
        super().bind_estimator(spec, kind, **options)
        found = self.estimator
        if self.max_kl is not None and not found.truncates:
            raise ValueError(
                f"max_kl is {self.max_kl}; it needs an estimator that truncates ratios, and {type(found).__name__} "
                "as it is here does not: use 'vtrace', with its leak of 1, or no max_kl"
            )

    def read_keys(self) -> list[Any]:
        """Entries that are read."""
        return [*super().read_keys(), k.LOGITS] if self.max_kl is not None else super().read_keys()

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        # one call of the network over the steps and their successors
        policy = evaluate_rollout(self, tensordict, reward_clip=self.reward_clip)
        value, next_value = state_values(self, policy)
        stats = Stats(policy.outcome.valid, policy.outcome.reward, self.reduction)

        # steps of states where the policy that is valued is too far from the policy are left out
        inside, learnt = self._inside(tensordict, policy), stats
        if inside is not None:
            valid = policy.outcome.valid
            learnt = Stats(inside if valid is None else inside & valid, policy.outcome.reward, self.reduction)

        # target and advantage, constant
        log_rho = policy.log_rho
        assert log_rho is not None
        estimate = self.estimator.estimate(
            policy.outcome, value=value, next_value=next_value, log_rho=log_rho, trace_mask=inside
        )
        advantage = estimate.advantage
        if self.normalize_advantage:
            advantage = learnt.standardised(advantage, estimate.weight)
        advantage, clipped = trust_region(advantage, log_rho, self.policy_clip)

        # the three terms
        entropy, error = policy.dist.entropy(), estimate.target - value
        out = {
            "loss_policy": -stats.reduce(zero_invalid(advantage * policy.log_pi, inside)),
            "loss_value": (0.5 * self.value_coef) * stats.reduce(zero_invalid(error.square(), inside)),
            "loss_entropy": -self.entropy_coef * stats.reduce(zero_invalid(entropy, self._fresh(tensordict))),
        }

        # diagnostics
        out["policy_clipped"] = learnt.mean(clipped)
        out |= estimate.diagnostics | rollout_diagnostics(
            learnt, entropy=entropy, advantage=estimate.advantage, target=estimate.target, error=error
        )
        if inside is not None:
            with torch.no_grad():
                for name in _OF_WHAT_IS_LEARNT:  # of nothing all would look perfect
                    if name in out:
                        out[name] = out[name].masked_fill(learnt.count == 0, math.nan)
                # these are about all valid steps
                out |= {"entropy": stats.mean(entropy), "valid_count": stats.count}
                out["outside"] = stats.mean((~inside).to(entropy.dtype))
        return TensorDict(out | ratio_diagnostics(self.policy, tensordict, policy, stats), [])

    def _inside(self, tensordict: TensorDictBase, policy: EvaluatedPolicy) -> Tensor | None:
        """Which steps are learnt from, bool [B, T]; None for all."""
        if self.max_kl is None:
            return None
        divergence = truncated_policy_kl(
            log_probs=policy.params[k.LOGITS].log_softmax(-1),
            behaviour_log_probs=behaviour_parameter(self, tensordict, k.LOGITS).log_softmax(-1),
            rho_clip=self.estimator.rho_clip,
        )
        return divergence < self.max_kl

    def _fresh(self, tensordict: TensorDictBase) -> Tensor | None:
        """Which steps have an entropy term, bool [B, T]; None for all."""
        if self.entropy_on_replay or tensordict.get(k.INDEX, None) is None:
            return None
        return entry(self, tensordict, k.INDEX, tensordict.batch_size) == -1
