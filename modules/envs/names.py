"""Names of environments, resolved without importing torch."""

from __future__ import annotations

import difflib
import re
from functools import cache

from offtrace.modules.envs.suite import control_name, control_tasks, unknown_task


@cache
def atari_games() -> tuple[str, ...]:
    """The games that ale-py brings, in snake case."""
    from ale_py import roms

    return tuple(sorted(roms.get_all_rom_ids()))


def atari_name(name: str) -> str | None:
    """The game in snake case for ``Pong``, ``ALE/Pong-v5`` or ``PongNoFrameskip-v4``; ``None`` if it is none."""
    short = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", name.removeprefix("ALE/"))
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short).lower()
    for candidate in (snake, snake.replace("_", "")):
        for game in atari_games():
            if candidate in (game, game.replace("_", "")):
                return game
    return None


def unknown(name: str) -> str:
    """The message for a name nobody knows, with the nearest known ones."""
    task = unknown_task(name)
    if task is not None:
        return f"unknown environment {name!r}: {task}"
    known = {game: game for game in atari_games()}
    import gymnasium

    known.update({env_id.lower(): env_id for env_id in gymnasium.registry})
    known.update({task.lower(): task for task in control_tasks()})
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {known[near[0]]!r}?" if near else ""
    return (
        f"unknown environment {name!r}{hint} "
        "(an Atari game, a Gymnasium id, domain-task of dm_control, or package.module:function)"
    )


def check_name(name: str) -> None:
    """Raises ``ValueError`` for a name that :func:`offtrace.modules.envs.make_env` would not know; imports no torch.

    An import path is only checked for its form: importing it is the user's code.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        if not module or not function.isidentifier():
            raise ValueError(f"the import path of an environment is 'package.module:function', got {name!r}")
        return
    if atari_name(name) is not None:
        return
    import gymnasium

    if name not in gymnasium.registry and control_name(name) is None:
        raise ValueError(unknown(name))
