"""The DeepMind control suite: its import, and the names of its tasks. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from functools import cache
from typing import Any


def has_display() -> bool:
    """Whether an X or a Wayland server is named."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@cache
def control_suite() -> Any:
    """The module ``dm_control.suite``, with an OpenGL that works where there is no display.

    dm_control decides at its import how it renders, and takes GLFW for working where there is no display. So without
    one, and unless ``MUJOCO_GL`` says something, EGL and then OSMesa are tried here; without either, everything but
    rendering works.

    Raises:
        ValueError: ``MUJOCO_GL`` names something that does not work on this machine.
    """
    if (
        sys.platform == "linux"
        and "MUJOCO_GL" not in os.environ
        and "dm_control._render" not in sys.modules
        and not has_display()
    ):
        _choose_renderer()
    try:
        return importlib.import_module("dm_control.suite")
    except Exception as error:  # PyOpenGL raises whatever the missing library leads to
        raise ValueError(
            f"dm_control cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}; "
            "unset it, or set it to 'disable', which leaves everything but rendering"
        ) from error


def _choose_renderer() -> None:
    platform = os.environ.get("PYOPENGL_PLATFORM")
    for backend in ("egl", "osmesa", "disable"):
        os.environ["MUJOCO_GL"] = backend
        try:
            importlib.import_module("dm_control._render")
            break
        except Exception:
            # what the failed attempt has set would forbid the next one
            os.environ.pop("PYOPENGL_PLATFORM", None)
            if platform is not None:
                os.environ["PYOPENGL_PLATFORM"] = platform
    if os.environ["MUJOCO_GL"] == "disable":
        del os.environ["MUJOCO_GL"]  # for others who read it


@cache
def control_tasks() -> tuple[str, ...]:
    """``domain-task`` of every task of the suite."""
    return tuple(f"{domain}-{task}" for domain, task in control_suite().ALL_TASKS)


def control_name(name: str) -> tuple[str, str] | None:
    """``(domain, task)`` for ``walker-walk``; ``None`` if the suite has no such task."""
    domain, _, task = name.partition("-")
    # a Gymnasium id ends in a version; the suite need not be imported to know that it is none of its tasks
    if not task or re.search(r"v\d+$", task) or not name.replace("-", "").replace("_", "").isalnum():
        return None
    return (domain, task) if name in control_tasks() else None


def unknown_task(name: str) -> str | None:
    """What is wrong with the task in a name whose domain is known, or ``None``."""
    domain, _, task = name.partition("-")
    tasks = control_suite().TASKS_BY_DOMAIN.get(domain)
    if tasks is None or not task:
        return None
    near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.0)[0]
    return f"the domain {domain!r} has no task {task!r}; did you mean '{domain}-{near}'? (it has {', '.join(tasks)})"
