"""SAC's gradient update with nothing around it: plain modules and tensors. The yardstick of the shipped loss.

    python benchmarks/bare_sac.py

Twin critics, learnt temperature, one backward pass over the three terms, fused Adam, targets by one foreach call; the
critics' parameters are switched off for the actor's term. The replay is tensors, indexed.
"""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transitions import ACT, OBS, transitions


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)


class BareSAC:
    """Networks, optimiser and ``update``."""

    gamma, tau = 0.99, 0.005

    def __init__(self, observation: int = OBS, action: int = ACT, hidden: int = 256) -> None:
        self.actor = mlp(observation, hidden, 2 * action)
        self.q1, self.q2 = mlp(observation + action, hidden, 1), mlp(observation + action, hidden, 1)
        self.t1, self.t2 = mlp(observation + action, hidden, 1), mlp(observation + action, hidden, 1)
        self.critic = [*self.q1.parameters(), *self.q2.parameters()]
        self.target = [p.requires_grad_(False) for p in (*self.t1.parameters(), *self.t2.parameters())]
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.entropy = -float(action)
        self.optimizer = torch.optim.Adam([*self.actor.parameters(), *self.critic, self.log_alpha], 3e-4, fused=True)

    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Action and its log-probability."""
        loc, log_scale = self.actor(observation).chunk(2, -1)
        log_scale = log_scale.clamp(-20, 2)
        noise = torch.randn_like(loc)
        u = loc + log_scale.exp() * noise
        log_prob = -0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi)
        return u.tanh(), (log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

    def loss(self, observation: Tensor, action: Tensor, reward: Tensor, following: Tensor, going: Tensor) -> Tensor:
        """Sum of the three terms."""
        alpha = self.log_alpha.exp()
        with torch.no_grad():
            after, log_prob = self.sample(following)
            x = torch.cat([following, after], -1)
            value = torch.min(self.t1(x), self.t2(x)).squeeze(-1) - alpha * log_prob
            y = reward + self.gamma * going * value
        x = torch.cat([observation, action], -1)
        critic = 0.5 * F.mse_loss(self.q1(x).squeeze(-1), y) + 0.5 * F.mse_loss(self.q2(x).squeeze(-1), y)
        fresh, log_prob = self.sample(observation)
        x = torch.cat([observation, fresh], -1)
        for parameter in self.critic:
            parameter.requires_grad_(False)
        best = torch.min(self.q1(x), self.q2(x)).squeeze(-1)
        for parameter in self.critic:
            parameter.requires_grad_(True)
        actor = (alpha.detach() * log_prob - best).mean()
        return critic + actor - alpha * (log_prob.detach().mean() + self.entropy)

    def update(self, stored: dict[str, Tensor], size: int = 256) -> None:
        """One gradient step, on ``size`` of the stored transitions, and one step of the targets."""
        index = torch.randint(len(stored["reward"]), (size,), device=stored["reward"].device)
        batch = [stored[name][index] for name in ("observation", "action", "reward", "next")]
        batch.append((~stored["terminated"][index]).float())
        self.optimizer.zero_grad()
        self.loss(*batch).backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.target, self.critic, self.tau)


if __name__ == "__main__":
    sac = BareSAC()
    data = transitions()
    for count in (100, 1000):
        start = time.perf_counter()
        for _ in range(count):
            sac.update(data)
    print(f"{1000 / (time.perf_counter() - start):.0f} updates/s, {torch.get_num_threads()} threads")
