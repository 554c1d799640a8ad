"""The score of a checkpoint over whole episodes: python recipes/evaluate.py runs/NAME/checkpoints/best.ckpt"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offtrace.agents.config import ConfigError, count
from offtrace.agents.runs.atari_scores import human_normalised
from offtrace.modules.envs.names import atari_name
from offtrace.recipes.cli import checkpoint_file, fail, run_command
from offtrace.recipes.flags import SentenceParser, check_flags, import_from_here

if TYPE_CHECKING:
    from offtrace.agents.runs.evaluation import EvaluationResult


def main(argv: list[str] | None = None) -> int:
    """Evaluates and prints one line per figure.

    Returns:
        the exit code: 0, 2 for a wrong command line or checkpoint, 1 for episodes that could not be played to the end.
    """
    import_from_here()
    return run_command(argv, parse, _evaluate)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, as far as they can be checked without torch.

    Raises:
        ConfigError: an unknown flag (with the nearest one), or a value that does not fit.
        RunError: if the checkpoint is missing or damaged.
    """
    parser = SentenceParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="such as runs/NAME/checkpoints/best.ckpt, or last.ckpt beside it")
    parser.add_argument("--episodes", type=int, default=10, help="whole episodes (default 10)")
    parser.add_argument(
        "--mode", choices=["sample", "greedy"], help="draw actions, or take the mode (default: as in training)"
    )
    parser.add_argument("--protocol", choices=["classic", "sticky"], help="Atari protocol (default: that of training)")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the first environment; the others follow it")
    parser.add_argument("--device", default="cpu", help="of the policy: cpu (default), cuda or cuda:<n>")
    parser.add_argument("--gif", type=Path, help="also write the first episode here, if the task has pictures")
    check_flags(argv, [option for option in parser._option_string_actions if option.startswith("--")])
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise ConfigError(f"--episodes is {args.episodes}; it must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed is {args.seed}; it must be at least 0 and below 2**32")
    if args.gif is not None and not args.gif.absolute().parent.is_dir():
        raise ConfigError(f"--gif is {args.gif}; there is no folder {args.gif.absolute().parent}")
    if args.gif is not None and args.gif.suffix != ".gif":
        raise ConfigError(f"--gif is {args.gif}; it must be the name of a file that ends in .gif")
    checkpoint_file(args.checkpoint)
    return args


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from offtrace.agents.runs.checkpoint import (
        CHECKPOINT_KEY,
        CheckpointError,
        load_env,
        load_policy,
        read_checkpoint,
    )
    from offtrace.agents.runs.evaluation import evaluate
    from offtrace.agents.runs.recording import Recorder
    from offtrace.modules.envs import env_info

    try:
        policy = load_policy(args.checkpoint).to(_device(args.device))
        saved = read_checkpoint(args.checkpoint)[CHECKPOINT_KEY]
    except CheckpointError as error:
        return fail(str(error))
    name, options = saved["env"]["name"], dict(saved["env"]["options"])
    mode = args.mode or saved["eval_mode"]
    if args.protocol is not None:
        if atari_name(name) is None:
            return fail(f"--protocol is {args.protocol}; {name} is no Atari game")
        options["protocol"] = args.protocol
    torch.manual_seed(args.seed)
    number = max(n for n in range(1, 17) if args.episodes % n == 0)
    try:
        actions = env_info(name, **options).num_actions
        own = saved["policy"]["arguments"].get("num_actions", actions)
        if actions != own:  # the same numbers would mean other actions
            under = "" if args.protocol is None else f" under the {args.protocol} protocol"
            return fail(f"the policy knows {own} actions of {name}; it has {actions}{under}")
        env = load_env(args.checkpoint, policy, number, seed=args.seed, pictures=args.gif is not None, **options)
    except ValueError as error:
        return fail(str(error))
    except RuntimeError as error:  # the task's own
        return _unplayed(name, error)
    try:
        recorder = Recorder(env) if args.gif else None
    except ValueError as error:
        env.close()
        return fail(f"--gif is {args.gif}; {error}")
    try:
        result = evaluate(policy, env, args.episodes, mode=mode, observer=recorder)
    except (RuntimeError, ValueError) as error:
        return _unplayed(name, error)
    finally:
        env.close()
    if not result.returns:
        print(f"error: the simulator of {name} failed in each of the {args.episodes} episodes", file=sys.stderr)
        return 1
    print("\n".join(report(result, name, options.get("protocol", ""))))
    if recorder is not None:
        try:
            recorder.save(args.gif)
        except (OSError, ValueError) as error:
            print(f"error: the GIF {args.gif} was not written: {error}", file=sys.stderr)
            return 1
    return 0


def _unplayed(name: str, error: Exception) -> int:
    from offtrace.agents.runs.run import one_line

    print(f"error: the episodes of {name} were not played to the end: {one_line(error)}", file=sys.stderr)
    return 1


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name}; it must be cpu, cuda or cuda:<n>") from error
    gpus = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ConfigError(f"--device is {name}; this machine has cpu and {count(gpus, 'CUDA device')}")
    return name


def report(result: EvaluationResult, name: str, protocol: str) -> list[str]:
    """The lines that are printed: what was played, the score and its spread, for Atari the human-normalised score."""
    atari = f"{protocol} protocol, " if atari_name(name) else ""
    lines = [
        f"{name}, {atari}{result.mode} actions, {count(len(result.returns), 'whole episode')}, raw scores",
        f"mean {result.mean:.2f}, {result.spread}",
        f"median {statistics.median(result.returns):g}, min {min(result.returns):g}, max {max(result.returns):g}",
        f"mean length {result.mean_length:.0f} agent steps",
    ]
    if result.dropped:
        lines.append(f"{count(result.dropped, 'episode')} dropped, in which the simulator failed")
    if result.action_change is not None:
        lines.append(f"action change {result.action_change:.4f} of the range from step to step (root mean square)")
    normalised = human_normalised(name, result.mean)
    if normalised is not None:
        lines.append(f"human-normalised score {100 * normalised:.1f} % (0 at random, 100 a human tester)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
