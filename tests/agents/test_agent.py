"""The agent and its callbacks: lag counted exactly, diverging updates refused, weights never saved when not finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.utils.data import DataLoader
from torchrl.objectives.common import LossModule

from offtrace.agents.agent import Agent, TrainingDivergedError, random_state, set_random_state
from offtrace.agents.callbacks import Checkpoints, Evaluation, WeightSync
from offtrace.agents.impala import ImpalaConfig, control_config, make_impala
from offtrace.agents.optim import OptimizerFactory, make_optimizer
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY, CheckpointError, load_policy
from offtrace.agents.runs.training import evaluation_env

MINIBATCHES, EPOCHS, ROLLOUTS = 2, 2, 6


def tiny() -> ImpalaConfig:
    config = control_config()
    config.collector.num_workers = 0
    config.env.num_envs, config.collector.unroll = 4, 8
    config.train.minibatches, config.train.epochs = MINIBATCHES, EPOCHS
    config.train.total_frames = 32 * ROLLOUTS
    return config


def fit(config: ImpalaConfig, *callbacks: pl.Callback) -> Any:
    torch.manual_seed(0)
    agent, data = make_impala(config)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(agent, data)
    return agent, data


class LagSpy(pl.Callback):
    """Compares each batch's behaviour log-probabilities with those of every weights the learner ever had."""

    def __init__(self, sync: WeightSync) -> None:
        self.sync = sync
        self.history: list[Any] = []
        self.told: list[tuple[float, int]] = []
        self.found: list[int] = []

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: Any, batch_idx: int) -> None:
        self.history.append({name: value.clone() for name, value in agent.policy.state_dict().items()})
        self.told.append((self.sync.lag_mean, self.sync.lag_max))
        now = len(self.history) - 1
        for age in range(now + 1):
            if self._fits(agent.policy, self.history[now - age], batch):
                self.found.append(age)
                return
        raise AssertionError("no weights of the past gave these log-probabilities")

    @staticmethod
    def _fits(policy: Any, weights: Any, batch: Any) -> bool:
        from copy import deepcopy

        policy = deepcopy(policy)
        policy.load_state_dict(weights)
        with torch.no_grad():
            dist = policy.build_dist_from_params(policy.get_dist_params(batch.select("observation").clone()))
            return bool(torch.allclose(dist.log_prob(batch["action"]), batch["action_log_prob"], atol=1e-6))


class NormSpy(pl.Callback):
    """The gradient's norm as it is told, and as it is when the optimiser has used it."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.used: list[float] = []

    def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
        self.told.append(agent.pop_metrics()["grad_norm"])
        grads = [p.grad for p in agent.loss.parameters() if p.grad is not None]
        self.used.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))


@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradients_are_clipped_to_what_is_set(clip: float | None) -> None:
    config, spy = tiny(), NormSpy()
    config.optim.clip_grad_norm = clip
    fit(config, WeightSync(1), spy)
    assert min(spy.told) > 1e-2
    wanted = spy.told if clip is None else [clip] * len(spy.told)
    torch.testing.assert_close(spy.used, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("every", "lag"), [(1, 0), (4, 0), (1, 4), (2, 6)])
def test_the_lag_told_is_the_lag_there_is(every: int, lag: int) -> None:
    sync = WeightSync(every, lag)
    spy = LagSpy(sync)
    fit(tiny(), sync, spy)
    assert len(spy.found) == ROLLOUTS * MINIBATCHES * EPOCHS
    for (mean, most), age in zip(spy.told, spy.found, strict=True):
        assert mean == most == age
    settled = spy.told[lag + 4 :]
    assert min(most for _, most in settled) >= lag
    per_rollout = MINIBATCHES * EPOCHS
    assert max(most for _, most in spy.told) <= lag + (per_rollout - 1) + (every - 1) + (every if lag else 0)


def test_a_trainer_that_never_pushes_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="the trainer has no WeightSync among its callbacks"):
        fit(tiny())


class Poison(pl.Callback):
    """Makes one reward infinite."""

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.before = {name: value.clone() for name, value in agent.state_dict().items()}
            batch["next", "reward"][0, 0] = torch.inf


def test_a_diverging_update_is_refused(tmp_path: Path) -> None:
    poison = Poison()
    with pytest.raises(TrainingDivergedError, match="the gradient's norm is nan at update 5"):
        fit(tiny(), WeightSync(4), Checkpoints(tmp_path, 10**9), poison)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in poison.before.items())


class NotFinite(pl.Callback):
    """Breaks a weight behind the agent's back."""

    def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
        if agent.updates == 3:
            next(agent.parameters()).data[0] = torch.nan
            trainer.should_stop = True


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    fit(tiny(), WeightSync(4), NotFinite(), Checkpoints(tmp_path, 10**9))
    assert not list(tmp_path.iterdir())


