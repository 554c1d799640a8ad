"""Torsos for control: encoders of observations, and K independent layer stacks evaluated as one batched network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offtrace.modules.networks.encoders import ShallowConv, _compute_dtype
from offtrace.modules.networks.initialise import SMALL_GAIN, TORSO_GAIN

_ACME_SCALE = 0.333


def _check_sizes(in_features: int, hidden: Sequence[int]) -> None:
    if not hidden or min(hidden) < 1 or in_features < 1:
        raise ValueError(f"a torso needs positive sizes, got in_features {in_features} and hidden {tuple(hidden)}")


def acme_uniform(weight: Tensor, fan_out: int) -> None:
    """Fill ``weight`` from a uniform distribution of variance 0.333 / ``fan_out``, as Acme's MLPs start."""
    limit = math.sqrt(3 * _ACME_SCALE / fan_out)
    nn.init.uniform_(weight, -limit, limit)


class LayerNormMLP(nn.Module):
    """Linear, LayerNorm, tanh; then linear layers with an ELU after each.

    Acme's torso for control (Hoffman et al. 2020, arXiv 2006.00979), with its initialisation: weights uniform with
    variance 0.333 / fan_out, biases zero. The first layer bounds what a badly scaled observation can do.

    Args:
        in_features: numbers in an observation, over all its dimensions.
        hidden: sizes of the layers; the last is the number of features out.

    Shapes: ``[N, *shape]`` of any dtype, flattened, to ``[N, hidden[-1]]``.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        _check_sizes(in_features, hidden)
        self.norm = nn.LayerNorm(hidden[0])
        sizes = (in_features, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out_features = hidden[-1]
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            acme_uniform(layer.weight, layer.out_features)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden[-1]]``."""
        first, *others = self.layers
        assert isinstance(first.weight, Tensor)
        # in place: no backward pass here reads what went into an activation
        x = torch.tanh_(self.norm(first(x.flatten(1).to(_compute_dtype(first.weight)))))
        for layer in others:
            x = F.elu_(layer(x))
        return x


class PixelTorso(nn.Module):
    """:class:`ShallowConv` and a :class:`LayerNormMLP` behind it, whose LayerNorm bounds the convolution's features.

    Args:
        in_channels: channels (stacked frames) of an image.
        image: height and width.
        hidden: layers of the MLP.
        conv_features: numbers between the two.

    Shapes: ``[N, in_channels, *image]`` uint8 to ``[N, hidden[-1]]``.
    """

    def __init__(
        self,
        in_channels: int,
        image: Sequence[int] = (84, 84),
        hidden: Sequence[int] = (256, 256),
        conv_features: int = 256,
    ) -> None:
        super().__init__()
        self.conv = ShallowConv(in_channels, conv_features, image)
        self.mlp = LayerNormMLP(conv_features, hidden)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden[-1]]``."""
        return self.mlp(self.conv(x))


class EnsembleLinear(nn.Module):
    """K independent linear layers in one batched product.

    Args:
        members: K.
        in_features, out_features: of each layer.
        gain: of the orthogonal weights, drawn for each member; None: Acme's uniform ones. Biases are zero.

    Shapes: ``[K, N, in_features]``, or ``[N, in_features]`` for one input to all, to ``[K, N, out_features]``.
    """

    def __init__(self, members: int, in_features: int, out_features: int, *, gain: float | None = TORSO_GAIN) -> None:
        super().__init__()
        if min(members, in_features, out_features) < 1:
            raise ValueError(
                f"an ensemble needs positive sizes, got {members} members, {in_features} in and {out_features} out"
            )
        self.members = members
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(members, 1, out_features))
        for weight in self.weight.data:
            if gain is None:
                acme_uniform(weight, out_features)
            else:
                weight.copy_(nn.init.orthogonal_(torch.empty(out_features, in_features), gain).t())

    def forward(self, x: Tensor) -> Tensor:
        """``[K, N, out_features]``."""
        weight, bias = self.weight, self.bias
        if x.ndim == 2:
            x = x.expand(self.members, *x.shape)
        if weight.shape[-1] == 1:  # a batched product with one column takes several times as long
            return (x * weight.transpose(1, 2)).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


def _relu(x: Tensor) -> Tensor:
    """ReLU of ``x``, which may be overwritten."""
    if torch.compiler.is_compiling():
        # Inductor would keep bools for relu's backward pass where no weight learns, and a CPU writes them so slowly
        # that SAC's compiled update took a third more time than an eager one. Equal to relu for numbers up to half the
        # largest; the gradient at 0 is a half.
        return (x + x.abs()) * 0.5
    return x.relu_()  # in place: the product's backward pass does not read its own output


class EnsembleMLP(nn.Module):
    """K independent MLPs in one batched network: hidden layers, and a linear layer without activation at the end.

    Args:
        members: K.
        in_features: numbers in.
        hidden: sizes of the hidden layers.
        out_features: numbers out of each member.
        layer_norm: Acme's form, see :class:`LayerNormMLP`, with a last layer that starts near 0; otherwise a ReLU after
            each hidden layer, weights orthogonal with gain sqrt(2), and gain 1 in the last layer.

    Shapes: ``[N, in_features]`` to ``[K, N, out_features]``.
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        hidden: Sequence[int] = (256, 256),
        out_features: int = 1,
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, hidden)
        sizes = (in_features, *hidden)
        gain = None if layer_norm else TORSO_GAIN
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b, gain=gain) for a, b in itertools.pairwise(sizes))
        self.last = EnsembleLinear(members, hidden[-1], out_features, gain=SMALL_GAIN if layer_norm else 1.0)
        self.layer_norm = layer_norm
        if layer_norm:
            self.norm_weight = nn.Parameter(torch.ones(members, 1, hidden[0]))
            self.norm_bias = nn.Parameter(torch.zeros(members, 1, hidden[0]))

    def forward(self, x: Tensor) -> Tensor:
        """``[K, N, out_features]``."""
        if not self.layer_norm:
            for layer in self.layers:
                x = _relu(layer(x))
            return self.last(x)
        first, *others = self.layers
        x = F.layer_norm(first(x), self.norm_weight.shape[-1:])
        x = torch.addcmul(self.norm_bias, x, self.norm_weight).tanh_()
        for layer in others:
            x = F.elu_(layer(x))
        return self.last(x)
