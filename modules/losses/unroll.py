"""One call of the network over a whole rollout: the sequence that it runs on, and what it says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.distributions import Distribution

from offtrace.modules import host
from offtrace.modules.estimators.base import Outcome, zero_invalid
from offtrace.modules.keys import ACTION_MASK, ACTION_VALUE, FINALS, IS_INIT, LOGITS, NEXT
from offtrace.modules.losses.steps import entry, read_action, read_outcome
from offtrace.modules.losses.views import recurrent_keys

if TYPE_CHECKING:
    from offtrace.modules.losses.base import Loss


class Unroll:
    """x_0, ..., x_{T-1} and the last successor, with the final observations of truncated steps behind their x_t.

    The successor of every step then stands one place behind it. (Behind a step that terminated stands the first
    observation of the next episode, which nobody may read; the observation of an invalid step is 0 where no valid step
    goes on to it; where the successor of the last step is terminal or unknown,
    x_{T-1} stands in its place, so that whatever was stored there reaches nothing.) Rows with fewer truncations than
    others are padded at their end with some observation of the batch. A recurrent state is reset by the ``is_init`` of
    the observation that follows a final one.

    Args:
        tensordict: rollout [B, T] in the layout of TorchRL's collectors. With an entry ``"finals"``, whose shape gives
            the K below or a larger one, nothing is read of the device.
        policy: its ``in_keys`` are copied; a key that it also writes under ``"next"`` is recurrent state, of which only
            the first step's is used.
        terminated, done: bool [B, T].
        valid: bool [B, T] or None; False where the successor is not known.
        successors: False leaves them out: then the sequence is x_0, ..., x_{T-1} alone, and nothing under ``"next"``
            is read.

    Raises:
        KeyError: what the policy reads is missing, by its name.
        ValueError: on the CPU, ``"finals"`` has less room than a row needs.

    Attributes:
        inputs: TensorDict [B, T + 1 + K], K the largest number of truncations inside a row; usually 0. Without
            successors [B, T].
    """

    def __init__(
        self,
        tensordict: TensorDictBase,
        policy: TensorDictModuleBase,
        *,
        terminated: Tensor,
        done: Tensor,
        valid: Tensor | None,
        successors: bool = True,
    ) -> None:
        self._batch, self._time = tensordict.batch_size
        self._extra, length = 0, self._time
        if successors:
            length = self._insert(terminated, done, valid, tensordict.get(FINALS, None))
        states = recurrent_keys(policy)
        # an invalid step's observation is read as the successor of the step before it, if that goes on to it
        read = valid
        if valid is not None and successors:
            read = valid | torch.nn.functional.pad((valid & ~done)[:, :-1], (1, 0))
        found: dict[Any, Tensor] = {}
        for key in policy.in_keys:
            x = tensordict.get(key, None)
            if x is None and key in states:
                raise KeyError(
                    f"the policy reads {key!r}, a recurrent state, which the rollout lacks at its first step"
                )
            if x is None:
                raise KeyError(f"the policy reads {key!r}, which the rollout lacks")
            if key in states:
                found[key] = x[:, :1].expand(-1, length, *x.shape[2:])
            elif successors:
                next_x = self._next(tensordict, key, x)
                found[key] = self._sequence(zero_invalid(x, read), next_x)
            else:
                found[key] = zero_invalid(x, read)
        self.inputs = TensorDict(found, [self._batch, length])

    def steps(self, x: Tensor) -> Tensor:
        """Of ``x`` [B, T + 1 + K, ...] the places of the steps, [B, T, ...]."""
        return x[self._rows, self._position] if self._extra else x[:, : self._time]

    def successors(self, x: Tensor) -> Tensor:
        """Of ``x`` [B, T + 1 + K, ...] the places of the steps' successors, [B, T, ...]."""
        return x[self._rows, self._position + 1] if self._extra else x[:, 1:]

    def _insert(self, terminated: Tensor, done: Tensor, valid: Tensor | None, finals: Tensor | None) -> int:
        """Find places for successors; the length of the sequence."""
        bootstraps = ~terminated if valid is None else ~terminated & valid
        self._last = bootstraps[:, -1:]
        inserted = (done & bootstraps)[:, :-1]
        # a shape, so the host must know it
        self._extra = room(inserted) if finals is None else finals.shape[2]
        if finals is not None and host.readable(inserted) and room(inserted) > self._extra:
            raise ValueError(
                f"{FINALS!r} has room for {self._extra} final observations in a row, and a row has {room(inserted)}"
            )
        if self._extra:
            self._place(inserted)
        return self._time + 1 + self._extra

    def _place(self, inserted: Tensor) -> None:
        before = torch.nn.functional.pad(inserted.long().cumsum(1), (1, 0))
        self._position = torch.arange(self._time, device=inserted.device) + before
        self._rows = torch.arange(self._batch, device=inserted.device).unsqueeze(1)
        # which row of [x of every step, K final observations of each row, last successors] stands where; gathering
        # whole rows is about 25 times faster than scattering them. Padding is row 0. To scatter for truncated steps
        # alone the host would have to count them, so all others write into one more place, which is cut off.
        steps, length = self._batch * self._time, self._time + 1 + self._extra
        number = torch.arange(steps, device=inserted.device).view(self._batch, -1)
        source = number.new_zeros(self._batch, length + 1).scatter_(1, self._position, number)
        place = torch.where(inserted, self._position[:, :-1] + 1, length)
        source.scatter_(1, place, steps + self._rows * self._extra + before[:, :-1])
        source.scatter_(1, self._position[:, -1:] + 1, steps + self._batch * self._extra + self._rows)
        self._source = source[:, :length].flatten()
        place = torch.where(inserted, before[:, :-1], self._extra)
        self._final = number.new_zeros(self._batch, self._extra + 1).scatter_(
            1, place, number[:1, :-1].expand_as(place)
        )
        self._final = self._final[:, : self._extra]

    def _next(self, tensordict: TensorDictBase, key: Any, x: Tensor) -> Tensor:
        next_x = tensordict.get((NEXT, key), None)
        if next_x is None:
            if key == IS_INIT:
                return torch.zeros_like(x)
            if key == ACTION_MASK:  # of successors only values are read, and they do not depend on the mask
                return x
            raise KeyError(f"the policy reads {key!r}, but the rollout lacks ('next', {key!r})")
        return next_x

    def _sequence(self, x: Tensor, next_x: Tensor) -> Tensor:
        event = (1,) * (x.ndim - 2)
        last = torch.where(self._last.view(-1, 1, *event), next_x[:, -1:], x[:, -1:])
        if not self._extra:
            return torch.cat([x, last], 1)
        final = next_x[self._rows, self._final].flatten(0, 1)
        source = torch.cat([x.flatten(0, 1), final, last.flatten(0, 1)])
        return source.index_select(0, self._source).unflatten(0, (self._batch, -1))


