"""The one base of all losses: networks with their targets, the estimator, names of entries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import ReturnEstimator, bind


class Loss(LossModule):
    """A TorchRL loss whose networks are called directly, and whose targets are those of one estimator.

    ``convert_to_functional`` keeps parameters and target parameters where TorchRL's updaters, ``state_dict`` and
    ``.to()`` expect them. Swapping them in and out of a module at each call costs more than a small network itself, so
    for each network stand here up to three modules bound to their parameters once:

    * ``self.<name>``: the network, with its parameters;
    * ``self.target(name)``: with the target parameters;
    * ``self.frozen(name)``: with the parameters detached: gradient passes through to its inputs, none reaches it.

    Buffers of a network (a normaliser's statistics) are one memory in all three. A loss over one network that needs
    neither keeps it as a plain submodule, and calls :meth:`bind_networks` once it has.

    Attributes:
        estimator: the loss's own copy, with its gamma; no submodule, and so not in ``state_dict``.
        gamma: discount per step.
        state_keys: of the networks' inputs those that are read at a step and behind it.
        device, dtype: of the parameters.
    """

    @dataclass
    class _AcceptedKeys:
        action: Any = k.ACTION
        sample_log_prob: Any = k.LOG_PROB
        pre_tanh: Any = k.PRE_TANH
        value: Any = k.VALUE
        action_value: Any = k.ACTION_VALUE
        advantage: Any = k.ADVANTAGE
        value_target: Any = k.VALUE_TARGET
        valid: Any = k.VALID
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED
        weight: Any = k.WEIGHT
        priority: Any = k.PRIORITY

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    estimator: Any
    gamma: float
    state_keys: list[Any]
    out_keys: list[Any]
    device: torch.device
    dtype: torch.dtype
    keeps_pre_tanh: bool = False
    """Whether the log-probability of an action comes from the sample before a tanh."""
    reads_behaviour: bool = False
    """Whether the behaviour policy's log-probability is read whatever the estimator needs."""
    has_target_critics: bool = True
    """Whether an estimator can have the target critics' value of the batch's action."""

    def bind_estimator(
        self,
        spec: str | ReturnEstimator,
        kind: str,
        *,
        gamma: float,
        discrete: bool = True,
        every_step: bool = False,
        **options: Any,
    ) -> None:
        """Take the estimator that ``spec`` is or names; arguments and errors as of :func:`~.estimators.bind`.

        ``every_step`` refuses one of action values that learns from the first step of a sequence alone.
        """
        owner = type(self).__name__
        found = bind(spec, kind, gamma=gamma, discrete=discrete, owner=owner, **options)
        if every_step and found.steps_per_sequence(2) != 2:
            raise ValueError(
                f"{owner} learns from every step of a rollout, and its estimator {type(found).__name__} from the first "
                "step alone: use 'retrace' or 'one_step'"
            )
        if not self.has_target_critics and found.uses_q_value:
            name = type(found).__name__
            raise ValueError(
                f"estimator {name} needs target critics, which {owner} has not: use 'one_step' or 'n_step'"
            )
        self.__dict__["estimator"] = found  # no submodule: state_dict knows nothing of it
        self.gamma = gamma
        self._binding: dict[str, Any] = {"kind": kind, "gamma": gamma, "discrete": discrete, "every_step": every_step}

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> Loss:
        """Take another estimator: TorchRL's name for what the argument ``estimator`` does.

        Args:
            value_type: a name, an import path or an object; None leaves it as it is.
            hyperparams: options of the one that is named.

        Raises:
            ValueError, TypeError: as the argument; gamma is no option of it, but the loss's.
        """
        if value_type is None and not hyperparams:
            return self
        if value_type is None:
            raise ValueError(
                f"options of an estimator need its name, and {type(self).__name__} got {hyperparams} alone"
            )
        if "gamma" in hyperparams:
            raise ValueError(f"gamma is the loss's, {self.gamma}: make another {type(self).__name__} for another")
        before = self.estimator.diagnostic_keys
        self.bind_estimator(value_type, **self._binding, **hyperparams)
        if set(before) <= set(self.out_keys):
            kept = [key for key in self.out_keys if key not in before]
            self.out_keys = [*kept, *(key for key in self.estimator.diagnostic_keys if key not in kept)]
        return self

    @property
    def value_estimator(self) -> Any:
        """The estimator, under TorchRL's name."""
        return self.estimator

    def add_network(self, name: str, network: nn.Module, *, target: bool = False, frozen: bool = False) -> None:
        """Register ``network`` as ``self.<name>``, its parameters as ``<name>_params`` and ``target_<name>_params``."""
        self.convert_to_functional(network, name, create_target_params=target)
        views = self.__dict__.setdefault("_views", {})
        for kind, wanted in (("target", target), ("frozen", frozen)):
            if wanted:
                views[kind, name] = copy.deepcopy(network).requires_grad_(False)
        self.__dict__.setdefault("_names", []).append(name)
        self.bind_networks()

    def target(self, name: str) -> Any:
        """The network with its target parameters."""
        return self._views["target", name]

    def frozen(self, name: str) -> Any:
        """The network with its own parameters detached."""
        return self._views["frozen", name]

    @property
    def functional(self) -> bool:
        """Whether parameters are kept apart from their networks; plain submodules are not."""
        return "_names" in self.__dict__

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the network that they belong to, for different learning rates; further ones by their name."""
        if self.functional:
            groups = {name: list(getattr(self, f"{name}_params").parameters()) for name in self._names}
        else:
            groups = {name: list(module.parameters()) for name, module in self.named_children()}
        groups.update({name: [parameter] for name, parameter in self._parameters.items() if parameter is not None})
        return {name: parameters for name, parameters in groups.items() if parameters}

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the training is done, 0 to 1; schedules of a loss follow it, and here is none."""

    def bind_networks(self) -> None:
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
        first = next(self.parameters(), None)
        if first is not None:
            self.device, self.dtype = first.device, first.dtype

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        self.bind_networks()
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled loss is bound to its own tensors."""
        super().__setstate__(state)
        self.bind_networks()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """The estimator alone reads the entries that the loss reads."""
        known = {field.name for field in fields(self.estimator.default_keys)}
        self.estimator.set_keys(**{name: getattr(self.tensor_keys, name) for name in kwargs if name in known})

    @property
    def in_keys(self) -> list[Any]:
        """As :meth:`read_keys`."""
        return self.read_keys()

    def read_keys(self) -> list[Any]:
        """Entries that are read; a loss that reads more overrides it.

        A method, because ``torch.compile`` cannot trace ``super()`` of a property.
        """
        names, uses_behaviour = self.tensor_keys, self.estimator.uses_behaviour
        found = [*self.state_keys, *((k.NEXT, key) for key in self.state_keys), names.action]
        if uses_behaviour or self.reads_behaviour:
            found.append(names.sample_log_prob)
        if self.keeps_pre_tanh and (uses_behaviour or self.estimator.uses_log_pi):
            found.append(names.pre_tanh)
        return [*found, *((k.NEXT, key) for key in (names.reward, names.done, names.terminated))]


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
