"""Networks: shapes, initialisation, precision, masks, and recurrent state through real collectors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.collectors import Collector, MultiAsyncCollector
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from offtrace.modules.networks import LSTMCore, ResNetConv, ShallowConv, build_policy

RECALL = 4


class Recall(EnvBase):
    """A cue of +1 or -1 at the first step, then nothing; at the last step action 1 answers +1 and action 0 answers -1.

    Even environments live ``RECALL`` steps and terminate, with ``mixed`` odd ones two steps less and truncate: ends
    then fall at other steps in every row of a rollout.
    """

    def __init__(self, number: int, *, mixed: bool = False, seed: int = 0) -> None:
        super().__init__(batch_size=[number])
        flag = Binary(1, shape=(number, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Unbounded((number, 2)),
            is_init=flag.clone(),
            last_action=Categorical(2, shape=(number,)),
            last_reward=Unbounded((number, 1)),
            shape=(number,),
        )
        self.action_spec = Categorical(2, shape=(number,))
        self.reward_spec = Unbounded((number, 1))
        self.full_done_spec = Composite(
            {name: flag.clone() for name in ("done", "terminated", "truncated")}, shape=(number,)
        )
        odd = torch.arange(number) % 2 == 1
        self.short = odd & mixed
        self.length = torch.where(self.short, RECALL - 2, RECALL)
        self.cue, self.time = torch.zeros(number), torch.zeros(number, dtype=torch.long)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.rng = torch.Generator().manual_seed(seed or 0)

    def _observe(self, first: Tensor, action: Tensor, reward: Tensor) -> dict[str, Tensor]:
        shown = torch.where(first, self.cue, 0.0)
        answer = (self.time == self.length - 1).float()
        return {
            "observation": torch.stack([shown, answer], -1),
            "is_init": first.unsqueeze(-1),
            "last_action": torch.where(first, 0, action),
            "last_reward": torch.where(first, 0.0, reward).unsqueeze(-1),
        }

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        chosen = torch.ones(self.batch_size, dtype=torch.bool) if chosen is None else chosen.squeeze(-1)
        fresh = torch.randint(2, self.batch_size, generator=self.rng) * 2.0 - 1
        self.cue, self.time = torch.where(chosen, fresh, self.cue), torch.where(chosen, 0, self.time)
        zero = torch.zeros(self.batch_size)
        return TensorDict(self._observe(self.time == 0, zero.long(), zero), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"]
        done = self.time == self.length - 1
        right = (action == (self.cue > 0).long()).float() * 2 - 1
        reward = torch.where(done, right, 0.0)
        self.time = self.time + 1
        out = self._observe(torch.zeros_like(done), action, reward)
        ends = {"done": done, "terminated": done & ~self.short, "truncated": done & self.short}
        out |= {name: value.unsqueeze(-1) for name, value in ends.items()}
        return TensorDict(out | {"reward": reward.unsqueeze(-1)}, self.batch_size)


def pixels(number: int = 3) -> Tensor:
    return torch.randint(256, (number, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("encoder", "flat"), [(ShallowConv, 32 * 9 * 9), (ResNetConv, 32 * 11 * 11)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_image_encoders(encoder: Any, flat: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    net = encoder(channels_last=channels_last)
    assert net.linear.in_features == flat
    assert net.out_features == 256
    out = net(pixels())
    assert out.shape == (3, 256)
    assert (out >= 0).all()
    scaled = pixels().float() / 255
    torch.testing.assert_close(net(scaled), out, rtol=1e-4, atol=1e-4)
    other = encoder(channels_last=not channels_last)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(pixels()), out, rtol=1e-4, atol=1e-4)


def test_the_resnet_is_that_of_the_paper() -> None:
    net = ResNetConv()
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == 15
    block = net.stages[0][2]
    for parameter in block.parameters():
        parameter.data.zero_()
    x = torch.randn(2, 16, 5, 5)
    before = x.clone()
    # with the branch at zero the block is the identity, negative numbers included
    torch.testing.assert_close(block(x), before)
    torch.testing.assert_close(x, before)


def test_initialisation_is_as_stated() -> None:
    policy = build_policy(network="shallow", observation_shape=[4, 84, 84], num_actions=6)
    net = policy.module[0]
    for layer, gain in (
        (net.encoder.conv1, math.sqrt(2)),
        (net.encoder.linear, math.sqrt(2)),
        (net.head.linear, 0.01),
        (net.value_head.linear, 1.0),
    ):
        weight = layer.weight.flatten(1)
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-4)
        assert not layer.bias.any()
    core = LSTMCore(5, 8, num_actions=3)
    bias = (core.cell.bias_ih + core.cell.bias_hh).unflatten(0, (4, 8))
    assert (bias[1] == 1).all()
    assert not bias[[0, 2, 3]].any()


def test_output_is_float32_under_autocast_and_close() -> None:
    for network in ("shallow", "resnet"):
        torch.manual_seed(0)
        policy = build_policy(network=network, observation_shape=[4, 84, 84], num_actions=6)
        net, td = policy.module[0], TensorDict({"observation": pixels()}, [3])
        exact = net(td.clone())
        with torch.autocast("cpu", torch.bfloat16):
            seen: list[torch.dtype] = []
            net.encoder.linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
            rough = net(td.clone())
        assert seen == [torch.bfloat16]
        for key in ("logits", "state_value"):
            assert rough[key].dtype == torch.float32
            torch.testing.assert_close(rough[key], exact[key], rtol=0.1, atol=0.1)


KINDS: dict[str, dict[str, Any]] = {
    "discrete": {"num_actions": 4},
    "masked": {"num_actions": 4, "masked": True},
    "greedy": {"num_actions": 4, "head": "greedy", "critic": "q", "head_options": {"epsilon": 1.0}},
    "greedy masked": {"num_actions": 4, "head": "greedy", "critic": "q", "masked": True},
    "distributional": {"num_actions": 4, "critic": "q", "critic_options": {"atoms": 5, "dueling": True}},
    "normal": {"action_dim": 2},
    "gaussian": {"action_dim": 2, "head": "gaussian", "critic": None},
    "full_gaussian": {"action_dim": 2, "head": "full_gaussian", "critic": None},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, None])
def test_fast_call_equals_the_base_class(kind: str, mode: ExplorationType | None) -> None:
    policy = build_policy(observation_shape=[3], **KINDS[kind])
    td = TensorDict({"observation": torch.randn(5, 3), "action_mask": torch.rand(5, 4) < 0.7}, [5])
    td["action_mask"][:, 0] = True
    with set_exploration_type(mode):
        torch.manual_seed(0)
        fast = policy(td.clone())
        torch.manual_seed(0)
        base = ProbabilisticTensorDictSequential.forward(policy, td.clone())
    torch.testing.assert_close(fast, base)
    assert fast["action_log_prob"].shape == (5,)
    dist = policy.build_dist_from_params(policy.get_dist_params(td.clone()))
    torch.testing.assert_close(dist.log_prob(fast["action"]), fast["action_log_prob"])
    if policy.num_actions:
        assert fast["action"].dtype == torch.int64


def test_distributions_equal_those_of_torch() -> None:
    torch.manual_seed(0)
    policy = build_policy(network="mlp", observation_shape=[3], num_actions=4)
    logits, other = torch.randn(2, 7, 4, dtype=torch.float64)
    p, q = (policy[-1].build_dist_from_params(TensorDict({"logits": x}, [7])) for x in (logits, other))
    rp, rq = (torch.distributions.Categorical(logits=x) for x in (logits, other))
    action = torch.arange(7) % 4
    torch.testing.assert_close(p.log_prob(action), rp.log_prob(action))
    torch.testing.assert_close(p.entropy(), rp.entropy())
    torch.testing.assert_close(torch.distributions.kl_divergence(p, q), torch.distributions.kl_divergence(rp, rq))
    counts = torch.bincount(torch.stack([p.sample()[0] for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts.double(), rp.probs[0], rtol=0, atol=0.04)


def test_masked_actions_have_probability_zero_and_the_others_are_exact() -> None:
    torch.manual_seed(0)
    policy = build_policy(network="mlp", observation_shape=[3], num_actions=5, masked=True)
    policy.module[0].head.linear.weight.data.mul_(300)
    observation = torch.randn(64, 3)
    mask = torch.rand(64, 5) < 0.5
    mask[:, 2] = True
    free = policy.get_dist_params(TensorDict({"observation": observation, "action_mask": mask | True}, [64]))["logits"]
    td = TensorDict({"observation": observation, "action_mask": mask}, [64])
    for _ in range(20):
        policy(td)
        assert mask.gather(-1, td["action"].unsqueeze(-1)).all()
    dist = policy.build_dist_from_params(td)
    assert (dist.probs[~mask] == 0).all()
    expected = free.masked_fill(~mask, -math.inf).log_softmax(-1)
    torch.testing.assert_close(dist.logits[mask], expected[mask])
    entropy = -torch.where(mask, expected.exp() * expected, 0).sum(-1)
    torch.testing.assert_close(dist.entropy(), entropy)
    dist.entropy().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_core_reads_last_action_and_clipped_reward_and_forgets_at_a_start() -> None:
    core = LSTMCore(2, 4, num_actions=3)
    x, started = torch.randn(2, 2), torch.tensor([[False], [True]])
    out = core.inputs(x, started, torch.tensor([2, 2]), torch.tensor([[7.0], [7.0]]))
    torch.testing.assert_close(out[:, 2:], torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 0]]))
    h, c = torch.randn(2, 2, 4)
    moved, _ = core.step(out, started, h + 1, c + 1)
    same, _ = core.step(out, started, h, c)
    assert (moved[1] == same[1]).all()
    assert not (moved[0] == same[0]).any()


def recurrent_policy() -> Any:
    torch.manual_seed(0)
    policy = build_policy(network="mlp", observation_shape=[2], num_actions=2, hidden=[16], recurrent=16)
    policy.module[0].head.linear.weight.data.mul_(100)
    return policy


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_learner_recomputes_the_stored_log_probabilities_across_resets(processes: int) -> None:
    policy = recurrent_policy()
    make_env = partial(Recall, 6, mixed=True)
    common = {"frames_per_batch": 6 * 11, "total_frames": 6 * 11 * 3, "auto_register_policy_transforms": True}
    if processes:
        collector = MultiAsyncCollector([make_env] * processes, policy, **common)
    else:
        collector = Collector(make_env(), policy, **common)
    try:
        batches = [batch.clone() for batch in collector]
    finally:
        collector.shutdown()
    for number, batch in enumerate(batches):
        assert batch["next", "done"][:, :-1].any()
        assert batch["next", "truncated"][:, :-1].any()
        assert batch["recurrent_h"][:, 0].any() or number == 0
        with set_recurrent_mode(True):
            again = policy.get_dist_params(batch.exclude("logits", "state_value", "next"))
        dist = policy.build_dist_from_params(again)
        torch.testing.assert_close(dist.log_prob(batch["action"]), batch["action_log_prob"], rtol=0, atol=1e-5)
        torch.testing.assert_close(again["state_value"], batch["state_value"], rtol=0, atol=1e-5)
    assert len(batches) == 3


def test_a_missing_recurrent_state_is_named() -> None:
    policy = recurrent_policy()
    env = Recall(2)
    step = policy(env.reset())
    assert step["next", "recurrent_h"].shape == (2, 16)
    _, following = env.step_and_maybe_reset(step)
    with pytest.raises(KeyError, match="auto_register_policy_transforms"):
        policy(following)
