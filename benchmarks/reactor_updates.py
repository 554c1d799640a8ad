"""Reactor's gradient updates a second: the recipe's own against the bare loop of bare_reactor.py, in turns.

    python benchmarks/reactor_updates.py                  4 sequences of 32 steps of images, as on Atari
    python benchmarks/reactor_updates.py --vectors        4 of 4 numbers
    python benchmarks/reactor_updates.py --check          no times: whether both compute the same loss and gradient

Both do the same work for each update: sequences out of a replay, one call of the network with its two LSTMs and one
of the target network, Retrace of distributions, beta-LOO, one backward pass, clipping, Adam. The shipped path draws by
lazy priorities from the shipped replay, which stores each frame once, gives the priorities back, weights the sequences,
masks what reaches over the end of an episode, resets the LSTMs there, and computes its diagnostics; the bare loop
indexes tensors that hold whole stacks, inside episodes alone, has none of that, and calls torch's LSTM over whole
sequences. The ratio is the median over pairs of turns.
"""

from __future__ import annotations

import sys

flags = {name for name in ("--vectors", "--check") if name in sys.argv}
for flag in flags:
    sys.argv.remove(flag)
vectors = "--vectors" in flags

from turns import arguments, compare  # noqa: E402

args = arguments(__doc__, only_eager=True)

import torch  # noqa: E402
from bare_reactor import ATOMS, ENTROPY, EPISODE, EPSILON, V_MAX, WIDTH, BareReactor  # noqa: E402
from tensordict import TensorDict, TensorDictBase  # noqa: E402

from offtrace.agents import Agent, hard_update  # noqa: E402
from offtrace.modules.losses import ReactorLoss  # noqa: E402
from offtrace.modules.networks import build_policy  # noqa: E402
from offtrace.modules.replay import LazyPrioritized, Replay  # noqa: E402

LENGTH, SIZE, ROWS = 32, 4_000, 4
ACTIONS = 2 if vectors else 6


def stored() -> dict[str, torch.Tensor]:
    """Random steps with an end after every thousandth; images are stacks of four frames in a row."""
    if vectors:
        observation = torch.randn(SIZE + 1, 4)
    else:
        frames = torch.randint(256, (SIZE + 4, 84, 84), dtype=torch.uint8)
        observation = torch.stack([frames[n : n + SIZE + 1] for n in range(4)], 1)
    logits = torch.randn(SIZE, ACTIONS)
    action, reward = torch.multinomial(logits.softmax(-1), 1).squeeze(-1), torch.randn(SIZE)
    first = torch.arange(SIZE + 1) % EPISODE == 0
    return {
        "observation": observation, "logits": logits, "probs": logits.softmax(-1), "action": action, "reward": reward,
        "done": first[1:], "is_init": first[:-1], "last_action": torch.cat([action[:1], action]),
        "last_reward": torch.cat([reward[:1], reward]), "recurrent_h": torch.randn(SIZE + 1, 2 * WIDTH).tanh(),
        "recurrent_c": torch.randn(SIZE + 1, 2 * WIDTH),
    }  # fmt: skip


def as_rollout(steps: dict[str, torch.Tensor]) -> TensorDict:
    """``[1, SIZE]``."""
    done = steps["done"].view(1, SIZE, 1)
    states = {name: steps[name][None] for name in ("observation", "last_action", "recurrent_h", "recurrent_c")}
    states["last_reward"] = steps["last_reward"].view(1, -1, 1)
    ends = {"terminated": done, "truncated": torch.zeros_like(done), "done": done.clone()}
    log_prob = steps["probs"].gather(-1, steps["action"].unsqueeze(-1)).log().view(1, SIZE)
    return TensorDict(
        {
            **{name: x[:, :-1] for name, x in states.items()}, "logits": steps["logits"][None],
            "action": steps["action"][None], "action_log_prob": log_prob, "is_init": steps["is_init"].view(1, SIZE, 1),
            "next": {
                **{name: x[:, 1:] for name, x in states.items()}, "reward": steps["reward"].view(1, SIZE, 1), **ends,
            },
        },
        [1, SIZE],
    )  # fmt: skip


def check(loss: ReactorLoss, bare: BareReactor, rollout: TensorDict) -> None:
    """Gives both the same weights and windows; prints the largest differences, and fails where they are large."""
    online, target = dict(loss.policy.named_parameters()), dict(loss.target("policy").named_buffers())
    with torch.no_grad():
        for name, to, other in zip(online, bare.network.parameters(), bare.target.parameters(), strict=True):
            target[name].add_(0.1 * torch.randn_like(target[name]))
            to.copy_(online[name])
            other.copy_(target[name])
    first = bare.starts()
    batch = torch.stack([rollout[0, start : start + LENGTH] for start in first.tolist()])
    out, expected = loss(batch), bare.loss(first)
    total = out["loss_policy"] + out["loss_value"] + out["loss_entropy"]
    found = torch.autograd.grad(total, list(loss.policy.parameters()))
    wanted = torch.autograd.grad(expected, bare.parameters)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    total, expected = total.detach(), expected.detach()
    print(f"loss {float(total):.7f} and {float(expected):.7f}, gradients apart by {worst:.1e} of their largest entry")
    assert abs(float(total - expected)) < 1e-4
    assert worst < 1e-3


def main() -> None:
    """Prints both speeds and their ratio."""
    torch.manual_seed(0)
    steps = stored()
    shape = [4] if vectors else [4, 84, 84]
    network, hidden = ("mlp", [64]) if vectors else ("shallow", None)
    policy = build_policy(
        network=network, observation_shape=shape, num_actions=ACTIONS, hidden=hidden, recurrent=WIDTH, critic="q",
        critic_options={"dueling": True, "atoms": ATOMS, "v_max": V_MAX}, head_options={"epsilon": EPSILON},
        separate_cores=True, detach_policy=True,
    )  # fmt: skip
    loss = ReactorLoss(policy, priorities=True, entropy_coef=ENTROPY)
    bare = BareReactor(steps, ROWS, LENGTH, ACTIONS, images=not vectors)
    if "--check" in flags:
        return check(loss, bare, as_rollout(steps))
    agent = Agent(
        loss,
        loss.policy,
        optimizer=lambda weights: torch.optim.Adam(weights, 5e-5, betas=(0.0, 0.999), eps=1e-5, fused=True),
        total_frames=1,
        schedule="constant",
        clip_grad_norm=10.0,
        after_update=hard_update(loss, 1000),
    )
    stack = 1 if vectors else 4
    replay = Replay(
        2 * SIZE, num_envs=1, batch_size=ROWS, length=LENGTH, pad=True, frame_stack=stack, sampler=LazyPrioritized()
    )
    replay.extend(as_rollout(steps))
    before: list[TensorDictBase] = []

    def sample() -> TensorDictBase:
        """A batch, once the priorities of the one before are back."""
        for batch in before:
            replay.update_priorities(batch["index"], batch["td_error"])
        before[:] = [replay.sample()]
        return before[0]

    compare(args, agent, sample, bare.update)


if __name__ == "__main__":
    main()
