"""What a name means, and which options the tasks of each kind have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import pytest

from offtrace.modules.envs import check_name, check_task_options, env_info, make_env
from offtrace.modules.envs.names import TASK_OPTIONS, known_actions, task_kind
from offtrace.modules.envs.suite import TASKS, control_name, control_tasks

TASK_OF = {"atari": "pong", "dm_control": "walker-walk", "gymnasium": "CartPole-v1", "own": "package.module:function"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for kind, name in TASK_OF.items()),
        ("ALE/Pong-v5", "atari"),
        ("PongNoFrameskip-v4", "atari"),
        ("blackjack", "atari"),
        ("ALE/Blackjack-v5", "atari"),
        ("Blackjack-v1", "gymnasium"),
        ("humanoid_CMU-run", "dm_control"),
        ("ball_in_cup-catch", "dm_control"),
        ("HalfCheetah-v5", "gymnasium"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert task_kind(name) == kind


@pytest.mark.parametrize("entry_point", ["own_module:Tetris", lambda: None], ids=["path", "function"])
def test_a_registered_environment_with_the_name_of_an_atari_game(
    entry_point: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gymnasium, "registry", {**gymnasium.registry})
    assert task_kind("Tetris-v0") == "atari"
    spec = gymnasium.envs.registration.EnvSpec("Tetris-v0", entry_point=entry_point)
    monkeypatch.setitem(gymnasium.registry, "Tetris-v0", spec)
    assert task_kind("Tetris-v0") == "gymnasium"
    assert task_kind("tetris") == "atari"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPol-v1", r"unknown environment 'CartPol-v1'; did you mean CartPole-v1"),
        ("a.b:", r"'package.module:function', got 'a.b:'"),
        ("walker-wlak", r"the domain 'walker' has no task 'wlak'; did you mean walker-walk"),
        ("wlaker-walk", r"unknown environment 'wlaker-walk'; did you mean walker-walk"),
        ("cheeta-run", r"did you mean cheetah-run"),
        ("walker", r"unknown environment 'walker'"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    for function in (check_name, task_kind, lambda name: make_env(name, 1), lambda name: check_task_options(name, {})):
        with pytest.raises(ValueError, match=words):
            function(name)


def test_names_of_the_suite() -> None:
    assert len(control_tasks()) == len(set(control_tasks())) == sum(len(tasks) for tasks in TASKS.values()) == 51
    assert control_name("humanoid-run_pure_state") == ("humanoid", "run_pure_state")
    for name in ("walker", "walker-", "-walk", "Walker2d-v5", "walker-walk-run"):
        assert control_name(name) is None


OTHER = {"protocol": "sticky", "action_repeat": 4, "pixels": True, "flatten": False}
HAVE = {
    "atari": {"protocol"},
    "dm_control": {"action_repeat", "pixels", "flatten"},
    "gymnasium": {"flatten"},
    "own": {"flatten"},
}


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("kind", HAVE)
def test_each_kind_of_task_has_its_options_and_takes_the_others_at_their_default(kind: str, option: str) -> None:
    name, default = TASK_OF[kind], TASK_OPTIONS[option].default
    check_task_options(name, {option: default, "last_step": True, "rescale_actions": True, "num_threads": 2})
    if option in HAVE[kind]:
        check_task_options(name, {option: OTHER[option]})
        return
    for function in (check_task_options, lambda name, options: make_env(name, 1, **options)):
        with pytest.raises(ValueError, match=rf"^{option} is {OTHER[option]}, which only .* have; '{name}' is an? "):
            function(name, {option: OTHER[option]})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "CartPole-v1",
            {"protocol": "sticky"},
            "protocol is sticky, which only Atari games have; 'CartPole-v1' is a Gymnasium environment: it must be "
            "classic",
        ),
        (
            "pong",
            {"flatten": False},
            "flatten is False, which only tasks of dm_control and Gymnasium environments and own environments have; "
            "'pong' is an Atari game: it must be True",
        ),
        ("pong", {"time_limit": 3}, "time_limit is 3; 'pong' is an Atari game, which has no such option"),
        ("m:own", {"time_limit": 3}, "time_limit is 3; 'm:own' is an own environment, which has no such option"),
    ],
)
def test_the_sentence(name: str, options: dict[str, Any], words: str) -> None:
    for function in (check_task_options, lambda name, options: env_info(name, **options)):
        with pytest.raises(ValueError, match=f"^{words}$"):
            function(name, options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:make", "'no_such_module:make' cannot be imported: there is no module 'no_such_module'"),
        (f"{__name__}:mak", "cannot be imported: the module .* has no 'mak'"),
        (f"{__name__}:of_size", r"must take num_envs and seed, or nothing, and takes \(size\)$"),
    ],
)
def test_an_own_environment_is_checked_before_it_is_made(name: str, words: str) -> None:
    for function in (check_name, lambda name: make_env(name, 1)):
        with pytest.raises(ValueError, match=words):
            function(name)


def of_size(size: int) -> None:
    """Takes neither num_envs and seed nor nothing."""


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("pong", "discrete"),
        ("walker-walk", "continuous"),
        ("CartPole-v1", "discrete"),
        ("Pendulum-v1", "continuous"),
        ("HalfCheetah-v5", "continuous"),
        ("package.module:function", None),
    ],
)
def test_what_a_task_acts_with_is_known_before_it_is_made(name: str, actions: str | None) -> None:
    assert known_actions(name) == actions


def test_what_only_the_environment_knows_is_left_to_it() -> None:
    check_task_options("Pendulum-v1", {"speed": 3})
    with pytest.raises(ValueError, match=r"the environment 'Pendulum-v1' cannot be made: .*'speed'"):
        make_env("Pendulum-v1", 1, speed=3)


def test_options_at_their_default_make_the_same_environment() -> None:
    options = {option: known.default for option, known in TASK_OPTIONS.items()}
    for name in ("pong", "CartPole-v1"):
        assert env_info(name, **options) == env_info(name)


@pytest.mark.slow
def test_checking_imports_neither_torch_nor_a_simulator() -> None:
    code = """
import sys
from offtrace.modules.envs import check_task_options
from offtrace.modules.envs.names import known_actions
for name in ("pong", "CartPole-v1", "walker-walk", "HalfCheetah-v5", "a:b"):
    known_actions(name)
    try:
        check_task_options(name, {"protocol": "classic", "pixels": True})
    except ValueError:
        pass
found = {"torch", "mujoco", "dm_control"} & set(sys.modules)
sys.exit(str(found) if found else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
