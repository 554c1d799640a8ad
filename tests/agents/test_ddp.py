"""Two gloo ranks on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.agents.ddp_script import LOSSES, UPDATES, FixedData, fit, gradients, ray_config, sgd_agent
from tests.marks import needs_ray

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ddp_script.py")


def run(*arguments: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["train", "rewards"])
def test_ranks_collect_for_themselves_and_stay_identical(kind: str, tmp_path: Path) -> None:
    run(kind, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]

    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
    for state, other in zip(*(rank["optimizer"]["state"].values() for rank in ranks), strict=True):
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(other[key])) for key in state)
    assert not torch.isclose(ranks[0]["first"], ranks[1]["first"]).all(-1).any(), "the ranks' environments are the same"
    assert ranks[0]["frames"] == ranks[1]["frames"] == ranks[0]["configured"]
    if kind == "rewards":  # those of both
        assert ranks[0]["weights"]["loss.reward_normalizer.returns.count"] == ranks[0]["frames"]
    assert ranks[0]["updates"] == ranks[1]["updates"] == 12


def test_the_gradient_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    """Before clipping, with 14 valid steps on one rank and 6 on the other; of IMPALA's, of ACER's and of TRPO's loss.

    Of TRPO it is the whole update: the step of the policy and two of the value.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    gradients(one, ranks=1)
    run("gradients", str(two))
    for loss in LOSSES:
        joined = torch.load(one / f"{loss}0.pt")
        for rank in (0, 1):
            gradient = torch.load(two / f"{loss}{rank}.pt")
            for name, value in joined.items():
                assert value.abs().max() > 0
                torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=2e-6)


@needs_ray
def test_ranks_on_one_ray_cluster_learn_as_one_from_both_batches(tmp_path: Path, sockets: None) -> None:
    """Both are on one node, which has no room for the second one's actor: that is elsewhere."""
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    run("ray", str(tmp_path), **loopback, RAY_TMPDIR=os.environ["TMPDIR"])
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]

    assert [len(rank["batches"]) for rank in ranks] == [UPDATES, UPDATES]
    first, second = (torch.stack([batch["observation"][:, 0] for batch in rank["batches"]]) for rank in ranks)
    assert not torch.isclose(first, second).all(-1).any(), "the ranks' environments are the same"
    agent, _ = sgd_agent(ray_config("auto"))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    fit(agent, FixedData(1, [rank["batches"] for rank in ranks]), 1)
    for name, value in agent.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(before[name], value) for name, value in agent.named_parameters())
