"""Estimators of action values: one-step and n-step returns, and one operator with four traces."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from offtrace.modules.estimators.action_networks import ActionValueForward
from offtrace.modules.estimators.base import (
    Outcome,
    sample_size,
    valid_mean,
    zero_invalid,
)
from offtrace.modules.estimators.names import check_ranges
from offtrace.modules.estimators.selection import Selection, every_step, first_window
from offtrace.modules.returns import (
    categorical_projection,
    clipped_fraction,
    distributional_return,
    importance_trace,
    n_step_return,
    q_return,
    retrace_trace,
    trace_reach,
    tree_backup_trace,
)


class ActionEstimate(NamedTuple):
    """``target`` [M], or its distribution [M, atoms]; ``diagnostics``, detached scalars by their names."""

    target: Tensor
    diagnostics: dict[str, Tensor]


class ActionValueEstimator(ActionValueForward):
    """Targets for Q(x, a), in a loss or alone on rollouts ``[*B, T]`` in TorchRL's layout.

    A loss asks in this order: :meth:`select`, which steps it learns from, before it runs any
    network; and :meth:`estimate`, with the values that it has computed for them. A subclass of your own defines
    :meth:`compute`, of the steps of whole sequences, and says what it needs:

    * ``uses_behaviour``: the log-ratio to the behaviour policy, ``log_rho``;
    * ``uses_log_pi``: the target policy's log-probability of the batch's action;
    * ``uses_q_value``: the target critic's value of the batch's action;
    * ``only_discrete``: probabilities of discrete actions.

    What it does not use is None where the loss does not have it. It then works in every loss that learns action values,
    as an object or by its import path.

    Alone, networks you give are called; what you do not give is read: ``"chosen_action_value"`` ``[*B, T, 1]``, the
    expected value of the successor ``("next", "state_value")`` ``[*B, T, 1]``, and ``"target_log_prob"`` ``[*B, T]``.
    Writes ``"value_target"`` and ``"advantage"``, target minus Q(x, a), ``[*B, T, 1]``, without gradient. There
    E_pi Q(x', .) is the exact sum where the critic writes ``"action_value"`` (``[*, A]``, or ``[*, K, A]`` for K
    critics); where it reads the action and writes ``"state_action_value"`` ``[*, K]``, it is the mean over
    ``num_samples`` fresh actions, or the value of the policy's deterministic action. Of K critics the smallest counts,
    at the batch's action and at the successor. Pass target networks to correct with target values.

    Args:
        gamma: discount per step; None: that of the loss.
        qvalue_network: the critic; a target network, usually.
        actor_network: a probabilistic TensorDict module, the target policy.
        num_samples: actions over which a continuous policy's value is averaged, or ``"mean"``.
        alpha: temperature: the successor's value is E_pi [Q - alpha log pi]. A value that is read is used as it is.
        validate: alone, also check values: finite, log-probabilities of a discrete policy not above 0. Costs a device
            sync.

    A loss has its own networks, samples and temperature: there all but ``gamma`` are left out.

    Raises:
        ValueError: on a parameter out of range, or by ``validate``, on a value.
        KeyError: when an entry is missing, by its name.
    """

    kind = "action"
    uses_q_value: bool = True

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of the diagnostics that :meth:`estimate` gives."""
        return ["ess"]

    def sequence_length(self, default: int) -> int:
        """How many steps a sequence should have: 1 means transitions; ``default`` where any length will do."""
        return default

    def steps_per_sequence(self, length: int) -> int:
        """How many steps of a sequence of ``length`` are learnt from."""
        return length

    def select(self, outcome: Outcome, *, gamma: float) -> Selection:
        """The steps that are learnt from, and where they bootstrap: here every step, from its own successor."""
        return every_step(outcome, gamma=gamma)

    def compute(
        self,
        *,
        reward: Tensor,
        q_value: Tensor,
        next_value: Tensor,
        log_pi: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        gamma: float,
        valid: Tensor | None,
        support: Tensor | None = None,
    ) -> Tensor:
        """The target, time first: what a subclass defines.

        Args:
            reward, terminated, done, gamma, valid: as of :func:`offtrace.modules.returns.q_return`, ``[T, *B]``.
            q_value: Q(x_t, a_t), ``[T, *B]``, or its distribution ``[T, *B, atoms]``.
            next_value: E_pi Q(x'_t, .) at the true successor, or the policy's mixture of distributions.
            log_pi: log pi(a_t|x_t).
            log_rho: log pi(a_t|x_t) - log mu(a_t|x_t).
            support: the atoms; passed for distributions only.

        Returns:
            ``[T, *B]``, or ``[T, *B, atoms]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define compute, the target of whole sequences")

    @torch.no_grad()
    def diagnose(
        self, *, log_pi: Tensor | None, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the sequences are, time first: the effective sample size of pi/mu, NaN where unknown."""
        return {"ess": sample_size(log_rho, like=done, valid=valid)}

    @torch.no_grad()
    def estimate(
        self,
        selection: Selection,
        *,
        next_value: Tensor,
        q_value: Tensor | None = None,
        log_pi: Tensor | None = None,
        log_rho: Tensor | None = None,
        support: Tensor | None = None,
        trace_mask: Tensor | None = None,
    ) -> ActionEstimate:
        """Target and diagnostics of the selected steps; no gradient flows. Here time changes its dimension.

        With a mask, the ratio of a step's action counts as 0 where it is False, so its coefficient c_t is 0: the sums
        that began before it end there. The step's own target has no coefficient of its own action, and stays. The
        diagnostics are about the other steps.

        Args:
            selection: what :meth:`select` gave.
            next_value: value of the policy where the steps bootstrap, [M], or its distribution [M, atoms].
            q_value: the target critic's value of the batch's actions, [M], or its distribution [M, atoms].
            log_pi, log_rho: log pi and log pi - log mu of the batch's actions, [M].
            support: the atoms.
            trace_mask: bool [M], False where the trace is cut; None cuts none.

        Raises:
            ValueError: there is a mask, and no ratio cuts the trace.
        """
        shape, dtype = selection.outcome.reward.shape, selection.outcome.reward.dtype
        reward, terminated, done, valid = selection.outcome.time_first()

        def sequences(x: Tensor | None) -> Any:
            """[T, N, ...] of [M, ...]; under autocast values come in half precision."""
            return None if x is None else x.detach().to(dtype).unflatten(0, shape).transpose(0, 1)

        logs: dict[str, Any] = {"log_pi": log_pi, "log_rho": log_rho}
        logs = {name: None if x is None else zero_invalid(sequences(x), valid) for name, x in logs.items()}
        kept = valid
        if trace_mask is not None:
            mask = trace_mask.unflatten(0, shape).transpose(0, 1)
            logs["log_rho"] = self._masked(logs["log_rho"], mask)
            kept = mask if valid is None else mask & valid
        target = self.compute(
            reward=reward,
            q_value=sequences(q_value),
            next_value=sequences(next_value),
            terminated=terminated,
            done=done,
            gamma=self._known_gamma(),
            valid=valid,
            **logs,
            **({} if support is None else {"support": support}),
        )
        diagnostics = self.diagnose(**logs, done=done, gamma=self._known_gamma(), valid=kept)
        return ActionEstimate(target.transpose(0, 1).flatten(0, 1), diagnostics)


