"""MPO as a bare torch loop: networks, replay, loss and update in one file. The reference of mpo_updates.py.

The mathematics of the shipped defaults: n-step targets, diagonal covariance with a multiplier for each dimension,
action penalty, LayerNorm networks, hard target copies, one Adam. Left out against the shipped path: masks of unknown
successors, diagnostics, Retrace, several critics, and every check.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transitions import ACT, OBS

N_STEP, GAMMA, SAMPLES = 5, 0.99, 20
EPSILON, EPSILON_MEAN, EPSILON_COV, EPSILON_PENALTY = 0.1, 2.5e-3, 1e-6, 1e-3


class Net(nn.Module):
    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, hidden[0]), nn.LayerNorm(hidden[0])
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(hidden))
        self.last = nn.Linear(hidden[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        for layer in self.hidden:
            x = F.elu(layer(x))
        return self.last(x)


class BareMPO:
    def __init__(self, replay: dict[str, Tensor], batch: int, hidden: tuple[int, ...]) -> None:
        self.replay, self.batch, self.updates = replay, batch, 0
        self.policy, self.critic = Net(OBS, hidden, 2 * ACT), Net(OBS + ACT, hidden, 1)
        self.old_policy, self.old_critic = copy.deepcopy(self.policy), copy.deepcopy(self.critic)
        self.eta, self.eta_cost = (nn.Parameter(torch.full((1,), 10.0)) for _ in range(2))
        self.alpha_mean, self.alpha_cov = (nn.Parameter(torch.full((ACT,), x)) for x in (10.0, 1000.0))
        self.duals = [self.eta, self.eta_cost, self.alpha_mean, self.alpha_cov]
        self.networks = [*self.policy.parameters(), *self.critic.parameters()]
        groups = [{"params": self.networks, "lr": 3e-4}, {"params": self.duals, "lr": 1e-2}]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def gaussian(self, net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = net(x).chunk(2, -1)
        return loc, F.softplus(raw) * (0.7 / math.log(2)) + 1e-6

    def sample(self) -> tuple[Tensor, ...]:
        device = self.replay["reward"].device
        steps = torch.arange(N_STEP, device=device)
        rows = torch.randint(len(self.replay["reward"]) - N_STEP + 1, (self.batch, 1), device=device) + steps
        reward, terminated, done = (self.replay[name][rows] for name in ("reward", "terminated", "done"))
        inside = torch.cat([torch.ones_like(reward[:, :1]), (~done[:, :-1]).float()], 1).cumprod(1)
        length = inside.sum(1)
        last = length.long() - 1
        total = (GAMMA**steps * inside * reward).sum(1)
        ends = terminated.gather(1, last.unsqueeze(1)).squeeze(1)
        after = self.replay["next"][rows.gather(1, last.unsqueeze(1)).squeeze(1)]
        first = rows[:, 0]
        return self.replay["observation"][first], self.replay["action"][first], total, GAMMA**length * ~ends, after

    def loss(self, x: Tensor, a: Tensor, reward: Tensor, discount: Tensor, after: Tensor) -> Tensor:
        with torch.no_grad():
            mu_t, sigma_t = self.gaussian(self.old_policy, after)
            actions = mu_t + sigma_t * torch.randn(SAMPLES, *mu_t.shape, device=mu_t.device)
            states = after.expand(SAMPLES, *after.shape)
            clipped = actions.clamp(-1, 1)
            q = self.old_critic(torch.cat([states, clipped], -1)).squeeze(-1)
            cost = -(actions - clipped).norm(dim=-1)
            y = reward + discount * q.mean(0)
        critic = 0.5 * (y - self.critic(torch.cat([x, a.clamp(-1, 1)], -1)).squeeze(-1)).square().mean()
        eta, eta_cost, alpha_mean, alpha_cov = (F.softplus(x) + 1e-8 for x in self.duals)
        weights, dual = torch.zeros_like(q), torch.zeros_like(eta)
        for value, temperature, epsilon in ((q, eta, EPSILON), (cost, eta_cost, EPSILON_PENALTY)):
            scaled = value / temperature
            weights = weights + scaled.detach().softmax(0)
            dual = dual + temperature * (epsilon + (scaled.logsumexp(0) - math.log(SAMPLES)).mean())
        mu, sigma = self.gaussian(self.policy, after)
        kl_mean = 0.5 * ((mu - mu_t) / sigma_t).square().mean(0)
        ratio = (sigma / sigma_t).log()
        kl_cov = (0.5 * ((-2 * ratio).exp() - 1) + ratio).mean(0)
        fit = -0.5 * ((actions - mu) / sigma_t).square() - 0.5 * ((actions - mu_t) / sigma).square() - sigma.log()
        policy = -(weights * fit.sum(-1)).sum(0).mean()
        policy = policy + (alpha_mean.detach() * kl_mean).sum() + (alpha_cov.detach() * kl_cov).sum()
        dual = dual + (alpha_mean * (EPSILON_MEAN - kl_mean.detach())).sum()
        dual = dual + (alpha_cov * (EPSILON_COV - kl_cov.detach())).sum()
        return policy + dual.squeeze() + critic

    def update(self) -> None:
        loss = self.loss(*self.sample())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks, 40.0)
        self.optimizer.step()
        with torch.no_grad():
            for raw in self.duals:
                raw.clamp_(min=-18)
        self.updates += 1
        if self.updates % 100 == 0:
            self.old_policy.load_state_dict(self.policy.state_dict())
            self.old_critic.load_state_dict(self.critic.state_dict())
