"""What all losses share: networks with targets, the entries they read, and masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torch.distributions import TransformedDistribution
from torchrl.modules import TruncatedNormal
from torchrl.objectives.common import LossModule

from offtrace.modules import keys as k
from offtrace.modules.networks.control_heads import TanhNormal


class Batch(NamedTuple):
    """Entries of the batch as [N, T]."""

    reward: Tensor
    terminated: Tensor
    done: Tensor
    valid: Tensor | None

    def time_first(self) -> Batch:
        """The same as [T, N], as the returns want it."""
        valid = None if self.valid is None else self.valid.t()
        return Batch(self.reward.t(), self.terminated.t(), self.done.t(), valid)


class OffPolicyLoss(LossModule):
    """A TorchRL loss whose networks are called directly.

    ``convert_to_functional`` keeps parameters and target parameters where TorchRL's updaters, ``state_dict`` and
    ``.to()`` expect them. Swapping them in and out of a module at each call costs more than a small network itself, so
    for each network stand here up to three modules bound to their parameters once:

    * ``self.<name>``: the network, with its parameters;
    * ``self.target(name)``: with the target parameters;
    * ``self.frozen(name)``: with the parameters detached: gradient passes through to its inputs, none reaches it.

    Buffers of a network (a normaliser's statistics) are one memory in all three.
    """

    reduction: str
    _state_keys: list[Any]
    """Of the networks' inputs those that are read at a step and behind it."""

    def add_network(self, name: str, network: nn.Module, *, target: bool = False, frozen: bool = False) -> None:
        """Register ``network`` as ``self.<name>``, its parameters as ``<name>_params`` and ``target_<name>_params``."""
        self.convert_to_functional(network, name, create_target_params=target)
        views = self.__dict__.setdefault("_views", {})
        for kind, wanted in (("target", target), ("frozen", frozen)):
            if wanted:
                views[kind, name] = copy.deepcopy(network).requires_grad_(False)
        self.__dict__.setdefault("_names", []).append(name)
        self._bind()

    def target(self, name: str) -> Callable[[TensorDictBase], TensorDictBase]:
        """The network with its target parameters."""
        return self._views["target", name]

    def frozen(self, name: str) -> Callable[[TensorDictBase], TensorDictBase]:
        """The network with its own parameters detached."""
        return self._views["frozen", name]

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the network that they belong to, for different learning rates; further ones by their name."""
        groups = {name: list(getattr(self, f"{name}_params").parameters()) for name in self._names}
        groups.update({name: [parameter] for name, parameter in self._parameters.items() if parameter is not None})
        return {name: parameters for name, parameters in groups.items() if parameters}

    def _bind(self) -> None:
        """Point every module at the tensors that are registered now; what replaces tensors calls it again."""
        for name in self.__dict__.get("_names", ()):
            params = self._modules[f"{name}_params"]
            targets = self._modules.get(f"target_{name}_params")
            for path, tensor in _leaves(params):
                _place(self.__dict__[name], path, tensor)
                if targets is not None and not isinstance(tensor, nn.Parameter):
                    targets.get(path).data = tensor.data
            if ("frozen", name) in self._views:
                for path, tensor in _leaves(params):
                    _place(self._views["frozen", name], path, tensor.detach())
            if targets is not None:
                for path, tensor in _leaves(targets):
                    _place(self._views["target", name], path, tensor)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        self._bind()
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled loss is bound to its own tensors."""
        super().__setstate__(state)
        self._bind()

    def make_value_estimator(self, *args: Any, **kwargs: Any) -> Any:
        """Not taken: the correction is an argument of the loss.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} takes its correction by name: its argument estimator, target or trace"
        )

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """There is no estimator object: the returns are functions of tensors."""

    @property
    def in_keys(self) -> list[Any]:
        """Entries that are read."""
        names = self.tensor_keys
        ends = [(k.NEXT, key) for key in (names.reward, names.done, names.terminated)]
        following = [(k.NEXT, key) for key in self._state_keys]
        return [*self._state_keys, *following, names.action, *self._behaviour_keys(), *ends]

    def _behaviour_keys(self) -> list[Any]:
        """Entries that tell of the behaviour policy."""
        return [self.tensor_keys.sample_log_prob]

    def _entry(self, tensordict: TensorDictBase, key: Any, shape: Sequence[int] | None = None) -> Tensor:
        """The entry ``key``, of ``shape`` (a last dimension of 1 is dropped) if one is given."""
        found = tensordict.get(key, None)
        if found is None:
            raise KeyError(f"{type(self).__name__} reads {key!r}, which the batch lacks")
        if shape is None:
            return found
        if tuple(found.shape) not in (tuple(shape), (*shape, 1)):
            raise ValueError(f"{key!r} must be {list(shape)} or {[*shape, 1]}, got {list(found.shape)}")
        return found.reshape(tuple(shape))

    def _ends(self, tensordict: TensorDictBase) -> Batch:
        """Reward, ends and mask in the shape of the batch; an episode that terminated is also done."""
        names, shape = self.tensor_keys, tensordict.batch_size
        if 0 in shape:
            raise ValueError(f"the batch is empty, {list(shape)}")
        parameter = next(self.parameters())
        device = parameter.device
        if tensordict.device is None:  # a TensorDict that has a device has all entries there
            for key in self.in_keys:
                entry = tensordict.get(key, None)
                if entry is not None and entry.device != device:
                    raise ValueError(f"{key!r} is on {entry.device}, the networks are on {device}")
        elif tensordict.device != device:
            raise ValueError(f"the batch is on {tensordict.device}, the networks are on {device}")
        found = []
        for name, dtype in ((names.reward, "floating-point"), (names.terminated, "bool"), (names.done, "bool")):
            entry = self._entry(tensordict, (k.NEXT, name), shape)
            if not (entry.dtype == torch.bool if dtype == "bool" else entry.is_floating_point()):
                raise TypeError(f"{(k.NEXT, name)!r} must be a {dtype} tensor, got {entry.dtype}")
            found.append(entry)
        reward, terminated, done = found
        return Batch(reward.to(parameter.dtype), terminated, done | terminated, self._valid(tensordict))

    def _valid(self, tensordict: TensorDictBase) -> Tensor | None:
        """bool [*B], or None where nothing is masked: the project's mask and those of TorchRL's samplers."""
        valid, device = None, next(self.parameters()).device
        for key in (self.tensor_keys.valid, *self._loss_mask_keys()):
            mask = tensordict.get(key, None)
            if mask is not None:
                mask = self._entry(tensordict, key, tensordict.batch_size)
                if mask.dtype != torch.bool or mask.device != device:
                    raise TypeError(f"{key!r} must be a bool tensor on {device}, got {mask.dtype} on {mask.device}")
                valid = mask if valid is None else valid & mask
        return valid


def cleared(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` [*B, ...] with zeros where ``valid`` [*B] is False: a NaN would pass through the weight of 0."""
    if valid is None:
        return x
    return torch.where(valid.view(*valid.shape, *(1,) * (x.ndim - valid.ndim)), x, x.new_zeros(()))


def check_arguments(*, reduction: str, **unit_interval: float) -> None:
    """Refuse a reduction that is not known and numbers outside [0, 1]."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    for name, value in unit_interval.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def squashed(policy: ProbabilisticTensorDictSequential) -> bool:
    """Whether the actions of ``policy`` are something else than what its parameters' normal gives."""
    kind = getattr(policy[-1], "distribution_class", None)
    bounded = isinstance(kind, type) and issubclass(kind, (TransformedDistribution, TanhNormal, TruncatedNormal))
    return bounded or k.PRE_TANH in policy.out_keys


def _leaves(params: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for path, tensor in params.items(True, True):
        yield (path if isinstance(path, tuple) else (path,)), tensor


def _place(module: nn.Module, path: tuple[str, ...], tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or, where it is none, the buffer at ``path`` of ``module``."""
    for name in path[:-1]:
        module = getattr(module, name)
    name = path[-1]
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._parameters.pop(name, None)
        module._buffers[name] = tensor
