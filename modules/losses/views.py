"""Policies and critics as functions of tensors, resolved once when a loss is built.

The networks of this package are called on tensors directly: a TensorDict costs as much as one of their smaller layers.
Others are wrapped. States are mappings of the entries that the networks read, [M, ...] each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, OneHotCategorical, TransformedDistribution
from torchrl.modules import DistributionalQValueModule, MaskedOneHotCategorical, QValueModule, TruncatedNormal
from torchrl.modules import OneHotCategorical as RLOneHotCategorical

from offtrace.modules import keys as k
from offtrace.modules.networks.critics import ActionCritic, DiscreteCritic, StateValue
from offtrace.modules.networks.distributions import TanhNormal
from offtrace.modules.networks.policy import Policy
from offtrace.modules.networks.policy_network import PolicyNetwork

States = Mapping[Any, Tensor]


class _Wrapped:
    """What the TensorDict module ``network`` writes under ``key`` for states [M], and an action [M, A] or [S, M, A]."""

    def __init__(self, network: Any, key: Any) -> None:
        self.network, self.key = network, key
        self.reads = [name for name in network.in_keys if name != k.ACTION]

    def __call__(self, states: States, action: Tensor | None = None) -> Tensor:
        found = {name: states[name] for name in self.reads}
        if action is None:
            return self.network(TensorDict(found, [_rows(states)])).get(self.key)
        batch = action.shape[:-1]
        found = {name: x.expand(*batch, *x.shape[1:]) for name, x in found.items()}
        return self.network(TensorDict({**found, k.ACTION: action}, batch)).get(self.key)


class _WrappedValues(_Wrapped):
    """The same of every discrete action, [M, K, A] where the network writes [M, A] too."""

    def __call__(self, states: States, action: Tensor | None = None) -> Tensor:
        found = super().__call__(states)
        return found.unsqueeze(1) if found.ndim == 2 else found


class _WrappedPolicy:
    """A probabilistic TensorDict module's distribution, or parameters, at states [M]."""

    def __init__(self, policy: ProbabilisticTensorDictSequential, keys: Sequence[Any] = ()) -> None:
        self.policy, self.keys = policy, keys
        self.reads = list(policy.det_part.in_keys if keys else policy.in_keys)

    def distribution(self, states: States) -> Distribution:
        return self.policy.get_dist(TensorDict({name: states[name] for name in self.reads}, [_rows(states)]))

    def parameters(self, states: States) -> tuple[Tensor, ...]:
        inputs = TensorDict({name: states[name] for name in self.reads}, [_rows(states)])
        found = self.policy.get_dist_params(inputs)
        return tuple(found.get(key) for key in self.keys)


def distribution_of(policy: ProbabilisticTensorDictSequential) -> Callable[[States], Distribution]:
    """The policy's distribution over actions at states [M]."""
    if isinstance(policy, Policy):
        return policy.distribution_at
    return _WrappedPolicy(policy).distribution


def parameters_of(
    policy: ProbabilisticTensorDictSequential, keys: Sequence[Any]
) -> Callable[[States], tuple[Tensor, ...]]:
    """The parameters ``keys`` of the policy's distribution at states [M], [M, ...] each."""
    if isinstance(policy, Policy) and list(policy[-1].in_keys) == list(keys):
        return policy.parameters_at
    return _WrappedPolicy(policy, keys).parameters


def values_of(network: nn.Module, key: Any) -> Callable[..., Tensor]:
    """What a critic or state value writes under ``key`` at states [M], of an action [M, A] or [S, M, A] if any.

    With K critics [M, K] or [S, M, K], with atoms [..., K, atoms]; of every discrete action [M, K, A].
    """
    if isinstance(network, (ActionCritic, DiscreteCritic, StateValue)):
        return network.values
    return _Wrapped(network, key)


def own_network_of(policy: Any) -> PolicyNetwork | None:
    """The policy's network if both are this package's own classes, so that parts of it can run by themselves.

    Subclasses may compute anything.
    """
    return policy.network if type(policy) is Policy and type(policy.network) is PolicyNetwork else None


def critic_of(policy: Any) -> Callable[[TensorDictBase], TensorDictBase]:
    """What writes the values of steps or sequences into their TensorDict, with as little else as can be."""
    network = own_network_of(policy)
    return policy.get_dist_params if network is None else network.critic


def value_network_of(policy: Any, key: Any) -> Any:
    """The part of a policy that computes the action values ``key``, without what samples or explores behind it."""
    if isinstance(policy, Policy):
        return policy.network
    if not isinstance(policy, TensorDictSequential):
        return policy
    parts = list(policy.module)
    last = next(i for i, part in enumerate(parts) if key in part.out_keys)
    writer = value_network_of(parts[last], key)
    return writer if last == 0 else TensorDictSequential(*parts[:last], writer)


def action_values_of(policy: Any, key: Any) -> Callable[[States], Tensor]:
    """What a Q-network writes under ``key`` at states [M]: values [M, K, A], or logits [M, K, A, atoms]."""
    network = value_network_of(policy, key)
    return network.values if isinstance(network, (PolicyNetwork, DiscreteCritic)) else _WrappedValues(network, key)


