"""One dm_control environment without the overhead of its own ``step``: same numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from offtrace.modules.envs.suite import control_module

_MAXIMUM = 1e9
"""Bounds beyond it are MuJoCo's way of saying that an actuator has none."""
_RESTARTS = 10


class SimulatorFailure(RuntimeError):
    """The simulation diverged, or a task returned what is not finite; the message says how."""


class Simulator:
    """A dm_control environment, stepped through its task and physics.

    Args:
        env: a ``dm_control.rl.control.Environment``; it stays the owner of task and physics.

    Attributes:
        low, high: float64 ``[A]``, the bounds of the actions.
        layout: name, place in the flat observation and shape of each entry, in the task's order.
        size: numbers in an observation.
        first: the first observation of the episode.
    """

    def __init__(self, env: Any) -> None:
        control = control_module("dm_control.rl.control")
        self._failures = (control.PhysicsError, mujoco.FatalError)
        if type(env).step is not control.Environment.step:
            raise ValueError(f"{type(env).__name__} has a step of its own; only dm_control.rl.control.Environment fits")
        self.env = env
        self.physics = env.physics
        self.task = env.task
        self._sub_steps: int = env._n_sub_steps
        self._step_limit: float = env._step_limit
        self._direct = type(self.physics).step is control_module("dm_control.mujoco").Physics.step
        self._steps = 0
        spec = env.action_spec()
        self.low, self.high = (np.broadcast_to(x, spec.shape).astype(np.float64) for x in (spec.minimum, spec.maximum))
        unbounded = (self.high > _MAXIMUM) | (self.low < -_MAXIMUM)
        self._middle = np.where(unbounded, 0.0, (self.low + self.high) / 2)
        self._half = np.where(unbounded, 1.0, (self.high - self.low) / 2)
        first = self.restart()
        self.layout: list[tuple[str, slice, tuple[int, ...]]] = []
        self.size = 0
        for key, value in first.items():
            shape = np.shape(value)
            end = self.size + int(np.prod(shape, dtype=int))
            self.layout.append((key, slice(self.size, end), shape))
            self.size = end

    def restart(self) -> Mapping[str, Any]:
        """Starts an episode and returns its first observation.

        Raises:
            SimulatorFailure: none of ten attempts gave a sound state.
        """
        for _ in range(_RESTARTS):
            try:
                observation = self.env.reset().observation
            except self._failures as error:
                reason = str(error)
                continue
            if all(np.isfinite(value).all() for value in observation.values()):
                self._steps = 0
                self._warnings = self.physics.data.warning.number
                self._before = self._warnings.tobytes()
                self.first = observation
                return observation
            reason = "the first observation is not finite"
        raise SimulatorFailure(f"{_RESTARTS} episodes in a row could not be started: {reason}")

    def observe(self, row: np.ndarray) -> None:
        """Writes the task's observation into ``row``, float32 ``[size]``."""
        self.write(self.task.get_observation(self.physics), row)

    def write(self, observation: Mapping[str, Any], row: np.ndarray) -> None:
        """Writes an observation into ``row``, float32 ``[size]``."""
        for key, place, shape in self.layout:
            value = observation[key]
            row[place] = value if len(shape) < 2 else value.ravel()

    def scale(self, action: np.ndarray) -> np.ndarray:
        """Actions ``[..., A]`` of a policy to the task's bounds.

        Clipped to [-1, 1], then mapped linearly to the bounds; where an actuator has no bounds it gets the clipped
        action as it is.
        """
        control = self._middle + np.clip(action, -1.0, 1.0).astype(np.float64) * self._half
        return np.clip(control, self.low, self.high, out=control)

    def step(self, control: np.ndarray, repeat: int) -> tuple[float, float | None]:
        """Applies ``control`` for ``repeat`` steps of the task, fewer where the episode ends.

        Returns:
            The summed reward, and the discount if the episode ended: 0 at a terminal state, 1 at a time limit.

        Raises:
            SimulatorFailure: the state is not sound; :meth:`restart` comes next.
        """
        task, physics = self.task, self.physics
        total, discount = 0.0, None
        for _ in range(repeat):
            try:
                task.before_step(control, physics)
                if self._direct:
                    self._advance()
                else:
                    physics.step(self._sub_steps)
                task.after_step(physics)
            except self._failures as error:
                raise SimulatorFailure(str(error)) from error
            total += float(task.get_reward(physics))
            self._steps += 1
            discount = 1.0 if self._steps >= self._step_limit else task.get_termination(physics)
            if discount is not None:
                break
        return total, discount

    def _advance(self) -> None:
        # What Physics.step does, without its context manager, which costs more than a step of a small model.
        model, data, steps = self.physics.model.ptr, self.physics.data.ptr, self._sub_steps
        if not self.physics.legacy_step:
            mujoco.mj_step(model, data, steps)
        else:
            if model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4:
                mujoco.mj_step2(model, data)
                if steps > 1:
                    mujoco.mj_step(model, data, steps - 1)
            else:
                mujoco.mj_step(model, data, steps)
            mujoco.mj_step1(model, data)
        if self._warnings.tobytes() != self._before:
            names = list(mujoco.mjtWarning.__members__)
            raised = [name for name, number in zip(names, self._warnings, strict=False) if number]
            raise SimulatorFailure(f"MuJoCo warned of {', '.join(raised)}")

    def camera(self, height: int, width: int, camera: int | str) -> Any:
        """A camera; its ``render()`` gives uint8 ``[height, width, 3]``."""
        engine = control_module("dm_control.mujoco.engine")
        return engine.Camera(self.physics, height=height, width=width, camera_id=camera)

    def close(self) -> None:
        """Frees model and OpenGL context."""
        self.physics.free()
