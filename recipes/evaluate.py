"""The score of a checkpoint over whole games: python recipes/evaluate.py runs/NAME/checkpoints/best.ckpt"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offtrace.agents.atari_scores import human_normalised
from offtrace.recipes.cli import fail


def main(argv: list[str] | None = None) -> int:
    """Evaluates and prints one line per figure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--episodes", type=int, default=10, help="whole games (default 10)")
    parser.add_argument("--mode", choices=["sample", "greedy"], default="sample", help="draw actions, or take the mode")
    parser.add_argument("--protocol", choices=["classic", "sticky"], help="Atari protocol (default: that of training)")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the first environment; the others follow it")
    parser.add_argument("--gif", type=Path, help="also write the first game here")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        return fail(f"--episodes is {args.episodes}; it must be at least 1")
    if not args.checkpoint.is_file():
        return fail(f"there is no checkpoint file at {args.checkpoint}")
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from offtrace.agents.checkpoint import CHECKPOINT_KEY, CheckpointError, load_policy, read_checkpoint
    from offtrace.agents.evaluation import evaluate
    from offtrace.agents.media import save_gif
    from offtrace.agents.training import with_policy_transforms
    from offtrace.modules.envs import make_env

    try:
        saved = read_checkpoint(args.checkpoint)[CHECKPOINT_KEY]
        policy = load_policy(args.checkpoint)
    except CheckpointError as error:
        return fail(str(error))
    name, protocol = saved["env"]["name"], args.protocol or saved["env"]["protocol"]
    torch.manual_seed(args.seed)
    number = max(n for n in range(1, 11) if args.episodes % n == 0)
    try:
        env = make_env(
            name,
            number,
            seed=args.seed,
            evaluation=True,
            protocol=protocol,
            last_step=bool(saved["policy"]["recurrent"]),
        )
        env = with_policy_transforms(env, policy)
    except ValueError as error:
        return fail(str(error))
    frames = []

    def keep(step: object) -> None:
        frame = step["observation"][0]  # type: ignore[index]
        frames.append(frame[-1].numpy().copy())

    try:
        result = evaluate(policy, env, args.episodes, mode=args.mode, observer=keep if args.gif else None)
    except (RuntimeError, ValueError) as error:
        return fail(f"the policy cannot play {name}: {str(error).splitlines()[0]}")
    finally:
        env.close()
    error = result.std / len(result.returns) ** 0.5
    ordered = sorted(result.returns)
    atari = human_normalised(name, result.mean)
    print(
        f"{name}, {f'{protocol} protocol, ' if atari is not None else ''}{args.mode} actions, {args.episodes} whole games"
    )
    print(f"mean {result.mean:.2f} +- {error:.2f} (standard error), std {result.std:.2f}")
    print(f"median {ordered[len(ordered) // 2]:g}, min {ordered[0]:g}, max {ordered[-1]:g}")
    print(f"mean length {sum(result.lengths) / len(result.lengths):.0f} agent steps")
    if atari is not None:
        print(f"human-normalised score {100 * atari:.1f} %")
    if args.gif:
        save_gif(frames[: result.lengths[0]], args.gif)
    return 0


if __name__ == "__main__":
    sys.exit(main())