def support_of(network: nn.Module) -> Tensor:
    """The atoms of a categorical critic, a copy of its buffer ``support``.

    Raises:
        ValueError: when there is none.
    """
    for name, buffer in network.named_buffers():
        if name.rpartition(".")[2] == "support":
            return buffer.detach().clone()
    raise ValueError(f"a critic that writes {k.VALUE_LOGITS!r} must have a buffer 'support' [atoms]")


def action_distribution(policy: ProbabilisticTensorDictSequential) -> Any:
    """Class of the policy's distribution, or whatever makes one."""
    return getattr(policy[-1], "distribution_class", None)


def is_squashed(policy: ProbabilisticTensorDictSequential) -> bool:
    """Whether the actions of ``policy`` are something else than what its parameters' normal gives."""
    kind = action_distribution(policy)
    bounded = isinstance(kind, type) and issubclass(kind, (TransformedDistribution, TanhNormal, TruncatedNormal))
    return bounded or k.PRE_TANH in policy.out_keys


def keeps_pre_tanh(policy: ProbabilisticTensorDictSequential) -> bool:
    """Whether the policy stores the samples before its tanh, from which its log-probabilities are exact."""
    return action_distribution(policy) is TanhNormal and k.PRE_TANH in policy.out_keys


def check_categorical(loss: object, policy: ProbabilisticTensorDictSequential, continuous: str) -> None:
    """Refuse a policy whose actions are no indices; ``continuous`` names the loss for continuous ones.

    Raises:
        ValueError: one sentence.
    """
    kind, name = action_distribution(policy), type(loss).__name__
    if not isinstance(kind, type):
        return
    if issubclass(kind, (OneHotCategorical, RLOneHotCategorical, MaskedOneHotCategorical)):
        raise ValueError(f"{name} needs actions as indices, got a policy of one-hot ones, {kind.__name__}")
    if not issubclass(kind, Categorical):
        raise ValueError(f"{name} needs discrete actions, got a policy with {kind.__name__}: use {continuous}")


def recurrent_keys(policy: Any) -> list[Any]:
    """The entries of ``policy`` that are recurrent state: those it reads, and writes under ``"next"``."""
    return [key for key in policy.in_keys if (k.NEXT, key) in policy.out_keys]


def check_feed_forward(loss: object, *networks: Any) -> None:
    """Refuse a network with a recurrent state, for a loss that reads states one by one.

    Raises:
        ValueError: one sentence.
    """
    for network in networks:
        if keys := recurrent_keys(network):
            raise ValueError(
                f"{type(loss).__name__} needs networks without a recurrent state, got one that reads {keys[0]!r}"
            )


def check_entropy(loss: object, policy: ProbabilisticTensorDictSequential) -> None:
    """Refuse a policy whose distribution has no entropy in closed form, as behind a tanh.

    Raises:
        ValueError: one sentence.
    """
    kind = action_distribution(policy)
    if isinstance(kind, type) and issubclass(kind, Distribution) and kind.entropy is Distribution.entropy:
        raise ValueError(
            f"{type(loss).__name__} needs the entropy of its policy, which {kind.__name__} has not in closed form: use "
            "a policy without tanh, as of build_policy(..., head='normal')"
        )


def check_indices(loss: object, policy: nn.Module) -> None:
    """Refuse a Q-network of TorchRL whose actions are no indices, or whose distributions are laid out otherwise.

    Raises:
        ValueError: one sentence.
    """
    name = type(loss).__name__
    for module in policy.modules():
        if isinstance(module, DistributionalQValueModule):
            raise ValueError(
                f"{name} needs {k.VALUE_LOGITS!r} [*, K, A, atoms], which TorchRL's {type(module).__name__} lacks"
            )
        if isinstance(module, QValueModule) and module.action_space != "categorical":
            space = module.action_space
            raise ValueError(f"{name} needs actions as indices, got action_space={space!r}: use 'categorical'")


def zero_illegal(x: Tensor, legal: Tensor | None) -> Tensor:
    """``x`` [M, A] with zeros where ``legal`` [M, A] is False."""
    return x if legal is None else x.masked_fill(~legal, 0)


def mask_key_of(policy: Any) -> Any | None:
    """Name of the mask of legal actions that ``policy`` reads, or None."""
    if k.ACTION_MASK in policy.in_keys:
        return k.ACTION_MASK
    for module in policy.modules():
        if isinstance(module, ProbabilisticTensorDictModule) and "mask" in module.dist_keys:
            return dict(zip(module.dist_keys, module.in_keys, strict=True))["mask"]
        if isinstance(module, QValueModule) and module.action_mask_key is not None:
            return module.action_mask_key
    return None


def state_keys_of(*networks: Any, mask_key: Any | None = None) -> list[Any]:
    """Entries of a state that the networks read, and the mask of legal actions, each once."""
    keys = [key for network in networks for key in network.in_keys if key != k.ACTION]
    return list(dict.fromkeys(keys if mask_key is None else [*keys, mask_key]))


def _rows(states: States) -> int:
    return len(next(iter(states.values())))
