"""One training of a comparison, in a process of its own: which preset an agent has, and what is kept of its run."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from offtrace.agents.config import Config, ConfigError, EnvConfig
from offtrace.agents.runs.folders import config_text, write_config
from offtrace.recipes.cli import prepare_process, run_in

RANDOM = "random"
"""The agent that draws every action at random, and against which the others are measured."""


class Presets(NamedTuple):
    """The recipe's preset, as ``recipe`` or ``recipe/preset``, by what a task shows and takes."""

    discrete: str
    continuous: str
    images: str
    """With discrete actions."""


PRESETS = {
    "a2c": Presets("a2c", "a2c", "a2c/atari"),
    "acer": Presets("acer_control", "acer_control/pendulum", "acer_atari"),
    "dqn": Presets("dqn", "dqn", "dqn/atari"),
    "impala": Presets("impala_control", "impala_control/pendulum", "impala_atari"),
    "mpo": Presets("mpo_control/discrete", "mpo_control", "mpo_control/discrete"),
    "ppo": Presets("ppo", "ppo/pendulum", "ppo/atari"),
    "q_actor_critic": Presets("q_actor_critic", "q_actor_critic", "q_actor_critic/atari"),
    "reactor": Presets("reactor_control", "reactor_control", "reactor_atari"),
    "sac": Presets("sac_control/discrete", "sac_control", "sac_control/discrete"),
    "trpo": Presets("trpo", "trpo/pendulum", "trpo/atari"),
    "vmpo": Presets("vmpo_control", "vmpo_control", "vmpo_control"),
}
"""Of every agent; what cannot act continuously says so itself."""


@dataclass(frozen=True)
class Cell:
    """One training of a comparison; everything that it depends on but the code."""

    task: str
    agent: str
    preset: str
    """As of :class:`Presets`; empty of the random agent."""
    seed: int
    frames: int
    """Environment frames that it is given."""
    episodes: int
    """Whole episodes that its last policy is scored by."""
    recurrent: int
    """Width of the LSTM in its networks; 0: as the preset has it."""
    settings: str
    """A short name of the whole configuration: with other settings it is another training."""

    @property
    def name(self) -> str:
        """That of its folder and its log."""
        task = self.task.replace("/", "-").replace(":", "-")
        return f"{task}-{self.agent}-s{self.seed}-{self.settings}"


def configuration(preset: str, task: str, frames: int, episodes: int, seed: int, recurrent: int = 0) -> Config:
    """A preset for a task: as it is, for so many frames, scored once at their end. Nothing is fitted to the machine.

    Args:
        preset: as of :class:`Presets`.
        task: name of the environment, with its usual options.
        frames: environment frames.
        episodes: whole ones of the evaluation.
        seed: of the run.
        recurrent: width of an LSTM; 0: as the preset has it.

    Raises:
        ConfigError: the agent's network can have no LSTM.
    """
    recipe, _, name = preset.partition("/")
    config: Config = import_module(f"offtrace.recipes.{recipe}").main.keywords["presets"][name or "default"]()
    changed: Any = config
    changed.env = EnvConfig(task=task, num_envs=config.env.num_envs)  # the same task for all, without action repeats
    changed.train = replace(
        config.train, total_frames=frames, seed=seed, eval_every=frames, eval_episodes=episodes, record=False
    )
    if recurrent:
        if not any(field.name == "recurrent" for field in fields(config.network)):
            raise ConfigError(f"{config.algorithm} has no recurrent network")
        changed.network.recurrent = recurrent
        if hasattr(config.train, "deal"):  # PPO's single steps would tear sequences apart
            changed.train.deal = "environments"
    return config


def make_cell(agent: str, preset: str, task: str, frames: int, episodes: int, seed: int, recurrent: int = 0) -> Cell:
    """The cell of an agent, or of :data:`RANDOM`, for which ``preset`` is empty and ``frames`` counts nothing."""
    text = f"{task} {episodes}"
    if preset:
        text = config_text(configuration(preset, task, frames, episodes, seed=0, recurrent=recurrent))
    settings = hashlib.sha256(text.encode()).hexdigest()[:8]
    frames, recurrent = (frames, recurrent) if preset else (0, 0)
    return Cell(task, agent, preset, seed, frames, episodes, recurrent, settings)


