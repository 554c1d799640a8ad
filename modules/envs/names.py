"""Names of environments and the options of their tasks, checked without importing torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Literal, NamedTuple

from offtrace.modules.envs.suite import check_installed, control_name, control_tasks, unknown_task
from offtrace.modules.naming import imported, nearest, signature, split_path, takes

Kind = Literal["atari", "dm_control", "gymnasium", "own"]
Protocol = Literal["classic", "sticky"]
ATARI_FRAME_SKIP: Final = 4
PROTOCOLS: tuple[Protocol, ...] = ("classic", "sticky")

_WHAT: Final[dict[Kind, str]] = {
    "atari": "an Atari game",
    "dm_control": "a task of dm_control",
    "gymnasium": "a Gymnasium environment",
    "own": "an own environment",
}
_OWNERS: Final[dict[Kind, str]] = {
    "atari": "Atari games",
    "dm_control": "tasks of dm_control",
    "gymnasium": "Gymnasium environments",
    "own": "own environments",
}


class TaskOption(NamedTuple):
    """An option of a task: its default, which every kind of task accepts, and the kinds that have others."""

    default: Any
    kinds: tuple[Kind, ...]


TASK_OPTIONS: Final[dict[str, TaskOption]] = {
    "protocol": TaskOption("classic", ("atari",)),
    "action_repeat": TaskOption(1, ("dm_control",)),
    "pixels": TaskOption(False, ("dm_control",)),
    "flatten": TaskOption(True, ("dm_control", "gymnasium", "own")),
}
"""What makes another task of the same name."""
_USE: Final = ("seed", "evaluation", "last_step", "num_threads", "rescale_actions", "pictures")
"""How a task is used; every kind takes these."""


@cache
def atari_games() -> tuple[str, ...]:
    """The games that ale-py brings, in snake case."""
    from ale_py import roms

    return tuple(sorted(roms.get_all_rom_ids()))


def atari_name(name: str) -> str | None:
    """The game in snake case for ``Pong``, ``ALE/Pong-v5`` or ``PongNoFrameskip-v4``; ``None`` if it is none.

    What Gymnasium knows as another environment is none: ``Blackjack-v1`` is its own game of cards.
    """
    import gymnasium

    registered = gymnasium.registry.get(name)
    if registered is not None and not _from_ale(registered.entry_point):
        return None
    short = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", name.removeprefix("ALE/"))
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short).lower()
    for candidate in (snake, snake.replace("_", "")):
        for game in atari_games():
            if candidate in (game, game.replace("_", "")):
                return game
    return None


def _from_ale(entry_point: Any) -> bool:
    module = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", None)
    return str(module).startswith("ale_py.")


def unknown(name: str) -> str:
    """The message for a name nobody knows, with the nearest known ones."""
    task = unknown_task(name)
    if task is not None:
        return f"unknown environment {name!r}: {task}"
    import gymnasium

    return (
        f"unknown environment {name!r}{nearest(name, [*gymnasium.registry, *control_tasks(), *atari_games()])} "
        "(an Atari game, a Gymnasium id, domain-task of dm_control, or package.module:function)"
    )


def task_kind(name: str) -> Kind:
    """What kind of task a name means: ``"atari"``, ``"dm_control"``, ``"gymnasium"`` or ``"own"`` (an import path).

    An import path is only checked for its form: importing it is the user's code.

    Raises:
        ValueError: nobody knows the name, or the import path is none.
    """
    if ":" in name:
        split_path(name)
        return "own"
    if atari_name(name) is not None:
        return "atari"
    if control_name(name) is not None:
        return "dm_control"
    import gymnasium

    if name not in gymnasium.registry:
        raise ValueError(unknown(name))
    return "gymnasium"


def environment_module(name: str) -> str:
    """Name of the module with the environments of the task's kind."""
    return {
        "atari": "offtrace.modules.envs.atari",
        "dm_control": "offtrace.modules.envs.control",
    }.get(task_kind(name), "offtrace.modules.envs.gym")


def check_name(name: str) -> None:
    """Raises ``ValueError`` for a name that :func:`offtrace.modules.envs.make_env` refuses.

    Imports no torch, unless the user's own code does, which an import path names.
    """
    if _installed_kind(name) == "own":
        own_environment(name)


def _installed_kind(name: str) -> Kind:
    kind = task_kind(name)
    if kind == "dm_control":
        check_installed(f"the task {name!r}")
    return kind


def own_environment(path: str) -> tuple[Callable[..., Any], bool]:
    """What an import path leads to, and whether it takes ``num_envs`` and ``seed``; otherwise it takes nothing.

    Raises:
        ValueError: it cannot be imported, or takes something else.
    """
    make = imported(path, "environment")
    sized = takes(make, num_envs=1, seed=0)
    if not sized and not takes(make):
        raise ValueError(
            f"the environment {path!r} must take num_envs and seed, or nothing, and takes {signature(make)}"
        )
    return make, sized


def check_takes(name: str, make: Callable[..., Any], *arguments: str, **options: Any) -> None:
    """Raises ``ValueError`` for options that the function ``make``, of the environment ``name``, does not take."""
    if options and not takes(make, *arguments, **options):
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"{name} was given {given}; its function takes {signature(make)}")


def known_actions(name: str) -> Literal["discrete", "continuous"] | None:
    """What a task acts with; None of the user's own, and where a Gymnasium environment cannot be made.

    Imports no torch.

    Raises:
        ValueError: as :func:`task_kind`.
    """
    kind = task_kind(name)
    if kind != "gymnasium":
        return {"atari": "discrete", "dm_control": "continuous"}.get(kind)  # type: ignore[return-value]
    import gymnasium

    if "gymnasium.envs.mujoco" in str(gymnasium.registry[name].entry_point):
        return "continuous"  # making one would choose MuJoCo's renderer for the whole process
    try:
        env = gymnasium.make(name)
    except Exception:  # who makes it for the run says what is wrong
        return None
    continuous = isinstance(env.action_space, gymnasium.spaces.Box)
    env.close()
    return "continuous" if continuous else "discrete"


def check_task_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks a task's name and the options that :func:`offtrace.modules.envs.make_env` shall get; imports no torch.

    One group of options serves every kind of task: what a kind does not have may be given at its default. Options that
    are not listed here go to the task of dm_control or the Gymnasium environment, which refuse what they do not know.

    Raises:
        ValueError: the name is refused, or the task has no such option.
    """
    kind = _installed_kind(name)
    for option, value in options.items():
        known = TASK_OPTIONS.get(option)
        if known is not None:
            if kind not in known.kinds and value != known.default:
                owners = " and ".join(_OWNERS[owner] for owner in known.kinds)
                raise ValueError(
                    f"{option} is {value}, which only {owners} have; {name!r} is {_WHAT[kind]}: it must be "
                    f"{known.default}"
                )
        elif kind in ("atari", "own") and option not in _USE:
            raise ValueError(f"{option} is {value}; {name!r} is {_WHAT[kind]}, which has no such option")
