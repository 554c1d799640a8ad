"""What recipes choose for a machine, and that nothing the user says is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from offtrace.agents.config import Config, Machine, fit
from offtrace.agents.impala import atari_config, control_config, laser_config, paper_config
from offtrace.agents.ppo import atari_config as ppo_atari_config
from offtrace.agents.vmpo import control_config as vmpo_config
from tests.marks import needs_ray


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


@pytest.mark.parametrize(
    ("machine", "devices", "wanted", "told"),
    [
        (Machine(1), 1, (0, 16, 0, 1, "copies", "cpu"), "1 core, no GPU: one core, on which acting and learning take"),
        (Machine(2), 1, (1, 16, 0, 1, "copies", "cpu"), "(1 actor of 16 environments)"),
        (Machine(2), 2, (1, 16, 0, 1, "copies", "cpu"), "as the preset says, because a learner has fewer than 4 cores"),
        (Machine(4), 1, (2, 16, 0, 1, "copies", "cpu"), "half of the cores act, the others learn (2 actors of 16"),
        (Machine(16), 1, (8, 8, 32, 1, "copies", "cpu"), "(8 actors of 8 environments, 32 unrolls in a batch)"),
        (Machine(64), 1, (16, 4, 32, 1, "copies", "cpu"), "no GPU: as many cores as leave the data young act, the oth"),
        (Machine(4, 1), 1, (2, 16, 0, 1, "server", "cuda"), "all cores but two step environments, and the GPU acts"),
        (
            Machine(16, 1), 1, (14, 8, 32, 1, "server", "cuda"),
            "16 cores, 1 GPU: all cores but two step environments, and the GPU acts (14 actors of 8 environments, "
            "server on cuda, 32 unrolls in a batch)",
        ),
        (Machine(64, 1), 1, (32, 4, 32, 1, "server", "cuda"), "as many cores as leave the data young step envir"),
        (Machine(16, 2), 2, (6, 8, 16, 1, "server", "cuda"), "16 cores, 2 GPUs: all cores but two step environments"),
        (Machine(2, 1), 1, (1, 16, 0, 1, "copies", "cpu"), "as the preset says"),
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


@pytest.mark.parametrize("encoder", ["auto", "resnet"])
@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_on_no_machine_are_there_few_updates_or_old_data(encoder: str, gpus: int, devices: int) -> None:
    """At least half of the updates of two cores, and a mean lag of at most 50 updates; on two cores it is 23.5."""
    for cores in range(1, 130):
        config, _ = fitted(Machine(cores, gpus * devices), network__encoder=encoder, train__devices=devices)
        config.validate()
        unrolls = config.rollouts_per_batch * config.env.num_envs
        assert unrolls * devices <= 2 * 16 * max(1, devices // 2), "learners of 16 unrolls each are as many as before"
        updates = config.train.minibatches * config.train.epochs
        batches = config.collector.num_workers / config.rollouts_per_batch
        # weights come during a rollout too where its actor does not wait for the learner
        age = (batches + 1) / 2 if gpus and encoder == "auto" else batches
        assert age * updates + (updates - 1) / 2 <= 50, cores


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        (Machine(4), (3, 32, 0)), (Machine(16), (12, 16, 32)), (Machine(64), (32, 8, 32)),
        (Machine(16, 1), (14, 32, 0)), (Machine(64, 1), (32, 16, 32)),
    ],
)  # fmt: skip
def test_a_published_batch_keeps_its_size(machine: Machine, wanted: tuple[int, ...]) -> None:
    """32 unrolls an update, whoever makes them, and at most eight updates, or on a GPU sixteen, within a rollout."""
    config, _ = fitted(machine, paper_config)
    assert choice(config)[:3] == wanted
    config.validate()
    config, _ = fitted(machine, paper_config, collector__num_workers=1)
    assert choice(config)[:3] == (1, 32, 0), "one actor makes the whole batch"
    config.validate()


def test_a_resnet_has_younger_data_and_the_gpu() -> None:
    """A GPU does not learn from it as fast as sixteen cores act."""
    assert choice(fitted(Machine(16, 1), network__encoder="resnet")[0]) == (14, 4, 32, 1, "server", "cuda")
    assert choice(fitted(Machine(2, 1), network__encoder="resnet")[0]) == (1, 16, 0, 1, "copies", "cuda")


@pytest.mark.parametrize(
    ("machine", "given", "wanted"),
    [
        # few actors, of which one acts on the GPU while the games of the other are stepped
        (
            Machine(16, 1), {"collector__acting": "copies", "collector__device": "cuda"},
            (2, 32, 0, 7, "copies", "cuda"),
        ),
        (
            Machine(16, 1),
            {"collector__acting": "copies", "collector__device": "cuda", "collector__num_workers": 3},
            (3, 32, 0, 4, "copies", "cuda"),
        ),
        (Machine(16, 1), {"collector__acting": "copies"}, (14, 8, 32, 1, "copies", "cpu")),
        (Machine(16, 1), {"collector__device": "cpu"}, (14, 8, 32, 1, "copies", "cpu")),
        (Machine(16, 1), {"train__accelerator": "cpu"}, (8, 8, 32, 1, "copies", "cpu")),
        (Machine(16, 1), {"collector__num_workers": 3}, (3, 32, 0, 1, "server", "cuda")),
        (Machine(16), {"collector__acting": "server"}, (7, 8, 32, 1, "server", "cpu")),
        (Machine(16), {"train__unrolls": 256}, (8, 64, 256, 1, "copies", "cpu")),
        (Machine(16), {"train__unrolls": 100}, (8, 25, 100, 1, "copies", "cpu")),
        (Machine(16), {"train__unrolls": 0}, (8, 16, 0, 1, "copies", "cpu")),
        (Machine(16), {"env__num_envs": 24}, (8, 24, 96, 1, "copies", "cpu")),
        (Machine(16), {"collector__emulator_threads": 4}, (2, 32, 0, 4, "copies", "cpu")),
        (Machine(16), {"collector__num_workers": 0}, (0, 16, 0, 16, "copies", "cpu")),
        (Machine(1), {"collector__acting": "server"}, (1, 16, 0, 1, "server", "cpu")),
        (Machine(1), {"collector__num_workers": 1}, (1, 16, 0, 1, "copies", "cpu")),
        # Ray's actors have copies of the policy on CPU cores; how many a cluster has for a run nobody here knows
        *(
            pytest.param(machine, {"collector__backend": "ray", **given}, wanted, marks=needs_ray)
            for machine, given, wanted in (
                (Machine(16, 1), {}, (14, 8, 32, 1, "copies", "cpu")),
                (Machine(1), {}, (1, 16, 0, 1, "copies", "cpu")),
                (Machine(2, 1), {"network__encoder": "resnet"}, (1, 16, 0, 1, "copies", "cpu")),
                (Machine(16, 1), {"collector__address": "auto"}, (1, 16, 0, 1, "copies", "cpu")),
                (
                    Machine(2), {"collector__address": "auto", "collector__num_workers": 32},
                    (32, 2, 32, 1, "copies", "cpu"),
                ),
            )
        ),
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
        config, line = fitted(Machine(16, 1), make)
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
    config, _ = fitted(Machine(16, 1), **wrong)
    assert config.collector.num_workers == 1