def room(inserted: Tensor) -> int:
    """The largest number of truncated steps in a row, of ``inserted`` bool [B, T - 1]; the host reads one number."""
    return int(inserted.sum(1).max())


class EvaluatedPolicy(NamedTuple):
    """A rollout as the network sees it now.

    Attributes:
        outcome: what the environment answered, [B, T].
        action: of the batch, 0 where not valid.
        unroll, output: the sequence that the network ran on, and what it wrote there.
        params: of the steps' distributions, [B, T, ...] by their keys.
        dist: the steps' distributions, [B, T].
        log_pi: log-probability of the batch's actions, with gradient, [B, T].
        log_rho: log pi - log mu, detached, 0 where not valid, [B, T]; None where log mu is missing and not needed.
    """

    outcome: Outcome
    action: Tensor
    unroll: Unroll
    output: TensorDictBase
    params: dict[Any, Tensor]
    dist: Distribution
    log_pi: Tensor
    log_rho: Tensor | None


def evaluate_rollout(
    loss: Loss,
    tensordict: TensorDictBase,
    *,
    reward_clip: float | None = None,
    needs_behaviour: bool = True,
    successors: bool = True,
) -> EvaluatedPolicy:
    """One call of ``loss.policy`` over a rollout [B, T], its steps and, by ``successors``, what follows them.

    Args:
        loss: its policy, its names of entries.
        tensordict: the rollout.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip].
        needs_behaviour: whether the behaviour policy's log-probability must be there.
        successors: as of :class:`Unroll`.

    Raises:
        KeyError: when an entry is missing, by its name.
        TypeError, ValueError: on an entry of another kind, shape or device, by its name.
    """
    shape, names = tensordict.batch_size, loss.tensor_keys
    if len(shape) != 2:
        raise ValueError(f"the batch must be [B, T], environments then time; got {list(shape)}")
    _check_device(loss, tensordict)
    outcome = read_outcome(loss, tensordict)
    if reward_clip is not None:
        outcome = outcome._replace(reward=outcome.reward.clamp(-reward_clip, reward_clip))
    valid, log_mu = outcome.valid, None
    if needs_behaviour or tensordict.get(names.sample_log_prob, None) is not None:
        log_mu = entry(loss, tensordict, names.sample_log_prob, shape)
    policy: Any = loss.policy
    sampler = policy[-1]
    unroll = Unroll(
        tensordict, policy, terminated=outcome.terminated, done=outcome.done, valid=valid, successors=successors
    )
    output = policy.get_dist_params(unroll.inputs)
    params = {key: unroll.steps(output.get(key)) for key in sampler.in_keys}
    dist = sampler.build_dist_from_params(TensorDict(params, shape))
    if LOGITS in params and not dist.event_shape:
        action = read_action(loss, tensordict, tuple(shape), discrete=True)
    else:
        action = entry(loss, tensordict, names.action).detach()
        if action.shape != (expected := dist.batch_shape + dist.event_shape):
            raise ValueError(f"{names.action!r} must be {list(expected)}, got {list(action.shape)}")
    action = zero_invalid(action, valid)
    log_pi = dist.log_prob(action)
    log_rho = None
    if log_mu is not None:
        log_rho = zero_invalid(log_pi.detach() - log_mu.detach(), valid).to(log_pi.dtype)
    return EvaluatedPolicy(outcome, action, unroll, output, params, dist, log_pi, log_rho)


