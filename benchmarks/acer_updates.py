"""ACER's gradient updates a second: the library's against the bare loop of bare_acer.py, in turns in one process.

    python benchmarks/acer_updates.py                     16 sequences of 20 steps of images, as on Atari
    python benchmarks/acer_updates.py --vectors           8 of 4 numbers, as on CartPole

Both do the same work for each update: sequences out of a replay, one call of the network and one of the average
network, Retrace, the trust region, one backward pass, clipping, RMSProp, the average. The shipped path samples from the
shipped replay, which stores each frame once, masks what reaches over the end of an episode, and computes its
diagnostics; the bare loop indexes tensors that hold whole stacks, and has neither. The ratio is the median over pairs
of turns.
"""

from __future__ import annotations

import sys

vectors = "--vectors" in sys.argv
if vectors:
    sys.argv.remove("--vectors")

from turns import arguments, compare  # noqa: E402

args = arguments(__doc__, only_eager=True)

import torch  # noqa: E402
from bare_acer import BareACER  # noqa: E402
from tensordict import TensorDict  # noqa: E402

from offtrace.agents import Agent, make_optimizer, soft_update  # noqa: E402
from offtrace.modules.losses import ACERLoss  # noqa: E402
from offtrace.modules.networks import build_policy  # noqa: E402
from offtrace.modules.replay import Replay  # noqa: E402

LENGTH, SIZE = 20, 4_000
ROWS, ACTIONS = (8, 2) if vectors else (16, 6)


def stored() -> dict[str, torch.Tensor]:
    """Random steps with an end after every thousandth; images are stacks of four frames in a row."""
    done = torch.arange(1, SIZE + 1) % 1000 == 0
    if vectors:
        observation = torch.randn(SIZE + 1, 4)
    else:
        frames = torch.randint(256, (SIZE + 4, 84, 84), dtype=torch.uint8)
        observation = torch.stack([frames[n : n + SIZE + 1] for n in range(4)], 1)
    logits = torch.randn(SIZE, ACTIONS)
    probs = logits.softmax(-1)
    action = torch.multinomial(probs, 1).squeeze(-1)
    return {
        "observation": observation, "logits": logits, "probs": probs, "action": action,
        "reward": torch.randn(SIZE), "done": done,
    }  # fmt: skip


def as_rollout(steps: dict[str, torch.Tensor]) -> TensorDict:
    """``[1, SIZE]``."""
    done = steps["done"].view(1, SIZE, 1)
    following = {"observation": steps["observation"][1:][None], "reward": steps["reward"].view(1, SIZE, 1)}
    ends = {"terminated": done, "truncated": torch.zeros_like(done), "done": done.clone()}
    log_prob = steps["probs"].gather(-1, steps["action"].unsqueeze(-1)).log().view(1, SIZE)
    return TensorDict(
        {
            "observation": steps["observation"][:-1][None], "logits": steps["logits"][None],
            "action": steps["action"][None], "action_log_prob": log_prob,
            "is_init": torch.cat([torch.ones(1, 1, 1, dtype=torch.bool), done[:, :-1]], 1),
            "next": {**following, **ends},
        },
        [1, SIZE],
    )  # fmt: skip


def main() -> None:
    """Prints both speeds and their ratio."""
    torch.manual_seed(0)
    steps = stored()
    shape = [4] if vectors else [4, 84, 84]
    network, hidden = ("mlp", [64, 64]) if vectors else ("shallow", None)
    policy = build_policy(network=network, observation_shape=shape, num_actions=ACTIONS, hidden=hidden, critic="q")
    loss = ACERLoss(policy)
    agent = Agent(
        loss,
        loss.policy,
        optimizer=make_optimizer("rmsprop_tf", lr=7e-4, eps=1e-5),
        total_frames=1,
        schedule="constant",
        clip_grad_norm=10.0,
        after_update=soft_update(loss, 0.01),
    )
    stack = 1 if vectors else 4
    replay = Replay(2 * SIZE, num_envs=1, batch_size=ROWS, length=LENGTH, pad=True, overlap=False, frame_stack=stack)
    replay.extend(as_rollout(steps))
    bare = BareACER(steps, ROWS, LENGTH, ACTIONS, images=not vectors)
    compare(args, agent, replay.sample, bare.update)


if __name__ == "__main__":
    main()
