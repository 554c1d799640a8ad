"""What bf16 in the learner does to the ratios: the same weights act in float32 and are judged in float32 and in bf16.

    python benchmarks/precision.py runs/NAME/checkpoints/best.ckpt

At equal weights every ratio should be 1. What differs is noise that V-trace takes for a policy that has moved.
"""

from __future__ import annotations

import argparse
import math

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential

from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, load_policy, read_checkpoint, with_policy_transforms
from offtrace.modules.envs import make_env
from offtrace.modules.keys import ACTION, LOG_PROB


def log_ratios(policy: ProbabilisticTensorDictSequential, rollout: TensorDict, dtype: torch.dtype) -> torch.Tensor:
    """log pi(a|x) in ``dtype`` minus the stored one, flat."""
    steps = rollout.flatten()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        params = policy.get_dist_params(steps.select(*policy.in_keys).clone(recurse=False))
    dist = policy[-1].build_dist_from_params(params.float())
    return dist.log_prob(steps[ACTION]) - steps[LOG_PROB]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = load_policy(args.checkpoint)
    saved = read_checkpoint(args.checkpoint)[CHECKPOINT_KEY]["env"]
    env = with_policy_transforms(make_env(saved["name"], args.envs, seed=0, **saved["options"]), policy)
    with torch.no_grad():
        rollout = env.rollout(args.steps, policy, break_when_any_done=False)
    env.close()
    print("| learner | std of log ratio | largest | ratio beyond 1 ± 0.01 | beyond 1 ± 0.1 | effective sample size |")
    print("|---|---|---|---|---|---|")
    for name, dtype in (("float32", torch.float32), ("bf16 autocast", torch.bfloat16)):
        x = log_ratios(policy, rollout, dtype).double()
        ess = float((2 * x.logsumexp(0) - (2 * x).logsumexp(0) - math.log(len(x))).exp())
        beyond = [f"{float((x.expm1().abs() > limit).double().mean()):.2%}" for limit in (0.01, 0.1)]
        print(f"| {name} | {float(x.std()):.1e} | {float(x.abs().max()):.1e} | {' | '.join(beyond)} | {ess:.6f} |")


if __name__ == "__main__":
    main()
