"""The estimators on random MDPs whose values are known: contraction, fixed points, convergence, and divergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from offtrace.modules.returns import q_return, retrace_trace, trace_reach, tree_backup_trace, vtrace

GAMMA = 0.9


@dataclass
class MDP:
    """Transition probabilities ``[S, A, S]``, rewards ``[S, A]``, policies ``[S, A]``."""

    transition: np.ndarray
    reward: np.ndarray
    target: np.ndarray
    behaviour: np.ndarray

    @classmethod
    def random(cls, seed: int, states: int = 5, actions: int = 3, close: float = 0.0) -> MDP:
        rng = np.random.default_rng(seed)
        target, behaviour = rng.dirichlet(np.full(actions, 0.5), (2, states))
        behaviour = close * target + (1 - close) * (0.9 * behaviour + 0.1 / actions)
        transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
        return cls(transition, rng.normal(size=(states, actions)), target, behaviour)

    def q_of(self, policy: np.ndarray) -> np.ndarray:
        """Q^policy, by solving the linear equations."""
        states, actions = self.reward.shape
        onward = np.einsum("sax,xb->saxb", self.transition, policy).reshape(states * actions, -1)
        return np.linalg.solve(np.eye(len(onward)) - GAMMA * onward, self.reward.ravel()).reshape(states, actions)

    def operator(self, q: np.ndarray, trace: np.ndarray) -> np.ndarray:
        """R Q = Q + (I - gamma P^{c mu})^{-1} (T^pi Q - Q), the expected operator with infinitely long traces."""
        states, actions = self.reward.shape
        onward = np.einsum("sax,xb->saxb", self.transition, trace * self.behaviour).reshape(states * actions, -1)
        error = self.reward + GAMMA * self.transition @ (self.target * q).sum(-1) - q
        return q + np.linalg.solve(np.eye(len(onward)) - GAMMA * onward, error.ravel()).reshape(states, actions)

    def contraction(self, trace: np.ndarray) -> np.ndarray:
        """eta(x, a) = gamma - (1 - gamma) E_mu sum_{t>=1} gamma^t c_1 ... c_t."""
        states, actions = self.reward.shape
        onward = np.einsum("sax,xb->saxb", self.transition, trace * self.behaviour).reshape(states * actions, -1)
        carried = np.linalg.solve(np.eye(len(onward)) - GAMMA * onward, np.ones(len(onward))) - 1
        return (GAMMA - (1 - GAMMA) * carried).reshape(states, actions)

    def clipped(self, clip: float) -> np.ndarray:
        """min(clip, pi / mu), ``[S, A]``."""
        return np.minimum(clip, self.target / self.behaviour)

    def value_operator(self, value: np.ndarray, rho: np.ndarray, c: np.ndarray) -> np.ndarray:
        """V-trace's expected operator with infinitely long traces."""
        onward = np.einsum("sa,sax->sx", c * self.behaviour, self.transition)
        error = self.reward + GAMMA * self.transition @ value - value[:, None]
        return value + np.linalg.solve(np.eye(len(value)) - GAMMA * onward, (self.behaviour * rho * error).sum(-1))

    def value_contraction(self, rho: np.ndarray, c: np.ndarray) -> np.ndarray:
        """1 - (1 - gamma) E_mu sum_{t>=0} gamma^t c_0 ... c_{t-1} rho_t, ``[S]``."""
        onward = np.einsum("sa,sax->sx", c * self.behaviour, self.transition)
        carried = np.linalg.solve(np.eye(len(onward)) - GAMMA * onward, (self.behaviour * rho).sum(-1))
        return 1 - (1 - GAMMA) * carried


def coefficients(mdp: MDP, name: str, lmbda: float) -> np.ndarray:
    log_pi, log_mu = torch.tensor(mdp.target).log(), torch.tensor(mdp.behaviour).log()
    if name == "retrace":
        return retrace_trace(log_rho=log_pi - log_mu, lmbda=lmbda).numpy()
    return tree_backup_trace(log_pi=log_pi, lmbda=lmbda).numpy()


