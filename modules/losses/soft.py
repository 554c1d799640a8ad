"""What the SAC losses share: temperature, targets, and the order of the terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import OffPolicyLoss, check_arguments, cleared
from offtrace.modules.losses.sites import Batch, Sites, States, read_sites
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.traces import TRACES, check_target, told_of, traced
from offtrace.modules.networks.control_heads import TanhNormal
from offtrace.modules.returns import q_return

ALPHA_LOSSES = ("alpha", "log_alpha")
Network = Callable[[TensorDictBase], TensorDictBase]


class SoftLoss(OffPolicyLoss):
    """Actor, K critics and temperature; subclasses say how an action is valued and what the actor's term is.

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

    actor: ProbabilisticTensorDictSequential
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams
    critic: TensorDictModule
    critic_params: TensorDictParams
    target_critic_params: TensorDictParams
    log_alpha: Tensor

    critic_key: str
    """What the critic must write."""

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        gamma: float,
        target: str,
        n_step: int,
        lmbda: float,
        reward_scale: float,
        alpha: float,
        learn_alpha: bool,
        alpha_loss: str,
        target_entropy: float,
        reduction: str,
        target_critic: bool,
        frozen_critic: bool,
    ) -> None:
        super().__init__()
        check_arguments(reduction=reduction, gamma=gamma, lmbda=lmbda)
        check_target(target, discrete=self.critic_key == k.ACTION_VALUE)
        if alpha_loss not in ALPHA_LOSSES:
            raise ValueError(f"alpha_loss must be one of {ALPHA_LOSSES}, got {alpha_loss!r}")
        if n_step < 1:
            raise ValueError(f"n_step must be 1 or more, got {n_step}")
        if alpha < 0 or (learn_alpha and alpha == 0):
            raise ValueError(f"the temperature must be positive (fixed: at least 0), got {alpha}")
        if self.critic_key not in critic.out_keys:
            raise ValueError(
                f"{type(self).__name__} needs a critic that writes {self.critic_key!r}, got {critic.out_keys}"
            )
        self.gamma = gamma
        self.target_kind = target
        self.n_step = n_step
        self.lmbda = lmbda
        self.reward_scale = reward_scale
        self.alpha_loss = alpha_loss
        self.target_entropy = target_entropy
        self.reduction = reduction
        self.add_network("actor", actor)
        self.add_network("critic", critic, target=target_critic, frozen=frozen_critic)
        log_alpha = torch.tensor(math.log(alpha) if alpha else -math.inf)
        if learn_alpha:
            self.log_alpha = nn.Parameter(log_alpha)
        else:
            self.register_buffer("log_alpha", log_alpha)
        self.learn_alpha = learn_alpha
        states = [*actor.in_keys, *(key for key in critic.in_keys if key != k.ACTION)]
        self._state_keys = list(dict.fromkeys(states))
        self._set_in_keys()
        self.out_keys = self._outputs()

    @property
    def alpha(self) -> Tensor:
        """The temperature, a detached scalar."""
        return self.log_alpha.detach().exp()

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor"``, ``"critic"``, ``"alpha"`` if it learns, ``"value"`` in v1."""
        return {("alpha" if name == "log_alpha" else name): p for name, p in super().param_groups().items()}

    def set_keys(self, **kwargs: Any) -> None:
        """Rename entries, see ``_AcceptedKeys``."""
        super().set_keys(**kwargs)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        names = self.tensor_keys
        ends = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        self._in_keys = [*self._state_keys, *((k.NEXT, key) for key in self._state_keys), names.action, *ends]
        if self.target_kind in TRACES:
            self._in_keys.append(names.sample_log_prob)

    def _outputs(self) -> list[str]:
        losses = ["loss_critic", "loss_actor", *(["loss_alpha"] if self.learn_alpha else [])]
        return [*losses, "entropy", "alpha", "q_value", "td_error", *told_of(self.target_kind), "valid_count"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        batch = self._batch(tensordict)
        n = self.n_step if self.target_kind == "n_step" else None
        sites = read_sites(
            tensordict, batch, state_keys=self._state_keys, action_key=self.tensor_keys.action, gamma=self.gamma, n=n
        )
        stats = Stats(sites.valid, sites.reward)
        alpha = self.alpha
        out = {"alpha": alpha, "valid_count": stats.count}
        policy = self._policy(sites.root)
        with torch.no_grad():
            following = self._state_value(sites.after, alpha)
            if self.target_kind in TRACES:
                target = self._corrected(out, tensordict, batch, sites, policy, following)
            else:
                target = torch.addcmul(sites.reward, sites.discount, following)
        values = self._values(self.critic, sites.root, sites.action)
        chosen = self._chosen(values, sites.action)
        error = chosen - target.unsqueeze(-1)
        out["loss_critic"] = 0.5 * self._reduce(error.square().sum(-1), stats)
        log_prob = self._improve(out, policy, sites, values, alpha, stats)
        out["entropy"] = entropy = -stats.mean(log_prob)
        if self.learn_alpha:
            coefficient = self.log_alpha.exp() if self.alpha_loss == "alpha" else self.log_alpha
            weight = stats.count if self.reduction == "sum" else stats.count.clamp(max=1)
            out["loss_alpha"] = coefficient * ((entropy - self.target_entropy) * weight)
        with torch.no_grad():
            out["q_value"] = stats.mean(chosen)
            out["td_error"] = stats.mean(error.abs())
        return TensorDict(out, [])

    # what subclasses define
    def _values(self, critic: Network, states: States, action: Tensor | None) -> Tensor:
        """What the critic writes: [M, K] of ``action``, or [M, K, A] of every action."""
        raise NotImplementedError

    def _chosen(self, values: Tensor, action: Tensor) -> Tensor:
        """Of what :meth:`_values` gives those of the batch's actions, [M, K]."""
        raise NotImplementedError

    def _state_value(self, states: States, alpha: Tensor) -> Tensor:
        """E_pi [min Q - alpha log pi] by the target networks, [M]; called without gradient."""
        raise NotImplementedError

    def _improve(
        self, out: dict[str, Tensor], policy: Distribution, sites: Sites, values: Tensor, alpha: Tensor, stats: Stats
    ) -> Tensor:
        """Add the actor's term to ``out``; detached log-probability [M] of its actions, whose mean is -entropy."""
        raise NotImplementedError

    # what they share
    def _policy(self, states: States) -> Distribution:
        keys = self.actor.in_keys
        if hasattr(self.actor, "distribution_at"):
            return self.actor.distribution_at(states[keys[0]])
        return self.actor.get_dist(TensorDict({key: states[key] for key in keys}, states[keys[0]].shape[:1]))

    def _reduce(self, x: Tensor, stats: Stats) -> Tensor:
        return stats.sum(x) if self.reduction == "sum" else stats.mean(x)

    def _batch(self, tensordict: TensorDictBase) -> Batch:
        if tensordict.ndim not in (1, 2):
            raise ValueError(f"the batch must be [N] or [N, T], got {list(tensordict.batch_size)}")
        single = tensordict.ndim == 1
        if single and self.target_kind != "one_step":
            raise ValueError(f"target {self.target_kind!r} needs sequences [N, T], got {list(tensordict.batch_size)}")
        shape = (len(tensordict), 1) if single else tensordict.batch_size
        if self.target_kind == "n_step" and shape[1] < self.n_step:
            raise ValueError(f"n_step={self.n_step} needs sequences of that many steps, got {shape[1]}")
        names, valid = self.tensor_keys, self._valid(tensordict)
        reward, terminated, done = (
            tensordict.get((k.NEXT, key)).reshape(shape) for key in (names.reward, names.terminated, names.done)
        )
        if self.reward_scale != 1:
            reward = reward * self.reward_scale
        return Batch(reward, terminated, done, None if valid is None else valid.view(shape))

    def _corrected(
        self,
        out: dict[str, Tensor],
        tensordict: TensorDictBase,
        batch: Batch,
        sites: Sites,
        policy: Distribution,
        following: Tensor,
    ) -> Tensor:
        """Targets of every step, [M]; here and in :func:`traced` time changes its dimension."""
        shape = batch.reward.shape
        values = self._chosen(self._values(self.target("critic"), sites.root, sites.action), sites.action)
        log_pi = self._log_prob(policy, tensordict, sites).view(shape)
        known, told = traced(
            self.target_kind,
            log_pi=log_pi,
            log_rho=log_pi - tensordict.get(self.tensor_keys.sample_log_prob),
            batch=batch,
            gamma=self.gamma,
            lmbda=self.lmbda,
        )
        out.update(told)
        target = q_return(q_value=least(values).view(shape).t(), next_state_value=following.view(shape).t(), **known)
        return target.t().flatten()

    def _log_prob(self, policy: Distribution, tensordict: TensorDictBase, sites: Sites) -> Tensor:
        """log pi of the batch's actions, [M], from what was stored before the tanh where the policy has one."""
        if not isinstance(policy, TanhNormal):
            return policy.log_prob(sites.action)
        pre_tanh = tensordict.get(self.tensor_keys.pre_tanh)
        return policy.log_prob_pre_tanh(cleared(pre_tanh.flatten(0, tensordict.ndim - 1), sites.valid))


def least(values: Tensor) -> Tensor:
    """The smallest of K values [*, K], [*]."""
    return values.squeeze(-1) if values.shape[-1] == 1 else values.min(-1).values


def entropy_target(given: float | str, auto: float) -> float:
    """``given``, or ``auto`` where it is ``"auto"``."""
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(f"target_entropy must be a number or 'auto', got {given!r}")
        return auto
    return given


def evaluate(network: Any, key: str, states: States, action: Tensor | None = None) -> Tensor:
    """What ``network`` writes under ``key`` for ``states`` [M] and, where it reads one, ``action`` [M, A].

    The networks of this package are called on tensors: a TensorDict costs as much as one of their smaller layers.
    """
    keys = network.in_keys
    if hasattr(network, "values"):
        return network.values(states[keys[0]], *(() if action is None else (action,)))
    found = {name: states[name] for name in keys if name in states}
    if action is not None:
        found[k.ACTION] = action
    return network(TensorDict(found, next(iter(found.values())).shape[:1])).get(key)
