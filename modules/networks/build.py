"""Policies from plain values, as a checkpoint stores them."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Sequence

from torch import nn

from offtrace.modules.networks.actor_critic import ActorCritic, Policy, make_policy
from offtrace.modules.networks.core import LSTMCore
from offtrace.modules.networks.encoders import MLP, ResNetConv, ShallowConv
from offtrace.modules.networks.heads import ActionValueHead, CategoricalHead, NormalHead, PopArtHead, ValueHead

NETWORKS = ("shallow", "resnet", "mlp")


def build_policy(
    *,
    network: str,
    observation_shape: Sequence[int],
    num_actions: int | None = None,
    action_dim: int | None = None,
    hidden: int | Sequence[int] | None = None,
    recurrent: int | None = None,
    masked: bool = False,
    activation: str = "tanh",
    init_scale: float = 1.0,
    state_dependent_scale: bool = False,
    last_step: bool = True,
    channels_last: bool = False,
    critic: str = "v",
    popart: bool = False,
) -> Policy:
    """Build the policy that these plain values describe, with fresh weights from torch's global generator.

    Args:
        network: ``"shallow"`` or ``"resnet"`` for images, ``"mlp"``, or ``"package.module:function"``: a function
            ``(observation_shape, hidden) -> nn.Module`` that maps [N, *shape] to [N, out_features] and has
            ``out_features`` as an attribute.
        observation_shape: of one observation, ``(channels, height, width)`` for images.
        num_actions: number of discrete actions, or None.
        action_dim: numbers in a continuous action, or None. Exactly one of the two is given.
        hidden: features of an image encoder (default 256); layers of an MLP (default 64, 64; a number: two layers).
        recurrent: size of the LSTM between encoder and heads, or None for a feed-forward net.
        masked: read ``"action_mask"``; discrete actions only.
        activation: of the MLP.
        init_scale, state_dependent_scale: standard deviation of continuous actions, see :class:`NormalHead`.
        last_step: the LSTM also reads ``"last_action"`` and ``"last_reward"``.
        channels_last: memory format of image encoders; faster on CUDA.
        critic: ``"v"`` writes the value of the state, ``"q"`` the values of all discrete actions.
        popart: normalise the value of the state, see :class:`PopArtHead`; for :class:`VMPOLoss`, which updates it.

    Raises:
        ValueError: on a value that does not fit, by its name.
    """
    if (num_actions is None) == (action_dim is None):
        raise ValueError(f"give num_actions or action_dim, got num_actions={num_actions} and action_dim={action_dim}")
    if masked and num_actions is None:
        raise ValueError("masked=True needs discrete actions; continuous actions have no mask")
    if critic not in ("v", "q"):
        raise ValueError(f"critic must be 'v' or 'q', got {critic!r}")
    if critic == "q" and num_actions is None:
        raise ValueError("critic='q' needs discrete actions; of continuous actions there is no list of values")
    if popart and critic == "q":
        raise ValueError("popart=True is for the value of the state, critic='v'")
    encoder = _encoder(network, tuple(observation_shape), hidden, activation, channels_last)
    features = int(encoder.out_features)  # type: ignore[arg-type]
    core = None
    if recurrent is not None:
        inputs = {"num_actions": num_actions, "action_dim": action_dim} if last_step else {}
        core = LSTMCore(features, recurrent, **inputs)
        features = core.out_features
    head: CategoricalHead | NormalHead
    if num_actions is not None:
        head = CategoricalHead(features, num_actions, masked=masked)
    else:
        assert action_dim is not None
        head = NormalHead(features, action_dim, init_scale=init_scale, state_dependent=state_dependent_scale)
    if critic == "q" and num_actions:
        return make_policy(ActorCritic(encoder, head, ActionValueHead(features, num_actions), core))
    value_head = PopArtHead(features) if popart else ValueHead(features)
    return make_policy(ActorCritic(encoder, head, value_head, core))


def _encoder(
    network: str, shape: tuple[int, ...], hidden: int | Sequence[int] | None, activation: str, channels_last: bool
) -> nn.Module:
    sizes = [hidden] * (2 if network == "mlp" else 1) if isinstance(hidden, int) else list(hidden or ())
    if any(size < 1 for size in (*sizes, *shape)):
        raise ValueError(f"sizes of a network must be positive, got hidden={hidden} and observation_shape={shape}")
    if ":" in network:
        return _imported(network, shape, hidden)
    if network not in NETWORKS:
        near = difflib.get_close_matches(network, NETWORKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"network must be one of {NETWORKS} or 'package.module:function', got {network!r}{hint}")
    if network == "mlp":
        return MLP(math.prod(shape), sizes or (64, 64), activation)
    if len(shape) != 3:
        raise ValueError(f"network {network!r} needs observations [channels, height, width], got {shape}; use 'mlp'")
    if len(sizes) > 1:
        raise ValueError(f"network {network!r} has one hidden layer, got hidden={hidden}")
    image_encoder = ShallowConv if network == "shallow" else ResNetConv
    return image_encoder(shape[0], sizes[0] if sizes else 256, shape[1:], channels_last=channels_last)


def _imported(path: str, shape: tuple[int, ...], hidden: int | Sequence[int] | None) -> nn.Module:
    module, _, name = path.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), name)(shape, hidden)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network {path!r} cannot be imported: {error}") from error
    if not isinstance(getattr(encoder, "out_features", None), int):
        raise ValueError(
            f"network {path!r} must give a module with an int 'out_features', got {type(encoder).__name__}"
        )
    return encoder
