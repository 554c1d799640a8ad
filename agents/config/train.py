"""The run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtrace.agents.config.base import Checks, ConfigError, Group


@dataclass
class TrainConfig(Group):
    """The run."""

    name: str | None = None
    """Folder under runs/; made from task, seed and time if not given."""
    total_frames: int = 15_000_000
    """Environment frames (four per Atari step, action repeats included), over all ranks."""
    seed: int = 0
    """Of network, environments and order of the data."""
    devices: int = 1
    """Learner processes of each machine."""
    num_nodes: int = 1
    """Machines with learners; those of more than one are started by torchrun."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the learners run."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Of the learner; auto: bf16 where the hardware computes it natively. Actors use float32."""
    eval_every: int = 1_000_000
    """Frames between two evaluations."""
    eval_episodes: int = 10
    """Whole episodes of an evaluation."""
    final_eval: bool = True
    """Evaluate at the end as well."""
    record: bool = True
    """Record an episode of the best checkpoint at the end, as episode.gif, where the task has pictures."""
    eval_mode: Literal["sample", "greedy"] = "sample"
    """Actions in evaluations: drawn from the policy, or its mode."""
    checkpoint_every: int = 1_000_000
    """Frames between two writings of last.ckpt, and of the replay where there is one."""
    log_every: float = 10.0
    """Seconds between two log lines."""
    compile: bool = False
    """torch.compile the loss; the first update then takes a minute, and a C++ compiler is needed."""
    capture: Literal["none", "update", "try"] = "none"
    """Run whole updates as CUDA graphs (try: eagerly where that is impossible). For one learner on a GPU."""

    @property
    def learners(self) -> int:
        """On all machines."""
        return self.devices * self.num_nodes

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        checks = Checks(self, at)
        checks.at_least(1, "total_frames", "devices", "num_nodes", "eval_every", "eval_episodes", "checkpoint_every")
        checks.at_least(0, "log_every")
        for name in ("devices", "num_nodes"):
            if self.capture != "none" and (number := getattr(self, name)) > 1:
                raise ConfigError(
                    f"{at}.capture is {self.capture}, which is for one learner, and {at}.{name} is {number}: capture "
                    f"must be none, or {name} 1"
                )
        if self.capture != "none" and self.accelerator == "cpu":
            raise ConfigError(
                f"{at}.capture is {self.capture}, which needs a GPU; with {at}.accelerator cpu it must be none"
            )
        checks.require("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")


@dataclass
class WholeRolloutTrainConfig(TrainConfig):
    """The run, of an algorithm whose update is one of a whole rollout."""

    unrolls: int = 0
    """Unrolls, of one environment each, that are dealt together. More than env.num_envs come from several actors, which
    makes batches larger or data younger; 0: those of one actor."""

    # a group of an algorithm that deals rollouts makes fields of them
    minibatches = 1
    epochs = 1

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(0, "unrolls")


@dataclass
class RolloutTrainConfig(WholeRolloutTrainConfig):
    """The run."""

    minibatches: int = 4
    """Updates a rollout is dealt to."""
    epochs: int = 4
    """Passes over a rollout."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(1, "minibatches", "epochs")


@dataclass
class ReplayTrainConfig(TrainConfig):
    """The run."""

    total_frames: int = 500_000
    """Environment steps, action repeats included, over all ranks."""
    eval_every: int = 10_000
    """Frames between two evaluations."""
    eval_mode: Literal["sample", "greedy"] = "greedy"
    """Actions in evaluations: drawn from the policy, or its mode."""
    checkpoint_every: int = 50_000
    """Frames between two writings of last.ckpt and the replay."""
    updates_per_step: int = 8
    """Most updates in one step of Lightning's loop, which costs about half a millisecond each."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        Checks(self, at).at_least(1, "updates_per_step")


@dataclass
class SeparateTrainConfig(ReplayTrainConfig):
    """The run, of an algorithm whose critics read the action."""

    precision: Literal["32-true"] = "32-true"
    """Of the learner: the values of sampled actions differ by less than a step of bf16."""