@pytest.mark.parametrize("name", ["retrace", "tree backup"])
@pytest.mark.parametrize("lmbda", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_the_expected_operator_contracts_to_q_of_the_target_policy(seed: int, lmbda: float, name: str) -> None:
    mdp = MDP.random(seed)
    trace = coefficients(mdp, name, lmbda)
    truth, eta = mdp.q_of(mdp.target), mdp.contraction(trace)
    assert (eta <= GAMMA + 1e-12).all()
    assert (eta >= -1e-12).all()
    np.testing.assert_allclose(mdp.operator(truth, trace), truth, atol=1e-10)
    for start in range(5):
        q = truth + np.random.default_rng(100 + start).normal(size=truth.shape)
        distance = np.abs(q - truth).max()
        assert (np.abs(mdp.operator(q, trace) - truth) <= eta * distance + 1e-10).all()


@pytest.mark.parametrize(("rho_clip", "c_clip"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (0.7, 0.4), (np.inf, 1.0)])
@pytest.mark.parametrize("seed", range(10))
def test_vtraces_expected_operator_contracts_to_the_value_of_the_clipped_policy(
    seed: int, rho_clip: float, c_clip: float
) -> None:
    mdp = MDP.random(seed)
    rho, c = mdp.clipped(rho_clip), 0.9 * mdp.clipped(c_clip)
    policy = rho * mdp.behaviour  # proportional to min(rho_clip mu, pi)
    policy = policy / policy.sum(-1, keepdims=True)
    truth, eta = (policy * mdp.q_of(policy)).sum(-1), mdp.value_contraction(rho, c)
    smallest = (mdp.behaviour * rho).sum(-1).min()
    assert (eta <= 1 - (1 - GAMMA) * smallest + 1e-12).all()  # the bound of the paper
    assert (eta >= -1e-12).all()
    np.testing.assert_allclose(mdp.value_operator(truth, rho, c), truth, atol=1e-10)
    for start in range(5):
        value = truth + np.random.default_rng(100 + start).normal(size=truth.shape)
        distance = np.abs(value - truth).max()
        assert (np.abs(mdp.value_operator(value, rho, c) - truth) <= eta * distance + 1e-10).all()


@pytest.mark.parametrize("rho_clip", [1.0, 2.0])
def test_vtraces_sample_operator_is_the_expected_one_on_average(rho_clip: float) -> None:
    mdp = MDP.random(3, states=3, actions=2)
    value = np.random.default_rng(0).normal(size=3)
    expected = mdp.value_operator(value, mdp.clipped(rho_clip), 0.9 * mdp.clipped(1.0))
    state, action, following = sample(mdp, episodes=40_000, length=60, seed=1)
    none = torch.zeros(state.shape, dtype=torch.bool)
    out = vtrace(
        reward=torch.tensor(mdp.reward[state, action]), value=torch.tensor(value[state]),
        next_value=torch.tensor(value[following]), terminated=none, done=none, gamma=GAMMA, lmbda=0.9,
        log_rho=torch.tensor(np.log(mdp.target / mdp.behaviour)[state, action]), rho_clip=rho_clip,
    ).target.numpy()[0]  # fmt: skip
    for s in range(3):
        found = out[state[0] == s]
        assert abs(found.mean() - expected[s]) < 4.5 * found.std() / np.sqrt(len(found)) + 1e-2, s


@pytest.mark.parametrize("name", ["retrace", "tree backup", "vtrace"])
def test_the_contraction_of_a_batch_is_the_exact_one_where_it_was(name: str) -> None:
    """Averaged over the steps, whose successors' steps are samples of the expectation."""
    mdp = MDP.random(4, states=3, actions=2)
    state, action, _ = sample(mdp, episodes=2_000, length=400, seed=2)
    rho = mdp.clipped(1.5) if name == "vtrace" else None
    c = mdp.clipped(1.0) if rho is not None else coefficients(mdp, name, 0.9)
    exact = mdp.contraction(c)[state, action] if rho is None else mdp.value_contraction(rho, c)[state]
    found = trace_reach(
        trace=torch.tensor(c[state, action]), done=torch.zeros(state.shape, dtype=torch.bool), gamma=GAMMA,
        rho=None if rho is None else torch.tensor(rho[state, action]),
    )  # fmt: skip
    # a rollout's end cuts traces: a few of 400 steps
    assert float(found.contraction) == pytest.approx(exact.mean(), abs=6e-3)
    assert abs(exact.mean() - GAMMA) > 0.05


@pytest.mark.parametrize("name", ["retrace", "tree backup"])
def test_the_sample_operator_is_the_expected_one_on_average(name: str) -> None:
    """q_return over long rollouts under mu, averaged by first state and action, against the linear algebra."""
    mdp = MDP.random(3, states=3, actions=2)
    trace = coefficients(mdp, name, 1.0)
    q = np.random.default_rng(0).normal(size=mdp.reward.shape)
    expected = mdp.operator(q, trace)
    state, action, following = sample(mdp, episodes=40_000, length=60, seed=1)
    out = q_return(
        reward=torch.tensor(mdp.reward[state, action]),
        q_value=torch.tensor(q[state, action]),
        next_state_value=torch.tensor((mdp.target * q).sum(-1)[following]),
        trace=torch.tensor(trace[state, action]),
        terminated=torch.zeros(state.shape, dtype=torch.bool),
        done=torch.zeros(state.shape, dtype=torch.bool),
        gamma=GAMMA,
    ).numpy()[0]
    for s in range(3):
        for a in range(2):
            found = out[(state[0] == s) & (action[0] == a)]
            error = found.std() / np.sqrt(len(found))
            assert abs(found.mean() - expected[s, a]) < 4.5 * error + 1e-2, (s, a)


def sample(mdp: MDP, episodes: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, actions under mu, and successors, ``[T, episodes]``; starts are uniform."""
    rng = np.random.default_rng(seed)
    behaviour, onward = mdp.behaviour.cumsum(-1), mdp.transition.cumsum(-1)
    states, actions, successors = [], [], []
    state = rng.integers(len(mdp.reward), size=episodes)
    for _ in range(length):
        action = (rng.random(episodes)[:, None] > behaviour[state]).sum(-1).clip(max=behaviour.shape[1] - 1)
        following = (rng.random(episodes)[:, None] > onward[state, action]).sum(-1).clip(max=len(mdp.reward) - 1)
        states.append(state)
        actions.append(action)
        successors.append(following)
        state = following
    return np.stack(states), np.stack(actions), np.stack(successors)


@pytest.mark.parametrize("name", ["retrace", "tree backup"])
def test_repeated_sample_updates_converge_to_q_of_the_target_policy(name: str) -> None:
    mdp = MDP.random(5, states=3, actions=2)
    trace, truth = coefficients(mdp, name, 1.0), mdp.q_of(mdp.target)
    q = np.zeros_like(truth)
    none = torch.zeros(20, 200, dtype=torch.bool)
    for update in range(400):
        state, action, following = sample(mdp, episodes=200, length=20, seed=update)
        out = q_return(
            reward=torch.tensor(mdp.reward[state, action]), q_value=torch.tensor(q[state, action]),
            next_state_value=torch.tensor((mdp.target * q).sum(-1)[following]),
            trace=torch.tensor(trace[state, action]), terminated=none, done=none, gamma=GAMMA,
        ).numpy()  # fmt: skip
        total, count = np.zeros_like(q), np.zeros_like(q)
        np.add.at(total, (state, action), out - q[state, action])
        np.add.at(count, (state, action), 1)
        q = q + total / np.maximum(count, 1) * (1 if update < 100 else 100 / (update + 1))
    assert np.abs(q - truth).max() < 0.05


@pytest.mark.parametrize("rho_clip", [1.0, 2.0])
def test_vtrace_converges_to_the_value_of_the_clipped_policy(rho_clip: float) -> None:
    """pi_rho is proportional to min(rho_clip mu, pi); with a clip above every ratio it is pi itself."""
    mdp = MDP.random(7, states=3, actions=2)
    clipped = np.minimum(rho_clip * mdp.behaviour, mdp.target)
    clipped /= clipped.sum(-1, keepdims=True)
    truth = (clipped * mdp.q_of(clipped)).sum(-1)
    other = (mdp.target * mdp.q_of(mdp.target)).sum(-1)
    log_rho = np.log(mdp.target) - np.log(mdp.behaviour)
    value = np.zeros(3)
    none = torch.zeros(20, 200, dtype=torch.bool)
    for update in range(600):
        state, action, following = sample(mdp, episodes=200, length=20, seed=update)
        out = vtrace(
            reward=torch.tensor(mdp.reward[state, action]), value=torch.tensor(value[state]),
            next_value=torch.tensor(value[following]), log_rho=torch.tensor(log_rho[state, action]),
            terminated=none, done=none, gamma=GAMMA, rho_clip=rho_clip,
        )  # fmt: skip
        total, count = np.zeros(3), np.zeros(3)
        np.add.at(total, state, out.target.numpy() - value[state])
        np.add.at(count, state, 1)
        value = value + total / count * (1 if update < 150 else 150 / (update + 1))
    assert np.abs(value - truth).max() < 0.05
    if rho_clip == 1.0:  # the difference is larger than the tolerance: the two fixed points are told apart
        assert np.abs(truth - other).max() > 0.15


def test_q_lambda_diverges_where_theory_says_it_may_and_retrace_does_not() -> None:
    """Two states; action 0 stays, action 1 switches; mu nearly always stays, pi nearly always switches."""
    mdp = MDP(
        transition=np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], dtype=float),
        reward=np.zeros((2, 2)),
        target=np.array([[0.01, 0.99], [0.01, 0.99]]),
        behaviour=np.array([[0.99, 0.01], [0.99, 0.01]]),
    )
    ones = np.ones((2, 2))
    distance = np.abs(mdp.target - mdp.behaviour).sum(-1).max()
    safe = 0.9 * (1 - GAMMA) / (GAMMA * distance)

    def iterate(trace: np.ndarray) -> float:
        q = np.array([[1.0, -1.0], [0.5, 2.0]])
        for _ in range(200):
            q = mdp.operator(q, trace)
        return float(np.abs(q).max())

    assert iterate(ones) > 1e3
    assert iterate(safe * ones) < 0.1
    assert iterate(coefficients(mdp, "retrace", 1.0)) < 1e-2
