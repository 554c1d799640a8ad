"""What recipes choose for a machine, and that nothing the user says is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from offtrace.agents.config import Config, Machine, fit
from offtrace.agents.impala import atari_config, control_config, laser_config, paper_config
from offtrace.agents.ppo import atari_config as ppo_atari_config
from offtrace.agents.vmpo import control_config as vmpo_config


def fitted(machine: Machine, make: Callable[[], Config] = atari_config, **given: Any) -> tuple[Any, str]:
    """The configuration of ``make`` with the flags ``group__name=value``, on ``machine``, and the line."""
    config = make()
    for flag, value in given.items():
        group, name = flag.split("__")
        setattr(getattr(config, group), name, value)
    line = fit(config, {flag.replace("__", ".") for flag in given}, machine)
    for flag, value in given.items():
        group, name = flag.split("__")
        assert getattr(getattr(config, group), name) == value, "what is given stays"
    return config, line


def choice(config: Any) -> tuple[Any, ...]:
    collector = config.collector
    return (
        collector.num_workers, config.env.num_envs, config.train.unrolls, collector.emulator_threads, collector.acting,
        collector.device,
    )  # fmt: skip


H200 = 151.0


@pytest.mark.parametrize(
    ("machine", "devices", "wanted", "told"),
    [
        (Machine(1), 1, (0, 16, 0, 1, "copies", "cpu"), "1 core, no GPU: one core, on which acting and learning take"),
        (Machine(2), 1, (1, 16, 0, 1, "copies", "cpu"), "(1 actor of 16 environments)"),
        (Machine(2), 2, (1, 16, 0, 1, "copies", "cpu"), "2 cores, no GPU: as the preset says for fewer than 4 cores"),
        (Machine(4), 1, (2, 16, 0, 1, "copies", "cpu"), "half of the cores act, the others learn (2 actors of 16"),
        (Machine(16), 1, (8, 16, 64, 1, "copies", "cpu"), "(8 actors of 16 environments, 64 unrolls in a batch)"),
        (Machine(64), 1, (32, 16, 128, 1, "copies", "cpu"), "64 cores, no GPU: half"),
        (Machine(4, 1, 16.0), 1, (2, 32, 0, 1, "server", "cuda"), "all cores but two step environments, and the GPU"),
        (
            Machine(16, 1, H200), 1, (14, 32, 128, 1, "server", "cuda"),
            "16 cores, 1 GPU of 151 GB: all cores but two step environments, and the GPU acts (14 actors of 32 "
            "environments, server on cuda, 128 unrolls in a batch)",
        ),
        (Machine(64, 1, H200), 1, (32, 16, 128, 1, "server", "cuda"), "32 actors"),
        (Machine(16, 2, 80.0), 2, (6, 32, 64, 1, "server", "cuda"), "16 cores, 2 GPUs of 80 GB"),
        (Machine(2, 1, 16.0), 1, (1, 16, 0, 1, "copies", "cpu"), "as the preset says"),
    ],
)  # fmt: skip
def test_actors_of_described_machines(machine: Machine, devices: int, wanted: tuple[Any, ...], told: str) -> None:
    config, line = fitted(machine, train__devices=devices)
    assert choice(config) == wanted
    assert told in line
    assert "\n" not in line
    config.validate()


def test_two_cores_are_what_the_presets_are_for() -> None:
    for make in (atari_config, paper_config, laser_config, control_config, ppo_atari_config, vmpo_config):
        assert fitted(Machine(2), make)[0] == make()
        assert fitted(Machine(3), make)[0] == make()


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        (Machine(4), (3, 16, 32)), (Machine(16), (12, 16, 32)), (Machine(64), (32, 16, 32)),
        (Machine(16, 1, H200), (14, 16, 32)),
    ],
)  # fmt: skip
def test_a_published_batch_keeps_its_size(machine: Machine, wanted: tuple[int, ...]) -> None:
    """32 unrolls an update, whoever makes them."""
    config, _ = fitted(machine, paper_config)
    assert choice(config)[:3] == wanted
    config.validate()
    config, _ = fitted(machine, paper_config, collector__num_workers=1)
    assert choice(config)[:3] == (1, 32, 0), "one actor makes the whole batch"
    config.validate()


def test_a_small_gpu_gets_small_batches() -> None:
    config, _ = fitted(Machine(16, 1, 6.0), network__encoder="resnet")
    assert choice(config) == (14, 16, 48, 1, "server", "cuda")
    steps = config.train.unrolls * config.collector.unroll // config.train.minibatches
    assert steps * 3e6 < 6e9 / 2
    assert choice(fitted(Machine(2, 1, 16.0), network__encoder="resnet")[0]) == (1, 16, 0, 1, "copies", "cuda")


@pytest.mark.parametrize(
    ("machine", "given", "wanted"),
    [
        # few actors, of which one acts on the GPU while the games of the other are stepped
        (
            Machine(16, 1, H200), {"collector__acting": "copies", "collector__device": "cuda"},
            (2, 112, 0, 7, "copies", "cuda"),
        ),
        (
            Machine(16, 1, H200),
            {"collector__acting": "copies", "collector__device": "cuda", "collector__num_workers": 3},
            (3, 64, 128, 4, "copies", "cuda"),
        ),
        (Machine(16, 1, H200), {"collector__acting": "copies"}, (14, 16, 112, 1, "copies", "cpu")),
        (Machine(16, 1, H200), {"collector__device": "cpu"}, (14, 16, 112, 1, "copies", "cpu")),
        (Machine(16, 1, H200), {"train__accelerator": "cpu"}, (8, 16, 64, 1, "copies", "cpu")),
        (Machine(16, 1, H200), {"collector__num_workers": 3}, (3, 32, 64, 1, "server", "cuda")),
        (Machine(16), {"collector__acting": "server"}, (7, 32, 128, 1, "server", "cpu")),
        (Machine(16), {"train__unrolls": 256}, (8, 32, 256, 1, "copies", "cpu")),
        (Machine(16), {"train__unrolls": 100}, (8, 20, 100, 1, "copies", "cpu")),
        (Machine(16), {"train__unrolls": 0}, (8, 16, 0, 1, "copies", "cpu")),
        (Machine(16), {"env__num_envs": 24}, (8, 24, 96, 1, "copies", "cpu")),
        (Machine(16), {"collector__emulator_threads": 4}, (2, 16, 0, 4, "copies", "cpu")),
        (Machine(16), {"collector__num_workers": 0}, (0, 16, 0, 16, "copies", "cpu")),
        (Machine(1), {"collector__acting": "server"}, (1, 16, 0, 1, "server", "cpu")),
        (Machine(1), {"collector__num_workers": 1}, (1, 16, 0, 1, "copies", "cpu")),
    ],
)  # fmt: skip
def test_what_is_given_stays_and_the_rest_adapts(
    machine: Machine, given: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    config, _ = fitted(machine, **given)
    assert choice(config) == wanted
    config.validate()


def test_the_line_says_that_not_all_of_it_was_chosen() -> None:
    _, line = fitted(Machine(16), collector__num_workers=3)
    assert "the others learn, but for what is given (3 actors of 16 environments, 32 unrolls in a batch)" in line
    _, line = fitted(Machine(16), train__seed=3)
    assert "given" not in line


def test_only_where_more_actors_do_not_change_what_is_learnt() -> None:
    for make in (laser_config, control_config, vmpo_config):
        config, line = fitted(Machine(16, 1, H200), make)
        assert config == make()
        assert "as the preset says, because" in line
    config, line = fitted(Machine(16), ppo_atari_config)
    assert config.collector.emulator_threads == 8, "one for each game, which changes none of them"
    config.collector.emulator_threads = 1
    assert config == ppo_atari_config()
    assert "acting and learning take turns (the learner's process of 8 environments, 8 emulator threads)" in line
    config, _ = fitted(Machine(16), ppo_atari_config, env__task="CartPole-v1")
    assert config.collector.emulator_threads == 1
    config.validate()


@pytest.mark.parametrize(
    "wrong",
    [
        {"env__task": "pnog"},
        {"env__num_envs": 0},
        {"train__devices": 0},
        {"train__unrolls": -1},
        {"collector__unroll": 0},
    ],
)
def test_what_is_wrong_is_left_to_the_checks(wrong: dict[str, Any]) -> None:
    config, _ = fitted(Machine(16, 1, H200), **wrong)
    assert config.collector.num_workers == 1
