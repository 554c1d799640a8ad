"""How weights start. Stated in one place because it decides how many frames are needed."""

from __future__ import annotations

import math

from torch import Tensor, nn

ENCODER_GAIN = math.sqrt(2.0)
"""Keeps the size of activations through a ReLU layer."""
POLICY_GAIN = 0.01
"""A policy that starts uniform: the first advantages are noise and must not find a favourite action to feed."""
VALUE_GAIN = 1.0
SMALL_GAIN = 0.1
"""Values that start near 0, where the layers before carry so much that first guesses would exceed first rewards."""
_ACME_SCALE = 0.333


def orthogonal(module: nn.Module, gain: float) -> nn.Module:
    """Give every linear and convolutional layer inside ``module`` orthogonal weights of ``gain`` and zero biases.

    Saxe et al. 2014, arXiv 1312.6120. A convolution's weight is taken as the matrix ``[out, in * height * width]``.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def acme_uniform(weight: Tensor, fan_out: int) -> None:
    """Fill ``weight`` from a uniform distribution of variance 0.333 / ``fan_out``, as Acme's MLPs start."""
    limit = math.sqrt(3 * _ACME_SCALE / fan_out)
    nn.init.uniform_(weight, -limit, limit)
