"""The steps of a batch that a loss learns from: entries checked at the door, masks, importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.modules import keys as k
from offtrace.modules.estimators.base import Outcome, zero_invalid
from offtrace.modules.estimators.selection import Selection

if TYPE_CHECKING:
    from offtrace.modules.losses.base import Loss

States = dict[Any, Tensor]
"""What the networks read of a state: the entries [M, ...] by their keys."""


class Steps(NamedTuple):
    """The M steps whose values are learnt.

    ``observation`` and ``next_observation``: of the step, and of the state where it bootstraps. Every entry can be
    evaluated, whatever was stored: zeros stand in for steps that are not valid, the step's own state where nothing is
    bootstrapped. ``action``: [M, A], or int64 [M]. ``valid``: bool [M], or None where all are. ``weight``: importance
    weight [M], at most 1, or None where all are equal. ``selection``: which steps these are, their rewards and
    discounts.
    """

    observation: States
    next_observation: States
    action: Tensor
    valid: Tensor | None
    weight: Tensor | None
    selection: Selection


def read_steps(
    loss: Loss,
    tensordict: TensorDictBase,
    *,
    discrete: bool,
    reward_scale: float = 1.0,
    reward_clip: float | None = None,
) -> Steps:
    """The steps of transitions [N] or sequences [N, T] that the loss's estimator selects.

    Args:
        loss: its names of entries, state keys, estimator and gamma say what is read.
        tensordict: the batch.
        discrete: whether actions are indices, int64 [*B], or vectors [*B, A].
        reward_scale: multiplies the rewards.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip] first.

    Raises:
        KeyError: when an entry is missing, by its name.
        TypeError, ValueError: on an entry of another kind, shape or device, by its name.
    """
    shape = tuple(tensordict.batch_size)
    _check_shape(loss.estimator, shape)
    outcome = read_outcome(loss, tensordict)
    if reward_clip is not None:
        outcome = outcome._replace(reward=outcome.reward.clamp(-reward_clip, reward_clip))
    if reward_scale != 1:
        outcome = outcome._replace(reward=outcome.reward * reward_scale)
    if len(shape) == 1:
        outcome = Outcome(*(None if x is None else x.unsqueeze(1) for x in outcome))  # type: ignore[arg-type]
    selection = loss.estimator.select(outcome, gamma=loss.gamma)
    if len(shape) == 1:
        selection = selection._replace(dims=1)
    valid, bootstraps = selection.valid, selection.bootstraps
    observation, next_observation = {}, {}
    for key in loss.state_keys:
        x = selection.at(entry(loss, tensordict, key))
        next_x = selection.successor(entry(loss, tensordict, (k.NEXT, key)))
        # an action mask without any legal action is no mask: what has no weight gets one that allows all
        observation[key] = x = zero_invalid(x, valid) if x.dtype != torch.bool else true_where_invalid(x, valid)
        # the successor of a terminal or invalid step may be anything, and no network may see it
        next_observation[key] = torch.where(bootstraps.view(-1, *(1,) * (x.ndim - 1)), next_x, x)
    action = zero_invalid(selection.at(read_action(loss, tensordict, shape, discrete=discrete)), valid)
    weight = read_weight(loss, tensordict, selection)
    return Steps(observation, next_observation, action, valid, weight, selection)


def read_outcome(loss: Loss, tensordict: TensorDictBase) -> Outcome:
    """Reward, ends and mask in the shape [*B] of the batch; an episode that terminated is also done.

    Raises:
        KeyError, TypeError, ValueError: as :func:`read_steps`.
    """
    names, shape = loss.tensor_keys, tensordict.batch_size
    if 0 in shape:
        raise ValueError(f"the batch is empty, {list(shape)}")
    reward = entry(loss, tensordict, (k.NEXT, names.reward), shape)
    terminated = entry(loss, tensordict, (k.NEXT, names.terminated), shape)
    done = entry(loss, tensordict, (k.NEXT, names.done), shape)
    if not reward.is_floating_point():
        raise TypeError(f"{(k.NEXT, names.reward)!r} must be a floating-point tensor, got {reward.dtype}")
    for name, flag in ((names.terminated, terminated), (names.done, done)):
        if flag.dtype != torch.bool:
            raise TypeError(f"{(k.NEXT, name)!r} must be a bool tensor, got {flag.dtype}")
    return Outcome(reward.to(loss.dtype), terminated, done | terminated, _valid(loss, tensordict))


def read_log_prob(loss: Loss, tensordict: TensorDictBase, steps: Steps) -> Tensor | None:
    """log mu [M], the behaviour policy's log-probability of the actions.

    None where it is missing and the estimator does not need it.
    """
    key, shape = loss.tensor_keys.sample_log_prob, tuple(tensordict.batch_size)
    if not loss.estimator.uses_behaviour and tensordict.get(key, None) is None:
        return None
    return steps.selection.at(entry(loss, tensordict, key, shape).detach())


def read_weight(
    loss: Loss, tensordict: TensorDictBase, selection: Selection, *, relative: bool = True
) -> Tensor | None:
    """Importance weights [M], 0 where not valid, or None where there are none.

    Args:
        loss, tensordict: whose entry is read, and where.
        selection: the steps.
        relative: divide by the largest of the valid steps, of all ranks, every one of which must call it alike. That
            bounds them by 1, but the same item then counts less in some batches than in others: in small ones the
            correction is partly lost. False takes them as the sampler gave them.
    """
    key = loss.tensor_keys.weight
    if tensordict.get(key, None) is None:
        return None
    weight = entry(loss, tensordict, key, tuple(tensordict.batch_size))
    if not weight.is_floating_point():
        raise TypeError(f"{key!r} must be a floating-point tensor, got {weight.dtype}")
    selected = zero_invalid(selection.at(weight.detach().to(loss.dtype)), selection.valid)
    if not relative:
        return selected
    largest = selected.max()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return selected / torch.where(largest > 0, largest, 1)  # where nothing counts, nothing is learnt


def log_ratio(log_pi: Tensor | None, log_mu: Tensor | None) -> Tensor | None:
    """log pi - log mu, [M]; None where one of the two is not known."""
    return None if log_pi is None or log_mu is None else log_pi - log_mu.to(log_pi.dtype)


def read_pre_tanh(loss: Loss, tensordict: TensorDictBase, steps: Steps, *, needed: bool) -> Tensor | None:
    """The samples [M, A] before a policy's tanh; None where they are missing and not needed."""
    key = loss.tensor_keys.pre_tanh
    if not needed and tensordict.get(key, None) is None:
        return None
    return zero_invalid(steps.selection.at(entry(loss, tensordict, key).detach()), steps.valid)


