"""Estimators of action values: one operator, four traces."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import ReturnEstimator, _with
from offtrace.modules.returns import TraceName, make_trace, q_return


class _ActionEstimator(ReturnEstimator):
    """Targets for Q(x, a) on rollouts ``[*B, T]`` in TorchRL's layout.

    What a network is given for is computed; what is not given is read: ``"chosen_action_value"``
    ``[*B, T, 1]``, the expected value of the successor ``("next", "state_value")`` ``[*B, T, 1]``, and
    ``"target_log_prob"`` ``[*B, T]``. Writes ``"value_target"`` and ``"advantage"``, target minus chosen value,
    ``[*B, T, 1]``, without gradient.

    E_pi Q(x', .) is the exact sum where the critic writes ``"action_value"`` (``[*, A]``, or ``[*, K, A]`` for K
    critics); where it reads the action and writes ``"state_action_value"`` ``[*, K]``, it is the mean over
    ``num_samples`` fresh actions, or the value of the policy's deterministic action. Of K critics the smallest counts,
    at the batch's action and at the successor. Pass target networks to correct with target values.

    Args:
        gamma: discount per step.
        lmbda: trace decay in [0, 1].
        qvalue_network: the critic; a target network, usually.
        actor_network: a probabilistic TensorDict module, the target policy.
        num_samples: actions over which a continuous policy's value is averaged, or ``"mean"``.
        alpha: temperature: the successor's value is E_pi [Q - alpha log pi]. A value that is read is used as it is.
        action_dim: of ACER's root, see :func:`offtrace.modules.returns.retrace_trace`.
        validate: also check values: finite, log-probabilities of a discrete policy not above 0. Costs a device sync.

    Raises:
        ValueError: on a parameter out of range, or by ``validate``, on a value.
        KeyError: when an entry is missing, by its name.
    """

    _trace: TraceName
    _needs_behaviour = True

    def __init__(
        self,
        *,
        gamma: float,
        lmbda: float = 1.0,
        qvalue_network: TensorDictModuleBase | None = None,
        actor_network: TensorDictModuleBase | None = None,
        num_samples: int | Literal["mean"] = 1,
        alpha: float | Tensor = 0.0,
        action_dim: int = 1,
        validate: bool = False,
    ) -> None:
        if num_samples != "mean" and (isinstance(num_samples, str) or num_samples < 1):
            raise ValueError(f"num_samples must be at least 1, or 'mean', got {num_samples!r}")
        if qvalue_network is not None and actor_network is None:
            raise ValueError("a qvalue_network needs an actor_network too: the successor's value is that of its policy")
        super().__init__(
            gamma=gamma, value_network=qvalue_network, actor_network=actor_network, validate=validate, lmbda=lmbda
        )
        self.lmbda = lmbda
        self.num_samples = num_samples
        self.alpha = alpha
        self.action_dim = action_dim

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
        found += [names.target_log_prob] if actor is None else [names.action, *actor.in_keys]
        if self._needs_behaviour:
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
        chosen, following = self._promoted(
            tensordict, self._chosen(tensordict, used), self._following(tensordict, used)
        )
        trace = self._coefficients(tensordict, chosen)
        target = q_return(
            q_value=chosen.transpose(0, dim),
            next_state_value=following.transpose(0, dim),
            trace=trace.transpose(0, dim) if isinstance(trace, Tensor) else trace,
            **self._ends(tensordict, dim, chosen, following),
        ).transpose(0, dim)
        tensordict.set(names.value_target, target)
        advantage, valid = target - chosen, self._valid(tensordict, chosen)
        tensordict.set(names.advantage, advantage if valid is None else torch.where(valid, advantage, 0))
        return tensordict

    def _coefficients(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | float:
        log_pi = self._target_log_prob(tensordict, like)
        log_rho = self._log_rho(tensordict, log_pi) if self._needs_behaviour else None
        return make_trace(self._trace, log_rho=log_rho, log_pi=log_pi, lmbda=self.lmbda, action_dim=self.action_dim)

    @torch.no_grad()
    def _chosen(self, tensordict: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """Q(x, a), ``[*B, T, 1]``."""
        names, network = self.tensor_keys, self.value_network
        if network is None:
            return self._entry(tensordict, names.chosen_action_value, "qvalue_network").detach()
        action = self._entry(tensordict, names.action)
        out = self._call(network, tensordict.select(*network.in_keys), params)
        if self._enumerates():
            every = self._least_of_all(out, tensordict.ndim)
            if action.is_floating_point() or action.numel() != tensordict.numel():
                raise ValueError(
                    f"{names.action!r} must hold the indices of discrete actions, {list(tensordict.batch_size)}, got "
                    f"{action.dtype} {list(action.shape)}; of one-hot actions take argmax(-1)"
                )
            return every.gather(-1, action.long().view(*every.shape[:-1], 1))
        return self._written(out, names.state_action_value, "qvalue_network").amin(-1, keepdim=True)

    @torch.no_grad()
    def _following(self, tensordict: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """E_pi [Q - alpha log pi] at the successor, ``[*B, T, 1]``."""
        names, network, actor = self.tensor_keys, self.value_network, self.actor_network
        if network is None:
            return self._entry(tensordict, (k.NEXT, names.value), "qvalue_network").detach()
        states = self._successor(tensordict)
        dist = actor.get_dist(states.select(*actor.in_keys))
        if self._enumerates():
            every = self._least_of_all(self._call(network, states.select(*network.in_keys), params), tensordict.ndim)
            log_pi = dist.logits.log_softmax(-1)
            # an illegal action has probability 0 and log-probability -inf, and 0 times inf is NaN
            soft = every - self.alpha * log_pi.masked_fill(log_pi.isinf(), 0)
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

    def _least_of_all(self, out: TensorDictBase, ndim: int) -> Tensor:
        """``[*B, T, A]``, the smallest of K critics."""
        every = out.get(self.tensor_keys.action_value)
        return every.amin(-2) if every.ndim == ndim + 2 else every

    def _call(
        self, network: TensorDictModuleBase, inputs: TensorDictBase, params: TensorDictBase | None
    ) -> TensorDictBase:
        with _with(params, network):
            return network(inputs)


class Retrace(_ActionEstimator):
    __doc__ = f"""Retrace(lambda): c = lmbda min(1, pi/mu). Safe for any behaviour policy; on-policy it cuts nothing.

    Source: Munos et al. 2016, arXiv 1606.02647.

    {_ActionEstimator.__doc__}"""
    _trace = "retrace"


class ImportanceSampling(_ActionEstimator):
    __doc__ = f"""Per-decision importance sampling: c = lmbda pi/mu. Unbiased; its variance has no bound.

    Source: Precup, Sutton and Singh 2000.

    {_ActionEstimator.__doc__}"""
    _trace = "importance_sampling"


class TreeBackup(_ActionEstimator):
    __doc__ = f"""Tree backup: c = lmbda pi(a|x). Discrete actions only; needs no behaviour log-probabilities.

    Source: Precup, Sutton and Singh 2000.

    {_ActionEstimator.__doc__}"""
    _trace = "tree_backup"
    _needs_behaviour = False
    _only_discrete = True

    def _coefficients(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | float:
        action = tensordict.get(self.tensor_keys.action, None)
        if action is not None and action.is_floating_point():
            raise ValueError(
                "TreeBackup needs probabilities of discrete actions, and these actions are continuous "
                f"({action.dtype}): a density is no probability; use Retrace"
            )
        return super()._coefficients(tensordict, like)


class QLambda(_ActionEstimator):
    __doc__ = f"""Q(lambda): c = lmbda whatever the policies do. Needs no log-probabilities; may diverge.

    Source: Harutyunyan et al. 2016, arXiv 1602.04951.

    {_ActionEstimator.__doc__}"""
    _trace = "q_lambda"
    _needs_behaviour = False

    def _coefficients(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | float:
        return self.lmbda

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        return [key for key in super().in_keys if key != self.tensor_keys.target_log_prob]
