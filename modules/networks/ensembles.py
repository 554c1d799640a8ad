"""K independent stacks of layers evaluated as one batched network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offtrace.modules.networks.encoders import check_activation, check_sizes
from offtrace.modules.networks.initialise import ENCODER_GAIN, SMALL_GAIN, VALUE_GAIN, acme_uniform


class EnsembleLinear(nn.Module):
    """K independent linear layers in one batched product.

    Args:
        members: K.
        in_features, out_features: of each layer.
        gain: of the orthogonal weights, drawn for each member; None: Acme's uniform ones. Biases are zero.

    Shapes: ``[K, N, in_features]``, or ``[N, in_features]`` for one input to all, to ``[K, N, out_features]``.
    """

    def __init__(self, members: int, in_features: int, out_features: int, *, gain: float | None = ENCODER_GAIN) -> None:
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
        layer_norm: Acme's form, see :class:`LayerNormMLP`, with a last layer that starts near 0; otherwise an
            activation after each hidden layer, weights orthogonal with gain sqrt(2), and gain 1 in the last layer.
        activation: without ``layer_norm``, as of :class:`MLP`.

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
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_sizes("an ensemble", in_features, hidden)
        sizes = (in_features, *hidden)
        gain = None if layer_norm else ENCODER_GAIN
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b, gain=gain) for a, b in itertools.pairwise(sizes))
        self.last = EnsembleLinear(members, hidden[-1], out_features, gain=SMALL_GAIN if layer_norm else VALUE_GAIN)
        self.layer_norm = layer_norm
        self.activate = _relu if activation == "relu" else getattr(F, activation)
        if layer_norm:
            self.norm_weight = nn.Parameter(torch.ones(members, 1, hidden[0]))
            self.norm_bias = nn.Parameter(torch.zeros(members, 1, hidden[0]))

    def forward(self, x: Tensor) -> Tensor:
        """``[K, N, out_features]``."""
        if not self.layer_norm:
            for layer in self.layers:
                x = self.activate(layer(x))
            return self.last(x)
        first, *others = self.layers
        x = F.layer_norm(first(x), self.norm_weight.shape[-1:])
        x = torch.addcmul(self.norm_bias, x, self.norm_weight).tanh_()
        for layer in others:
            x = F.elu_(layer(x))
        return self.last(x)
