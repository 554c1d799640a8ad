"""What the estimators share: keys, networks, log-probabilities, checks of values; and how a loss gets its own."""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.objectives.value import ValueEstimatorBase

from offtrace.modules import keys as k
from offtrace.modules.estimators.names import check_options, check_ranges, find_named, parse_spec
from offtrace.modules.naming import imported
from offtrace.modules.returns import effective_sample_size


class Outcome(NamedTuple):
    """What the environment answered at each step, [N, T].

    ``done`` includes ``terminated``. ``valid`` is False where the successor is unknown, or None where it never is.
    """

    reward: Tensor
    terminated: Tensor
    done: Tensor
    valid: Tensor | None

    def time_first(self) -> Outcome:
        """The same as [T, N], as the returns want it."""
        valid = None if self.valid is None else self.valid.t()
        return Outcome(self.reward.t(), self.terminated.t(), self.done.t(), valid)


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` [*B, ...] with zeros where ``valid`` [*B] is False: a NaN would pass through the weight of 0."""
    if valid is None:
        return x
    return torch.where(valid.view(*valid.shape, *(1,) * (x.ndim - valid.ndim)), x, x.new_zeros(()))


def valid_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Of ``x`` [*B] over the valid steps; 0 where there is none."""
    if valid is None:
        return x.mean()
    return torch.where(valid, x, 0).sum() / valid.sum().float().clamp(min=1)


def sample_size(log_rho: Tensor | None, *, like: Tensor, valid: Tensor | None) -> Tensor:
    """The effective sample size of pi/mu, on the device of ``like``; NaN where the ratios are not known."""
    if log_rho is None:
        return torch.full((), math.nan, device=like.device)
    return effective_sample_size(log_rho, valid=valid)


class ReturnEstimator(ValueEstimatorBase):
    """A TorchRL value estimator over pure functions of tensors.

    Subclasses say which function; here stand the entries, all renamed by ``set_keys``, and who provides them: a network
    that is given is called, what is not given is read from the TensorDict.
    """

    kind: ClassVar[str]
    """``"state"`` or ``"action"``: whose values are estimated."""
    uses_behaviour: bool = True
    """Whether it needs the ratio to the behaviour policy."""
    only_discrete: bool = False
    """Whether it needs probabilities of discrete actions."""
    ratio_cuts_trace: bool = False
    """Whether a ratio of 0 cuts the trace at its step, and of state values makes the step's TD error 0: then the losses
    may leave steps out by a ``trace_mask``."""

    @dataclass
    class _AcceptedKeys:
        # listed in full: TorchRL accepts only names that stand in this class itself
        advantage: Any = k.ADVANTAGE
        value_target: Any = k.VALUE_TARGET
        value: Any = k.VALUE
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED
        steps_to_next_obs: Any = "steps_to_next_obs"
        sample_log_prob: Any = k.LOG_PROB
        action: Any = k.ACTION
        pre_tanh: Any = k.PRE_TANH
        target_log_prob: Any = k.TARGET_LOG_PROB
        chosen_action_value: Any = k.CHOSEN_ACTION_VALUE
        state_action_value: Any = k.STATE_ACTION_VALUE
        action_value: Any = k.ACTION_VALUE
        valid: Any = k.VALID

    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        gamma: float | None = None,
        value_network: TensorDictModuleBase | None = None,
        actor_network: TensorDictModuleBase | None = None,
        validate: bool = False,
    ) -> None:
        if gamma is not None:
            check_ranges(gamma=gamma)
        super().__init__(value_network=value_network)
        self.gamma = gamma
        # not a submodule: the loss that uses this estimator owns the actor
        self.__dict__["actor_network"] = actor_network
        self.validate = validate

    def check_bound(self, owner: str) -> None:
        """What only a loss that takes this estimator can refuse; called when ``owner`` does.

        Raises:
            ValueError: where the estimator has networks of its own: a loss evaluates its own ones, once.
        """
        if self.value_network is not None or self.actor_network is not None:
            raise ValueError(
                f"{owner} evaluates its own networks: leave those of its estimator {type(self).__name__} out"
            )

    def _masked(self, log_rho: Tensor | None, trace_mask: Tensor) -> Tensor:
        """``log_rho`` with a ratio of 0 where ``trace_mask``, bool of its shape, is False.

        Raises:
            ValueError: no ratio cuts the trace.
        """
        if log_rho is None or not self.ratio_cuts_trace:
            raise ValueError(
                f"{type(self).__name__} got a trace_mask, and no ratio cuts its trace: leave the mask out, or use "
                f"'{'vtrace' if self.kind == 'state' else 'retrace'}'"
            )
        return log_rho.masked_fill(~trace_mask, -math.inf)

    def value_estimate(
        self, tensordict: TensorDictBase, target_params: TensorDictBase | None = None, **kwargs: Any
    ) -> Tensor:
        """The value target alone, ``[*B, T, 1]``; ``tensordict`` stays as it is."""
        out = self.forward(tensordict.clone(False), params=target_params, target_params=target_params)
        return out.get(self.tensor_keys.value_target)

    def _known_gamma(self) -> float:
        if self.gamma is None:
            name = type(self).__name__
            raise ValueError(f"{name} has no gamma: make it {name}(gamma=...), or give it to a loss, which has one")
        return self.gamma

    def _ends(self, tensordict: TensorDictBase, dim: int, value: Tensor, next_value: Tensor) -> dict[str, Any]:
        """Reward, masks and discount as the functions take them, time first; checked against the values."""
        names = self.tensor_keys
        valid = self._valid(tensordict, value)
        found = {}
        for name in (names.reward, names.terminated, names.done):
            entry = self._entry(tensordict, (k.NEXT, name))
            found[name] = _like((k.NEXT, name), entry, value)
        if found[names.reward].is_floating_point():
            found[names.reward] = found[names.reward].to(value.dtype)
        if self.validate:
            self._check_finite(valid, reward=found[names.reward], value=value)
            bootstraps = ~found[names.terminated] if valid is None else valid & ~found[names.terminated]
            self._check_finite(bootstraps, next_value=next_value)
        return {
            "reward": found[names.reward].transpose(0, dim),
            "terminated": found[names.terminated].transpose(0, dim),
            "done": found[names.done].transpose(0, dim),
            "gamma": self._known_gamma(),
            "valid": None if valid is None else valid.transpose(0, dim),
        }

    def _promoted(self, tensordict: TensorDictBase, *values: Tensor) -> list[Tensor]:
        """``values`` in the reward's precision, if that is higher: under autocast they come in half."""
        reward = self._entry(tensordict, (k.NEXT, self.tensor_keys.reward))
        dtype = reward.dtype if reward.is_floating_point() else values[0].dtype
        return [x.to(torch.promote_types(x.dtype, dtype)) for x in values]

    @torch.no_grad()
    def _target_log_prob(self, tensordict: TensorDictBase, like: Tensor) -> Tensor:
        """log pi of the batch's actions, in the shape of ``like``."""
        names, actor = self.tensor_keys, self.actor_network
        if actor is None:
            found = self._entry(tensordict, names.target_log_prob, "actor_network")
        else:
            dist = actor.get_dist(tensordict.select(*actor.in_keys))
            pre_tanh = tensordict.get(names.pre_tanh, None)
            if pre_tanh is not None and hasattr(dist, "log_prob_pre_tanh"):
                found = dist.log_prob_pre_tanh(pre_tanh)
            else:
                found = dist.log_prob(self._entry(tensordict, names.action))
        found = _like(names.target_log_prob, found.detach().to(like.dtype), like)
        if self.validate:
            self._check_probability(tensordict, "target_log_prob", found)
        return found

    def _log_rho(self, tensordict: TensorDictBase, log_pi: Tensor) -> Tensor:
        """log pi - log mu, in the shape of ``log_pi``."""
        behaviour = tensordict.get(self.tensor_keys.sample_log_prob, None)
        if behaviour is None:
            raise KeyError(f"{self.tensor_keys.sample_log_prob!r}, the behaviour policy's log-probability, is missing")
        behaviour = _like(self.tensor_keys.sample_log_prob, behaviour.to(log_pi.dtype), log_pi)
        log_rho = log_pi - behaviour
        if self.validate:
            self._check_probability(tensordict, "action_log_prob", behaviour)
            # pi = 0 is a ratio of 0
            self._check_finite(self._valid(tensordict, log_rho), log_rho=log_rho.masked_fill(log_pi == -math.inf, 0))
        return log_rho

    def _entry(self, tensordict: TensorDictBase, key: Any, network: str | None = None) -> Tensor:
        found = tensordict.get(key, None)
        if found is None:
            hint = "" if network is None else f", and there is no {network} to compute it with"
            raise KeyError(f"{key!r} is missing{hint}")
        return found

    def _valid(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
        valid = tensordict.get(self.tensor_keys.valid, None)
        if valid is None:
            return None
        if valid.dtype != torch.bool:
            raise TypeError(f"{self.tensor_keys.valid!r} must be a bool tensor, got {valid.dtype}")
        return _like(self.tensor_keys.valid, valid, like)

    def _successor(self, tensordict: TensorDictBase) -> TensorDictBase:
        if (found := tensordict.get(k.NEXT, None)) is None:
            raise KeyError(f"{k.NEXT!r}, which holds the successors, is missing")
        return found

    def _written(self, out: TensorDictBase, key: Any, network: str) -> Tensor:
        found = out.get(key, None)
        if found is None:
            raise KeyError(f"the {network} does not write {key!r}")
        return found

    def _discrete(self, tensordict: TensorDictBase) -> bool:
        action = tensordict.get(self.tensor_keys.action, None)
        return action is not None and not action.is_floating_point()

    def _check_probability(self, tensordict: TensorDictBase, name: str, log_prob: Tensor) -> None:
        valid = self._valid(tensordict, log_prob)
        known = log_prob if valid is None else log_prob[valid]
        if bool(known.isnan().any()):
            raise ValueError(f"{name} must be a number, got {int(known.isnan().sum())} entries that are NaN")
        if (self.only_discrete or self._discrete(tensordict)) and bool((known > 1e-6).any()):
            raise ValueError(
                f"{name} is the log-probability of a discrete action and must not be above 0, "
                f"got {float(known.max()):g}"
            )

    def _check_finite(self, valid: Tensor | None, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            bad = ~torch.isfinite(tensor)
            if valid is not None:
                bad = bad & valid
            if bool(bad.any()):
                raise ValueError(f"{name} must be finite, got {int(bad.sum())} entries that are not")


def make_estimator(spec: str | ReturnEstimator, kind: str, **options: Any) -> ReturnEstimator:
    """The estimator that ``spec`` is or names, of state values or of action values by ``kind``.

    Args:
        spec: an object, which is returned as it is; or a name of :mod:`offtrace.modules.estimators.names`, or an import
            path ``package.module:Class``, either with options: ``"vtrace(lmbda=0.95, rho_clip=inf)"``.
        kind: ``"state"`` or ``"action"``.
        options: further ones of what is named.

    Raises:
        ValueError: on a name or an option that is not known, the nearest told, an import path that leads nowhere, a
            number out of range, or another kind.
        TypeError: on what is no estimator, or no number.
    """
    if isinstance(spec, str):
        name, given = parse_spec(spec)
        options = given | options
        if ":" in name:
            build, fixed = imported(name, "estimator"), {}
            check_options(name, options, _parameters(build))
        else:
            named = find_named(name, kind)
            check_options(name, options, (*named.options, "gamma"))
            build, fixed = imported(named.path, "estimator"), dict(named.fixed)
        spec = build(**fixed, **options)
    elif options:
        raise TypeError(
            f"options go with the name of an estimator, and {type(spec).__name__} is an object that has its own"
        )
    if not isinstance(spec, ReturnEstimator):
        what = (
            f"the class {spec.__name__}, of which an object is needed"
            if isinstance(spec, type)
            else type(spec).__name__
        )
        raise TypeError(f"an estimator is a name, an import path, or an object of the kind of VTrace(), got {what}")
    if spec.kind != kind:
        name = type(spec).__name__
        raise ValueError(f"{name} estimates {spec.kind} values, and an estimator of {kind} values is needed")
    return spec


def bind(
    spec: str | ReturnEstimator,
    kind: str,
    *,
    gamma: float,
    discrete: bool = True,
    owner: str = "the loss",
    **options: Any,
) -> Any:
    """A loss's own copy of the estimator that ``spec`` is or names, with the loss's ``gamma``.

    Args:
        spec, kind, options: as of :func:`make_estimator`.
        gamma: discount per step, of the loss.
        discrete: whether the loss is one of discrete actions.
        owner: the loss's name, for messages.

    Raises:
        ValueError: where the estimator has another gamma, networks of its own, or needs discrete actions; and as
            :func:`make_estimator`, whose other errors come too.
    """
    check_ranges(gamma=gamma)
    found = copy.copy(make_estimator(spec, kind, **options))
    if found.gamma is not None and found.gamma != gamma:
        raise ValueError(
            f"{owner} has gamma={gamma} and its estimator {type(found).__name__} gamma={found.gamma}: leave the "
            "estimator's out"
        )
    if found.only_discrete and not discrete:
        raise ValueError(
            f"{type(found).__name__} needs probabilities of discrete actions, and those of {owner} are continuous: a "
            "density is no probability; use 'retrace'"
        )
    found.check_bound(owner)
    found.gamma = gamma
    return found


def _parameters(build: Any) -> tuple[str, ...]:
    """Names of the arguments of ``build``, those behind ``**kwargs`` of a subclass included."""
    names: list[str] = []
    makers: list[Any] = [build]
    if isinstance(build, type):
        makers = [vars(x)["__init__"] for x in inspect.getmro(build) if "__init__" in vars(x)]
    for make in makers:
        found = inspect.signature(make).parameters.values()
        names += [p.name for p in found if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in found):
            break
    return tuple(dict.fromkeys(names))


def _with(params: TensorDictBase | None, network: TensorDictModuleBase) -> AbstractContextManager[Any]:
    return nullcontext() if params is None else params.to_module(network)


def _like(name: Any, tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the shape of the values ``like`` [*B, T, 1], of which it may lack the last dimension."""
    if tensor.shape not in (like.shape, like.shape[:-1]):
        raise ValueError(f"{name!r} must have the shape of the values, {list(like.shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name!r} must be on the device of the values, {like.device}, got {tensor.device}")
    return tensor.view_as(like)
