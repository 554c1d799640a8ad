"""The loss of IMPALA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor
from torchrl.objectives.common import LossModule

from offtrace.modules import keys as k
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.unroll import Unroll
from offtrace.modules.returns import vtrace

_DIAGNOSTICS = (
    "ratio_mean",
    "rho_clipped",
    "c_clipped",
    "ess",
    "entropy",
    "kl",
    "explained_variance",
    "advantage_std",
    "policy_clipped",
    "valid_count",
)


class ImpalaLoss(LossModule):
    """V-trace policy gradient, value and entropy terms over one shared actor-critic, called once per batch.

    Over the valid steps of a rollout [B, T], with the V-trace target v and advantage A held constant::

        loss_policy  = sum of  -A log pi(a|x)
        loss_value   = sum of  value_coef * 1/2 (v - V(x))^2
        loss_entropy = sum of  -entropy_coef * H(pi(.|x))

    Espeholt et al. 2018, arXiv 1802.01561. The total loss is the sum of the three. The paper sums; under ``"mean"``
    each is divided by the number of valid steps: learning rate, gradient clip and RMSProp's epsilon then have another
    scale.

    The network runs once over x_0, ..., x_{T-1} and the successor of the last step; the final observation of a step
    truncated inside the rollout is inserted behind it, so a recurrent net meets it with the state after x_t.

    Args:
        policy: what :func:`offtrace.modules.networks.make_policy` gives: its deterministic part writes the
            parameters of the distribution and the state value.
        gamma: discount per step.
        value_coef, entropy_coef: weights of the two terms.
        reduction: ``"sum"`` or ``"mean"`` over valid steps.
        lmbda, rho_clip, c_clip, pg_rho_clip, leak: of :func:`offtrace.modules.returns.vtrace`.
        reward_clip: clip rewards to [-reward_clip, reward_clip]; None leaves them.
        normalize_advantage: (A - mean) / (std + 1e-8) over the valid steps of the batch passed in.
        policy_clip: where pi/mu has already moved beyond 1 +- policy_clip in the direction the advantage asks for, the
            step gives no policy gradient: the trust region of PPO (Schulman et al. 2017, arXiv 1707.06347) on V-trace
            advantages, which makes several passes over a rollout safe. None: as in the paper.
        correction: False takes every ratio as 1 in the targets, for studies of what the correction does. The
            diagnostics still show the true ratios.

    Reads (names change by :meth:`set_keys`) the inputs of the policy, ``"action"``, ``"action_log_prob"`` [B, T] and
    ``("next", ...)`` ``"reward"``, ``"terminated"``, ``"done"`` [B, T, 1]; ``"valid"`` [B, T, 1] where there is one,
    and TorchRL's own masks. Parameters of the behaviour distribution give the exact KL; without them it is estimated
    from the actions.

    Returns the three losses and, detached scalars over the valid steps: ``ratio_mean`` of pi/mu; ``rho_clipped`` and
    ``c_clipped``, fractions of ratios above the clips; ``ess``, effective sample size as a fraction in (0, 1];
    ``entropy`` in nats; ``kl`` of behaviour to target; ``explained_variance`` of the targets by the value;
    ``advantage_std``, before normalisation; ``policy_clipped``, fraction of steps outside the trust region;
    ``valid_count``.

    Raises:
        ValueError: on an argument out of range, or a batch that is not [B, T].
        KeyError: when an entry is missing, by its name.
    """

    @dataclass
    class _AcceptedKeys:
        action: Any = k.ACTION
        sample_log_prob: Any = k.LOG_PROB
        value: Any = k.VALUE
        valid: Any = k.VALID
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_policy", "loss_value", "loss_entropy", *_DIAGNOSTICS]  # noqa: RUF012 (TorchRL's convention)

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        *,
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
        correction: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        for name, value in {"gamma": gamma, "lmbda": lmbda, "leak": leak}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if reward_clip is not None and reward_clip <= 0:
            raise ValueError(f"reward_clip must be positive or None, got {reward_clip}")
        if policy_clip is not None and policy_clip <= 0:
            raise ValueError(f"policy_clip must be positive or None, got {policy_clip}")
        self.policy = policy
        self.policy_clip = policy_clip
        self.reduction = reduction
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.reward_clip = reward_clip
        self.normalize_advantage = normalize_advantage
        self.correction = correction
        self.rho_clip = rho_clip
        self.c_clip = c_clip
        self._vtrace = {
            "gamma": gamma,
            "lmbda": lmbda,
            "rho_clip": rho_clip,
            "c_clip": c_clip,
            "pg_rho_clip": pg_rho_clip,
            "leak": leak,
        }
        self._set_in_keys()

    @property
    def functional(self) -> bool:
        """The policy is a plain submodule; its parameters are not copied."""
        return False

    def set_keys(self, **kwargs: Any) -> None:
        """Rename entries, see ``_AcceptedKeys``."""
        super().set_keys(**kwargs)
        self._set_in_keys()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """There is no estimator object: :func:`vtrace` is called on tensors."""

    def _set_in_keys(self) -> None:
        names = self.tensor_keys
        observed = [*self.policy.in_keys, *((k.NEXT, key) for key in self.policy.in_keys)]
        ends = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        self._in_keys = [*observed, names.action, names.sample_log_prob, *ends]

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[Any]) -> None:
        self._in_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of a rollout [B, T]."""
        if tensordict.ndim != 2:
            raise ValueError(f"the batch must be [B, T], environments then time; got {list(tensordict.batch_size)}")
        names = self.tensor_keys
        reward, terminated, done = (
            tensordict.get((k.NEXT, key)).squeeze(-1) for key in (names.reward, names.terminated, names.done)
        )
        valid = self._valid(tensordict)
        unroll = Unroll(tensordict, self.policy, terminated=terminated, done=done, valid=valid)
        output = self.policy.get_dist_params(unroll.inputs)
        values = output.get(names.value).squeeze(-1)
        value, next_value = unroll.at(values), unroll.behind(values).detach()
        sampler = self.policy[-1]
        params = {key: unroll.at(output.get(key)) for key in sampler.in_keys}
        dist = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
        log_prob, entropy = dist.log_prob(tensordict.get(names.action)), dist.entropy()
        log_rho = log_prob.detach() - tensordict.get(names.sample_log_prob)
        if self.reward_clip is not None:
            reward = reward.clamp(-self.reward_clip, self.reward_clip)
        target, advantage = self._targets(reward, value, next_value, log_rho, terminated, done, valid)

        stats = Stats(valid, reward)
        spread = stats.std(advantage)
        if self.normalize_advantage:
            advantage = (advantage - stats.mean(advantage)) / (spread + 1e-8)
        advantage, outside = self._trust_region(advantage, log_rho)
        reduce = stats.sum if self.reduction == "sum" else stats.mean
        mean_entropy = stats.mean(entropy)
        out = {
            "loss_policy": -reduce(advantage * log_prob),
            "loss_value": (0.5 * self.value_coef) * reduce((target - value).square()),
            "loss_entropy": -self.entropy_coef * reduce(entropy),
            "entropy": mean_entropy.detach(),
            "advantage_std": spread,
            "policy_clipped": stats.mean(outside),
            "valid_count": stats.count,
        }
        with torch.no_grad():
            rho = log_rho.exp()
            out["kl"] = stats.mean(self._kl(tensordict, dist, log_rho))
            out["explained_variance"] = 1 - stats.variance(target - value) / stats.variance(target).clamp(min=1e-8)
            out["ratio_mean"] = stats.mean(rho)
            out["ess"] = stats.sum(rho).square() / (stats.count * stats.sum(rho.square())).clamp(min=1e-30)
            out["rho_clipped"] = stats.mean((rho > self.rho_clip).to(rho.dtype))
            out["c_clipped"] = stats.mean((rho > self.c_clip).to(rho.dtype))
        return TensorDict(out, [])

    def _valid(self, tensordict: TensorDictBase) -> Tensor | None:
        """bool [B, T], or None where nothing is masked: the project's mask and those of TorchRL's samplers."""
        valid = None
        for key in (self.tensor_keys.valid, *self._loss_mask_keys()):
            mask = tensordict.get(key, None)
            if mask is not None:
                mask = mask.reshape(tensordict.batch_size)
                valid = mask if valid is None else valid & mask
        return valid

    def _targets(
        self,
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """V-trace target and advantage, [B, T]; the one place where time changes its dimension."""
        out = vtrace(
            reward=reward.to(value.dtype).t(),
            value=value.detach().t(),
            next_value=next_value.t(),
            log_rho=(log_rho if self.correction else torch.zeros_like(log_rho)).to(value.dtype).t(),
            terminated=terminated.t(),
            done=done.t(),
            valid=None if valid is None else valid.t(),
            **self._vtrace,
        )
        return out.target.t(), out.advantage.t()

    def _trust_region(self, advantage: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor]:
        """The advantage, 0 where the ratio left the trust region in its direction; and those steps as 0 and 1."""
        if self.policy_clip is None:
            return advantage, torch.zeros_like(advantage)
        moved = torch.where(advantage > 0, log_rho, -log_rho)
        limit = torch.where(advantage > 0, math.log1p(self.policy_clip), -math.log1p(-min(self.policy_clip, 1 - 1e-6)))
        outside = moved > limit
        return advantage.masked_fill(outside, 0), outside.to(advantage.dtype)

    def _kl(self, tensordict: TensorDictBase, dist: torch.distributions.Distribution, log_rho: Tensor) -> Tensor:
        """KL of behaviour to target at each step [B, T], from the stored parameters, or one sample of it each."""
        sampler = self.policy[-1]
        params = {key: tensordict.get(key, None) for key in sampler.in_keys}
        if any(param is None for param in params.values()):
            return -log_rho
        behaviour = sampler.build_dist_from_params(TensorDict(params, tensordict.batch_size))
        return torch.distributions.kl_divergence(behaviour, dist)
