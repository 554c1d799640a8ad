"""The DeepMind control suite, several environments at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from absl import logging
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

from offtrace.modules.envs.base import EnvironmentFailure, StepResult, VectorEnv
from offtrace.modules.envs.names import check_takes, unknown
from offtrace.modules.envs.simulator import Simulator, SimulatorFailure
from offtrace.modules.envs.suite import check_installed, control_name, control_suite


class ControlEnv(VectorEnv):
    """``N`` environments of one task of the suite (Tassa et al. 2018, arXiv 1801.00690), stepped in turn.

    Actions are float32 in [-1, 1]: clipped to that, then mapped linearly to the task's bounds, whatever their size;
    an actuator without bounds gets the clipped action as it is. An episode that reaches the time limit is
    ``truncated``; it is ``terminated`` where the task says that the state is terminal, as hardly any does. In both
    cases the observation is the true last one.

    Where the simulator diverges, or a task returns what is not finite, the step is written with ``valid`` False,
    ``truncated`` True, reward 0 and the observation before it: nothing is learned from it and nothing bootstraps from
    it. The episode is dropped, which means that ``episode_end`` stays False and its return is reported nowhere. It is
    counted in ``dropped``, said once in a warning, and the environment goes on with a new episode.

    Args:
        task: ``"walker-walk"``, or a function that gives a ``dm_control.rl.control.Environment`` for a seed.
        num_envs: N.
        seed: environment i gets ``seed + i``.
        action_repeat: steps of the task per action, their rewards summed; fewer where the episode ends.
        flatten: one float32 vector ``[D]``, the task's entries in its order. False: ``("observation", entry)`` each.
        pixels: observe images instead, uint8 ``[3 * frame_stack, height, width]``.
        height, width, camera, frame_stack: of the images; the newest frame is the last. At the start of an episode
            the first frame fills the stack.
        last_step: also write the last action and reward.
        name: for messages; the task by default.
        kwargs: of the task, such as ``time_limit`` in seconds; a function gets them behind the seed.

    Raises:
        ValueError: on an unknown domain or task, an option that the task or the function does not take, a number out
            of range, or a Python without dm_control.
        EnvironmentFailure: ``pixels`` on a machine that cannot render.
    """

    renders = True

    def __init__(
        self,
        task: str | Callable[..., Any],
        num_envs: int,
        *,
        seed: int = 0,
        action_repeat: int = 1,
        flatten: bool = True,
        pixels: bool = False,
        height: int = 84,
        width: int = 84,
        camera: int | str = 0,
        frame_stack: int = 3,
        last_step: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {"num_envs": num_envs, "action_repeat": action_repeat, "height": height, "width": width}
        for argument, number in {**sizes, "frame_stack": frame_stack}.items():
            if number < 1:
                raise ValueError(f"{argument} is {number}; it must be at least 1")
        if pixels and not flatten:
            raise ValueError("flatten is False; with pixels an observation is one image: it must be True")
        label = name or (task if isinstance(task, str) else str(getattr(task, "__name__", "task")))
        if not isinstance(task, str):
            check_takes(label, task, "seed", **kwargs)
        try:
            self._simulators = [Simulator(_load(task, seed + index, kwargs)) for index in range(num_envs)]
        except SimulatorFailure as error:
            raise EnvironmentFailure(f"{label}: {error}") from error
        first = self._simulators[0]
        self._action_repeat = action_repeat
        self._flatten = flatten
        self._camera = camera
        self._cameras: list[Any] | None = None
        observation: TensorSpec
        if pixels:
            self._cameras = [_camera(label, one, height, width, camera) for one in self._simulators]
            observation = Bounded(0, 255, shape=(3 * frame_stack, height, width), dtype=torch.uint8)
        elif flatten:
            observation = Unbounded((first.size,), dtype=torch.float32)
        else:
            observation = Composite({key: Unbounded(shape, dtype=torch.float32) for key, _, shape in first.layout})
        super().__init__(
            label,
            num_envs,
            observation=observation,
            action=Bounded(-1.0, 1.0, shape=first.low.shape, dtype=torch.float32),
            frame_skip=action_repeat,
            last_step=last_step,
            fallible=True,
            frame_stack=frame_stack if pixels else 1,
        )
        shape = tuple(observation.shape) if pixels else (first.size,)
        self._current = np.zeros((num_envs, *shape), np.uint8 if pixels else np.float32)
        self._started = False
        self._video: tuple[tuple[int, int], Any] | None = None
        self._final_frame: np.ndarray | None = None

    def render(self, height: int = 240, width: int = 320) -> np.ndarray:
        """A picture of environment 0, uint8 ``[height, width, 3]``.

        An episode that ended in the last step is seen where it ended, if pictures were taken before.

        Raises:
            EnvironmentFailure: this machine cannot render.
        """
        if self._video is None or self._video[0] != (height, width):
            self._video = (height, width), _camera(self.name, self._simulators[0], height, width, self._camera)
            self._final_frame = None
        # a camera gives its own buffer again and again
        return self._video[1].render().copy() if self._final_frame is None else self._final_frame

    def _start(self) -> tuple[Tensor | TensorDictBase, None]:
        self._current = np.empty_like(self._current)
        for index in range(len(self._simulators)):
            self._restart(index, self._current[index], again=self._started)
        self._started = True
        self._final_frame = None
        return self._shaped(self._current), None

    def _advance(self, action: Tensor) -> StepResult:
        controls = self._controls(action)
        number = len(self._simulators)
        successor = np.empty_like(self._current)
        rewards = np.zeros(number, np.float32)
        terminated, truncated, failed = (np.zeros(number, bool) for _ in range(3))
        self._final_frame = None
        for index, simulator in enumerate(self._simulators):
            try:
                rewards[index], discount = simulator.step(controls[index], self._action_repeat)
                self._observe(index, successor[index])
            except SimulatorFailure as error:
                failed[index] = True
                self._drop(index, str(error))
                continue
            except Exception as error:
                raise EnvironmentFailure(
                    f"{self.name}: environment {index} raised {type(error).__name__} at step {self._steps}: {error}"
                ) from error
            if discount is not None:
                terminated[index], truncated[index] = discount == 0.0, discount != 0.0
        self._drop_what_is_not_finite(successor, rewards, failed)
        truncated |= failed
        terminated &= ~failed
        ended = terminated | truncated
        if failed.any():
            successor[failed] = self._current[failed]
            rewards[failed] = 0.0
        self._current = successor
        if ended.any():
            self._current = successor.copy()
            for index in ended.nonzero()[0].tolist():
                self._restart(index, self._current[index])
        return StepResult(
            self._shaped(successor),
            torch.from_numpy(rewards),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(ended),
            valid=torch.from_numpy(~failed),
        )

    def _following(self) -> Tensor | TensorDictBase:
        return self._shaped(self._current)

    def _controls(self, action: Tensor) -> np.ndarray:
        actions = action.numpy()
        if not np.isfinite(actions).all():  # not the simulator's fault: no episode after it would go better
            index = int((~np.isfinite(actions)).any(-1).argmax())
            raise EnvironmentFailure(
                f"{self.name}: the policy gave environment {index} an action that is not finite at step {self._steps}"
            )
        return self._simulators[0].scale(actions)

    def _observe(self, index: int, out: np.ndarray) -> None:
        if self._cameras is None:
            self._simulators[index].observe(out)
        else:
            out[:-3] = self._current[index, 3:]
            out[-3:] = self._cameras[index].render().transpose(2, 0, 1)

    def _restart(self, index: int, out: np.ndarray, *, again: bool = True) -> None:
        simulator = self._simulators[index]
        if index == 0 and again and self._video is not None:
            self._final_frame = self._video[1].render().copy()
        try:
            # made simulators stand at the start of an episode already
            first = simulator.restart() if again else simulator.first
        except SimulatorFailure as error:
            raise EnvironmentFailure(f"{self.name}: environment {index} at step {self._steps}: {error}") from error
        if self._cameras is None:
            simulator.write(first, out)
        else:
            frame = self._cameras[index].render().transpose(2, 0, 1)
            out.reshape(-1, *frame.shape)[:] = frame

    def _drop_what_is_not_finite(self, successor: np.ndarray, rewards: np.ndarray, failed: np.ndarray) -> None:
        finite = np.isfinite(rewards)
        if self._cameras is None:
            finite &= np.isfinite(successor).all(-1)
        for index in (~(finite | failed)).nonzero()[0].tolist():
            failed[index] = True
            self._drop(index, "the task returned a number that is not finite")

    def _shaped(self, rows: np.ndarray) -> Tensor | TensorDictBase:
        tensor = torch.from_numpy(rows)
        if self._cameras is not None or self._flatten:
            return tensor
        number = len(rows)
        entries = {key: tensor[:, place].reshape(number, *shape) for key, place, shape in self._simulators[0].layout}
        return TensorDict(entries, [number])

    def _close(self) -> None:
        self._cameras = self._video = None
        for simulator in self._simulators:
            simulator.close()


def _load(task: str | Callable[..., Any], seed: int, kwargs: dict[str, Any]) -> Any:
    if not isinstance(task, str):
        return task(seed, **kwargs)
    names = control_name(task)
    if names is None:
        raise ValueError(unknown(task))
    check_installed(f"the task {task!r}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # the suite's own models make MuJoCo speak of deprecated attributes
    try:
        return control_suite().load(*names, task_kwargs={"random": seed, **kwargs})
    except TypeError as error:
        raise ValueError(f"the task {task!r} cannot be made: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def _camera(name: str, simulator: Simulator, height: int, width: int, camera: int | str) -> Any:
    try:
        made = simulator.camera(height, width, camera)
        made.render()
    except ValueError:  # a size or a camera that the model does not have
        raise
    except Exception as error:  # PyOpenGL raises whatever the missing library leads to
        raise EnvironmentFailure(
            f"{name}: this machine cannot render ({type(error).__name__}: {error}); images need EGL or OSMesa "
            "(packages libegl1 or libosmesa6) and MUJOCO_GL unset or naming one that is there"
        ) from error
    return made
