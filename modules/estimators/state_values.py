"""Estimators of state values: V-trace, generalised advantages, n-step returns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import (
    Outcome,
    ReturnEstimator,
    _with,
    sample_size,
    valid_mean,
    zero_invalid,
)
from offtrace.modules.estimators.names import check_ranges
from offtrace.modules.returns import (
    clipped_fraction,
    gae,
    importance_trace,
    n_step_return,
    trace_reach,
    vtrace,
)

OF_THE_TRACE = ("trace_length", "contraction")
"""Diagnostics that are about the steps which are learnt from; the others are about ratios."""


class StateEstimate(NamedTuple):
    """``target`` and ``advantage`` [B, T], the latter 0 where not valid; diagnostics, detached scalars by their names.

    ``weight`` [B, T] is the ratio that multiplied the advantage, 0 where not valid.
    """

    target: Tensor
    advantage: Tensor
    weight: Tensor
    diagnostics: dict[str, Tensor]


class StateValueEstimator(ReturnEstimator):
    """Targets for V(x) and advantages, in a loss or alone on rollouts ``[*B, T]`` in TorchRL's layout.

    A loss calls :meth:`estimate` with the values that it has computed. A subclass of your own defines :meth:`compute`,
    says by ``uses_behaviour`` whether it needs the log-ratio to the behaviour policy, by ``ratio_cuts_trace`` whether a
    ratio of 0 leaves a step out, and, where the ratio multiplies its advantages, gives it in :meth:`weight`. It then
    works in every loss that learns state values, as an object or by its import path, and in TorchRL's:
    ``loss.make_value_estimator(estimator)`` for ``A2CLoss``, ``PPOLoss`` and relatives. (Such a loss forwards its
    renamed keys to an instance at the next ``loss.set_keys``, and not all of them: A2C keeps ``sample_log_prob``, both
    keep ``action``; rename those on the instance.)

    Alone, networks you give are called; what you do not give is read from the TensorDict. With neither network it needs
    ``"state_value"``, ``("next", "state_value")`` ``[*B, T, 1]`` and, with ratios, ``"target_log_prob"`` ``[*B, T]``.
    Reads ``("next", "reward")``, ``("next", "done")``, ``("next", "terminated")``, ``"valid"`` where there is one,
    and, with ratios, ``"action_log_prob"`` (``sample_log_prob``). Writes ``"advantage"`` and ``"value_target"``
    ``[*B, T, 1]``, without gradient. All names change by :meth:`set_keys`.

    Args:
        gamma: discount per step; None: that of the loss.
        value_network: writes ``"state_value"`` from the observation; called on the steps and on their true successors.
        actor_network: a probabilistic TensorDict module; gives the target log-probability of the batch's action.
            Without ratios it is not called, so that one estimator can take the other's place.
        validate: alone, also check values: finite, log-probabilities of a discrete policy not above 0. Costs a device
            sync.

    A loss has its own networks: there both are left out.

    Raises:
        ValueError: on a parameter out of range, or by ``validate``, on a value.
        KeyError: when an entry is missing, by its name.
    """

    kind = "state"
    rho_clip: float = math.inf
    """Clip of the ratio in the TD error; ``inf`` where there is none."""

    @property
    def truncates(self) -> bool:
        """Whether no ratio in the TD error is above ``rho_clip``, and that is a number."""
        return self.ratio_cuts_trace and self.rho_clip < math.inf

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of the diagnostics that :meth:`diagnose` gives."""
        return ["ess"]

    def compute(
        self,
        *,
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        gamma: float,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Target and advantage, time first: what a subclass defines.

        Args:
            reward, value, next_value, terminated, done, gamma, valid: as of :func:`offtrace.modules.returns.vtrace`,
                ``[T, *B]``.
            log_rho: log pi(a_t|x_t) - log mu(a_t|x_t), ``[T, *B]``; None may come where ``uses_behaviour`` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define compute, its target and advantage")

    def weight(self, log_rho: Tensor) -> Tensor:
        """What multiplies the advantage, in the shape of ``log_rho``: here 1."""
        return torch.ones_like(log_rho)

    @torch.no_grad()
    def diagnose(
        self, *, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the rollout is, time first: the effective sample size of pi/mu, NaN where unknown."""
        return {"ess": sample_size(log_rho, like=done, valid=valid)}

    @torch.no_grad()
    def estimate(
        self,
        outcome: Outcome,
        *,
        value: Tensor,
        next_value: Tensor,
        log_rho: Tensor | None,
        trace_mask: Tensor | None = None,
    ) -> StateEstimate:
        """All that a loss needs; no gradient flows. Here time changes its dimension.

        With a mask m, the ratio of a step counts as 0 where m_s is False, which for V-trace is::

            v_s - V(x_s) = m_s [delta_s + gamma k_s c_s (v_{s+1} - V(x_{s+1}))]        A_s = m_s A_s

        Such a step has its own value for a target and no advantage, and traces stop before it. The diagnostics in
        :data:`OF_THE_TRACE` are then about the other steps, and those of the ratios still about all.

        Args:
            outcome: of the steps, [B, T].
            value, next_value: V(x) and V(x') of the true successor, [B, T].
            log_rho: log pi - log mu, [B, T], 0 where not valid; None where it is neither known nor needed.
            trace_mask: bool [B, T], False where a step is left out; None leaves none out.

        Raises:
            ValueError: there is a mask, and no ratio cuts the trace.
        """
        reward, terminated, done, valid = outcome.time_first()
        dtype, gamma = value.dtype, self._known_gamma()
        log_rho = None if log_rho is None else log_rho.detach().to(dtype).t()
        diagnostics: dict[str, Tensor] = {}
        learnt = valid
        if trace_mask is not None:
            masked = self._masked(log_rho, trace_mask.t())
            diagnostics = self.diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=valid)
            log_rho, learnt = masked, trace_mask.t() if valid is None else trace_mask.t() & valid
        target, advantage = self._compute_valid(
            reward=reward.to(dtype),
            value=value.detach().t(),
            next_value=next_value.detach().t(),
            log_rho=log_rho,
            terminated=terminated,
            done=done,
            gamma=gamma,
            valid=valid,
        )
        weight = zero_invalid(self.weight(torch.zeros_like(target) if log_rho is None else log_rho), valid)
        known = self.diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=learnt)
        diagnostics |= {key: x for key, x in known.items() if trace_mask is None or key in OF_THE_TRACE}
        return StateEstimate(target.t(), advantage.t(), weight.t(), diagnostics)

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        names = self.tensor_keys
        found = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        network, actor = self.value_network, self.actor_network
        observed = [names.value] if network is None else list(network.in_keys)
        found += [*observed, *((k.NEXT, key) for key in observed)]
        if self.uses_behaviour:
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
        next_value = self._state_value(tensordict, used, successor=True)
        value, next_value = self._promoted(tensordict, value, next_value)
        log_rho = None
        if self.uses_behaviour:
            log_rho = self._log_rho(tensordict, self._target_log_prob(tensordict, value)).transpose(0, dim)
        target, advantage = self._compute_valid(
            value=value.transpose(0, dim),
            next_value=next_value.transpose(0, dim),
            log_rho=log_rho,
            **self._ends(tensordict, dim, value, next_value),
        )
        tensordict.set(names.advantage, advantage.transpose(0, dim))
        tensordict.set(names.value_target, target.transpose(0, dim))
        return tensordict

    @torch.no_grad()
    def _compute_valid(self, *, log_rho: Tensor | None, valid: Tensor | None, **known: Any) -> tuple[Tensor, Tensor]:
        """What :meth:`compute` gives, of the right shape; steps that are not valid have no ratio and no advantage."""
        if log_rho is not None:
            log_rho = zero_invalid(log_rho, valid)
        found = self.compute(log_rho=log_rho, valid=valid, **known)  # type: ignore[arg-type]
        target, advantage = (x.detach() for x in found)
        if target.shape != known["value"].shape or advantage.shape != known["value"].shape:
            raise ValueError(
                f"{type(self).__name__}.compute must give target and advantage of the values' shape, "
                f"{list(known['value'].shape)}, got {list(target.shape)} and {list(advantage.shape)}"
            )
        return target, zero_invalid(advantage, valid)

    @torch.no_grad()
    def _state_value(
        self, tensordict: TensorDictBase, params: TensorDictBase | None, *, successor: bool = False
    ) -> Tensor:
        """V(x), or V(x'), ``[*B, T, 1]``."""
        network, key = self.value_network, self.tensor_keys.value
        if network is None:
            return self._entry(tensordict, (k.NEXT, key) if successor else key, "value_network").detach()
        inputs = (self._successor(tensordict) if successor else tensordict).select(*network.in_keys)
        with _with(params, network):
            return self._written(network(inputs), self.tensor_keys.value, "value_network")


class VTrace(StateValueEstimator):
    __doc__ = f"""V-trace: :func:`offtrace.modules.returns.vtrace` with the ratios of the batch's own actions.

    Source: Espeholt et al. 2018, arXiv 1802.01561.

    Args:
        lmbda, rho_clip, c_clip, pg_rho_clip, leak: of that function; all three clips ``inf`` is plain importance
            sampling: unbiased, its variance has no bound.

    {StateValueEstimator.__doc__}"""
    ratio_cuts_trace = True

    def __init__(
        self,
        *,
        lmbda: float = 1.0,
        rho_clip: float = 1.0,
        c_clip: float = 1.0,
        pg_rho_clip: float = 1.0,
        leak: float = 1.0,
        **options: Any,
    ) -> None:
        check_ranges(lmbda=lmbda, leak=leak, rho_clip=rho_clip, c_clip=c_clip, pg_rho_clip=pg_rho_clip)
        super().__init__(**options)
        self.lmbda, self.leak = lmbda, leak
        self.rho_clip, self.c_clip, self.pg_rho_clip = rho_clip, c_clip, pg_rho_clip

    @property
    def truncates(self) -> bool:
        """As :attr:`StateValueEstimator.truncates`; not where the ratio leaks."""
        return super().truncates and self.leak == 1

    @property
    def _clips(self) -> dict[str, float]:
        """Diagnostic by diagnostic the limit above which ratios count; none where nothing is clipped at all."""
        clips = {"rho_clipped": self.rho_clip, "c_clipped": self.c_clip, "pg_rho_clipped": self.pg_rho_clip}
        return {} if min(clips.values()) == math.inf else clips

    @property
    def diagnostic_keys(self) -> list[str]:
        """Fractions of ratios above the clips, ``trace_length`` in steps and ``contraction``, besides ``ess``."""
        return ["ess", "trace_length", "contraction", *self._clips]

    def compute(self, **tensors: Any) -> tuple[Tensor, Tensor]:
        """V-trace."""
        return vtrace(
            lmbda=self.lmbda,
            rho_clip=self.rho_clip,
            c_clip=self.c_clip,
            pg_rho_clip=self.pg_rho_clip,
            leak=self.leak,
            **tensors,
        )

    def weight(self, log_rho: Tensor) -> Tensor:
        """The ratio, clipped at ``pg_rho_clip`` and leaking."""
        return self._leaking(importance_trace(log_rho=log_rho), self.pg_rho_clip)

    @torch.no_grad()
    def diagnose(
        self, *, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the rollout is, how much is clipped, and how far the trace reaches."""
        assert log_rho is not None
        out = super().diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        fractions: dict[float, Tensor] = {}
        for name, limit in self._clips.items():
            if limit not in fractions:  # usually they are all the same
                fractions[limit] = clipped_fraction(log_rho, limit, valid=valid)
            out[name] = fractions[limit]
        ratio = importance_trace(log_rho=log_rho)
        rho, c = self._leaking(ratio, self.rho_clip), self.lmbda * self._leaking(ratio, self.c_clip)
        bounded = self.leak == 1 and self.c_clip <= 1
        reach = trace_reach(trace=c, done=done, gamma=gamma, rho=rho, valid=valid, bounded=bounded)
        return out | {"trace_length": reach.length, "contraction": reach.contraction}

    def _leaking(self, ratio: Tensor, limit: float) -> Tensor:
        clipped = ratio.clamp(max=limit)
        return clipped if self.leak == 1 else self.leak * clipped + (1 - self.leak) * ratio


class GAE(StateValueEstimator):
    __doc__ = f"""TD(lambda) targets and generalised advantages: V-trace with every ratio 1.

    Source: Schulman et al. 2016, arXiv 1506.02438.

    Args:
        lmbda: trace decay in [0, 1].

    {StateValueEstimator.__doc__}"""
    uses_behaviour = False

    def __init__(self, *, lmbda: float = 1.0, **options: Any) -> None:
        check_ranges(lmbda=lmbda)
        super().__init__(**options)
        self.lmbda = lmbda

    @property
    def diagnostic_keys(self) -> list[str]:
        """``trace_length`` in steps and ``contraction``, besides ``ess``."""
        return ["ess", "trace_length", "contraction"]

    def compute(self, *, log_rho: Tensor | None = None, **tensors: Any) -> tuple[Tensor, Tensor]:
        """Generalised advantages."""
        return gae(lmbda=self.lmbda, **tensors)

    @torch.no_grad()
    def diagnose(
        self, *, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the rollout is, and how far the trace reaches."""
        out = super().diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        ones = _ones(log_rho, done)
        reach = trace_reach(trace=self.lmbda * ones, done=done, gamma=gamma, rho=ones, valid=valid, bounded=True)
        return out | {"trace_length": reach.length, "contraction": reach.contraction}


class WeightedGAE(GAE):
    __doc__ = f"""Generalised advantages, each times the step's own min(pg_rho_clip, pi/mu): ``"one_step"``.

    The targets are those of the behaviour policy's values; the gradient is weighted by one step.

    Source: Espeholt et al. 2018, arXiv 1802.01561, table 2: "1-step importance sampling".

    Args:
        lmbda: trace decay in [0, 1].
        pg_rho_clip: clip of the ratio.

    {StateValueEstimator.__doc__}"""
    uses_behaviour = True

    def __init__(self, *, lmbda: float = 1.0, pg_rho_clip: float = 1.0, **options: Any) -> None:
        check_ranges(pg_rho_clip=pg_rho_clip)
        super().__init__(lmbda=lmbda, **options)
        self.pg_rho_clip = pg_rho_clip

    @property
    def diagnostic_keys(self) -> list[str]:
        """``pg_rho_clipped``, the fraction of ratios above the clip, besides those of :class:`GAE`."""
        return [*super().diagnostic_keys, "pg_rho_clipped"]

    def compute(self, *, log_rho: Tensor | None = None, **tensors: Any) -> tuple[Tensor, Tensor]:
        """Weighted advantages."""
        assert log_rho is not None
        target, advantage = super().compute(**tensors)
        return target, self.weight(log_rho) * advantage

    def weight(self, log_rho: Tensor) -> Tensor:
        """The ratio, clipped at ``pg_rho_clip``."""
        return importance_trace(log_rho=log_rho).clamp(max=self.pg_rho_clip)

    def diagnose(
        self, *, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Those of :class:`GAE`, and ``pg_rho_clipped``."""
        assert log_rho is not None
        out = super().diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        return out | {"pg_rho_clipped": clipped_fraction(log_rho, self.pg_rho_clip, valid=valid)}


class NStepReturn(StateValueEstimator):
    __doc__ = f"""n-step returns of every step, and what they exceed the value by: no ratios.

    Source: Sutton 1988; Watkins 1989; with the end of the rollout for n, Mnih et al. 2016, arXiv 1602.01783.

    Args:
        n: number of steps, at least 1.

    {StateValueEstimator.__doc__}"""
    uses_behaviour = False

    def __init__(self, *, n: int = 5, **options: Any) -> None:
        check_ranges(n=n)
        super().__init__(**options)
        self.n = n

    @property
    def diagnostic_keys(self) -> list[str]:
        """``trace_length``, steps of the window beyond the first, and ``contraction``, besides ``ess``."""
        return ["ess", "trace_length", "contraction"]

    def compute(self, *, value: Tensor, log_rho: Tensor | None = None, **tensors: Any) -> tuple[Tensor, Tensor]:
        """n-step returns."""
        target = n_step_return(n=self.n, **tensors)
        return target, target - value

    @torch.no_grad()
    def diagnose(
        self, *, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the rollout is, and how long the windows are."""
        out = super().diagnose(log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        ones = _ones(log_rho, done)
        # of rewards 1 without a discount, the return is the number of steps
        length = n_step_return(
            reward=ones, next_value=0 * ones, terminated=done, done=done, gamma=1.0, n=self.n, valid=valid
        )
        contraction = 1 - valid_mean(1 - gamma**length, valid)
        return out | {"trace_length": valid_mean(length - 1, valid), "contraction": contraction}


def _ones(log_rho: Tensor | None, done: Tensor) -> Tensor:
    if log_rho is not None:
        return torch.ones_like(log_rho)
    return torch.ones(done.shape, device=done.device)
