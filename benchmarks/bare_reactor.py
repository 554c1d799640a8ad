"""Reactor's update with nothing around it: tensors, one network and its copy. The yardstick of reactor_updates.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

GAMMA, EPSILON, ENTROPY, EPISODE = 0.99, 0.01, 0.01, 1000
WIDTH, ATOMS, V_MAX, COPY_EVERY = 128, 51, 10.0, 1000


class BareReactor:
    """Reactor on windows inside the episodes of stored steps; no masks, weights, priorities or diagnostics."""

    def __init__(self, stored: dict[str, Tensor], rows: int, length: int, actions: int, *, images: bool) -> None:
        self.stored, self.rows, self.length, self.actions = stored, rows, length, actions
        if images:
            torso, width = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
                            nn.Linear(2592, 256), nn.ReLU()], 256  # fmt: skip
        else:
            torso, width = [nn.Linear(stored["observation"].shape[-1], 64), nn.Tanh()], 64
        inputs = width + actions + 1
        self.network = nn.ModuleDict(
            {
                "torso": nn.Sequential(*torso), "critic": nn.LSTM(inputs, WIDTH), "actor": nn.LSTM(inputs, WIDTH),
                "policy": nn.Linear(WIDTH, actions), "advantage": nn.Linear(WIDTH, actions * ATOMS),
                "state": nn.Linear(WIDTH, ATOMS),
            }
        )  # fmt: skip
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, 5e-5, betas=(0.0, 0.999), eps=1e-5, fused=True)
        self.support = torch.linspace(-V_MAX, V_MAX, ATOMS)
        self.updates = 0

    def starts(self) -> Tensor:
        """Where windows begin that end inside their episode, [rows]."""
        episodes = len(self.stored["reward"]) // EPISODE
        return torch.randint(episodes, (self.rows,)) * EPISODE + torch.randint(EPISODE - self.length - 1, (self.rows,))

    def loss(self, first: Tensor) -> Tensor:
        """The sum of the three terms on the windows that begin there."""
        steps = first + torch.arange(self.length).unsqueeze(1)
        every = torch.cat([steps, steps[-1:] + 1])
        stored = self.stored
        a, r, mu = (stored[name][steps] for name in ("action", "reward", "probs"))
        x, h, c = stored["observation"][every], stored["recurrent_h"][first], stored["recurrent_c"][first]
        x = x.float() * (1 / 255) if x.dtype == torch.uint8 else x
        last = nn.functional.one_hot(stored["last_action"][every], self.actions).float()
        last = torch.cat([last, stored["last_reward"][every].clamp(-1, 1).unsqueeze(-1)], -1)

        def run(network: nn.ModuleDict, *, acts: bool) -> tuple[Tensor | None, Tensor]:
            features = network["torso"](x.flatten(0, 1)).unflatten(0, every.shape)
            state = h[None, :, WIDTH:].contiguous(), c[None, :, WIDTH:].contiguous()
            hidden = network["critic"](torch.cat([features, last], -1), state)[0]
            advantage = network["advantage"](hidden).unflatten(-1, (self.actions, ATOMS))
            logits = advantage + (network["state"](hidden).unsqueeze(-2) - advantage.mean(-2, keepdim=True))
            if not acts:
                return None, logits
            state = h[None, :, :WIDTH].contiguous(), c[None, :, :WIDTH].contiguous()
            hidden = network["actor"](torch.cat([features.detach(), last], -1), state)[0]
            return (1 - EPSILON) * network["policy"](hidden).softmax(-1) + EPSILON / self.actions, logits

        probs, logits = run(self.network, acts=True)
        assert probs is not None
        index = a[..., None, None].expand(-1, -1, 1, ATOMS)
        taken = logits[:-1].gather(2, index).squeeze(2)
        pi, pi_a = probs[:-1], probs[:-1].gather(-1, a.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            known = run(self.target, acts=False)[1].softmax(-1)
            ratio = pi_a / mu.gather(-1, a.unsqueeze(-1)).squeeze(-1)
            target = self._target(
                r, known[:-1].gather(2, index).squeeze(2), (probs[1:].unsqueeze(-1) * known[1:]).sum(2),
                ratio.clamp(max=1),
            )  # fmt: skip
            q = logits[:-1].softmax(-1) @ self.support
            error = target @ self.support - q.gather(-1, a.unsqueeze(-1)).squeeze(-1)
        surrogate = error * pi_a + (q * pi).sum(-1)
        entropy = -(pi * pi.log()).sum(-1)
        return (-surrogate - (target * taken.log_softmax(-1)).sum(-1) - ENTROPY * entropy).mean()

    def update(self) -> None:
        """Sample, one forward and backward pass, clip, Adam, now and then a copy."""
        loss = self.loss(self.starts())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        self.updates += 1
        if self.updates % COPY_EVERY == 0:
            self.target.load_state_dict(self.network.state_dict())

    def _target(self, reward: Tensor, dist: Tensor, following: Tensor, trace: Tensor) -> Tensor:
        """Distributional Retrace, [T, rows, atoms]."""
        gap, length = 2 * V_MAX / (ATOMS - 1), self.length
        out, weight, gained = torch.zeros_like(dist), torch.ones_like(reward), torch.zeros_like(reward)
        for n in range(length):
            rest = length - n
            gained = gained[:rest] + GAMMA**n * reward[n:]
            behind = torch.cat([trace[n + 1 :], torch.zeros_like(trace[:1])])
            mass = following[n:].clone()
            mass[:-1] -= behind[:-1].unsqueeze(-1) * dist[n + 1 :]
            mass = weight[:rest].unsqueeze(-1) * mass
            weight = weight[:rest] * behind
            place = (gained.unsqueeze(-1) + GAMMA ** (n + 1) * self.support).clamp(-V_MAX, V_MAX)
            place = (place + V_MAX) / gap
            low = place.floor().clamp(max=ATOMS - 2)
            share, low = place - low, low.long()
            out[:rest].scatter_add_(-1, low, mass * (1 - share)).scatter_add_(-1, low + 1, mass * share)
        return out