def check_action_values(policy: Any, owner: str) -> None:
    """Refuse a policy without values of discrete actions; ``owner`` is the loss's name.

    Raises:
        ValueError: one sentence.
    """
    if ACTION_VALUE not in policy.out_keys or list(policy[-1].in_keys) != [LOGITS]:
        raise ValueError(
            f"{owner} needs a policy over discrete actions that writes {ACTION_VALUE!r}, got one that writes "
            f"{policy.out_keys}: use build_policy(..., num_actions=..., critic='q')"
        )


def evaluate_action_values(
    loss: Loss, tensordict: TensorDictBase, *, reward_clip: float | None = None
) -> tuple[EvaluatedPolicy, Tensor]:
    """As :func:`evaluate_rollout` of a policy with values of discrete actions; and its ``log_rho``, which is there.

    Where actions can be illegal the mask is read behind a step as well: the policy's value there needs it.
    """
    if ACTION_MASK in loss.policy.in_keys:
        entry(loss, tensordict, (NEXT, ACTION_MASK))
    policy = evaluate_rollout(loss, tensordict, reward_clip=reward_clip)
    assert policy.log_rho is not None
    return policy, policy.log_rho


def state_values(loss: Loss, policy: EvaluatedPolicy) -> tuple[Tensor, Tensor]:
    """V of the steps, with gradient, and of their successors, without: [B, T] each."""
    values = entry(loss, policy.output, loss.tensor_keys.value).squeeze(-1)
    return policy.unroll.steps(values), policy.unroll.successors(values).detach()


def _check_device(loss: Loss, tensordict: TensorDictBase) -> None:
    if tensordict.device is not None:  # then all entries are there
        if tensordict.device != loss.device:
            raise ValueError(f"the batch is on {tensordict.device}, the networks are on {loss.device}")
        return
    for key in (x for state in loss.state_keys for x in (state, (NEXT, state))):  # the others are read by entry
        found = tensordict.get(key, None)
        if found is not None and found.device != loss.device:
            raise ValueError(f"{key!r} is on {found.device}, the networks are on {loss.device}")
