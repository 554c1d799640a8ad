"""ACER's update with nothing around it: tensors, one network and its average. The yardstick of acer_updates.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

GAMMA, CLIP, DELTA, DECAY = 0.99, 10.0, 1.0, 0.99


class BareACER:
    """Discrete ACER on windows of stored steps; no masks, no diagnostics, none of the steps' ends inside a window."""

    def __init__(self, stored: dict[str, Tensor], rows: int, length: int, actions: int, *, images: bool) -> None:
        self.stored, self.rows, self.length = stored, rows, length
        if images:
            torso, width = [nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
                            nn.Linear(2592, 256), nn.ReLU()], 256  # fmt: skip
        else:
            numbers = stored["observation"].shape[-1]
            torso, width = [nn.Linear(numbers, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()], 64
        self.network = nn.ModuleDict(
            {"torso": nn.Sequential(*torso), "policy": nn.Linear(width, actions), "value": nn.Linear(width, actions)}
        )
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.parameters = list(self.network.parameters())
        self.averages = list(self.average.parameters())
        self.squares = [torch.ones_like(p) for p in self.parameters]

    def update(self) -> None:
        """Sample, one forward and backward pass, clip, RMSProp, move the average."""
        first = torch.randint(len(self.stored["reward"]) - self.length, (self.rows,))
        steps = first + torch.arange(self.length).unsqueeze(1)
        every = torch.cat([steps, steps[-1:] + 1])
        x = self.stored["observation"][every]
        x = x.float() * (1 / 255) if x.dtype == torch.uint8 else x
        a, r, done, mu = (self.stored[name][steps] for name in ("action", "reward", "done", "probs"))
        hidden = self.network["torso"](x.flatten(0, 1))
        log_pi = self.network["policy"](hidden).log_softmax(-1).unflatten(0, every.shape)
        q = self.network["value"](hidden).unflatten(0, every.shape)
        probs = log_pi[:-1].exp()
        q_taken = q[:-1].gather(-1, a.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            value = (log_pi.exp() * q).sum(-1)
            pi_a, mu_a = (p.gather(-1, a.unsqueeze(-1)).squeeze(-1) for p in (probs, mu))
            trace = (pi_a / mu_a).clamp(max=1)
            discount = GAMMA * (~done).float()
            target, follows = torch.empty_like(r), value[-1]
            for t in reversed(range(self.length)):
                target[t] = r[t] + discount[t] * follows
                follows = trace[t] * (target[t] - q_taken[t]) + value[t]
            g = (1 - CLIP * mu / probs).clamp(min=0) * (q[:-1] - value[:-1].unsqueeze(-1))
            weight = torch.minimum(CLIP / pi_a, 1 / mu_a) * (target - value[:-1])
            g.scatter_add_(-1, a.unsqueeze(-1), weight.unsqueeze(-1))
            average = self.average["policy"](self.average["torso"](x[:-1].flatten(0, 1))).softmax(-1).view_as(probs)
            k = -average / probs
            excess = ((k * g).sum(-1, keepdim=True) - DELTA).clamp(min=0)
            g -= excess / k.square().sum(-1, keepdim=True) * k
        loss = -(g * probs).sum(-1).mean() + 0.25 * (target - q_taken).square().mean()
        for p in self.parameters:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        with torch.no_grad():
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(self.squares, 0.99)
            torch._foreach_addcmul_(self.squares, gradients, gradients, 0.01)
            roots = torch._foreach_add(self.squares, 1e-5)
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(self.parameters, gradients, roots, -7e-4)
            torch._foreach_lerp_(self.averages, self.parameters, 1 - DECAY)
