"""What all environments share: the TorchRL side of a batch of environments that reset themselves."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from offtrace.modules import keys as k


class EnvironmentFailure(RuntimeError):
    """An environment raised, or returned what cannot be learned from; the message names it, the step and the reason."""


class StepResult(NamedTuple):
    """What the environments return, ``[N, ...]``; ``observation`` is the true successor, ended episode or not.

    ``valid`` is False where the simulator failed: the step is no data, its episode is dropped and counts nowhere.
    ``action_mask`` is that of ``observation``, ``following_mask`` that of what the next step starts from, another one
    where an episode ended.
    """

    observation: Tensor | TensorDictBase
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    episode_end: Tensor
    action_mask: Tensor | None = None
    valid: Tensor | None = None
    following_mask: Tensor | None = None


class VectorEnv(EnvBase):
    """``N`` environments that step together. Subclasses implement ``_start``, ``_advance`` and ``_following``, and
    ``_close`` where there is something to free.

    Reads ``"action"``; writes what ``modules/keys.py`` lists: observation, reward, ``terminated``, ``truncated``,
    ``done``, ``is_init``, the running ``episode_*`` entries and, with ``last_step``, the last action and raw reward.

    Args:
        name: for messages.
        num_envs: N.
        observation: spec of one observation.
        action: spec of one action.
        frame_skip: environment frames per step.
        last_step: also write ``"last_action"`` and ``"last_reward"``, zeros at the start of an episode.
        masked: the environment gives ``"action_mask"``.
        fallible: a simulator may fail: also write ``"valid"``, False under ``"next"`` where it did in the step.
        frame_stack: frames along an observation's first dimension, the newest last. Within an episode each observation
            is the one before, moved by a frame; what the first one holds is free. 1: no stack.

    Attributes:
        dropped: episodes that a simulator's failure ended.
        renders: ``render()`` gives pictures of environment 0, uint8 ``[height, width, 3]``.
        action_bounds: float32 ``[A]`` each, what continuous actions are clipped to; None for discrete ones, and where
            a bound is infinite.
    """

    renders = False

    batch_locked = True
    # TorchRL would append a second frame skip to an environment that has the attribute and does not say this.
    _has_frame_skip = True

    def __init__(
        self,
        name: str,
        num_envs: int,
        *,
        observation: TensorSpec,
        action: TensorSpec,
        frame_skip: int = 1,
        last_step: bool = False,
        masked: bool = False,
        fallible: bool = False,
        frame_stack: int = 1,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it must be at least 1")
        super().__init__(device=torch.device("cpu"), batch_size=[num_envs])
        self.is_closed = False  # True is TorchRL's default, and of what is closed already nothing is freed
        self.name = name
        self.frame_skip = frame_skip
        self.frame_stack = frame_stack
        self.last_step = last_step
        n = num_envs
        flag = lambda: Binary(n=1, shape=(n, 1), dtype=torch.bool)  # noqa: E731
        entries: dict[str, TensorSpec] = {
            k.OBSERVATION: observation.expand(n, *observation.shape),
            k.IS_INIT: flag(),
            k.EPISODE_REWARD: Unbounded((n, 1)),
            k.EPISODE_LENGTH: Unbounded((n, 1), dtype=torch.int64),
            k.EPISODE_END: flag(),
        }
        self._discrete = isinstance(action, Categorical)
        if last_step:
            entries[k.LAST_ACTION] = Unbounded((n, *action.shape), dtype=action.dtype)
            entries[k.LAST_REWARD] = Unbounded((n, 1))
        if masked:
            entries[k.ACTION_MASK] = Binary(n=action.space.n, shape=(n, action.space.n), dtype=torch.bool)
        if fallible:
            entries[k.VALID] = flag()
        self.fallible = fallible
        self.dropped = 0
        self.action_bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(action, Bounded):
            self.action_bounds = action.space.low, action.space.high
        self.observation_spec = Composite(entries, shape=(n,))
        self.action_spec = action.expand(n, *action.shape)
        self.reward_spec = Unbounded((n, 1))
        self.done_spec = Composite({key: flag() for key in (k.DONE, k.TERMINATED, k.TRUNCATED)}, shape=(n,))
        self._steps = 0
        self._sums = torch.zeros(n, 1)
        self._lengths = torch.zeros(n, 1, dtype=torch.int64)
        self._ended = torch.ones(n, 1, dtype=torch.bool)
        self._done = self._ended
        self._false = torch.zeros(n, 1, dtype=torch.bool)
        self._no_action = torch.zeros(n, *action.shape, dtype=action.dtype)
        self._successor: Tensor | TensorDictBase | None = None
        self._mask: Tensor | None = None

    @abstractmethod
    def _start(self) -> tuple[Tensor | TensorDictBase, Tensor | None]:
        """First observations ``[N, ...]`` of all environments, and masks."""

    @abstractmethod
    def _advance(self, action: Tensor) -> StepResult:
        """One step of all environments. Those that end restart by themselves; ``_following`` tells with what."""

    @abstractmethod
    def _following(self) -> Tensor | TensorDictBase:
        """The observations ``[N, ...]`` the next step starts from: the next episode's first where one ended."""

    def _close(self) -> None:
        """Frees what the simulators hold; called once."""
        return

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees what the simulators hold. One that raises is told by a RuntimeWarning: nothing needs it any more."""
        if not self.is_closed:
            self.is_closed = True
            try:
                self._close()
            except Exception as error:
                warnings.warn(
                    f"{self.name}: the environment raised {type(error).__name__} when it was closed: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        super().close(raise_if_closed=raise_if_closed)

    def _set_seed(self, seed: int | None) -> None:
        raise EnvironmentFailure(f"{self.name}: environments are seeded when they are made; pass seed to make_env")

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None or self._successor is None or (bool(mask.all()) and not bool(self._done.all())):
            observation, self._mask = self._guard(self._start)
            mask = torch.ones_like(self._false)
            self._ended = self._done = torch.ones_like(self._ended)
        else:
            observation = self._following()
            mask = mask.view(-1, 1)
            self._check_reset(mask)
        if not self.fallible:  # those look themselves, and drop
            self._check(k.OBSERVATION, observation)
        fresh = mask & self._ended
        self._sums = self._sums.masked_fill(fresh, 0)  # in place it would change what was given away
        self._lengths = self._lengths.masked_fill(fresh, 0)
        self._ended = self._ended & ~mask
        self._done = self._done & ~mask
        self._successor = observation
        out = {
            k.OBSERVATION: observation,
            k.IS_INIT: mask.clone(),
            **self._sums_so_far(self._false.clone()),
            **{key: self._false.clone() for key in (k.DONE, k.TERMINATED, k.TRUNCATED)},
        }
        if self.last_step:
            out[k.LAST_ACTION] = self._no_action.clone()
            out[k.LAST_REWARD] = torch.zeros_like(self._sums)
        if self._mask is not None:
            out[k.ACTION_MASK] = self._mask
        if self.fallible:
            out[k.VALID] = ~self._false
        return TensorDict(out, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(k.ACTION)
        if action.shape != self._no_action.shape:
            raise EnvironmentFailure(
                f"{self.name}: the policy gave actions of shape {list(action.shape)}; they must be "
                f"{list(self._no_action.shape)}"
            )
        self._steps += 1
        result = self._guard(self._advance, action)
        reward = result.reward.view(-1, 1)
        if not self.fallible:  # those drop the episode instead, and have looked
            self._check(k.REWARD, reward)
            self._check(k.OBSERVATION, result.observation)
        terminated, truncated = result.terminated.view(-1, 1), result.truncated.view(-1, 1)
        self._sums = self._sums + reward
        self._lengths = self._lengths + 1
        self._ended = result.episode_end.view(-1, 1)
        self._done = terminated | truncated
        self._successor = result.observation
        self._mask = result.action_mask if result.following_mask is None else result.following_mask
        finished = self._ended if result.valid is None else self._ended & result.valid.view(-1, 1)
        out = {
            k.OBSERVATION: result.observation,
            k.IS_INIT: self._false.clone(),
            **self._sums_so_far(finished),
            k.REWARD: reward,
            k.TERMINATED: terminated,
            k.TRUNCATED: truncated,
            k.DONE: self._done,
        }
        if self.last_step:
            out[k.LAST_ACTION] = action.clone()
            out[k.LAST_REWARD] = reward.clone()
        if result.action_mask is not None:
            out[k.ACTION_MASK] = result.action_mask
        if result.valid is not None:
            out[k.VALID] = result.valid.view(-1, 1)
        return TensorDict(out, self.batch_size, device=self.device)

    def _check_reset(self, mask: Tensor) -> None:
        # these environments have restarted already where an episode ended; elsewhere the old one would go on unnoticed
        early = (mask & ~self._done).flatten().nonzero().flatten().tolist()
        if early:
            raise EnvironmentFailure(
                f"{self.name}: environment {early[0]} is reset in the middle of its episode, which only all can be at "
                "once; for shorter episodes give the environment itself a time limit"
            )

    def _sums_so_far(self, ended: Tensor) -> dict[str, Tensor]:
        return {
            k.EPISODE_REWARD: self._sums,
            k.EPISODE_LENGTH: self._lengths,
            k.EPISODE_END: ended,
        }

    def _drop(self, index: int, reason: str) -> None:
        """Counts a dropped episode and says so, ever more rarely."""
        self.dropped += 1
        if self.dropped & (self.dropped - 1):
            return
        warnings.warn(
            f"{self.name}: environment {index} failed at step {self._steps} ({reason}); its episode was dropped, "
            f"number {self.dropped} so far",
            RuntimeWarning,
            stacklevel=2,
        )

    def _guard(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except EnvironmentFailure:
            raise
        except Exception as error:
            raise EnvironmentFailure(
                f"{self.name}: the environment raised {type(error).__name__} at step {self._steps}: {error}"
            ) from error

    def _check(self, what: str, value: Tensor | TensorDictBase) -> None:
        if isinstance(value, TensorDictBase):
            for leaf in value.values(True, True):
                self._check(what, leaf)
            return
        if not value.is_floating_point():
            return
        # one pass: a sum is finite unless an entry is not, or the entries overflow it
        if torch.isfinite(value.sum()):
            return
        bad = (~torch.isfinite(value)).reshape(len(value), -1).any(-1).nonzero().flatten().tolist()
        if bad:
            raise EnvironmentFailure(
                f"{self.name}: environment {bad[0]} returned a {what} that is not finite at step {self._steps}"
            )


def bounded(low: Any, high: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Bounded:
    """A bounded spec from numbers or arrays."""
    return Bounded(torch.as_tensor(low, dtype=dtype), torch.as_tensor(high, dtype=dtype), shape=shape, dtype=dtype)
