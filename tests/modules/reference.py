"""Returns as the papers define them: direct sums, one number at a time, in float64. Slow on purpose."""

from __future__ import annotations

import numpy as np


def vtrace_sums(
    reward: np.ndarray, value: np.ndarray, next_value: np.ndarray, rho: np.ndarray, terminated: np.ndarray,
    done: np.ndarray, gamma: float, lmbda: float = 1.0, rho_clip: float = 1.0, c_clip: float = 1.0,
    pg_rho_clip: float = 1.0, leak: float = 1.0, valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Target, advantage and the sum of the target's absolute terms, of one sequence ``[T]``."""
    length = len(reward)
    known = np.ones(length, bool) if valid is None else valid

    def clipped(t: int, limit: float) -> float:
        return leak * min(limit, rho[t]) + (1 - leak) * rho[t]

    def delta(t: int) -> float:
        bootstrap = 0.0 if terminated[t] else gamma * next_value[t]
        return clipped(t, rho_clip) * (reward[t] + bootstrap - value[t])

    target, size = np.zeros(length), np.zeros(length)
    for s in range(length):
        target[s], size[s] = value[s], abs(value[s])
        weight = 1.0
        for t in range(s, length):
            if not known[t]:
                break
            term = weight * delta(t)
            target[s] += term
            size[s] += abs(term)
            if done[t]:
                break
            weight *= gamma * lmbda * clipped(t, c_clip)
    advantage = np.zeros(length)
    for s in range(length):
        if not known[s]:
            continue
        if terminated[s]:
            following = 0.0
        elif done[s] or s == length - 1:
            following = next_value[s]
        else:
            following = lmbda * target[s + 1] + (1 - lmbda) * value[s + 1]
        advantage[s] = clipped(s, pg_rho_clip) * (reward[s] + gamma * following - value[s])
    return target, advantage, size
