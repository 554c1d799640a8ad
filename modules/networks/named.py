"""Networks by name or by import path: what observation they can read, and how wide they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from offtrace.modules.naming import imported, nearest
from offtrace.modules.networks.encoders import MLP, Concatenate, ConvMLP, LayerNormMLP, ResNetConv, ShallowConv

NETWORKS = ("mlp", "layernorm_mlp", "shallow", "resnet")
_IMAGE = {"shallow": ShallowConv, "resnet": ResNetConv}
_DEFAULT = {"mlp": (64, 64), "layernorm_mlp": (256, 256), "shallow": (256,), "resnet": (256,)}
_CRITIC_DEFAULT = (256, 256, 256)

Widths = int | Sequence[int] | None
Shape = Sequence[int] | Mapping[str, Sequence[int]]


def observation_names(shape: Shape) -> tuple[str, ...] | None:
    """Names of the entries of a dictionary observation; None for one tensor."""
    return tuple(shape) if isinstance(shape, Mapping) else None


def make_encoder(
    network: str, shape: Shape, hidden: Widths, *, activation: str, channels_last: bool | None
) -> nn.Module:
    """The encoder that ``network`` names, with fresh weights.

    Raises:
        ValueError: on a name, a shape or a width that does not fit.
    """
    if ":" in network:
        return _imported(network, shape, hidden)
    _check(network, shape)
    widths = _widths(network, hidden)
    if network in _IMAGE:
        assert not isinstance(shape, Mapping)
        conv = _convolutions(network, shape, widths[0], channels_last)
        return ConvMLP(conv, widths[1:]) if len(widths) > 1 else conv
    layers = MLP(_size(shape), widths, activation) if network == "mlp" else LayerNormMLP(_size(shape), widths)
    return Concatenate(list(shape), layers) if isinstance(shape, Mapping) else layers


def make_critic_encoder(
    network: str, shape: Shape, hidden: Widths, *, channels_last: bool | None
) -> tuple[nn.Module | None, int, tuple[int, ...]]:
    """What several critics share, the features that it gives, and the widths of the layers each has of its own.

    That is the flattened observation for ``"mlp"`` and ``"layernorm_mlp"``; the convolutional net of an image network;
    all of a network by import path, behind which the layers are as wide as its own.

    Raises:
        ValueError: on a name, a shape or a width that does not fit.
    """
    if ":" in network:
        encoder = _imported(network, shape, hidden)
        return encoder, int(encoder.out_features), _widths("layernorm_mlp", hidden)  # type: ignore[arg-type]
    _check(network, shape)
    if network not in _IMAGE:
        joined = Concatenate(list(shape)) if isinstance(shape, Mapping) else None
        return joined, _size(shape), _widths("layernorm_mlp", hidden)
    assert not isinstance(shape, Mapping)
    first, *widths = _widths(
        network, _CRITIC_DEFAULT if hidden is None else [hidden] * 3 if isinstance(hidden, int) else hidden
    )
    if not widths:
        raise ValueError(f"a critic on images has the width of the convolutional net and others, got hidden={hidden}")
    return _convolutions(network, shape, first, channels_last), first, tuple(widths)


def _check(network: str, shape: Shape) -> None:
    if network not in NETWORKS:
        raise ValueError(
            f"network must be one of {NETWORKS} or 'package.module:function', got {network!r}"
            f"{nearest(network, NETWORKS)}"
        )
    shapes = shape.values() if isinstance(shape, Mapping) else [shape]
    if not shapes or any(size < 1 for one in shapes for size in one):
        raise ValueError(f"sizes of an observation must be positive, got observation_shape={shape}")
    if isinstance(shape, Mapping):
        images = [name for name, one in shape.items() if len(one) == 3]
        if images or network in _IMAGE:
            raise ValueError(
                f"network {network!r} reads one image or vectors, and the observation has the entries {dict(shape)}; "
                "give a network of your own as 'package.module:function', which gets all of them"
            )
    elif not len(shape):
        raise ValueError("observation_shape is (); it must have a dimension: (1,) for a single number")
    elif network in _IMAGE and len(shape) != 3:
        other = "; use 'mlp'" if len(shape) == 1 else ""
        raise ValueError(f"network {network!r} needs observations [channels, height, width], got {tuple(shape)}{other}")
    elif network not in _IMAGE and len(shape) == 3:  # it would read bytes from 0 to 255 as they are
        raise ValueError(
            f"network {network!r} reads vectors, and the observation is an image, {tuple(shape)}; use 'shallow' or "
            "'resnet'"
        )


def _widths(network: str, hidden: Widths) -> tuple[int, ...]:
    if hidden is None:
        return _DEFAULT[network]
    widths = (hidden,) * len(_DEFAULT[network]) if isinstance(hidden, int) else tuple(hidden)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths of a network must be positive, and one at least, got hidden={hidden}")
    return widths


def _size(shape: Shape) -> int:
    """Numbers in an observation."""
    return sum(map(math.prod, shape.values())) if isinstance(shape, Mapping) else math.prod(shape)


def _convolutions(
    network: str, shape: Sequence[int], width: int, channels_last: bool | None
) -> ShallowConv | ResNetConv:
    given = {} if channels_last is None else {"channels_last": channels_last}
    return _IMAGE[network](shape[0], width, shape[1:], **given)


def _imported(path: str, shape: Shape, hidden: Widths) -> nn.Module:
    entries = {key: tuple(one) for key, one in shape.items()} if isinstance(shape, Mapping) else tuple(shape)
    encoder: nn.Module = imported(path, "network", "observation_shape", "hidden")(entries, hidden)
    if not isinstance(getattr(encoder, "out_features", None), int):
        raise ValueError(
            f"the network {path!r} must give a module with an int 'out_features', got {type(encoder).__name__}"
        )
    return encoder