def test_evaluating_changes_nothing_in_training() -> None:
    config = tiny()
    without, _ = fit(config, WeightSync(4))
    evaluation = Evaluation(lambda: evaluation_env(config, 2), every=64, episodes=2)
    with_it, data = fit(config, WeightSync(4), evaluation)
    assert [frames for frames, _ in evaluation.scores] == [64, 128, 192]
    assert data.frames == 192
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[name]), name


def test_random_state_comes_back() -> None:
    import random

    import numpy as np

    state = random_state()
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(state)
    assert torch.equal(torch.rand(3), first[0])
    assert np.array_equal(np.random.rand(3), first[1])
    assert random.random() == first[2]


@pytest.mark.parametrize(("every", "lag"), [(0, 0), (1, -1)])
def test_bad_arguments(every: int, lag: int) -> None:
    with pytest.raises(ValueError, match="every must be at least 1 and lag at least 0"):
        WeightSync(every, lag)


@pytest.mark.parametrize("estimator", ["vtrace(lmbda=0.9)", "importance_sampling", "one_step", "gae", "n_step(n=3)"])
def test_every_estimator_is_one_flag(estimator: str, tmp_path: Path) -> None:
    """Each of them trains, and its checkpoint acts as the agent does."""
    config = tiny()
    config.loss.estimator = estimator
    config.validate()
    torch.manual_seed(0)  # as fit does
    before = make_impala(config)[0]
    agent, _ = fit(config, WeightSync(4), Checkpoints(tmp_path, every=1000))
    pairs = zip(agent.policy.parameters(), before.policy.parameters(), strict=True)
    assert all(not torch.equal(after, old) for after, old in pairs)
    loaded = load_policy(tmp_path / "last.ckpt")
    step = TensorDict({"observation": torch.randn(5, 4)}, [5])
    assert torch.equal(loaded.get_dist_params(step.clone())["logits"], agent.policy.get_dist_params(step)["logits"])


class Regression(LossModule):
    """A loss of nobody's making: fits "y", and tells its progress and its errors."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.progress: list[float] = []

    def set_progress(self, fraction: float) -> None:
        self.progress.append(fraction)

    def forward(self, batch: Any) -> TensorDict:
        error = self.line(batch["x"]) - batch["y"]
        batch["td_error"] = error.detach().abs().squeeze(-1)
        return TensorDict({"loss_fit": error.square().mean(), "valid_count": torch.tensor(len(error))})


class Told(pl.Callback):
    """What the data was given back, and how many frames there were."""

    def __init__(self) -> None:
        self.frames: list[int] = []

    def on_train_batch_end(self, trainer: Any, agent: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert "td_error" in batch
        self.frames.append(agent.frames)


class Filters(Regression):
    """The same by a convolution, whose weights lie in one memory format or the other."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.line = nn.Conv2d(2, 3, (2, 2)).to(memory_format=memory_format)
        self.images = torch.randn(4, 2, 2, 2)

    def forward(self, batch: Any) -> TensorDict:
        error = self.line(batch["x"][..., None, None] * self.images).mean((1, 2, 3)) - batch["y"][:, 0]
        batch["td_error"] = error.detach().abs()
        return TensorDict({"loss_fit": error.square().mean(), "valid_count": torch.tensor(len(error))})


