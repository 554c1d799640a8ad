"""What the SAC losses share: temperature, targets, and the order of the terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import cleared
from offtrace.modules.losses.replayed import ReplayedLoss
from offtrace.modules.losses.sites import Sites, States, at_sites, evaluate
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.traces import TRACES, told_of
from offtrace.modules.networks.control_heads import TanhNormal

ALPHA_LOSSES = ("alpha", "log_alpha")
Network = Callable[[TensorDictBase], TensorDictBase]


class SoftLoss(ReplayedLoss):
    """Actor, K critics and temperature; subclasses say how an action is valued and what the actor's term is.

    Args are those of the subclasses.
    """

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
        super().__init__(
            target=target,
            discrete=self.critic_key == k.ACTION_VALUE,
            n_step=n_step,
            gamma=gamma,
            lmbda=lmbda,
            reduction=reduction,
            reward_scale=reward_scale,
        )
        if alpha_loss not in ALPHA_LOSSES:
            raise ValueError(f"alpha_loss must be one of {ALPHA_LOSSES}, got {alpha_loss!r}")
        if alpha < 0 or (learn_alpha and alpha == 0):
            raise ValueError(f"the temperature must be positive (fixed: at least 0), got {alpha}")
        if self.critic_key not in critic.out_keys:
            raise ValueError(
                f"{type(self).__name__} needs a critic that writes {self.critic_key!r}, got {critic.out_keys}"
            )
        self.alpha_loss = alpha_loss
        self.target_entropy = target_entropy
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
        self.out_keys = self._outputs()

    @property
    def alpha(self) -> Tensor:
        """The temperature, a detached scalar."""
        return self.log_alpha.detach().exp()

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to: ``"actor"``, ``"critic"``, ``"alpha"`` if it learns, ``"value"`` in v1."""
        return {("alpha" if name == "log_alpha" else name): p for name, p in super().param_groups().items()}

    def _outputs(self) -> list[str]:
        losses = ["loss_critic", "loss_actor", *(["loss_alpha"] if self.learn_alpha else [])]
        return [*losses, "entropy", "alpha", "q_value", "td_error", *told_of(self.target_kind), "valid_count"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        batch, sites = self._read(tensordict)
        stats = Stats(sites.valid, sites.reward)
        alpha = self.alpha
        out = {"alpha": alpha, "valid_count": stats.count}
        policy = self._policy(sites.root)
        with torch.no_grad():
            following = self._state_value(sites.after, alpha)
            target = self._targets(
                out,
                tensordict,
                batch,
                sites,
                log_pi=self._log_prob(policy, tensordict, sites) if self._has_behaviour(tensordict) else None,
                chosen=lambda: least(
                    self._chosen(self._values(self.target("critic"), sites.root, sites.action), sites.action)
                ),
                following=following,
            )
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

    def _behaviour_keys(self) -> list[Any]:
        keys = super()._behaviour_keys()
        squashed = keys and k.PRE_TANH in self.actor.out_keys
        return [*keys, self.tensor_keys.pre_tanh] if squashed else keys

    # what subclasses define
    def _values(self, critic: Network, states: States, action: Tensor | None) -> Tensor:
        """What the critic writes: [M, K] of ``action``, or [M, K, A] of every action."""
        return evaluate(critic, self.critic_key, states, action)

    def _chosen(self, values: Tensor, action: Tensor) -> Tensor:
        """Of what :meth:`_values` gives those of the batch's actions, [M, K]."""
        return values

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

    def _has_behaviour(self, tensordict: TensorDictBase) -> bool:
        """Without a trace, what was stored before a tanh may be missing too."""
        squashed = self.target_kind not in TRACES and k.PRE_TANH in self.actor.out_keys
        known = not squashed or tensordict.get(self.tensor_keys.pre_tanh, None) is not None
        return known and super()._has_behaviour(tensordict)

    def _log_prob(self, policy: Distribution, tensordict: TensorDictBase, sites: Sites) -> Tensor:
        """log pi of the batch's actions, [M], from what was stored before the tanh where the policy has one."""
        if not isinstance(policy, TanhNormal):
            return policy.log_prob(sites.action)
        pre_tanh = at_sites(self._entry(tensordict, self.tensor_keys.pre_tanh), tensordict.ndim, self._window)
        return policy.log_prob_pre_tanh(cleared(pre_tanh, sites.valid))


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
