"""The networks in losses: recurrent state from actors to the learner, encoders that run once, and learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector

from offtrace.modules.losses import ImpalaLoss, MPOLoss
from offtrace.modules.networks import build_critic, build_policy
from tests.modules.test_networks import Recall, recurrent_policy


def test_on_policy_the_loss_sees_no_difference_to_a_recurrent_actor() -> None:
    policy = recurrent_policy()
    collector = Collector(
        Recall(6, mixed=True), policy, frames_per_batch=66, total_frames=198, auto_register_policy_transforms=True
    )
    loss = ImpalaLoss(policy)
    for batch in collector:
        out = loss(batch)
        torch.testing.assert_close(out["ratio_mean"], torch.tensor(1.0), rtol=0, atol=1e-5)
        assert out["kl"].abs() < 1e-6
    collector.shutdown()


def train_recall(recurrent: int | None) -> float:
    """Mean answer, in [-1, 1], of the last 20 of 120 rollouts."""
    torch.manual_seed(0)
    policy = build_policy(network="mlp", observation_shape=[2], num_actions=2, hidden=[16], recurrent=recurrent)
    loss = ImpalaLoss(policy, gamma=0.99, reduction="mean", entropy_coef=0.01, normalize_advantage=True)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    collector = Collector(
        Recall(64), policy, frames_per_batch=64 * 8, total_frames=64 * 8 * 120, auto_register_policy_transforms=True
    )
    answers = []
    for batch in collector:
        answers.append(float(batch["next", "reward"][batch["next", "done"]].mean()))
        out = loss(batch)
        optimizer.zero_grad()
        (out["loss_policy"] + out["loss_value"] + out["loss_entropy"]).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    collector.shutdown()
    return sum(answers[-20:]) / 20


@pytest.mark.slow
def test_only_the_recurrent_agent_solves_recall() -> None:
    assert train_recall(16) > 0.9
    assert abs(train_recall(None)) < 0.2


def test_mpo_encodes_an_image_once_for_all_samples() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"network": "shallow", "observation_shape": (3, 48, 48), "action_dim": 2}
    options["hidden"] = (16, 8)
    policy = build_policy(head="gaussian", critic=None, **options)
    loss = MPOLoss(policy, build_critic(**options), action_dim=2, estimator="one_step")
    seen: list[int] = []
    loss.target("critic").encoder.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    images = torch.randint(256, (2, 4, 3, 48, 48)).byte()
    flags = {name: torch.zeros(4, 1, dtype=torch.bool) for name in ("done", "terminated")}
    following = {"observation": images[1], "reward": torch.zeros(4, 1), **flags}
    loss(TensorDict({"observation": images[0], "action": torch.rand(4, 2), "next": following}, [4]))
    assert seen == [4]


@pytest.mark.parametrize("categorical", [False, True])
def test_the_losses_train_the_shipped_networks(categorical: bool) -> None:
    """A few steps on one batch whose reward is known: the critic's error falls, nothing else breaks."""
    torch.manual_seed(0)
    actor = build_policy(
        head="gaussian", critic=None, network="layernorm_mlp", observation_shape=(5,), action_dim=2, hidden=(16, 16)
    )
    critic = build_critic(
        network="layernorm_mlp", observation_shape=(5,), action_dim=2, hidden=(16, 16), critics=1,
        atoms=51 if categorical else 0, v_max=3.0,
    )  # fmt: skip
    loss = MPOLoss(actor, critic, action_dim=2, estimator="one_step", gamma=0.0)  # type: ignore[arg-type]
    groups = loss.param_groups()
    optimizer = torch.optim.Adam(
        [{"params": groups["actor"] + groups["critic"], "lr": 1e-2}, {"params": groups["duals"], "lr": 1e-2}]
    )
    observation, action = torch.randn(64, 5), torch.randn(64, 2).clamp(-1, 1)
    ends = torch.zeros(64, 1, dtype=torch.bool)
    following = {"observation": observation, "reward": observation[:, :1], "terminated": ends, "done": ends}
    td = TensorDict({"observation": observation, "action": action, "next": following}, [64])
    errors = []
    for _ in range(60):
        out = loss(td)
        optimizer.zero_grad()
        sum(x for name, x in out.items() if name.startswith("loss_")).backward()  # type: ignore[union-attr]
        optimizer.step()
        errors.append(out["td_error"].item())
    assert errors[-1] < 0.4 * errors[0]
    assert all(p.isfinite().all() for p in loss.parameters())
