"""The Triton kernels of :mod:`offtrace.modules.returns.fused`; their formulas are those of the plain path.

A program owns ``C`` columns and walks over tiles of ``R`` rows, the last tile first.
"""

# Triton reads annotations at run time and has types of its own, so this file alone is left out of the type check.

import triton
import triton.language as tl


@triton.jit
def _limited(x, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _then(a1, b1, e1, f1, a2, b2, e2, f2):
    """Segments of rows as maps of what stands behind them: y -> b + a y whole, y -> f + e y without the first row.

    The later segment (1) comes before the earlier one (2).
    """
    return a1 * a2, b2 + a2 * b1, a1 * e2, f2 + e2 * b1


@triton.jit
def _then_limited(a1, b1, e1, f1, a2, b2, e2, f2):
    """As above, for traces that may overflow: an infinity that meets a 0 would be NaN."""
    limit: tl.constexpr = 3.4028234663852886e38 if a1.dtype == tl.float32 else 1.7976931348623157e308
    return (
        _limited(a1 * a2, limit),
        _limited(b2 + a2 * b1, limit),
        _limited(a1 * e2, limit),
        _limited(f2 + e2 * b1, limit),
    )


@triton.jit
def _load(pointer, at, inside, dtype: tl.constexpr):
    return tl.load(pointer + at, mask=inside, other=0).to(dtype)


@triton.jit
def _ratio(rho, limit, CLIP: tl.constexpr, LEAK: tl.constexpr, dtype: tl.constexpr):
    """The ratio clipped and leaked; ``limit`` is the clip as a tensor of the right precision."""
    if CLIP == float("inf"):  # noqa: SIM300
        return rho
    clipped = tl.minimum(rho, limit)
    if LEAK != 1:
        leak = tl.full((), LEAK, dtype)
        clipped = leak * clipped + (1 - leak) * rho
    return clipped


@triton.jit
def vtrace_kernel(
    value_ptr, reward_ptr, next_value_ptr, log_rho_ptr, terminated_ptr, done_ptr, valid_ptr,
    target_ptr, advantage_ptr, length, width,
    GAMMA: tl.constexpr, LMBDA: tl.constexpr, RHO_CLIP: tl.constexpr, C_CLIP: tl.constexpr,
    PG_RHO_CLIP: tl.constexpr, LEAK: tl.constexpr, LOG_MAX: tl.constexpr, LIMIT: tl.constexpr,
    HAS_VALID: tl.constexpr, BOUNDED: tl.constexpr, SATURATE: tl.constexpr, DOUBLE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    gamma, lmbda = tl.full((), GAMMA, dtype), tl.full((), LMBDA, dtype)
    columns = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)[None, :]
    carry = tl.zeros((1, C), dtype)
    for tile in range(0, tl.cdiv(length, R)):
        rows = length - (tile + 1) * R + tl.arange(0, R)[:, None]
        inside = (rows >= 0) & (columns < width)
        at = rows.to(tl.int64) * width + columns
        value = _load(value_ptr, at, inside, dtype)
        reward = _load(reward_ptr, at, inside, dtype)
        next_value = _load(next_value_ptr, at, inside, dtype)
        log_rho = _load(log_rho_ptr, at, inside, dtype)
        unknown = tl.load(terminated_ptr + at, mask=inside, other=0) != 0
        done = (tl.load(done_ptr + at, mask=inside, other=0) != 0) | unknown
        if HAS_VALID:
            invalid = tl.load(valid_ptr + at, mask=inside, other=0) == 0
            reward = tl.where(invalid, 0, reward)
            log_rho = tl.where(invalid, 0, log_rho)
            unknown = unknown | invalid
            done = done | invalid
        next_value = tl.where(unknown, 0, next_value)

        rho = tl.exp(tl.minimum(log_rho, tl.full((), LOG_MAX, dtype)))
        error = reward + gamma * next_value - value
        delta = _ratio(rho, tl.full((), RHO_CLIP, dtype), RHO_CLIP, LEAK, dtype) * error
        if HAS_VALID:
            delta = tl.where(invalid, 0, delta)
        going = tl.where(done, 0, gamma)
        decay = _ratio(rho, tl.full((), C_CLIP, dtype), C_CLIP, LEAK, dtype) * going * lmbda
        one, zero = tl.full((R, C), 1, dtype), tl.zeros((R, C), dtype)
        if BOUNDED:
            a, b, e, f = tl.associative_scan((decay, delta, one, zero), 0, _then, reverse=True)
        else:
            delta = _limited(delta, LIMIT)
            a, b, e, f = tl.associative_scan((decay, delta, one, zero), 0, _then_limited, reverse=True)
        correction, later = b + a * carry, f + e * carry
        if not BOUNDED:
            correction, later = _limited(correction, LIMIT), _limited(later, LIMIT)
        carry = tl.sum(tl.where(tl.arange(0, R)[:, None] == 0, correction, 0), axis=0)[None, :]

        behind = _load(value_ptr, at + width, inside & (rows + 1 < length), dtype) + lmbda * later
        going = tl.where(rows + 1 < length, going, 0)
        if HAS_VALID:  # the value of a step that is no data may be anything
            next_valid = tl.load(valid_ptr + at + width, mask=inside & (rows + 1 < length), other=0)
            going = tl.where(next_valid == 0, 0, going)
        # not 0 times it: what stands behind the end of an episode may be anything
        mixture = tl.where(going == 0, 0, going * (behind - next_value))
        advantage = _ratio(rho, tl.full((), PG_RHO_CLIP, dtype), PG_RHO_CLIP, LEAK, dtype) * (error + mixture)
        target = value + correction
        if SATURATE:
            target, advantage = _limited(target, LIMIT), _limited(advantage, LIMIT)
        if HAS_VALID:
            advantage = tl.where(invalid, 0, advantage)
        tl.store(target_ptr + at, target, mask=inside)
        tl.store(advantage_ptr + at, advantage, mask=inside)


@triton.jit
def q_kernel(
    q_ptr, reward_ptr, next_value_ptr, trace_ptr, terminated_ptr, done_ptr, valid_ptr, target_ptr, length, width,
    GAMMA: tl.constexpr, TRACE: tl.constexpr, LIMIT: tl.constexpr, HAS_VALID: tl.constexpr, BOUNDED: tl.constexpr,
    DOUBLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    gamma = tl.full((), GAMMA, dtype)
    columns = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)[None, :]
    carry = tl.zeros((1, C), dtype)
    for tile in range(0, tl.cdiv(length, R)):
        rows = length - (tile + 1) * R + tl.arange(0, R)[:, None]
        inside = (rows >= 0) & (columns < width)
        at = rows.to(tl.int64) * width + columns
        following = inside & (rows + 1 < length)
        q_value = _load(q_ptr, at, inside, dtype)
        reward = _load(reward_ptr, at, inside, dtype)
        terminated = tl.load(terminated_ptr + at, mask=inside, other=0) != 0
        done = (tl.load(done_ptr + at, mask=inside, other=0) != 0) | terminated
        next_value = tl.where(terminated, 0, _load(next_value_ptr, at, inside, dtype))
        delta = reward + gamma * next_value - q_value
        if HAS_VALID:
            invalid = tl.load(valid_ptr + at, mask=inside, other=0) == 0
            delta = tl.where(invalid, 0, delta)
            done = done | invalid
        if TRACE is None:
            trace = _load(trace_ptr, at + width, following, dtype)
            if HAS_VALID:  # an unknown coefficient carries nothing
                trace = tl.where(tl.load(valid_ptr + at + width, mask=following, other=0) == 0, 0, trace)
        else:
            trace = tl.full((), TRACE, dtype)
        decay = tl.where(done, 0, trace * gamma)
        one, zero = tl.full((R, C), 1, dtype), tl.zeros((R, C), dtype)
        if BOUNDED:
            a, b, _, _ = tl.associative_scan((decay, delta, one, zero), 0, _then, reverse=True)
            correction = b + a * carry
        else:
            a, b, _, _ = tl.associative_scan((decay, delta, one, zero), 0, _then_limited, reverse=True)
            correction = _limited(b + a * carry, LIMIT)
        carry = tl.sum(tl.where(tl.arange(0, R)[:, None] == 0, correction, 0), axis=0)[None, :]
        tl.store(target_ptr + at, q_value + correction, mask=inside)
