"""IMPALA with nothing around it: vector environment, network, update, one process. The yardstick of the recipe.

    python benchmarks/bare_impala.py --frames 400000 --precision bf16

It does the work of the default recipe (same network, rollouts, minibatches, V-trace, optimiser) without TorchRL,
TensorDict, Lightning, logs, evaluation or checkpoints, and prints agent steps per second after a warm-up.
"""

import argparse
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("--game", default="pong")
parser.add_argument("--frames", type=float, default=400_000)
parser.add_argument("--envs", type=int, default=32)
parser.add_argument("--unroll", type=int, default=20)
parser.add_argument("--minibatches", type=int, default=8)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
from ale_py.vector_env import AtariVectorEnv  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(args.threads)
N, T = args.envs, args.unroll
env = AtariVectorEnv(args.game, N, autoreset_mode=AutoresetMode.SAME_STEP, life_loss_info=True, reward_clipping=False,
                     num_threads=args.threads)  # fmt: skip
actions = int(env.single_action_space.n)
torso = nn.Sequential(nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
                      nn.Linear(2592, 256), nn.ReLU())  # fmt: skip
policy, value = nn.Linear(256, actions), nn.Linear(256, 1)
parameters = [*torso.parameters(), *policy.parameters(), *value.parameters()]
optimizer = torch.optim.Adam(parameters, 5e-4, eps=1e-5, fused=True)
bf16 = args.precision == "bf16"


def forward(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = torso(frames.to(torch.bfloat16 if bf16 else torch.float32) * (1 / 255))
        return policy(hidden).float().log_softmax(-1), value(hidden).float().squeeze(-1)


def update(x: torch.Tensor, a: torch.Tensor, r: torch.Tensor, done: torch.Tensor, log_mu: torch.Tensor) -> None:
    log_pi, v = forward(x.flatten(0, 1))
    log_pi, v = log_pi.view(T + 1, -1, actions)[:-1], v.view(T + 1, -1)
    log_pa = log_pi.gather(-1, a.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        c = (log_pa - log_mu).exp().clamp(max=1)
        g = 0.99 * (~done).float()
        delta = c * (r + g * v[1:] - v[:-1])
        correction, following = torch.zeros_like(v[0]), v[T]
        target, advantage = torch.empty_like(r), torch.empty_like(r)
        for t in reversed(range(T)):
            advantage[t] = c[t] * (r[t] + g[t] * following - v[t])
            correction = delta[t] + g[t] * c[t] * correction
            target[t] = following = v[t] + correction
    entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
    loss = -(advantage * log_pa).mean() + 0.25 * (target - v[:-1]).square().mean() - 0.01 * entropy
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()


obs = torch.empty(T + 1, N, 4, 84, 84, dtype=torch.uint8)
act, log_mu = torch.empty(T, N, dtype=torch.long), torch.empty(T, N)
rew, done = torch.empty(T, N), torch.empty(T, N, dtype=torch.bool)
obs[T] = torch.from_numpy(env.reset(seed=0)[0])
rollouts, warm_up = int(args.frames / (4 * N * T)), 5
for rollout in range(rollouts + warm_up):
    if rollout == warm_up:
        start = time.perf_counter()
    obs[0] = obs[T]
    for t in range(T):
        with torch.inference_mode():
            log_pi = forward(obs[t])[0]
            act[t] = torch.multinomial(log_pi.exp(), 1).squeeze(-1)
            log_mu[t] = log_pi.gather(-1, act[t].unsqueeze(-1)).squeeze(-1)
        x, r, terminated, truncated, _ = env.step(act[t].numpy())
        obs[t + 1], rew[t] = torch.from_numpy(x), torch.as_tensor(r).clamp(-1, 1)
        done[t] = torch.from_numpy(terminated | truncated)
    for _ in range(args.epochs):
        for rows in torch.randperm(N).chunk(args.minibatches):
            update(obs[:, rows], act[:, rows], rew[:, rows], done[:, rows], log_mu[:, rows])
print(f"{rollouts * N * T / (time.perf_counter() - start):.1f}")