class NStep(ActionValueEstimator):
    __doc__ = f"""n rewards and the value behind them, not corrected for being off-policy.

    A loss learns from the first step of each sequence; the window is cut at an episode's end and before a step that is
    not valid. With n 1 it is :class:`OneStep`, and learns from every step. Alone it gives the returns of every step,
    :func:`offtrace.modules.returns.n_step_return`.

    Source: Sutton 1988; Watkins 1989.

    Args:
        n: number of steps, at least 1.

    {ActionValueEstimator.__doc__}"""
    uses_behaviour = False
    uses_log_pi = False
    uses_q_value = False

    def __init__(self, *, n: int = 5, **options: Any) -> None:
        check_ranges(n=n)
        super().__init__(**options)
        self.n = n

    @property
    def diagnostic_keys(self) -> list[str]:
        """``trace_length``, steps of the window beyond the first, and ``contraction``, besides ``ess``."""
        return ["ess", "trace_length", "contraction"]

    def sequence_length(self, default: int) -> int:
        """n."""
        return self.n

    def steps_per_sequence(self, length: int) -> int:
        """The first; with n 1 all."""
        return length if self.n == 1 else 1

    def select(self, outcome: Outcome, *, gamma: float) -> Selection:
        """The first step of each sequence, and the end of its window; with n 1 every step, from its own successor."""
        if self.n == 1:
            return every_step(outcome, gamma=gamma)
        return first_window(outcome, gamma=gamma, n=self.n)

    def compute(self, *, reward: Tensor, next_value: Tensor, **known: Any) -> Tensor:
        """The n-step return of every step, ``[T, *B]``."""
        ends = {name: known[name] for name in ("terminated", "done", "gamma", "valid")}
        return n_step_return(reward=reward, next_value=next_value, n=self.n, **ends)

    @torch.no_grad()
    def estimate(
        self,
        selection: Selection,
        *,
        next_value: Tensor,
        q_value: Tensor | None = None,
        log_pi: Tensor | None = None,
        log_rho: Tensor | None = None,
        support: Tensor | None = None,
        trace_mask: Tensor | None = None,
    ) -> ActionEstimate:
        """``reward + discount * next_value`` of the selected steps, projected on the ``support`` of a distribution.

        Raises:
            ValueError: there is a ``trace_mask``; no ratio cuts a window.
        """
        if trace_mask is not None:
            self._masked(log_rho, trace_mask)
        reward, discount = selection.reward, selection.discount
        if support is None:
            target = torch.addcmul(reward, discount, next_value)
        else:
            atoms = reward.unsqueeze(-1) + discount.unsqueeze(-1) * support
            target = categorical_projection(atoms=atoms, probs=next_value.to(atoms.dtype), support=support)
        return ActionEstimate(target, self._diagnose_windows(selection, log_rho))

    def _diagnose_windows(self, selection: Selection, log_rho: Tensor | None) -> dict[str, Tensor]:
        reward, valid, gamma = selection.reward, selection.valid, self._known_gamma()
        known = None if log_rho is None else zero_invalid(log_rho.detach(), valid)
        if selection.length is None:
            length, contraction = reward.new_zeros(()), reward.new_full((), gamma)
        else:
            steps = selection.length.to(reward.dtype)
            length, contraction = valid_mean(steps - 1, valid), 1 - valid_mean(1 - gamma**steps, valid)
        return {"ess": sample_size(known, like=reward, valid=valid), "trace_length": length, "contraction": contraction}


