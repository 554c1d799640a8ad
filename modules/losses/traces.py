"""Targets that correct whole sequences, by the name of their trace, and what is told of them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from offtrace.modules.losses.offpolicy import Batch, cleared
from offtrace.modules.returns import (
    TraceName,
    clipped_fraction,
    effective_sample_size,
    make_trace,
    q_lambda_trace,
    trace_reach,
)

TRACES = get_args(TraceName)
TARGETS = ("one_step", "n_step", *TRACES)


def check_target(target: str, *, discrete: bool) -> None:
    """Refuse a target that is not known, and tree backup for densities.

    Raises:
        ValueError: one sentence.
    """
    if target not in TARGETS:
        known = tuple(name for name in TARGETS if discrete or name != "tree_backup")
        raise ValueError(f"target must be one of {known}, got {target!r}")
    if target == "tree_backup" and not discrete:
        raise ValueError(
            "target='tree_backup' needs probabilities of discrete actions, and these actions are continuous: a density "
            "is no probability; use 'retrace'"
        )


def told_of(name: str) -> list[str]:
    """Diagnostics of the target ``name``.

    ``ess``, effective sample size as a fraction; ``trace_length`` in steps; ``c_clipped``, fraction of ratios above
    Retrace's clip, 1; ``contraction``, for traces that never exceed the ratio: Q(lambda)'s may.
    """
    own = {"retrace": ["contraction", "c_clipped"], "q_lambda": []}.get(name, ["contraction"])
    return ["ess", "trace_length", *own]


@torch.no_grad()
def traced(
    name: str, *, log_pi: Tensor, log_rho: Tensor, batch: Batch, gamma: float, lmbda: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`q_return` needs besides values, time first; and the diagnostics that :func:`told_of` names.

    Args:
        name: of the trace.
        log_pi, log_rho: log pi and log pi - log mu of the batch's actions, [N, T].
        batch: the sequences.
        gamma, lmbda: discount and trace decay.
    """
    reward, terminated, done, valid = batch.time_first()
    log_pi, log_rho = (cleared(x.detach().to(reward.dtype), batch.valid).t() for x in (log_pi, log_rho))
    trace = make_trace(name, log_rho=log_rho, log_pi=log_pi, lmbda=lmbda)  # type: ignore[arg-type]
    whole = trace if isinstance(trace, Tensor) else q_lambda_trace(log_rho=log_rho, lmbda=lmbda)
    reach = trace_reach(trace=whole, done=done, gamma=gamma, valid=valid, bounded=name != "importance_sampling")
    told = {"ess": effective_sample_size(log_rho, valid=valid), "trace_length": reach.length}
    if "contraction" in told_of(name):
        told["contraction"] = reach.contraction
    if name == "retrace":
        told["c_clipped"] = clipped_fraction(log_rho, 1.0, valid=valid)
    known = {"reward": reward, "trace": trace, "terminated": terminated, "done": done, "gamma": gamma, "valid": valid}
    return known, told
