"""Return estimators on TensorDicts: TorchRL value estimators over the functions of :mod:`offtrace.modules.returns`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value import ValueEstimatorBase

from offtrace.modules import keys as k
from offtrace.modules.returns import vtrace


class VTrace(ValueEstimatorBase):
    """V-trace on rollouts ``[*B, T]`` in TorchRL's layout; the ratios are those of the actions in the batch.

    Networks you give are called; what you do not give is read from the TensorDict. With neither network it needs
    ``"state_value"``, ``("next", "state_value")`` ``[*B, T, 1]`` and ``"target_log_prob"`` ``[*B, T]``.

    Works alone, and as an instance in TorchRL's losses: ``loss.make_value_estimator(VTrace(...))`` for ``A2CLoss``,
    ``PPOLoss`` and relatives. A loss forwards its renamed keys to an instance at the next ``loss.set_keys``, and not
    all of them (A2C keeps ``sample_log_prob``, both keep ``action``): rename those on the instance.

    Reads ``"action_log_prob"`` (``sample_log_prob``), ``("next", "reward")``, ``("next", "done")``,
    ``("next", "terminated")``, and ``"valid"`` where there is one. Writes ``"advantage"`` and ``"value_target"``
    ``[*B, T, 1]``, without gradient. All names change by :meth:`set_keys`.

    Args:
        gamma: discount per step.
        value_network: writes ``"state_value"`` from the observation; called on the steps and on their true successors.
        actor_network: a probabilistic TensorDict module; gives the target log-probability of the batch's action.
        lmbda, rho_clip, c_clip, pg_rho_clip, leak: of :func:`offtrace.modules.returns.vtrace`.
        validate: also check values: finite, log-probabilities of a discrete policy not above 0. Costs a device sync.

    Raises:
        ValueError: on a parameter out of range, or by ``validate``, on a value.
        KeyError: when an entry is missing, by its name.

    Source: Espeholt et al. 2018, arXiv 1802.01561.
    """

    @dataclass
    class _AcceptedKeys:
        # listed in full: TorchRL accepts only names that stand in this class itself
        advantage: Any = k.ADVANTAGE
        value_target: Any = k.VALUE_TARGET
        value: Any = k.VALUE
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED
        steps_to_next_obs: Any = "steps_to_next_obs"
        sample_log_prob: Any = k.LOG_PROB
        action: Any = k.ACTION
        target_log_prob: Any = k.TARGET_LOG_PROB
        valid: Any = k.VALID

    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        gamma: float,
        value_network: TensorDictModuleBase | None = None,
        actor_network: TensorDictModuleBase | None = None,
        lmbda: float = 1.0,
        rho_clip: float = 1.0,
        c_clip: float = 1.0,
        pg_rho_clip: float = 1.0,
        leak: float = 1.0,
        validate: bool = False,
    ) -> None:
        for name, number in {"gamma": gamma, "lmbda": lmbda, "leak": leak}.items():
            if not 0 <= number <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {number}")
        if not 0 < c_clip <= rho_clip:
            raise ValueError(f"c_clip must be above 0 and at most rho_clip, {rho_clip}, got {c_clip}")
        super().__init__(value_network=value_network)
        self.gamma = gamma
        # not a submodule: the loss that uses this estimator owns the actor
        self.__dict__["actor_network"] = actor_network
        self.validate = validate
        self._options = {
            "lmbda": lmbda,
            "rho_clip": rho_clip,
            "c_clip": c_clip,
            "pg_rho_clip": pg_rho_clip,
            "leak": leak,
        }

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        names = self.tensor_keys
        ends = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        found = [names.sample_log_prob, *ends]
        network, actor = self.value_network, self.actor_network
        observed = [names.value] if network is None else list(network.in_keys)
        found += [*observed, *((k.NEXT, key) for key in observed)]
        found += [names.target_log_prob] if actor is None else [names.action, *actor.in_keys]
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
        """Adds advantage and value target to ``tensordict`` ``[*B, T]`` and returns it.

        Args:
            tensordict: the rollout.
            params: of the value network, where a functional loss keeps them.
            target_params: of the value network on the successors; ``params`` by default.
            time_dim: dimension of time; the one named ``"time"``, else the last.
        """
        names = self.tensor_keys
        dim = self._get_time_dim(time_dim, tensordict)
        value = self._value(tensordict, params)
        next_value = self._value(tensordict.get(k.NEXT), params if target_params is None else target_params)
        behaviour = tensordict.get(names.sample_log_prob, None)
        if behaviour is None:
            raise KeyError(f"{names.sample_log_prob!r}, the behaviour policy's log-probability, is missing")
        log_rho = self._log_prob(tensordict, value) - behaviour.view_as(value)

        def time_first(x: Tensor) -> Tensor:
            return x.transpose(0, dim)

        valid = tensordict.get(names.valid, None)
        reward = tensordict.get((k.NEXT, names.reward))
        if self.validate:
            self._check(reward=reward, value=value, log_rho=log_rho)
        out = vtrace(
            reward=time_first(reward),
            value=time_first(value),
            next_value=time_first(next_value),
            log_rho=time_first(log_rho),
            terminated=time_first(tensordict.get((k.NEXT, names.terminated))),
            done=time_first(tensordict.get((k.NEXT, names.done))),
            gamma=self.gamma,
            valid=None if valid is None else time_first(valid.view_as(value)),
            **self._options,
        )
        tensordict.set(names.advantage, time_first(out.advantage))
        tensordict.set(names.value_target, time_first(out.target))
        return tensordict

    def value_estimate(
        self, tensordict: TensorDictBase, target_params: TensorDictBase | None = None, **kwargs: Any
    ) -> Tensor:
        """The value target alone, ``[*B, T, 1]``; ``tensordict`` stays as it is."""
        out = self.forward(tensordict.clone(False), params=target_params, target_params=target_params)
        return out.get(self.tensor_keys.value_target)

    @torch.no_grad()
    def _value(self, tensordict: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        network = self.value_network
        if network is None:
            value = tensordict.get(self.tensor_keys.value, None)
            if value is None:
                raise KeyError(
                    f"{self.tensor_keys.value!r} is missing, and there is no value_network to compute it with"
                )
            return value.detach()
        inputs = tensordict.select(*network.in_keys)
        with nullcontext() if params is None else params.to_module(network), hold_out_net(network):
            return network(inputs).get(self.tensor_keys.value)

    @torch.no_grad()
    def _log_prob(self, tensordict: TensorDictBase, like: Tensor) -> Tensor:
        names, actor = self.tensor_keys, self.actor_network
        if actor is None:
            found = tensordict.get(names.target_log_prob, None)
            if found is None:
                raise KeyError(
                    f"{names.target_log_prob!r} is missing, and there is no actor_network to compute it with"
                )
        else:
            found = actor.get_dist(tensordict.select(*actor.in_keys)).log_prob(tensordict.get(names.action))
            if self.validate and not tensordict.get(names.action).is_floating_point() and bool((found > 1e-6).any()):
                raise ValueError("the log-probability of a discrete action must not be above 0")
        return found.detach().view_as(like)

    def _check(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name} must be finite, got {int((~torch.isfinite(tensor)).sum())} entries that are not"
                )
