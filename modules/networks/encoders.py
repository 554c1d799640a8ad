"""Encoders: an observation ``[N, *shape]`` in, features ``[N, out_features]`` out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offtrace.modules.networks.initialise import ENCODER_GAIN, acme_uniform, orthogonal

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU}


def compute_dtype(reference: Tensor) -> torch.dtype:
    """The dtype in which a layer with weights like ``reference`` computes: autocast's where that is on."""
    kind = reference.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else reference.dtype


def check_activation(name: str) -> None:
    """Refuse an activation without a name in :data:`ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")


def check_sizes(what: str, in_features: int, hidden: Sequence[int]) -> None:
    """Refuse layers without width."""
    if not hidden or min(hidden) < 1 or in_features < 1:
        raise ValueError(f"{what} needs positive sizes, got in_features {in_features} and hidden {tuple(hidden)}")


class _Image(nn.Module):
    """What the two image encoders share: cast, scale, and the memory format."""

    def __init__(self, in_channels: int, image: Sequence[int], channels_last: bool | None) -> None:
        super().__init__()
        if in_channels < 1 or len(image) != 2:
            raise ValueError(f"an image is [channels, height, width], got {in_channels} channels of {tuple(image)}")
        self._chosen = channels_last is not None
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def _set_format(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._format)

    def _floats(self, x: Tensor, weight: Tensor) -> Tensor:
        """uint8 becomes [0, 1] at once in the dtype of the convolution: under autocast half the bytes move."""
        dtype, scaled = compute_dtype(weight), x.dtype == torch.uint8
        here = self._format
        if x.device.type == "cpu":
            # torch's backward pass of convolutions in float32 is much faster in this format; acting, and bf16, do not
            # gain. Weights may stay in the other one.
            if not self._chosen and dtype == torch.float32 and torch.is_grad_enabled():
                here = torch.channels_last
            if here == torch.channels_last:  # torch's own copy into it takes three times as long
                x = torch.stack(x.unbind(1), -1).permute(0, 3, 1, 2)
        x = x.to(dtype, memory_format=here)
        return x.mul_(1 / 255) if scaled else x


class ShallowConv(_Image):
    """The small net of the paper: 16 filters 8x8 stride 4, 32 filters 4x4 stride 2, a linear layer; ReLU after each.

    Espeholt et al. 2018, arXiv 1802.01561, figure 3 left; Mnih et al. 2016, arXiv 1602.01783.

    Args:
        in_channels: channels (stacked frames) of an image.
        hidden: features out.
        image: height and width.
        channels_last: memory format of activations and weights, faster on CUDA under autocast. None: channels last
            where a CPU learns in float32, for which it is faster, and first else.

    Shapes: ``[N, in_channels, *image]`` uint8 (scaled here by 1/255) or floating (taken as it is) to ``[N, hidden]``.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden: int = 256,
        image: Sequence[int] = (84, 84),
        *,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(in_channels, image, channels_last)
        height, width = (((size - 8) // 4 + 1 - 4) // 2 + 1 for size in image)
        if height < 1 or width < 1:
            raise ValueError(f"the shallow encoder needs images of at least 20x20, got {tuple(image)}; use 'resnet'")
        self.conv1 = nn.Conv2d(in_channels, 16, 8, 4)
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.linear = nn.Linear(32 * height * width, hidden)
        self.out_features = hidden
        orthogonal(self, ENCODER_GAIN)
        self._set_format()

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden]``."""
        # in-place is safe here: a convolution's backward pass does not read its own output
        x = self.conv1(self._floats(x, self.conv1.weight)).relu_()
        x = self.conv2(x).relu_()
        return self.linear(x.flatten(1)).relu_()


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # the first ReLU must not be in place: x is also the skip path
        return x + self.conv2(self.conv1(F.relu(x)).relu_())


class ResNetConv(_Image):
    """The deep net of the paper: three stages of convolution, max-pool and two residual blocks; 15 convolutions.

    Espeholt et al. 2018, arXiv 1802.01561, figure 3 right. Pooling pads both sides, where TensorFlow's SAME pads the
    bottom and right of even sizes: the same shapes, shifted by a pixel.

    Args and shapes as :class:`ShallowConv`; ``channels`` are the filters of the stages. Channels last is faster on a
    CPU too, where a max-pool of images in the other format takes ten times as long.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden: int = 256,
        image: Sequence[int] = (84, 84),
        *,
        channels: Sequence[int] = (16, 32, 32),
        channels_last: bool = True,
    ) -> None:
        super().__init__(in_channels, image, channels_last)
        stages: list[nn.Module] = []
        height, width = image
        for filters in channels:
            conv = nn.Conv2d(in_channels, filters, 3, padding=1)
            stages.append(nn.Sequential(conv, nn.MaxPool2d(3, 2, 1), _Residual(filters), _Residual(filters)))
            in_channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
        self.stages = nn.ModuleList(stages)
        self.linear = nn.Linear(in_channels * height * width, hidden)
        self.out_features = hidden
        orthogonal(self, ENCODER_GAIN)
        self._set_format()

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden]``."""
        x = self._floats(x, self.linear.weight)
        for stage in self.stages:
            x = stage(x)
        return F.relu(self.linear(F.relu(x).flatten(1)))


class MLP(nn.Module):
    """Linear layers with an activation after each.

    Args:
        in_features: numbers in an observation, over all its dimensions.
        hidden: sizes of the layers; the last is the number of features out.
        activation: ``"tanh"``, ``"relu"``, ``"elu"``, ``"silu"`` or ``"gelu"``.

    Shapes: ``[N, *shape]`` of any dtype, flattened, to ``[N, hidden[-1]]``.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> None:
        super().__init__()
        check_activation(activation)
        check_sizes("an MLP", in_features, hidden)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(in_features, size), ACTIVATIONS[activation]()]
            in_features = size
        self.layers = nn.Sequential(*layers)
        self.out_features = in_features
        orthogonal(self, ENCODER_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden[-1]]``."""
        weight = self.layers[0].weight
        assert isinstance(weight, Tensor)
        return self.layers(x.flatten(1).to(compute_dtype(weight)))


class LayerNormMLP(nn.Module):
    """Linear, LayerNorm, tanh; then linear layers with an ELU after each.

    Acme's encoder for control (Hoffman et al. 2020, arXiv 2006.00979), with its initialisation: weights uniform with
    variance 0.333 / fan_out, biases zero. The first layer bounds what a badly scaled observation can do.

    Args:
        in_features: numbers in an observation, over all its dimensions.
        hidden: sizes of the layers; the last is the number of features out.

    Shapes: ``[N, *shape]`` of any dtype, flattened, to ``[N, hidden[-1]]``.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        check_sizes("a LayerNorm MLP", in_features, hidden)
        if hidden[0] < 2:
            raise ValueError(f"a LayerNorm of one number is 0 whatever it is; the first layer needs 2, got {hidden[0]}")
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
        x = torch.tanh_(self.norm(first(x.flatten(1).to(compute_dtype(first.weight)))))
        for layer in others:
            x = F.elu_(layer(x))
        return x


