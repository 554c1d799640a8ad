"""Actors and critics of SAC and MPO from plain values, as a checkpoint stores them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from torch import nn

from offtrace.modules.networks.categorical_critic import CategoricalCritic
from offtrace.modules.networks.control_heads import GaussianHead, TanhNormalHead
from offtrace.modules.networks.control_policy import ControlActor, ControlPolicy
from offtrace.modules.networks.critics import Critic, DiscreteCritic, StateValue
from offtrace.modules.networks.encoders import MLP, ShallowConv
from offtrace.modules.networks.gaussian_heads import CholeskyHead
from offtrace.modules.networks.heads import CategoricalHead, ValueHead
from offtrace.modules.networks.normalise import ObservationNormalizer
from offtrace.modules.networks.torsos import EnsembleMLP, LayerNormMLP, PixelTorso

CONTROL_NETWORKS = ("mlp", "layernorm_mlp", "shallow")
ACTOR_KINDS = ("tanh", "gaussian", "full_gaussian", "categorical")
_CONV_FEATURES = 256


def build_actor(
    *,
    kind: str,
    network: str,
    observation_shape: Sequence[int],
    action_dim: int | None = None,
    num_actions: int | None = None,
    hidden: int | Sequence[int] = (256, 256),
    log_scale: str = "clip",
    init_scale: float = 0.7,
    min_scale: float | None = None,
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
    smoothing: float = 0.0,
) -> ControlPolicy:
    """Build the acting policy that these plain values describe, with fresh weights from torch's global generator.

    Args:
        kind: ``"tanh"`` (SAC), ``"gaussian"`` (MPO), ``"full_gaussian"`` (with covariances) or ``"categorical"``.
        network: ``"mlp"`` (ReLU), ``"layernorm_mlp"`` (Acme), or ``"shallow"`` for images.
        observation_shape: of one observation, ``(channels, height, width)`` for images.
        action_dim: numbers in a continuous action; for the first three kinds.
        num_actions: number of discrete actions; for ``"categorical"``.
        hidden: sizes of the layers; a number: two such layers.
        log_scale: of ``"tanh"``, see :class:`TanhNormalHead`.
        init_scale, min_scale: of the Gaussian kinds, see :class:`GaussianHead` and :class:`CholeskyHead`; ``min_scale``
            None is the head's own.
        normalize, normalize_clip: running normalisation of observations, see :class:`ObservationNormalizer`.
        smoothing: low pass over executed actions, see :class:`ControlPolicy`.

    Raises:
        ValueError: on a value that does not fit, by its name.
    """
    shape = tuple(observation_shape)
    if kind not in ACTOR_KINDS:
        raise ValueError(f"kind must be one of {ACTOR_KINDS}, got {kind!r}{_near(kind, ACTOR_KINDS)}")
    _check_actions(action_dim, num_actions)
    if (kind == "categorical") != (num_actions is not None):
        raise ValueError(
            f"kind={kind!r} needs {'num_actions' if kind == 'categorical' else 'action_dim'}, "
            f"got action_dim={action_dim} and num_actions={num_actions}"
        )
    torso = _torso(network, shape, _sizes(hidden))
    features = int(torso.out_features)  # type: ignore[arg-type]
    head: nn.Module
    if num_actions is not None:
        head = CategoricalHead(features, num_actions)
    elif kind == "tanh":
        assert action_dim is not None
        head = TanhNormalHead(features, action_dim, log_scale=log_scale)
    else:
        assert action_dim is not None
        gaussian = GaussianHead if kind == "gaussian" else CholeskyHead
        least = {} if min_scale is None else {"min_scale": min_scale}
        head = gaussian(features, action_dim, init_scale=init_scale, **least)
    return ControlPolicy(ControlActor(torso, head, _normalizer(normalize, shape, normalize_clip)), smoothing=smoothing)


def build_critic(
    *,
    network: str,
    observation_shape: Sequence[int],
    action_dim: int | None = None,
    num_actions: int | None = None,
    hidden: int | Sequence[int] = (256, 256),
    critics: int = 2,
    atoms: int = 0,
    v_max: float = 150.0,
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
) -> Critic | DiscreteCritic | CategoricalCritic:
    """Build ``critics`` independent critics as one module: of an action that is put in, or of every discrete action.

    Args:
        network, observation_shape, hidden, normalize, normalize_clip: as :func:`build_actor`. The critics share the
            convolutions of ``"shallow"``.
        action_dim, num_actions: exactly one is given: :class:`Critic` or :class:`DiscreteCritic`.
        critics: K, at least 1.
        atoms: 0: values. More: a :class:`CategoricalCritic` on that many, from ``-v_max`` to ``v_max``; continuous
            actions, clipped by the loss.

    Raises:
        ValueError: on a value that does not fit, by its name.
    """
    shape = tuple(observation_shape)
    _check_actions(action_dim, num_actions)
    if critics < 1:
        raise ValueError(f"critics must be at least 1, got {critics}")
    encoder, features = _encoder(network, shape)
    normalizer = _normalizer(normalize, shape, normalize_clip)
    layer_norm = network != "mlp"
    if atoms:
        if action_dim is None:
            raise ValueError(f"atoms={atoms} needs continuous actions, got num_actions={num_actions}")
        ensemble = EnsembleMLP(critics, features + action_dim, _sizes(hidden), atoms, layer_norm=layer_norm)
        return CategoricalCritic(ensemble, low=-v_max, high=v_max, atoms=atoms, encoder=encoder, normalizer=normalizer)
    if num_actions is not None:
        ensemble = EnsembleMLP(critics, features, _sizes(hidden), num_actions, layer_norm=layer_norm)
        return DiscreteCritic(ensemble, encoder, normalizer)
    assert action_dim is not None
    ensemble = EnsembleMLP(critics, features + action_dim, _sizes(hidden), 1, layer_norm=layer_norm)
    return Critic(ensemble, encoder, normalizer)


def build_value(
    *,
    network: str,
    observation_shape: Sequence[int],
    hidden: int | Sequence[int] = (256, 256),
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
) -> StateValue:
    """Build a state value; arguments as :func:`build_actor`."""
    shape = tuple(observation_shape)
    torso = _torso(network, shape, _sizes(hidden))
    head = ValueHead(int(torso.out_features))  # type: ignore[arg-type]
    return StateValue(torso, head, _normalizer(normalize, shape, normalize_clip))


def _torso(network: str, shape: tuple[int, ...], hidden: tuple[int, ...]) -> nn.Module:
    _check_network(network, shape)
    if network == "shallow":
        return PixelTorso(shape[0], shape[1:], hidden, _CONV_FEATURES)
    if network == "mlp":
        return MLP(math.prod(shape), hidden, "relu")
    return LayerNormMLP(math.prod(shape), hidden)


def _encoder(network: str, shape: tuple[int, ...]) -> tuple[nn.Module | None, int]:
    """What the critics share, and how many features it gives."""
    _check_network(network, shape)
    if network == "shallow":
        return ShallowConv(shape[0], _CONV_FEATURES, shape[1:]), _CONV_FEATURES
    return None, math.prod(shape)


def _check_network(network: str, shape: tuple[int, ...]) -> None:
    if network not in CONTROL_NETWORKS:
        hint = _near(network, CONTROL_NETWORKS)
        raise ValueError(f"network must be one of {CONTROL_NETWORKS}, got {network!r}{hint}")
    if any(size < 1 for size in shape):
        raise ValueError(f"sizes of an observation must be positive, got observation_shape={shape}")
    if network == "shallow" and len(shape) != 3:
        raise ValueError(f"network 'shallow' needs observations [channels, height, width], got {shape}; use 'mlp'")


def _check_actions(action_dim: int | None, num_actions: int | None) -> None:
    if (num_actions is None) == (action_dim is None):
        raise ValueError(f"give action_dim or num_actions, got action_dim={action_dim} and num_actions={num_actions}")


def _sizes(hidden: int | Sequence[int]) -> tuple[int, ...]:
    return (hidden, hidden) if isinstance(hidden, int) else tuple(hidden)


def _normalizer(wanted: bool, shape: tuple[int, ...], clip: float | None) -> ObservationNormalizer | None:
    return ObservationNormalizer(shape, clip=clip) if wanted else None


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