def plain_fit(
    folder: Path,
    epochs: int,
    *callbacks: pl.Callback,
    resume: Path | None = None,
    make_loss: Callable[[], Regression] = Regression,
    optimizer: OptimizerFactory | None = None,
) -> Agent:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 12)[:, None]
    batches = [TensorDict({"x": part, "y": 2 * part}, [4]) for part in x.split(4)]
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch.clone())
    loss = make_loss()
    optimizer = optimizer or make_optimizer("adam", lr=0.1, eps=1e-8)
    agent = Agent(loss, loss.line, optimizer=optimizer, total_frames=48, schedule="constant")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Checkpoints(folder, 10**9), *callbacks],
    )  # fmt: skip
    trainer.fit(agent, loader, ckpt_path=resume, weights_only=None if resume is None else True)
    return agent


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*resuming from a checkpoint")
def test_a_users_own_dataloader_trains_and_resumes(tmp_path: Path) -> None:
    told = Told()
    whole = plain_fit(tmp_path / "a", 4, told)
    assert told.frames == [*range(4, 49, 4)]
    assert whole.loss.progress == pytest.approx([done / 12 for done in range(12)])
    assert whole.updates == 12
    plain_fit(tmp_path / "b", 2)
    resumed = plain_fit(tmp_path / "b", 4, resume=tmp_path / "b" / "last.ckpt")
    assert (resumed.updates, resumed.frames) == (12, 48)
    assert resumed.loss.progress == pytest.approx([done / 12 for done in range(6, 12)])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*resuming from a checkpoint")
def test_a_fused_optimiser_resumes_in_another_memory_format(tmp_path: Path) -> None:
    formats = torch.contiguous_format, torch.channels_last
    adam = partial(torch.optim.Adam, lr=0.1, fused=True)
    fit = partial(plain_fit, optimizer=adam)
    fit(tmp_path, 2, make_loss=partial(Filters, formats[0]))
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "begun.ckpt")
    same, other = (
        fit(tmp_path, 4, resume=tmp_path / "begun.ckpt", make_loss=partial(Filters, to)).state_dict() for to in formats
    )
    torch.testing.assert_close(other, same, rtol=1e-5, atol=1e-6)


def test_weights_for_actors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WeightSync gives weights to actors, and the trainer's data, NoneType, has"):
        plain_fit(tmp_path, 1, WeightSync())


# Policies from checkpoints


def own_policy(width: int) -> Any:
    """A network that the package does not know, built by a function outside it."""
    network = TensorDictModule(nn.Linear(4, width), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticTensorDictSequential(
        network,
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )


def saved_policy(path: Path, builder: str, **arguments: Any) -> Path:
    weights = {f"policy.{name}": value for name, value in own_policy(2).state_dict().items()}
    spec = {"builder": builder, "arguments": arguments}
    torch.save({"state_dict": weights, CHECKPOINT_KEY: {"policy": spec}}, path)
    return path


def test_a_policy_is_rebuilt_by_whoever_defined_it(tmp_path: Path) -> None:
    policy = load_policy(saved_policy(tmp_path / "own.ckpt", "tests.agents.test_agent:own_policy", width=2))
    assert policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))["action"].shape == (3,)


@pytest.mark.parametrize(
    ("builder", "arguments", "words"),
    [
        (
            "nowhere.to_be:found",
            {},
            "the builder 'nowhere.to_be:found' cannot be imported: there is no module 'nowhere'",
        ),
        ("tests.agents.test_agent:absent", {}, "cannot be imported: the module .* has no 'absent'"),
        ("build_castles", {}, "the builder 'build_castles' is unknown; it must be build_policy, or package.module:"),
        ("os:system", {"command": "true"}, "the builder 'os:system' builds no policy"),
        ("subprocess:call", {"args": "true"}, "the builder 'subprocess:call' builds no policy"),
        ("builtins:exec", {}, "the builder 'builtins:exec' builds no policy"),
        ("tests.agents.test_agent:own_policy", {"depth": 2}, "unexpected keyword argument 'depth'"),
        ("tests.agents.test_agent:own_policy", {"width": 3}, "holds the weights of another network: size mismatch"),
    ],
)
def test_a_policy_that_cannot_be_rebuilt_is_one_sentence(
    builder: str, arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = saved_policy(tmp_path / "own.ckpt", builder, **arguments)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
