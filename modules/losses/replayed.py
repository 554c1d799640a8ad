"""What the losses on replayed transitions and sequences share: the steps they learn from, and the critic's targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import Batch, OffPolicyLoss, check_arguments, cleared
from offtrace.modules.losses.sites import Sites, at_sites, read_sites
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.traces import TRACES, check_target, traced
from offtrace.modules.returns import (
    categorical_projection,
    distributional_return,
    effective_sample_size,
    q_return,
)


class ReplayedLoss(OffPolicyLoss):
    """Batches [N] or [N, T], targets by name, and what is told of them; subclasses add the networks and the terms.

    Args are those of the subclasses.
    """

    @dataclass
    class _AcceptedKeys:
        action: Any = k.ACTION
        sample_log_prob: Any = k.LOG_PROB
        pre_tanh: Any = k.PRE_TANH
        valid: Any = k.VALID
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        target: str,
        discrete: bool,
        n_step: int,
        gamma: float,
        lmbda: float,
        reduction: str,
        reward_scale: float,
    ) -> None:
        super().__init__()
        check_target(target, discrete=discrete)
        check_arguments(reduction=reduction, gamma=gamma, lmbda=lmbda)
        if n_step < 1:
            raise ValueError(f"n_step must be 1 or more, got {n_step}")
        self.target_kind = target
        self.discrete = discrete
        self.n_step = n_step
        self.gamma = gamma
        self.lmbda = lmbda
        self.reduction = reduction
        self.reward_scale = reward_scale

    def _behaviour_keys(self) -> list[Any]:
        return super()._behaviour_keys() if self.target_kind in TRACES else []

    def _read(self, tensordict: TensorDictBase) -> tuple[Batch, Sites]:
        """The batch as [N, T], of transitions T = 1; and the steps whose values are learnt."""
        shape = list(tensordict.batch_size)
        if len(shape) not in (1, 2):
            raise ValueError(f"the batch must be [N] or [N, T], got {shape}")
        if len(shape) == 1 and self.target_kind != "one_step":
            raise ValueError(f"target {self.target_kind!r} needs sequences [N, T], got {shape}")
        if self._window is not None and shape[1] < self.n_step:
            raise ValueError(f"n_step={self.n_step} needs sequences of that many steps, got {shape[1]}")
        reward, terminated, done, valid = self._ends(tensordict)
        if self.reward_scale != 1:
            reward = reward * self.reward_scale
        if len(shape) == 1:
            reward, terminated, done = (x.unsqueeze(1) for x in (reward, terminated, done))
            valid = None if valid is None else valid.unsqueeze(1)
        batch = Batch(reward, terminated, done, valid)
        sites = read_sites(
            partial(self._entry, tensordict),
            batch,
            dims=len(shape),
            state_keys=self._state_keys,
            action_key=self.tensor_keys.action,
            gamma=self.gamma,
            n=self._window,
        )
        if sites.action.is_floating_point() == self.discrete:
            kind = "discrete actions, as integers" if self.discrete else "continuous actions"
            raise TypeError(f"{type(self).__name__} needs {kind}; {self.tensor_keys.action!r} is {sites.action.dtype}")
        return batch, sites

    @property
    def _window(self) -> int | None:
        return self.n_step if self.target_kind == "n_step" else None

    def _has_behaviour(self, tensordict: TensorDictBase) -> bool:
        """Whether the ratio to the behaviour policy is wanted: the diagnostics take it where the batch has it."""
        return self.target_kind in TRACES or tensordict.get(self.tensor_keys.sample_log_prob, None) is not None

    def _targets(
        self,
        out: dict[str, Tensor],
        tensordict: TensorDictBase,
        batch: Batch,
        sites: Sites,
        *,
        log_pi: Tensor | None,
        chosen: Callable[[], Tensor],
        following: Tensor,
        support: Tensor | None = None,
    ) -> Tensor:
        """What the critics learn, [M] or [M, atoms]; adds to ``out`` what is told of it.

        Here and in :func:`traced` time changes its dimension.

        Args:
            log_pi: of the batch's actions [M], or None: then the target is not corrected, and no ratio told.
            chosen: gives the target critic's value of the batch's action, [M], or its distribution [M, atoms].
            following: value of the policy where the step bootstraps, [M], or its distribution [M, atoms].
            support: the atoms.
        """
        if log_pi is not None:
            log_mu = self._entry(tensordict, self.tensor_keys.sample_log_prob, tensordict.batch_size)
            log_rho = log_pi.detach() - at_sites(log_mu, tensordict.ndim, self._window).to(log_pi.dtype)
        if self.target_kind not in TRACES or log_pi is None:
            self._tell_uncorrected(out, sites, None if log_pi is None else log_rho)
            if support is None:
                return torch.addcmul(sites.reward, sites.discount, following)
            atoms = sites.reward.unsqueeze(-1) + sites.discount.unsqueeze(-1) * support
            return categorical_projection(atoms=atoms, probs=following.to(atoms.dtype), support=support)
        shape, dtype = batch.reward.shape, batch.reward.dtype
        known, told = traced(
            self.target_kind,
            log_pi=log_pi.view(shape),
            log_rho=log_rho.view(shape),
            batch=batch,
            gamma=self.gamma,
            lmbda=self.lmbda,
        )
        out.update(told)
        # under autocast values come in half precision
        q, following = (x.to(dtype).unflatten(0, shape).transpose(0, 1) for x in (chosen(), following))
        if support is None:
            found = q_return(q_value=q, next_state_value=following, **known)
        else:
            found = distributional_return(q_dist=q, next_state_dist=following, support=support, **known)
        return found.transpose(0, 1).flatten(0, 1)

    def _tell_uncorrected(self, out: dict[str, Tensor], sites: Sites, log_rho: Tensor | None) -> None:
        """Adds how far off-policy the batch is where the target is not corrected for it."""
        if log_rho is None:
            out["ess"] = sites.reward.new_full((), math.nan)
        else:
            out["ess"] = effective_sample_size(cleared(log_rho, sites.valid), valid=sites.valid)
        if sites.length is None:
            out["trace_length"] = sites.reward.new_zeros(())
            out["contraction"] = sites.reward.new_full((), self.gamma)
        else:
            stats, length = Stats(sites.valid, sites.reward), sites.length.to(sites.reward.dtype)
            out["trace_length"] = stats.mean(length - 1)
            out["contraction"] = 1 - stats.mean(1 - self.gamma**length)

    def _reduce(self, x: Tensor, stats: Stats) -> Tensor:
        return stats.sum(x) if self.reduction == "sum" else stats.mean(x)