def write_priority(loss: Loss, tensordict: TensorDictBase, error: Tensor, valid: Tensor | None) -> None:
    """Writes the mean of ``error`` [M] over each item's valid steps into the batch: [N], or [N, T] for sequences."""
    rows = zero_invalid(error.detach(), valid).view(tensordict.batch_size[0], -1)
    if valid is None:
        priority = rows.mean(1)
    else:
        priority = rows.sum(1) / valid.view(rows.shape).sum(1).clamp(min=1)
    if len(tensordict.batch_size) == 2:
        priority = priority.unsqueeze(1).expand(tensordict.batch_size)
    tensordict.set(loss.tensor_keys.priority, priority)


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` [M] times the importance weights, where there are any."""
    return x if weight is None else x * weight


def entry(loss: Loss, tensordict: TensorDictBase, key: Any, shape: Sequence[int] | None = None) -> Tensor:
    """The entry ``key``, of ``shape`` (a last dimension of 1 is dropped) if one is given.

    Raises:
        KeyError: when it is missing.
        ValueError: when it has another shape, or is not where the networks are.
    """
    found = tensordict.get(key, None)
    if found is None:
        raise KeyError(f"{type(loss).__name__} reads {key!r}, which the batch lacks")
    if found.device != loss.device:
        raise ValueError(f"{key!r} is on {found.device}, the networks are on {loss.device}")
    if shape is None or found.shape == shape:
        return found
    if found.shape != (*shape, 1):
        raise ValueError(f"{key!r} must be {list(shape)} or {[*shape, 1]}, got {list(found.shape)}")
    return found.squeeze(-1)


def true_where_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` bool [*B, ...] with True where ``valid`` [*B] is False."""
    return x if valid is None else x | ~valid.view(*valid.shape, *(1,) * (x.ndim - valid.ndim))


def _check_shape(estimator: Any, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2):
        raise ValueError(f"the batch must be [N] or [N, T], got {list(shape)}")
    if len(shape) == 1 and estimator.sequence_length(2) > 1:
        raise ValueError(f"estimator {type(estimator).__name__} needs sequences [N, T], got {list(shape)}")
    if len(shape) == 2 and shape[1] < estimator.sequence_length(1):
        steps = estimator.sequence_length(1)
        raise ValueError(f"estimator {type(estimator).__name__} needs sequences of {steps} steps, got {shape[1]}")


def read_action(loss: Loss, tensordict: TensorDictBase, shape: tuple[int, ...], *, discrete: bool) -> Tensor:
    """The actions, int64 ``shape`` or [*shape, A], without the gradient that acting may have left in them.

    Raises:
        KeyError, TypeError, ValueError: as :func:`read_steps`.
    """
    name = loss.tensor_keys.action
    action = entry(loss, tensordict, name).detach()
    if action.is_floating_point() == discrete:
        kind = "discrete actions, as integers" if discrete else "continuous actions"
        raise TypeError(f"{type(loss).__name__} needs {kind}; {name!r} is {action.dtype}")
    if not discrete:
        if action.ndim != len(shape) + 1:
            raise ValueError(f"{name!r} must be {[*shape, 'A']}, got {list(action.shape)}")
        return action
    if action.shape != shape:
        if action.shape != (*shape, 1):
            raise ValueError(
                f"{name!r} must hold indices of actions, {list(shape)}, got {list(action.shape)}; of one-hot actions "
                "take argmax(-1)"
            )
        action = action.squeeze(-1)
    return action.long()


def _valid(loss: Loss, tensordict: TensorDictBase) -> Tensor | None:
    """bool [*B], or None where nothing is masked: the project's mask and those of TorchRL's samplers."""
    valid = None
    for key in (loss.tensor_keys.valid, *loss._loss_mask_keys()):
        mask = tensordict.get(key, None)
        if mask is not None:
            if mask.dtype != torch.bool or mask.device != loss.device:
                raise TypeError(f"{key!r} must be a bool tensor on {loss.device}, got {mask.dtype} on {mask.device}")
            mask = entry(loss, tensordict, key, tensordict.batch_size)
            valid = mask if valid is None else valid & mask
    return valid
