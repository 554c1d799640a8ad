"""Returns as the papers define them: direct sums, one number at a time, in float64. Slow on purpose.

Every function takes one sequence, as lists or arrays ``[T]``, and also returns the sum of the absolute terms, which is
what a floating-point error has to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Floats = Sequence[float] | np.ndarray
Bools = Sequence[bool] | np.ndarray


def _list(x: Floats | Bools) -> list:
    return x.tolist() if isinstance(x, np.ndarray) else list(x)


def vtrace_sums(
    reward: Floats, value: Floats, next_value: Floats, rho: Floats, terminated: Bools, done: Bools, gamma: float,
    lmbda: float = 1.0, rho_clip: float = 1.0, c_clip: float = 1.0, pg_rho_clip: float = 1.0, leak: float = 1.0,
    valid: Bools | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Target, advantage and the size of the target."""
    reward, value, next_value, rho = _list(reward), _list(value), _list(next_value), _list(rho)
    terminated, done = _list(terminated), _list(done)
    length = len(reward)
    known = [True] * length if valid is None else _list(valid)

    def clipped(t: int, limit: float) -> float:
        return leak * min(limit, rho[t]) + (1 - leak) * rho[t]

    def delta(t: int) -> tuple[float, float]:
        bootstrap = 0.0 if terminated[t] else gamma * next_value[t]
        factor = clipped(t, rho_clip)
        return factor * (reward[t] + bootstrap - value[t]), factor * (abs(reward[t]) + abs(bootstrap) + abs(value[t]))

    target, size = np.zeros(length), np.zeros(length)
    for s in range(length):
        target[s], size[s] = value[s], abs(value[s])
        weight = 1.0
        for t in range(s, length):
            if not known[t]:
                break
            term, absolute = delta(t)
            target[s] += weight * term
            size[s] += weight * absolute
            if done[t]:
                break
            weight *= gamma * lmbda * clipped(t, c_clip)
    advantage = np.zeros(length)
    for s in range(length):
        if not known[s]:
            continue
        if terminated[s]:
            following = 0.0
        elif done[s] or s == length - 1 or not known[s + 1]:
            following = next_value[s]
        else:
            following = lmbda * target[s + 1] + (1 - lmbda) * value[s + 1]
        advantage[s] = clipped(s, pg_rho_clip) * (reward[s] + gamma * following - value[s])
    return target, advantage, size


def q_return_sums(
    reward: Floats, q_value: Floats, next_state_value: Floats, trace: Floats, terminated: Bools, done: Bools,
    gamma: float, valid: Bools | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """G and its size, by the sum form: the trace of the first action is never used."""
    reward, q, following, c = _list(reward), _list(q_value), _list(next_state_value), _list(trace)
    terminated, done = _list(terminated), _list(done)
    length = len(reward)
    known = [True] * length if valid is None else _list(valid)
    out, size = np.zeros(length), np.zeros(length)
    for s in range(length):
        out[s], size[s] = q[s], abs(q[s])
        weight = 1.0
        for t in range(s, length):
            if t > s:
                weight *= gamma * c[t]
            if not known[t]:
                break
            bootstrap = 0.0 if terminated[t] else gamma * following[t]
            out[s] += weight * (reward[t] + bootstrap - q[t])
            size[s] += abs(weight) * (abs(reward[t]) + abs(bootstrap) + abs(q[t]))
            if done[t]:
                break
    return out, size


def n_step_sums(
    reward: Floats, next_value: Floats, terminated: Bools, done: Bools, gamma: float, n: int, valid: Bools | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """n-step returns and their size."""
    length = len(reward)
    known = [True] * length if valid is None else _list(valid)
    out, size = np.zeros(length), np.zeros(length)
    for s in range(length):
        if not known[s]:
            continue
        for i in range(n):
            t = s + i
            out[s] += gamma**i * reward[t]
            size[s] += abs(gamma**i * reward[t])
            if done[t] or t == length - 1 or not known[t + 1] or i == n - 1:
                bootstrap = 0.0 if terminated[t] else gamma ** (i + 1) * next_value[t]
                out[s] += bootstrap
                size[s] += abs(bootstrap)
                break
    return out, size


def project(place: float, mass: float, support: np.ndarray) -> np.ndarray:
    """Mass at one place, on the grid."""
    out = np.zeros(len(support))
    place = min(max(place, support[0]), support[-1])
    for i in range(len(support) - 1):
        low, high = support[i], support[i + 1]
        if low <= place <= high:
            out[i] = mass * (high - place) / (high - low)
            out[i + 1] = mass * (place - low) / (high - low)
            return out
    raise AssertionError(place)


def distributional_sums(
    reward: Floats, q_dist: np.ndarray, next_state_dist: np.ndarray, trace: Floats, terminated: Bools, done: Bools,
    gamma: float, support: np.ndarray, valid: Bools | None = None,
) -> np.ndarray:  # fmt: skip
    """The mixture of n-step distributions, atom by atom, ``[T, K]``."""
    length = len(reward)
    known = [True] * length if valid is None else _list(valid)
    out = np.zeros((length, len(support)))
    for s in range(length):
        if not known[s]:
            out[s] = q_dist[s]
            continue
        gained, product, n = 0.0, 1.0, 1
        while True:
            t = s + n - 1
            gained += gamma ** (n - 1) * reward[t]
            cut = done[t] or t == length - 1 or not known[t + 1]
            c = 0.0 if cut else trace[t + 1]
            for i, atom in enumerate(support):
                place = gained + (0.0 if terminated[t] else gamma**n * atom)
                mass = (1.0 if i == 0 else 0.0) if terminated[t] else next_state_dist[t][i]
                out[s] += project(place, product * mass, support)
                if not cut:
                    out[s] -= project(place, product * c * q_dist[t + 1][i], support)
            if cut:
                break
            product *= c
            n += 1
    return out
