"""Estimators of state values: V-trace and the lambda return."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import ReturnEstimator
from offtrace.modules.returns import gae, vtrace
from offtrace.modules.returns.checks import check_clips


class _StateEstimator(ReturnEstimator):
    _off_policy: bool

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        names = self.tensor_keys
        found = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        network, actor = self.value_network, self.actor_network
        observed = [names.value] if network is None else list(network.in_keys)
        found += [*observed, *((k.NEXT, key) for key in observed)]
        if self._off_policy:
            found += [names.sample_log_prob]
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
        value = self._state_value(tensordict, params)
        used = params if target_params is None else target_params
        value, following = self._promoted(tensordict, value, self._state_value(tensordict, used, successor=True))
        extra = {}
        if self._off_policy:
            log_rho = self._log_rho(tensordict, self._target_log_prob(tensordict, value))
            extra["log_rho"] = log_rho.transpose(0, dim)
        ends = self._ends(tensordict, dim, value, following)
        target, advantage = self._compute(
            value=value.transpose(0, dim), next_value=following.transpose(0, dim), **ends, **extra
        )
        tensordict.set(names.advantage, advantage.transpose(0, dim))
        tensordict.set(names.value_target, target.transpose(0, dim))
        return tensordict

    def _compute(self, **tensors: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class VTrace(_StateEstimator):
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
        lmbda, rho_clip, c_clip, pg_rho_clip, leak: of :func:`offtrace.modules.returns.vtrace`; all three clips ``inf``
            is plain importance sampling.
        validate: also check values: finite, log-probabilities of a discrete policy not above 0. Costs a device sync.

    Raises:
        ValueError: on a parameter out of range, or by ``validate``, on a value.
        KeyError: when an entry is missing, by its name.

    Source: Espeholt et al. 2018, arXiv 1802.01561.
    """

    _off_policy = True

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
        check_clips(rho_clip=rho_clip, c_clip=c_clip, pg_rho_clip=pg_rho_clip)
        super().__init__(
            gamma=gamma, value_network=value_network, actor_network=actor_network, validate=validate, lmbda=lmbda,
            leak=leak,
        )  # fmt: skip
        self._options: dict[str, Any] = {
            "lmbda": lmbda, "rho_clip": rho_clip, "c_clip": c_clip, "pg_rho_clip": pg_rho_clip, "leak": leak,
        }  # fmt: skip

    def _compute(self, **tensors: Any) -> tuple[Tensor, Tensor]:
        return vtrace(**tensors, **self._options)


class LambdaReturn(_StateEstimator):
    """TD(lambda) targets and generalised advantages: the on-policy relative of :class:`VTrace`, used like it.

    Needs no log-probabilities. ``actor_network`` is accepted, so that one estimator can take the other's place, and is
    not called.

    Args:
        gamma: discount per step.
        lmbda: trace decay in [0, 1].
        value_network, validate: as of :class:`VTrace`.
        actor_network: ignored.

    Raises:
        ValueError, KeyError: as :class:`VTrace`.

    Source: Schulman et al. 2016, arXiv 1506.02438.
    """

    _off_policy = False

    def __init__(
        self,
        *,
        gamma: float,
        lmbda: float = 1.0,
        value_network: TensorDictModuleBase | None = None,
        actor_network: TensorDictModuleBase | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__(gamma=gamma, value_network=value_network, actor_network=None, validate=validate, lmbda=lmbda)
        self.lmbda = lmbda

    def _compute(self, **tensors: Any) -> tuple[Tensor, Tensor]:
        return gae(**tensors, lmbda=self.lmbda)