class ConvMLP(nn.Module):
    """A convolutional encoder and a :class:`LayerNormMLP` behind it, whose LayerNorm bounds the encoder's features.

    Args:
        conv: :class:`ShallowConv` or :class:`ResNetConv`.
        hidden: layers of the MLP.

    Shapes: ``[N, in_channels, *image]`` uint8 to ``[N, hidden[-1]]``.
    """

    def __init__(self, conv: ShallowConv | ResNetConv, hidden: Sequence[int]) -> None:
        super().__init__()
        self.conv = conv
        self.mlp = LayerNormMLP(conv.out_features, hidden)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, hidden[-1]]``."""
        return self.mlp(self.conv(x))


class Concatenate(nn.Module):
    """The vectors of a dictionary observation as one vector, in the order of ``names``, and an encoder of it.

    Args:
        names: of the entries.
        encoder: reads the vector; None: the vector is what comes out.

    Shapes: a mapping name -> ``[N, *shape]`` to ``[N, F]``.
    """

    def __init__(self, names: Sequence[str], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.names = tuple(names)
        self.encoder = encoder
        if encoder is not None:
            self.out_features = encoder.out_features

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """Features ``[N, F]``."""
        entries = [x[name] for name in self.names]
        joined = torch.cat([entry.reshape(len(entry), -1) for entry in entries], -1)
        return joined if self.encoder is None else self.encoder(joined)
