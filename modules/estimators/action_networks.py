"""An estimator of action values on its own: networks and entries of a TensorDict in, targets out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import ReturnEstimator, _with, zero_invalid


class ActionValueForward(ReturnEstimator):
    """What :class:`offtrace.modules.estimators.ActionValueEstimator` does without a loss."""

    uses_log_pi: bool = True
    compute: Callable[..., Tensor]
    """The target, time first."""

    def __init__(
        self,
        *,
        gamma: float | None = None,
        qvalue_network: TensorDictModuleBase | None = None,
        actor_network: TensorDictModuleBase | None = None,
        num_samples: int | Literal["mean"] = 1,
        alpha: float | Tensor = 0.0,
        validate: bool = False,
    ) -> None:
        if num_samples != "mean" and (isinstance(num_samples, str) or num_samples < 1):
            raise ValueError(f"num_samples must be at least 1, or 'mean', got {num_samples!r}")
        if qvalue_network is not None and actor_network is None:
            raise ValueError("a qvalue_network needs an actor_network too: the successor's value is that of its policy")
        super().__init__(gamma=gamma, value_network=qvalue_network, actor_network=actor_network, validate=validate)
        self.num_samples = num_samples
        self.alpha = alpha

    def check_bound(self, owner: str) -> None:
        """Nor samples and a temperature of its own.

        Raises:
            ValueError: on those.
        """
        super().check_bound(owner)
        alpha = self.alpha if isinstance(self.alpha, float | int) else 1.0
        if self.num_samples != 1 or alpha != 0:
            raise ValueError(
                f"{owner} draws its own actions at its own temperature: leave num_samples and alpha of its estimator "
                f"{type(self).__name__} out"
            )

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        names = self.tensor_keys
        found = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        network, actor = self.value_network, self.actor_network
        if network is None:
            found += [names.chosen_action_value, (k.NEXT, names.value)]
        else:
            states = [key for key in (*network.in_keys, *actor.in_keys) if key != names.action]
            found += [names.action, *states, *((k.NEXT, key) for key in states)]
        if self.uses_log_pi or self.uses_behaviour:
            found += [names.target_log_prob] if actor is None else [names.action, *actor.in_keys]
        if self.uses_behaviour:
            found.append(names.sample_log_prob)
        return list(dict.fromkeys(found))

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Adds value target and advantage to ``tensordict`` ``[*B, T]`` and returns it.

        Args:
            tensordict: the rollout.
            params: of the critic, where a functional loss keeps them.
            target_params: of the critic, in place of ``params``, at the batch's action and at the successor.
            time_dim: dimension of time; the one named ``"time"``, else the last.
        """
        names = self.tensor_keys
        dim = self._get_time_dim(time_dim, tensordict)
        used = params if target_params is None else target_params
        q_value, next_value = self._promoted(
            tensordict, self._q_value(tensordict, used), self._next_value(tensordict, used)
        )
        log_pi, log_rho = self._log_probs(tensordict, q_value)
        target = self.compute(
            q_value=q_value.transpose(0, dim),
            next_value=next_value.transpose(0, dim),
            log_pi=None if log_pi is None else log_pi.transpose(0, dim),
            log_rho=None if log_rho is None else log_rho.transpose(0, dim),
            **self._ends(tensordict, dim, q_value, next_value),
        )
        target = target.detach().transpose(0, dim)
        tensordict.set(names.value_target, target)
        tensordict.set(names.advantage, zero_invalid(target - q_value, self._valid(tensordict, q_value)))
        return tensordict

    def _log_probs(self, tensordict: TensorDictBase, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """log pi and log pi - log mu, each where it is needed."""
        if self.only_discrete:
            action = tensordict.get(self.tensor_keys.action, None)
            if action is not None and action.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} needs probabilities of discrete actions, and these actions are continuous "
                    f"({action.dtype}): a density is no probability; use Retrace"
                )
        if not (self.uses_log_pi or self.uses_behaviour):
            return None, None
        log_pi = self._target_log_prob(tensordict, like)
        log_rho = self._log_rho(tensordict, log_pi) if self.uses_behaviour else None
        valid = self._valid(tensordict, like)
        return zero_invalid(log_pi, valid), None if log_rho is None else zero_invalid(log_rho, valid)

    @torch.no_grad()
    def _q_value(self, tensordict: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """Q(x, a), ``[*B, T, 1]``."""
        names, network = self.tensor_keys, self.value_network
        if network is None:
            return self._entry(tensordict, names.chosen_action_value, "qvalue_network").detach()
        action = self._entry(tensordict, names.action)
        out = self._call(network, tensordict.select(*network.in_keys), params)
        if self._enumerates():
            q_values = self._min_q_values(out, tensordict.ndim)
            if action.is_floating_point() or action.numel() != tensordict.numel():
                raise ValueError(
                    f"{names.action!r} must hold the indices of discrete actions, {list(tensordict.batch_size)}, got "
                    f"{action.dtype} {list(action.shape)}; of one-hot actions take argmax(-1)"
                )
            return q_values.gather(-1, action.long().view(*q_values.shape[:-1], 1))
        return self._written(out, names.state_action_value, "qvalue_network").amin(-1, keepdim=True)

    @torch.no_grad()
    def _next_value(self, tensordict: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """E_pi [Q - alpha log pi] at the successor, ``[*B, T, 1]``."""
        names, network, actor = self.tensor_keys, self.value_network, self.actor_network
        if network is None:
            return self._entry(tensordict, (k.NEXT, names.value), "qvalue_network").detach()
        states = self._successor(tensordict)
        dist = actor.get_dist(states.select(*actor.in_keys))
        if self._enumerates():
            out = self._call(network, states.select(*network.in_keys), params)
            q_values = self._min_q_values(out, tensordict.ndim)
            log_pi = dist.logits.log_softmax(-1)
            # an illegal action has probability 0 and log-probability -inf, and 0 times inf is NaN
            soft = q_values - self.alpha * log_pi.masked_fill(log_pi.isinf(), 0)
            return (log_pi.exp() * soft).sum(-1, keepdim=True)
        if self.num_samples == "mean":
            action = dist.deterministic_sample.unsqueeze(0)
        else:
            action = dist.sample(torch.Size([self.num_samples]))
        observed = states.select(*(key for key in network.in_keys if key != names.action))
        inputs = observed.expand(len(action), *observed.batch_size).clone(False).set(names.action, action)
        out = self._call(network, inputs, params)
        value = self._written(out, names.state_action_value, "qvalue_network").amin(-1, keepdim=True)
        if isinstance(self.alpha, Tensor) or self.alpha != 0:
            value = value - self.alpha * dist.log_prob(action).unsqueeze(-1)
        return value.mean(0)

    def _enumerates(self) -> bool:
        return self.value_network is not None and self.tensor_keys.action_value in self.value_network.out_keys

    def _min_q_values(self, out: TensorDictBase, ndim: int) -> Tensor:
        """``[*B, T, A]``, of each action the smallest of K critics' values."""
        q_values = out.get(self.tensor_keys.action_value)
        return q_values.amin(-2) if q_values.ndim == ndim + 2 else q_values

    def _call(
        self, network: TensorDictModuleBase, inputs: TensorDictBase, params: TensorDictBase | None
    ) -> TensorDictBase:
        with _with(params, network):
            return network(inputs)