def finished(folder: Path, frames: int) -> dict[str, Any] | None:
    """The summary of a run that came to its end, of so many ``frames``, with a score; None where it has not."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    scored = bool(summary["scores"])
    if summary["signal"]:  # behind the last score nothing is missing
        scored = scored and summary["scores"][-1][0] >= frames
    return summary if scored else None


def train(cell: Cell, folder: Path) -> int:
    """Trains ``cell`` in ``folder``, or goes on where that was stopped; the exit code of a recipe.

    A run that failed is begun again, and one at its end that has no score. Any other that is refused, such as for a
    full disk or damaged checkpoints, is left as it is.
    """
    config = configuration(cell.preset, cell.task, cell.frames, cell.episodes, cell.seed, cell.recurrent)
    checkpoints = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
    if any(path.exists() for path in checkpoints) and not (folder / "error.txt").exists():
        _keep_seconds(folder)
        code = run_in(folder, config, checkpoints[0])
        if code != 2 or not _at_end(checkpoints[0], cell.frames):
            return code
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_config(config, folder)
    return run_in(folder, config, None)


def _at_end(checkpoint: Path, frames: int) -> bool:
    from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, CheckpointError, read_checkpoint

    try:
        return bool(read_checkpoint(checkpoint)[CHECKPOINT_KEY]["frames"] >= frames)
    except CheckpointError:
        return False


def _keep_seconds(folder: Path) -> None:
    """Adds the time of the part that ended to ``seconds``, since a part's summary takes the place of the last one's."""
    path = folder / "summary.json"
    try:
        spent = float(json.loads(path.read_text())["seconds"])
        path.unlink()
    except (OSError, ValueError):  # killed: nobody knows
        return
    (folder / "seconds").write_text(str(seconds_before(folder) + spent))


def seconds_before(folder: Path) -> float:
    """Wall time of a run's parts before the last one."""
    try:
        return float((folder / "seconds").read_text())
    except (OSError, ValueError):
        return 0.0


def play_at_random(cell: Cell, folder: Path) -> int:
    """Scores actions drawn at random from what is legal, in the evaluation that the agents have; the exit code.

    They are uniform: over legal actions, or within the task's bounds. Where a bound is infinite they are normal.
    """
    import torch
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModuleBase
    from torchrl.data import Bounded

    from offtrace.agents.runs.evaluation import evaluate
    from offtrace.agents.runs.run import one_line
    from offtrace.agents.runs.training import evaluation_env
    from offtrace.modules.keys import ACTION, ACTION_MASK

    class Random(TensorDictModuleBase):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))  # an evaluation asks for the device of one

        def forward(self, step: TensorDictBase) -> TensorDictBase:
            mask = step.get(ACTION_MASK, None)
            drawn = spec.rand() if mask is None else torch.multinomial(mask.float(), 1).squeeze(-1)
            return step.set(ACTION, drawn)

    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cell.seed)
    # any configuration: the evaluation's environment is of the task, its seed and the number of episodes alone
    config = configuration(PRESETS["ppo"].discrete, cell.task, 1, cell.episodes, cell.seed)
    try:
        env = evaluation_env(config, cell.episodes)
        spec = env.action_spec
        bounds = getattr(env, "action_bounds", None)  # a policy may sample outside of them, and its spec has none
        if bounds is not None:
            spec = Bounded(*(bound.expand(spec.shape) for bound in bounds), dtype=spec.dtype)
        try:
            result = evaluate(Random(), env, cell.episodes)
        finally:
            env.close()
    except Exception as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    scores = [(0, result.mean)] if result.returns else []
    summary = {
        "frames": 0, "scores": scores, "seconds": time.perf_counter() - start, "frames_per_second": 0.0, "signal": 0,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary) + "\n")
    return 0


def main(cell: str, folder: str) -> int:
    """Runs a cell, which is JSON, and leaves ``summary.json`` in ``folder``; the exit code of a recipe."""
    prepare_process()
    found = Cell(**json.loads(cell))
    return (play_at_random if found.agent == RANDOM else train)(found, Path(folder))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
