"""dm_control, the only place that imports it, and the names of its tasks. Imports no torch.

dm_control needs labmaze, which has wheels for Python 3.11 and 3.12; on newer Pythons it is not installed. The names of
the suite's tasks are known everywhere, so that they can be refused where it is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from typing import Any, Final

from offtrace.modules.naming import nearest

# as of dm-control 1.0.50; reading them from the suite would import MuJoCo for every command line
TASKS: Final[dict[str, tuple[str, ...]]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
"""Tasks of the suite by domain."""
MISSING: Final = "needs dm_control, which is not installed"


def has_display() -> bool:
    """Whether an X or a Wayland server is named."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@cache
def has_dm_control() -> bool:
    """Whether dm_control is installed; it is not imported."""
    return importlib.util.find_spec("dm_control") is not None


def check_installed(task: str) -> None:
    """Raises ``ValueError`` where a task needs dm_control and it is not installed."""
    if not has_dm_control():
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"{task} {MISSING}; offtrace installs it on Python 3.11 and 3.12, and this "
            f"is {running}: use one of these, or a MuJoCo task of Gymnasium, such as HalfCheetah-v5"
        )


@cache
def control_module(name: str) -> Any:
    """The module ``name`` of dm_control, such as ``dm_control.suite``, with an OpenGL that works without a display.

    Raises:
        ValueError: dm_control is not installed, or ``MUJOCO_GL`` names something that does not work on this machine.
    """
    check_installed(name)
    choose_renderer()
    try:
        return importlib.import_module(name)
    except Exception as error:  # PyOpenGL raises whatever the missing library leads to
        raise ValueError(
            f"dm_control cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}; "
            "unset it, or set it to 'disable', which leaves everything but rendering"
        ) from error


def control_suite() -> Any:
    """The module ``dm_control.suite``; raises as :func:`control_module`."""
    return control_module("dm_control.suite")


@cache
def choose_renderer() -> None:
    """Finds an OpenGL for MuJoCo that works without a display: EGL, then OSMesa.

    dm_control decides at its import how it renders, and takes GLFW for working where there is no display. So without
    one, and unless ``MUJOCO_GL`` says something, the others are tried here; without either, everything but rendering
    works.
    """
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ or "dm_control._render" in sys.modules or has_display():
        return
    platform = os.environ.get("PYOPENGL_PLATFORM")
    for backend in ("egl", "osmesa", "disable"):
        os.environ["MUJOCO_GL"] = backend
        try:
            _import_renderer(backend)
            break
        except Exception:
            # what the failed attempt has set would forbid the next one
            os.environ.pop("PYOPENGL_PLATFORM", None)
            if platform is not None:
                os.environ["PYOPENGL_PLATFORM"] = platform
    if os.environ["MUJOCO_GL"] == "disable":
        del os.environ["MUJOCO_GL"]  # for others who read it


def _import_renderer(backend: str) -> None:
    if has_dm_control():
        importlib.import_module("dm_control._render")  # reads MUJOCO_GL
    elif backend != "disable":
        importlib.import_module(f"mujoco.{backend}")


def control_tasks() -> tuple[str, ...]:
    """``domain-task`` of every task of the suite."""
    return tuple(f"{domain}-{task}" for domain, tasks in TASKS.items() for task in tasks)


def control_name(name: str) -> tuple[str, str] | None:
    """``(domain, task)`` for ``walker-walk``; ``None`` if the suite has no such task."""
    domain, _, task = name.partition("-")
    return (domain, task) if task in TASKS.get(domain, ()) else None


def unknown_task(name: str) -> str | None:
    """What is wrong with the task in a name whose domain is known, or ``None``."""
    domain, _, task = name.partition("-")
    tasks = TASKS.get(domain)
    if tasks is None or not task:
        return None
    near = nearest(name, [f"{domain}-{known}" for known in tasks])
    return f"the domain {domain!r} has no task {task!r}{near} (it has {', '.join(tasks)})"
