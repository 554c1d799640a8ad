"""Atari on ale-py's native vector environment."""

from __future__ import annotations

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import Tensor
from torchrl.data import Bounded, Categorical

from offtrace.modules.envs.base import StepResult, VectorEnv
from offtrace.modules.envs.names import ATARI_FRAME_SKIP, PROTOCOLS, Protocol, atari_name, unknown

LAST_EMULATOR_SEED = 2**31 - 1


class AtariEnv(VectorEnv):
    """``N`` games of one kind: four stacked 84x84 grey frames, four emulator frames a step, the last two of them maxed.

    ``classic`` is the protocol of Mnih et al. 2015 and of all scores in the literature up to 2018: up to 30 no-ops at
    the start, no sticky actions, the game's minimal actions; in training a lost life is ``terminated`` but the game
    goes on. ``sticky`` is that of Machado et al. 2018 (arXiv 1709.06009): an action is repeated with probability 0.25,
    all 18 actions, no life signal, no no-ops. Both end a game after 108,000 frames, as truncation. FIRE is pressed
    after a reset where the game needs it, as the wrappers of the published baselines do. Rewards are raw: the loss
    clips them.

    Against Gymnasium's ``AtariPreprocessing`` with ``FrameStackObservation``: grey values differ by 1 of 255 at most,
    since ale-py scales the picture by its own copy of OpenCV's area interpolation; the first stacks of a game are
    padded with zeros where Gymnasium repeats the first frame; ``AtariPreprocessing`` never presses FIRE, and ends an
    episode with a life only if told (``terminal_on_life_loss``), where it restarts the game.

    Args:
        game: ``"pong"``, ``"Pong"`` or ``"ALE/Pong-v5"``.
        num_envs: N.
        protocol: ``"classic"`` or ``"sticky"``.
        evaluation: whole games: a lost life is no end.
        seed: environment i gets ``seed + i``.
        num_threads: threads of the emulator; one is most efficient per core.
        last_step: also write the last action and reward.
        max_frames: emulator frames of a game.

    Raises:
        ValueError: on an unknown game or protocol, a number below 1, or a seed that an emulator cannot take.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        protocol: Protocol = "classic",
        evaluation: bool = False,
        seed: int = 0,
        num_threads: int = 1,
        last_step: bool = False,
        max_frames: int = 108_000,
    ) -> None:
        rom = atari_name(game)
        if rom is None:
            raise ValueError(unknown(game))
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be 'classic' or 'sticky', got {protocol!r}")
        for argument, number in (("num_envs", num_envs), ("num_threads", num_threads), ("max_frames", max_frames)):
            if number < 1:  # ale-py would crash the process
                raise ValueError(f"{argument} is {number}; it must be at least 1")
        if not 0 <= seed <= LAST_EMULATOR_SEED - num_envs + 1:  # ale-py would draw a seed of its own for -1
            raise ValueError(
                f"seed is {seed}, and those of {num_envs} games follow it; it must be from 0 to "
                f"{LAST_EMULATOR_SEED - num_envs + 1}"
            )
        classic = protocol == "classic"
        self._env = AtariVectorEnv(
            rom,
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=0.0 if classic else 0.25,
            full_action_space=not classic,
            autoreset_mode=AutoresetMode.SAME_STEP,
            noop_max=30 if classic else 0,
            life_loss_info=classic and not evaluation,
            reward_clipping=False,
        )
        actions = int(self._env.single_action_space.n)
        super().__init__(
            rom,
            num_envs,
            observation=Bounded(0, 255, shape=(4, 84, 84), dtype=torch.uint8),
            action=Categorical(actions, dtype=torch.int64),
            frame_skip=ATARI_FRAME_SKIP,
            last_step=last_step,
            frame_stack=4,
        )
        self._seed = seed
        self._started = False
        self._frame_numbers = np.zeros(num_envs, np.int64)
        self._current = torch.empty(0)

    def _start(self) -> tuple[Tensor, None]:
        observation, info = self._env.reset(seed=None if self._started else self._seed)
        self._started = True
        self._frame_numbers = info["episode_frame_number"]
        self._current = torch.from_numpy(observation)
        return self._current, None

    def _advance(self, action: Tensor) -> StepResult:
        observation, reward, terminated, truncated, info = self._env.step(action.numpy())
        self._current = successor = torch.from_numpy(observation)
        # Only a game that was over starts to count its frames anew; after a lost life it goes on. One that was cut off
        # early may have had fewer frames than the no-ops of the next.
        over = truncated | (info["episode_frame_number"] < self._frame_numbers)
        self._frame_numbers = info["episode_frame_number"]
        if over.any():
            ended = torch.from_numpy(over)
            final = torch.from_numpy(info["final_obs"])
            successor = torch.where(ended.view(-1, 1, 1, 1), final, successor)
        return StepResult(
            successor,
            torch.from_numpy(np.asarray(reward, np.float32)),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(over),
        )

    def _following(self) -> Tensor:
        return self._current

    def _close(self) -> None:
        # what is left at the process's end, where garbage is not collected any more, nanobind tells in twenty lines
        del self._env
