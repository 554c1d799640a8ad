"""The acting policy of SAC and MPO: torso, head, sampling, and optional smoothing of what is executed."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
)
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer

from offtrace.modules.keys import ACTION, IS_INIT, LOG_PROB, NEXT, OBSERVATION, PRE_TANH, SMOOTHED_ACTION
from offtrace.modules.networks.control_heads import TanhNormal, TanhNormalHead, safe_atanh
from offtrace.modules.networks.normalise import ObservationNormalizer


class ControlActor(TensorDictModuleBase):
    """Observation to the parameters of the action distribution.

    Reads ``"observation"`` [*B, *shape], writes the head's entries (``"loc"`` and ``"scale"``, or ``"logits"``).

    Args:
        torso: [N, *shape] to [N, F].
        head: [N, F] to a tuple of parameters, with ``out_keys`` and the class ``distribution`` they go into.
        normalizer: applied to the observation first.
        observation_key: name of the observation.
    """

    def __init__(
        self,
        torso: nn.Module,
        head: nn.Module,
        normalizer: ObservationNormalizer | None = None,
        *,
        observation_key: Any = OBSERVATION,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.torso = torso
        self.head = head
        self.in_keys = [observation_key]
        self.out_keys = list(head.out_keys)  # type: ignore[arg-type]

    def compute(self, observation: Tensor) -> tuple[Tensor, ...]:
        """The parameters, each [N, ...], of ``observation`` [N, *shape]."""
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        return self.head(self.torso(observation))

    def distribution_at(self, observation: Tensor) -> torch.distributions.Distribution:
        """The distribution over actions at ``observation`` [N, *shape]."""
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        head, features = self.head, self.torso(observation)
        if isinstance(head, TanhNormalHead):
            return head.distribution_of(features)
        return head.distribution(*head(features))  # type: ignore[operator]

    def parameters_of(self, tensordict: TensorDictBase) -> tuple[Tensor, ...]:
        """The parameters, each [*B, ...], without writing them."""
        batch, x = tensordict.batch_size, tensordict.get(self.in_keys[0])
        if len(batch) == 1:
            return self.compute(x)
        params = self.compute(x.reshape(-1, *x.shape[len(batch) :]))
        return tuple(p.view(*batch, *p.shape[1:]) for p in params)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the parameters to ``tensordict`` [*B] and return it."""
        for key, value in zip(self.out_keys, self.parameters_of(tensordict), strict=True):
            tensordict.set(key, value)
        return tensordict


