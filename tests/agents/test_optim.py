"""The paper's RMSProp against its definition, and the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtrace.agents.optim import RMSpropTF, learning_rate_factor, make_optimizer, match_device


def test_rmsprop_tf_follows_the_definition() -> None:
    lr, decay, eps = 0.01, 0.9, 0.1
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(2, 3)), rng.normal(size=(5, 2, 3))
    expected, square = start.copy(), np.ones_like(start)
    for grad in grads:
        square = decay * square + (1 - decay) * grad**2
        expected = expected - lr * grad / np.sqrt(square + eps)

    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = RMSpropTF([parameter], lr=lr, decay=decay, eps=eps)
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        optimizer.step()

    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_rmsprop_tf_is_not_torchs() -> None:
    """The first step of torch's is about lr / sqrt(1 - decay) times the sign; of TensorFlow's, about lr times g."""
    moved = {}
    for name in ("rmsprop", "rmsprop_tf"):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), 1e-3)
        make_optimizer(name, lr=1.0, eps=1e-8, decay=0.99)([parameter]).step()  # type: ignore[arg-type]
        moved[name] = -parameter.item()
    assert moved["rmsprop"] == pytest.approx(10.0, rel=1e-3)
    assert moved["rmsprop_tf"] == pytest.approx(1e-3, rel=0.01)


def test_rmsprop_tf_resumes_exactly() -> None:
    def steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, grads: torch.Tensor) -> None:
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()

    grads = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    straight = torch.nn.Parameter(torch.ones(4))
    steps(RMSpropTF([straight]), straight, grads)

    first = torch.nn.Parameter(torch.ones(4))
    optimizer = RMSpropTF([first])
    steps(optimizer, first, grads[:3])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = RMSpropTF([second])
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, second, grads[3:])

    assert torch.equal(straight, second)


@pytest.mark.parametrize(
    ("arguments", "word"), [({"lr": -1.0}, "lr"), ({"decay": 1.0}, "decay"), ({"eps": 0.0}, "eps")]
)
def test_rmsprop_tf_refuses(arguments: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word} must be"):
        RMSpropTF([torch.nn.Parameter(torch.zeros(1))], **arguments)


def test_unknown_optimiser() -> None:
    with pytest.raises(ValueError, match="adam, rmsprop or rmsprop_tf, got 'sgd'"):
        make_optimizer("sgd", lr=1.0, eps=1.0)  # type: ignore[arg-type]


def test_schedule() -> None:
    assert [learning_rate_factor("linear", frames, 100) for frames in (0, 25, 100, 130)] == [1.0, 0.75, 0.0, 0.0]
    assert learning_rate_factor("constant", 100, 100) == 1.0


@pytest.mark.parametrize("name", ["adam", "rmsprop", "rmsprop_tf"])
def test_what_a_captured_run_saved_goes_on_on_a_cpu(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    plain, resumed = (make_optimizer(name, lr=0.1, eps=1e-8)([parameter]) for parameter in parameters)  # type: ignore[arg-type]
    saved = plain.state_dict()
    if name != "rmsprop_tf":
        saved["param_groups"][0]["capturable"] = True
    resumed.load_state_dict(saved)
    match_device(resumed)
    for parameter, optimizer in zip(parameters, (plain, resumed), strict=True):
        parameter.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(*parameters)
