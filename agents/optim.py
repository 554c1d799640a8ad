"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

OptimizerName = Literal["adam", "rmsprop", "rmsprop_tf"]
ScheduleName = Literal["linear", "constant"]
OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]


class RMSpropTF(Optimizer):
    """RMSProp as TensorFlow defines it, which the published IMPALA scores were made with.

    Two differences to :class:`torch.optim.RMSprop`: epsilon stands inside the root, and the accumulator starts at one::

        ms <- decay * ms + (1 - decay) * g^2          ms_0 = 1
        p  <- p - lr * g / sqrt(ms + eps)

    With the paper's ``eps = 0.01`` neither is cosmetic.

    Args:
        params: the parameters, or parameter groups.
        lr: step size, > 0.
        decay: of the running mean of squares, in [0, 1).
        eps: > 0.

    Raises:
        ValueError: if a hyperparameter is out of its range.

    Source: Espeholt et al. 2018 (arXiv 1802.01561), appendix, and the released code's ``tf.train.RMSPropOptimizer``.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 6e-4, decay: float = 0.99, eps: float = 0.01) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            squares = [self._square(p) for p in params]
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
            denominators = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(denominators)
            if isinstance(group["lr"], Tensor):  # of a captured update: the host must not read it
                steps = torch._foreach_div(grads, denominators)
                torch._foreach_mul_(steps, group["lr"])
                torch._foreach_sub_(params, steps)
            else:
                torch._foreach_addcdiv_(params, grads, denominators, value=-group["lr"])
        return loss

    def _square(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "square_avg" not in state:
            state["square_avg"] = torch.ones_like(param, memory_format=torch.preserve_format)
        return state["square_avg"]


def make_optimizer(name: OptimizerName, *, lr: float, eps: float, decay: float = 0.99) -> OptimizerFactory:
    """A function that builds the named optimiser over given parameters.

    Args:
        name: ``adam``, ``rmsprop`` (torch's) or ``rmsprop_tf`` (the paper's).
        lr: step size.
        eps: added inside the root by ``rmsprop_tf``, outside by the two others.
        decay: of the two RMSProps' running mean of squares; Adam keeps betas (0.9, 0.999).

    Raises:
        ValueError: if ``name`` is none of the three.
    """

    def build(params: Iterable[Tensor]) -> Optimizer:
        arguments: dict[str, Any] = {"lr": lr, "eps": eps}
        if name == "adam":
            return torch.optim.Adam(params, fused=True, **arguments)
        if name == "rmsprop":
            return torch.optim.RMSprop(params, alpha=decay, **arguments)
        return RMSpropTF(params, decay=decay, **arguments)

    if name not in ("adam", "rmsprop", "rmsprop_tf"):
        raise ValueError(f"optimiser must be adam, rmsprop or rmsprop_tf, got {name!r}")
    return build


def match_device(optimizer: Optimizer) -> None:
    """Makes what a checkpoint brought fit this machine, where that of the run before was another.

    The state gets the memory format of its parameters. Fused steps go through both as flat memory: in another format
    they would take the moments of other weights. And the step need not be capturable, which a CPU's cannot be.
    """
    for group in optimizer.param_groups:
        if group.get("capturable") and group["params"][0].device.type == "cpu":
            group["capturable"] = False
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def learning_rate_factor(schedule: ScheduleName, frames: int, total_frames: int) -> float:
    """What the learning rate is multiplied with after ``frames`` of ``total_frames``: 1 falling to 0, or always 1."""
    if schedule == "constant":
        return 1.0
    return max(0.0, 1.0 - frames / total_frames)
