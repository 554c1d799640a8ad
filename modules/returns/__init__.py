"""Off-policy returns as pure functions of tensors, time first ``[T, *B]``.

Every return with a trace is the linear recurrence ``y_t = b_t + a_t y_{t+1}``, written once in
:mod:`offtrace.modules.returns.recurrence`; n-step and distributional returns are sums of their own.
"""

from offtrace.modules.returns.action_values import (
    TraceName,
    importance_trace,
    make_trace,
    q_lambda_trace,
    q_return,
    retrace_trace,
    tree_backup_trace,
)
from offtrace.modules.returns.diagnostics import (
    TraceReach,
    clipped_fraction,
    effective_sample_size,
    trace_reach,
)
from offtrace.modules.returns.distributional import categorical_projection, distributional_return
from offtrace.modules.returns.state_values import (
    GAEOutput,
    VTraceOutput,
    gae,
    lambda_return,
    n_step_return,
    vtrace,
)

__all__ = [
    "GAEOutput",
    "TraceName",
    "TraceReach",
    "VTraceOutput",
    "categorical_projection",
    "clipped_fraction",
    "distributional_return",
    "effective_sample_size",
    "gae",
    "importance_trace",
    "lambda_return",
    "make_trace",
    "n_step_return",
    "q_lambda_trace",
    "q_return",
    "retrace_trace",
    "trace_reach",
    "tree_backup_trace",
    "vtrace",
]