class ActionSmoother(nn.Module):
    """First-order low pass over the actions of an episode: executed_t = beta executed_{t-1} + (1 - beta) sampled_t.

    The first action of an episode is executed as sampled. The state travels in the TensorDict: ``"smoothed_action"`` is
    read and written under ``"next"``; TorchRL's collectors find :meth:`make_tensordict_primer`.

    Args:
        action_dim: A.
        beta: in [0, 1); 0 would be no smoothing.
    """

    def __init__(self, action_dim: int, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {beta}")
        self.action_dim = action_dim
        self.beta = beta
        self.log_volume = action_dim * math.log1p(-beta)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform by which an environment carries the last executed action."""
        return TensorDictPrimer({SMOOTHED_ACTION: Unbounded(shape=(self.action_dim,))}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase, action: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Executed action [*B, A], its log-density [*B] given the one before, and bool [*B, 1] where nothing changed.

        Raises:
            KeyError: when the state is missing in mid-episode.
        """
        first = tensordict.get(IS_INIT)
        before = tensordict.get(SMOOTHED_ACTION, None)
        if before is None:
            if not bool(first.all()):
                raise KeyError(
                    f"{SMOOTHED_ACTION!r} is missing in mid-episode: the environment does not carry the last action; "
                    "append torchrl.modules.utils.get_env_transforms_from_module(policy) to the environment."
                )
            before = torch.zeros_like(action)
        executed = torch.where(first, action, self.beta * before + (1 - self.beta) * action)
        tensordict.set((NEXT, SMOOTHED_ACTION), executed)
        return executed, torch.where(first.squeeze(-1), log_prob, log_prob - self.log_volume), first


class ControlPolicy(ProbabilisticTensorDictSequential):
    """``[ControlActor, ProbabilisticTensorDictModule]`` whose call goes straight through.

    Writes the head's parameters, ``"action"``, ``"action_log_prob"`` [*B] and, of a tanh policy, ``"pre_tanh"``.
    Samples under ``ExplorationType.RANDOM`` and when no type is set; under ``DETERMINISTIC`` it takes tanh(mean), the
    mean, or the likeliest action.

    With smoothing all entries are about the action that is executed: ``"action"`` is the low pass of the samples,
    ``"action_log_prob"`` its exact log-density given the action before, log pi(sample|x) - A log(1 - beta), and
    ``"pre_tanh"`` its inverse tanh. That is also what a replay stores, the samples nowhere, and a loss learns the
    policy without smoothing: pi(a|x) / mu(a|x, a before) is the ratio of the action that was executed, of which Retrace
    takes no more. Plain importance sampling would miss the actions that the low pass cannot reach.
    Acting then also reads ``"is_init"`` and ``"smoothed_action"``; ``in_keys`` lists what the distribution depends on.

    Args:
        actor: observation to parameters.
        smoothing: beta of :class:`ActionSmoother`; 0: none. Continuous actions only.
    """

    out_keys: list[Any]

    def __init__(self, actor: ControlActor, *, smoothing: float = 0.0) -> None:
        head = actor.head
        sampler = ProbabilisticTensorDictModule(
            in_keys=list(actor.out_keys),
            out_keys=[ACTION],
            distribution_class=head.distribution,
            return_log_prob=True,
            log_prob_key=LOG_PROB,
            default_interaction_type=InteractionType.RANDOM,
        )
        super().__init__(actor, sampler)
        self.action_dim: int | None = getattr(head, "action_dim", None)
        self.num_actions: int | None = getattr(head, "num_actions", None)
        if head.distribution is TanhNormal:
            self.out_keys = [*self.out_keys, PRE_TANH]
        self.smoother: ActionSmoother | None = None
        if smoothing:
            if self.action_dim is None:
                raise ValueError(f"smoothing={smoothing} needs continuous actions; discrete ones have no mean")
            self.smoother = ActionSmoother(self.action_dim, smoothing)
            self.out_keys = [*self.out_keys, (NEXT, SMOOTHED_ACTION)]

    @property
    def actor(self) -> ControlActor:
        """The part from observation to parameters."""
        return self.module[0]

    def forward(self, tensordict: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Write distribution parameters, action and log-probability into ``tensordict`` [*B] and return it."""
        if args or kwargs or not isinstance(tensordict, TensorDictBase):
            return super().forward(tensordict, *args, **kwargs)
        actor = self.actor
        params = actor.parameters_of(tensordict)
        for key, value in zip(actor.out_keys, params, strict=True):
            tensordict.set(key, value)
        dist = actor.head.distribution(*params)  # type: ignore[operator]
        random = self._random()
        if isinstance(dist, TanhNormal):
            pre_tanh = dist.sample_pre_tanh() if random else dist.loc
            action, log_prob = pre_tanh.tanh(), dist.log_prob_pre_tanh(pre_tanh)
        else:
            action = dist.sample() if random else dist.deterministic_sample
            log_prob = dist.log_prob(action)
        if self.smoother is not None:
            action, log_prob, same = self.smoother(tensordict, action, log_prob)
            if isinstance(dist, TanhNormal):
                pre_tanh = torch.where(same, pre_tanh, safe_atanh(action))
        if isinstance(dist, TanhNormal):
            tensordict.set(PRE_TANH, pre_tanh)
        tensordict.set(ACTION, action)
        return tensordict.set(LOG_PROB, log_prob)

    def get_dist_params(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Run the part from observation to parameters only."""
        return self.actor(tensordict)

    def get_dist(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> torch.distributions.Distribution:
        """The distribution over actions; writes nothing."""
        return self.actor.head.distribution(*self.actor.parameters_of(tensordict))  # type: ignore[operator]

    def distribution_at(self, observation: Tensor) -> torch.distributions.Distribution:
        """The distribution over actions at ``observation`` [N, *shape], without a TensorDict."""
        return self.actor.distribution_at(observation)

    @staticmethod
    def _random() -> bool:
        mode = interaction_type()
        if mode is None or mode is InteractionType.RANDOM:
            return True
        if mode in (InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.MEAN):
            return False
        raise NotImplementedError(f"exploration type {mode} is not supported; use RANDOM or DETERMINISTIC")