class OneStep(NStep):
    __doc__ = f"""The reward and the value of the successor: what transitions can give. Needs no correction.

    {ActionValueEstimator.__doc__}"""

    def __init__(self, **options: Any) -> None:
        super().__init__(n=1, **options)


class TraceEstimator(ActionValueEstimator):
    """The operator of all traces, :func:`offtrace.modules.returns.q_return`, or its relative for distributions.

    A subclass of your own defines :meth:`trace`; where no coefficient exceeds 1 it may say ``bounded``, and where none
    exceeds the ratio pi/mu, ``contracts``: then the modulus of the operator is a diagnostic too.

    Source: Munos et al. 2016, arXiv 1606.02647.
    """

    __doc__ = f"{__doc__}\n    {ActionValueEstimator.__doc__}\n"

    bounded: bool = False
    contracts: bool = False

    def __init__(self, *, lmbda: float = 1.0, **options: Any) -> None:
        check_ranges(lmbda=lmbda)
        super().__init__(**options)
        self.lmbda = lmbda

    @property
    def diagnostic_keys(self) -> list[str]:
        """``trace_length`` in steps and, of what contracts, ``contraction``, besides ``ess``."""
        return ["ess", "trace_length", *(["contraction"] if self.contracts else [])]

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        """The coefficient c_t of the action at t, ``[T, *B]``, or one number for all: what a subclass defines.

        Args:
            log_pi: log pi(a_t|x_t), ``[T, *B]``.
            log_rho: log pi(a_t|x_t) - log mu(a_t|x_t), ``[T, *B]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its trace")

    def compute(
        self,
        *,
        reward: Tensor,
        q_value: Tensor,
        next_value: Tensor,
        log_pi: Tensor,
        log_rho: Tensor,
        terminated: Tensor,
        done: Tensor,
        gamma: float,
        valid: Tensor | None,
        support: Tensor | None = None,
    ) -> Tensor:
        """The operator of all traces."""
        trace = self.trace(log_pi=log_pi, log_rho=log_rho)
        known: dict[str, Any] = {"reward": reward, "trace": trace, "terminated": terminated, "done": done}
        known |= {"gamma": gamma, "valid": valid}
        if support is None:
            return q_return(q_value=q_value, next_state_value=next_value, **known)
        return distributional_return(q_dist=q_value, next_state_dist=next_value, support=support, **known)

    @torch.no_grad()
    def diagnose(
        self, *, log_pi: Tensor | None, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """How far off-policy the sequences are, and how far the trace reaches in them."""
        out = super().diagnose(log_pi=log_pi, log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        trace = self.trace(log_pi=log_pi, log_rho=log_rho)  # type: ignore[arg-type]
        if not isinstance(trace, Tensor):
            known = log_rho if log_rho is not None else log_pi
            dtype = torch.get_default_dtype() if known is None else known.dtype
            trace = torch.full(done.shape, trace, dtype=dtype, device=done.device)
        reach = trace_reach(trace=trace, done=done, gamma=gamma, valid=valid, bounded=self.bounded)
        out["trace_length"] = reach.length
        if self.contracts:
            out["contraction"] = reach.contraction
        return out


class Retrace(TraceEstimator):
    __doc__ = f"""Retrace(lambda): c = lmbda min(1, pi/mu). Safe for any behaviour policy; on-policy it cuts nothing.

    Source: Munos et al. 2016, arXiv 1606.02647; Wang et al. 2017, arXiv 1611.01224 for the root.

    Args:
        lmbda: trace decay in [0, 1].
        root: of the ratio, min(1, (pi/mu)^(1/root)): 1 is Retrace. The number of dimensions of the action is ACER's,
            for continuous actions, whose joint ratios are tiny; c may then be above the ratio, and the contraction
            theorem no longer covers it.

    {ActionValueEstimator.__doc__}"""
    ratio_cuts_trace = True
    bounded = True

    def __init__(self, *, lmbda: float = 1.0, root: int = 1, **options: Any) -> None:
        check_ranges(root=root)
        super().__init__(lmbda=lmbda, **options)
        self.root = root
        self.contracts = root == 1

    @property
    def diagnostic_keys(self) -> list[str]:
        """``c_clipped``, the fraction of ratios above 1, besides those of every trace."""
        return [*super().diagnostic_keys, "c_clipped"]

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        """lmbda min(1, rho^(1/root))."""
        return retrace_trace(log_rho=log_rho, lmbda=self.lmbda, action_dim=self.root)

    def diagnose(
        self, *, log_pi: Tensor | None, log_rho: Tensor | None, done: Tensor, gamma: float, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Those of every trace, and ``c_clipped``."""
        out = super().diagnose(log_pi=log_pi, log_rho=log_rho, done=done, gamma=gamma, valid=valid)
        assert log_rho is not None
        return out | {"c_clipped": clipped_fraction(log_rho, 1.0, valid=valid)}


