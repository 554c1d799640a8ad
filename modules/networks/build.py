"""Policies and critics from plain values, as a checkpoint stores them.

What the three builders take alike:

``network``
    ``"mlp"``, ``"layernorm_mlp"`` (Acme); ``"shallow"`` or ``"resnet"`` for images; or ``"package.module:function"``: a
    function ``(observation_shape, hidden) -> nn.Module`` that maps [N, *shape] to [N, out_features] and has
    ``out_features`` as an attribute.
``observation_shape``
    of one observation, ``(channels, height, width)`` for images. Of a dictionary a mapping name -> shape: a network by
    import path gets a dict name -> [N, *shape]; the MLPs read its vectors as one, in the mapping's order.
``hidden``
    widths. Of an MLP those of its layers. For images the first is that of the convolutional net's linear layer, further
    ones are a LayerNorm MLP behind it. A network by import path gets ``hidden`` as it was given.
``activation``
    of ``"mlp"``.
``channels_last``
    memory format of image networks; None: the faster one on a CPU, which is True for ``"resnet"``, and where it learns
    in float32 for ``"shallow"``. On CUDA True is.
``normalize``, ``normalize_clip``
    running normalisation of observations, see :class:`ObservationNormalizer`.

Weights are drawn from torch's global generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from offtrace.modules.naming import nearest
from offtrace.modules.networks.core import LSTMCore, SeparateCores
from offtrace.modules.networks.critics import CategoricalCritic, Critic, DiscreteCritic, StateValue
from offtrace.modules.networks.ensembles import EnsembleMLP
from offtrace.modules.networks.heads import (
    CategoricalHead,
    CholeskyHead,
    GaussianHead,
    GreedyHead,
    NormalHead,
    PolicyHead,
    TanhNormalHead,
)
from offtrace.modules.networks.named import (
    Shape,
    Widths,
    make_critic_encoder,
    make_encoder,
    observation_names,
)
from offtrace.modules.networks.normalise import DictNormalizer, ObservationNormalizer
from offtrace.modules.networks.policy import Policy
from offtrace.modules.networks.policy_network import PolicyNetwork
from offtrace.modules.networks.value_heads import ActionValueHead, CategoricalValueHead, PopArtHead, ValueHead

_DISCRETE: dict[str, type[PolicyHead]] = {"categorical": CategoricalHead, "greedy": GreedyHead}
_CONTINUOUS: dict[str, type[PolicyHead]] = {
    "normal": NormalHead,
    "tanh": TanhNormalHead,
    "gaussian": GaussianHead,
    "full_gaussian": CholeskyHead,
}
HEADS = (*_DISCRETE, *_CONTINUOUS)
CRITICS = ("v", "q", None)
_CRITIC_OPTIONS = {"v": ("popart",), "q": ("dueling", "atoms", "v_max"), None: ()}


def build_policy(
    *,
    observation_shape: Shape,
    num_actions: int | None = None,
    action_dim: int | None = None,
    masked: bool = False,
    network: str = "mlp",
    hidden: Widths = None,
    activation: str = "tanh",
    channels_last: bool | None = None,
    recurrent: int | None = None,
    last_step: bool = True,
    separate_cores: bool = False,
    detach_policy: bool = False,
    head: str | None = None,
    head_options: Mapping[str, Any] | None = None,
    critic: str | None = "v",
    critic_options: Mapping[str, Any] | None = None,
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
    smoothing: float = 0.0,
    noise_correlation: float = 0.0,
) -> Policy:
    """Build the policy that these plain values describe, with fresh weights.

    Args:
        observation_shape, network, hidden, activation, channels_last, normalize, normalize_clip: see
            :mod:`offtrace.modules.networks.build`. ``hidden`` None: (64, 64) for ``"mlp"``, (256, 256) for
            ``"layernorm_mlp"``, (256,) for images; a number: all of these widths.
        num_actions: number of discrete actions, or None.
        action_dim: numbers in a continuous action, or None. Exactly one of the two is given.
        masked: read ``"action_mask"``; discrete actions only.
        recurrent: size of the LSTM between encoder and heads, or None for a feed-forward net.
        last_step: the LSTM also reads ``"last_action"`` and ``"last_reward"``.
        separate_cores: policy and critic have an LSTM each, see :class:`SeparateCores`.
        detach_policy: what policy and critic share learns from the critic alone: the policy's gradient stops behind its
            own head or, with separate cores, its own core.
        head: ``"categorical"`` or ``"greedy"`` (DQN; needs critic ``"q"``); ``"normal"`` (IMPALA, PPO, V-MPO),
            ``"tanh"`` (SAC), ``"gaussian"`` or ``"full_gaussian"`` (MPO). None: categorical or normal.
        head_options: keyword arguments of the head: :class:`CategoricalHead` and :class:`GreedyHead` ``epsilon``;
            :class:`NormalHead` ``init_scale``, ``state_dependent``; :class:`TanhNormalHead` ``log_scale``;
            :class:`GaussianHead` and :class:`CholeskyHead` ``init_scale``, ``min_scale``.
        critic: ``"v"`` writes the value of the state, ``"q"`` the values of all discrete actions; None: neither.
        critic_options: of ``"v"``: ``popart`` (bool, see :class:`PopArtHead`; for the losses that update it). Of
            ``"q"``: ``dueling`` (bool, see :class:`ActionValueHead`); ``atoms`` and ``v_max`` (see
            :class:`CategoricalValueHead`; 0 atoms: values alone, and
            ``v_max`` is not read).
        smoothing: low pass over executed actions, see :class:`Policy`; continuous actions only.
        noise_correlation: of the exploration noise from step to step, see :class:`Policy`; continuous actions only.

    Raises:
        ValueError: on a value that does not fit, by its name.
    """
    _check_actions(num_actions, action_dim)
    if masked and num_actions is None:
        raise ValueError("masked=True needs discrete actions; continuous actions have no mask")
    if head is None:
        head = "categorical" if num_actions is not None else "normal"
    _check_head(head, head_options or {}, num_actions, action_dim, critic)
    _check_critic(critic, critic_options or {}, num_actions)
    _check_shared(head, critic, recurrent, separate_cores=separate_cores, detach_policy=detach_policy)
    encoder = make_encoder(network, observation_shape, hidden, activation=activation, channels_last=channels_last)
    features = int(encoder.out_features)  # type: ignore[arg-type]
    core: LSTMCore | None = None
    if recurrent is not None:
        inputs = {"num_actions": num_actions, "action_dim": action_dim} if last_step else {}
        if separate_cores:
            core = SeparateCores(features, recurrent, detach_policy=detach_policy, **inputs)
        else:
            core = LSTMCore(features, recurrent, **inputs)
        features = core.out_features
    net = PolicyNetwork(
        encoder,
        _head(head, head_options or {}, features, num_actions, action_dim, masked),
        _value_head(critic, critic_options or {}, features, num_actions, masked),
        core,
        _normalizer(normalize, observation_shape, normalize_clip),
        observation_names=observation_names(observation_shape),
        detach_policy=detach_policy,
    )
    return Policy(net, smoothing=smoothing, noise_correlation=noise_correlation)


def build_critic(
    *,
    observation_shape: Shape,
    num_actions: int | None = None,
    action_dim: int | None = None,
    network: str = "mlp",
    hidden: Widths = None,
    activation: str = "relu",
    channels_last: bool | None = None,
    critics: int = 2,
    atoms: int = 0,
    v_max: float = 150.0,
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
) -> Critic | DiscreteCritic | CategoricalCritic:
    """Build ``critics`` independent critics as one module: of an action that is put in, or of every discrete action.

    They share the convolutional net of an image network, and all of a network by import path; behind it each has
    LayerNorm layers of its own.

    Args:
        observation_shape, network, hidden, activation, channels_last, normalize, normalize_clip: see
            :mod:`offtrace.modules.networks.build`. ``hidden`` None: (256, 256), for images (256, 256, 256), of which
            the first is what is shared; a number: all of these widths. Behind a network by import path, which gets
            ``hidden`` too, the layers of the critics have these widths.
        num_actions, action_dim: exactly one is given: :class:`DiscreteCritic` or :class:`Critic`.
        critics: K, at least 1.
        atoms: 0: values. More: a :class:`CategoricalCritic` on that many, from ``-v_max`` to ``v_max``; continuous
            actions, clipped by the loss.

    Raises:
        ValueError: on a value that does not fit, by its name.
    """
    _check_actions(num_actions, action_dim)
    if critics < 1:
        raise ValueError(f"critics must be at least 1, got {critics}")
    if atoms and action_dim is None:
        raise ValueError(
            f"atoms={atoms} needs continuous actions, got num_actions={num_actions}; "
            "of discrete ones build_policy(critic='q', critic_options={'atoms': ...}) gives distributions"
        )
    encoder, features, widths = make_critic_encoder(network, observation_shape, hidden, channels_last=channels_last)
    shared: Any = {
        "encoder": encoder,
        "normalizer": _normalizer(normalize, observation_shape, normalize_clip),
        "observation_names": observation_names(observation_shape),
    }
    outputs = num_actions or atoms or 1
    layer_norm = network != "mlp"
    ensemble = EnsembleMLP(
        critics, features + (action_dim or 0), widths, outputs, layer_norm=layer_norm, activation=activation
    )
    if num_actions is not None:
        return DiscreteCritic(ensemble, **shared)
    if atoms:
        return CategoricalCritic(ensemble, low=-v_max, high=v_max, atoms=atoms, **shared)
    return Critic(ensemble, **shared)


def build_value(
    *,
    observation_shape: Shape,
    network: str = "mlp",
    hidden: Widths = None,
    activation: str = "relu",
    channels_last: bool | None = None,
    normalize: bool = False,
    normalize_clip: float | None = 10.0,
) -> StateValue:
    """Build a state value; arguments and errors as :func:`build_policy`."""
    encoder = make_encoder(network, observation_shape, hidden, activation=activation, channels_last=channels_last)
    head = ValueHead(int(encoder.out_features))  # type: ignore[arg-type]
    normalizer = _normalizer(normalize, observation_shape, normalize_clip)
    return StateValue(encoder, head, normalizer, observation_names=observation_names(observation_shape))


def _check_actions(num_actions: int | None, action_dim: int | None) -> None:
    if (num_actions is None) == (action_dim is None):
        raise ValueError(f"give num_actions or action_dim, got num_actions={num_actions} and action_dim={action_dim}")
    for name, number in (("num_actions", num_actions), ("action_dim", action_dim)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def _check_head(
    head: str, options: Mapping[str, Any], num_actions: int | None, action_dim: int | None, critic: str | None
) -> None:
    if head not in HEADS:
        raise ValueError(f"head must be one of {HEADS}, got {head!r}{nearest(head, HEADS)}")
    if (head in _DISCRETE) != (num_actions is not None):
        raise ValueError(
            f"head {head!r} needs {'num_actions' if head in _DISCRETE else 'action_dim'}, "
            f"got num_actions={num_actions} and action_dim={action_dim}"
        )
    if head == "greedy" and critic != "q":
        raise ValueError(f"head 'greedy' needs critic='q', whose action values it reads; got critic={critic!r}")
    arguments = inspect.signature((_DISCRETE | _CONTINUOUS)[head]).parameters.values()
    known = [x.name for x in arguments if x.kind is x.KEYWORD_ONLY and x.name != "masked"]
    _check_options(f"head {head!r}", options, known)


def _check_critic(critic: str | None, options: Mapping[str, Any], num_actions: int | None) -> None:
    if critic not in CRITICS:
        raise ValueError(f"critic must be 'v', 'q' or None, got {critic!r}")
    if critic == "q" and num_actions is None:
        raise ValueError("critic='q' needs discrete actions; of continuous actions there is no list of values")
    _check_options(f"critic={critic!r}", options, _CRITIC_OPTIONS[critic])


def _check_shared(
    head: str, critic: str | None, recurrent: int | None, *, separate_cores: bool, detach_policy: bool
) -> None:
    if separate_cores and recurrent is None:
        raise ValueError("separate_cores=True needs recurrent, the size of each core, got recurrent=None")
    for name, value in (("separate_cores", separate_cores), ("detach_policy", detach_policy)):
        if value and (critic is None or head == "greedy"):
            raise ValueError(
                f"{name}=True needs a policy and a critic that share a network, got head={head!r} and critic={critic!r}"
            )


def _check_options(what: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(f"{what} has no option {name!r}, its options are {list(known)}{nearest(name, known)}")


def _head(
    head: str,
    options: Mapping[str, Any],
    features: int,
    num_actions: int | None,
    action_dim: int | None,
    masked: bool,
) -> PolicyHead:
    if num_actions is None:
        assert action_dim is not None
        return _CONTINUOUS[head](features, action_dim, **options)
    if head == "greedy":
        return GreedyHead(num_actions, masked=masked, **options)
    return CategoricalHead(features, num_actions, masked=masked, **options)


def _value_head(
    critic: str | None, options: Mapping[str, Any], features: int, num_actions: int | None, masked: bool
) -> ValueHead | ActionValueHead | CategoricalValueHead | None:
    if critic == "v":
        return PopArtHead(features) if options.get("popart") else ValueHead(features)
    if critic is None:
        return None
    assert num_actions is not None
    dueling = bool(options.get("dueling"))
    if not options.get("atoms"):
        return ActionValueHead(features, num_actions, dueling=dueling, masked=masked)
    distribution = {name: options[name] for name in ("atoms", "v_max") if name in options}
    return CategoricalValueHead(features, num_actions, dueling=dueling, masked=masked, **distribution)


def _normalizer(wanted: bool, shape: Shape, clip: float | None) -> ObservationNormalizer | DictNormalizer | None:
    if not wanted:
        return None
    return DictNormalizer(shape, clip=clip) if isinstance(shape, Mapping) else ObservationNormalizer(shape, clip=clip)
