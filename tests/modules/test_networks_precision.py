"""Precision of critics and of state values: of what they read, and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from offtrace.modules.networks import build_critic, build_value

SHAPES: dict[str, Any] = {"network": "mlp", "observation_shape": [3], "hidden": [16]}
MADE: dict[str, Any] = {
    "critic": lambda: build_critic(**SHAPES, action_dim=2),
    "layer norm": lambda: build_critic(**SHAPES | {"network": "layernorm_mlp"}, action_dim=2),
    "categorical": lambda: build_critic(**SHAPES, action_dim=2, atoms=5),
    "discrete": lambda: build_critic(**SHAPES, num_actions=4),
    "value": lambda: build_value(**SHAPES),
}


@pytest.fixture(params=MADE)
def network(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MADE[request.param]()


def values(network: Any, observation: torch.Tensor) -> torch.Tensor:
    td = TensorDict({"observation": observation, "action": torch.full((len(observation), 2), 0.7)}, [len(observation)])
    found: torch.Tensor = network(td)[network.out_keys[0]]
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_observations_of_any_kind_are_read(network: Any, dtype: torch.dtype) -> None:
    """And the action with them as it is: 0.7 of a whole number would be 0."""
    numbers = torch.randint(0, 255, (6, 3))
    found = values(network, numbers.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, values(network, numbers.float()))


def test_under_autocast_values_keep_the_precision_of_the_weights(network: Any) -> None:
    """A step of bf16 at 60 is 0.25, more than the advantages of an action."""
    last = network.head.linear if hasattr(network, "head") else network.ensemble.last
    with torch.no_grad():
        last.bias += 60
    observation = torch.randn(64, 3)
    expected = values(network, observation)
    with torch.autocast("cpu", torch.bfloat16):
        found = values(network, observation)
    assert found.dtype == torch.float32
    if hasattr(network, "ensemble"):  # of vectors nothing is left to compute in half precision
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