class ImportanceSampling(TraceEstimator):
    __doc__ = f"""Per-decision importance sampling: c = lmbda pi/mu. Unbiased; its variance has no bound.

    Source: Precup, Sutton and Singh 2000.

    {ActionValueEstimator.__doc__}"""
    ratio_cuts_trace = True
    contracts = True

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        """lmbda rho."""
        return importance_trace(log_rho=log_rho, lmbda=self.lmbda)


class TreeBackup(TraceEstimator):
    __doc__ = f"""Tree backup: c = lmbda pi(a|x). Discrete actions only; needs no behaviour log-probabilities.

    Source: Precup, Sutton and Singh 2000.

    {ActionValueEstimator.__doc__}"""
    uses_behaviour = False
    only_discrete = True
    bounded = True
    contracts = True

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        """lmbda pi."""
        return tree_backup_trace(log_pi=log_pi, lmbda=self.lmbda)


class QLambda(TraceEstimator):
    __doc__ = f"""Q(lambda): c = lmbda whatever the policies do. Needs no log-probabilities; may diverge.

    With lmbda 1 it is ACER's Q^opc.

    Source: Harutyunyan et al. 2016, arXiv 1602.04951.

    {ActionValueEstimator.__doc__}"""
    uses_behaviour = False
    uses_log_pi = False
    bounded = True

    def trace(self, *, log_pi: Tensor, log_rho: Tensor) -> Tensor | float:
        """lmbda."""
        return self.lmbda
