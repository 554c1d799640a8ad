"""The shared actor-critic and the policy around it."""

from __future__ import annotations

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
from torchrl.modules.tensordict_module.rnn import recurrent_mode

from offtrace.modules.keys import (
    ACTION,
    ACTION_MASK,
    IS_INIT,
    LAST_ACTION,
    LAST_REWARD,
    LOG_PROB,
    NEXT,
    OBSERVATION,
    RECURRENT_C,
    RECURRENT_H,
)
from offtrace.modules.networks.core import LSTMCore
from offtrace.modules.networks.heads import ActionValueHead, CategoricalHead, NormalHead, ValueHead


class ActorCritic(TensorDictModuleBase):
    """Encoder, optional recurrent core, policy head and value head: one call gives distribution and values.

    Reads ``"observation"`` [*B, *shape] and, where they apply, ``"action_mask"``, ``"is_init"``, ``"last_action"``,
    ``"last_reward"``, ``"recurrent_h"`` and ``"recurrent_c"`` [*B, H]. Writes the head's parameters (``"logits"``, or
    ``"loc"`` and ``"scale"``) and the value head's ``"state_value"`` [*B, 1] or ``"action_value"`` [*B, 1, A], always
    in the dtype of the weights, under autocast too.

    A recurrent net takes one step on [*B] and writes the state into ``"next"``. Under TorchRL's
    ``set_recurrent_mode(True)``, which losses set, the last batch dimension is time: it unrolls from the state stored
    at the first step, sets it to zero where ``"is_init"``, and writes no state.

    Args:
        encoder: observation [N, *shape] to features [N, F].
        policy_head: features to the parameters of the action distribution.
        value_head: features to the value of the state, or of every discrete action.
        core: recurrent core between encoder and heads.
        observation_key: name of the observation.
    """

    def __init__(
        self,
        encoder: nn.Module,
        policy_head: CategoricalHead | NormalHead,
        value_head: ValueHead | ActionValueHead,
        core: LSTMCore | None = None,
        *,
        observation_key: str = OBSERVATION,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.core = core
        self.policy_head = policy_head
        self.value_head = value_head
        self.in_keys = [observation_key]
        self.out_keys: list[Any] = [*policy_head.out_keys, value_head.out_key]
        if policy_head.masked:
            self.in_keys.append(ACTION_MASK)
        if core is not None:
            self.in_keys += [IS_INIT, RECURRENT_H, RECURRENT_C]
            self.out_keys += [(NEXT, RECURRENT_H), (NEXT, RECURRENT_C)]
            if core.last_step:
                self.in_keys += [LAST_ACTION, LAST_REWARD]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add parameters, value and next state to ``tensordict`` [*B] and return it.

        Raises:
            KeyError: when an entry is missing, by its name.
        """
        batch = tensordict.batch_size
        observation = tensordict.get(self.in_keys[0])
        features = self.encoder(observation.reshape(-1, *observation.shape[len(batch) :]))
        # cores and heads are small and their output feeds exponentials: they keep the precision of the weights
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.value_head.linear.weight.dtype).view(*batch, -1)
            if self.core is not None:
                features = self._recurrent(self.core, tensordict, features)
            mask = tensordict.get(ACTION_MASK) if self.policy_head.masked else None
            for key, value in zip(self.policy_head.out_keys, self.policy_head(features, mask), strict=True):
                tensordict.set(key, value)
            return tensordict.set(self.value_head.out_key, self.value_head(features))

    def _recurrent(self, core: LSTMCore, tensordict: TensorDictBase, features: Tensor) -> Tensor:
        is_init = tensordict.get(IS_INIT)
        last = [tensordict.get(key) if core.last_step else None for key in (LAST_ACTION, LAST_REWARD)]
        x = core.inputs(features, is_init, *last)
        h, c = self._state(tensordict, features, is_init)
        if recurrent_mode():
            h, c = (state.unflatten(0, (-1, x.shape[-2]))[:, 0] for state in (h, c))
            out = core.unroll(x.reshape(len(h), -1, x.shape[-1]), is_init.reshape(len(h), -1, 1), h, c)
            return out.view(*tensordict.batch_size, -1)
        h, c = core.step(x.reshape(-1, x.shape[-1]), is_init.reshape(-1, 1), h, c)
        h, c = (state.view(*tensordict.batch_size, -1) for state in (h, c))
        tensordict.set((NEXT, RECURRENT_H), h)
        tensordict.set((NEXT, RECURRENT_C), c)
        return h

    def _state(self, tensordict: TensorDictBase, features: Tensor, is_init: Tensor) -> tuple[Tensor, Tensor]:
        """State before the step, flattened to [N, H]."""
        assert self.core is not None
        h, c = tensordict.get(RECURRENT_H, None), tensordict.get(RECURRENT_C, None)
        if h is None or c is None:
            if not bool(is_init.all()):
                raise KeyError(
                    f"{RECURRENT_H!r} and {RECURRENT_C!r} are missing in mid-episode: the environment does not carry "
                    "the recurrent state; build the collector with auto_register_policy_transforms=True, or append "
                    "torchrl.modules.utils.get_env_transforms_from_module(policy) to the environment."
                )
            h = c = features.new_zeros(*tensordict.batch_size, self.core.hidden_size)
        return h.reshape(-1, h.shape[-1]), c.reshape(-1, c.shape[-1])


class Policy(ProbabilisticTensorDictSequential):
    """``[ActorCritic, ProbabilisticTensorDictModule]`` whose call goes straight through.

    The same results as the base class, with less of TensorDict's own time at every environment step.
    """

    def forward(self, tensordict: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Write distribution parameters, value, action and log-probability into ``tensordict`` [*B]."""
        if args or kwargs or not isinstance(tensordict, TensorDictBase):
            return super().forward(tensordict, *args, **kwargs)
        net, sampler = self.module
        tensordict = net(tensordict)
        dist = net.policy_head.distribution(*(tensordict.get(key) for key in net.policy_head.out_keys))
        mode = interaction_type()
        if mode is None or mode is InteractionType.RANDOM:
            action = dist.sample()
        elif mode in (InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.MEAN):
            action = dist.deterministic_sample
        else:
            raise NotImplementedError(f"exploration type {mode} is not supported; use RANDOM or DETERMINISTIC")
        tensordict.set(sampler.out_keys[0], action)
        return tensordict.set(sampler.log_prob_key, dist.log_prob(action))

    def get_dist_params(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Run the actor-critic only."""
        return self.module[0](tensordict)


def make_policy(actor_critic: ActorCritic) -> Policy:
    """The acting policy: writes ``"action"`` and ``"action_log_prob"`` beside what ``actor_critic`` writes.

    Samples under ``ExplorationType.RANDOM`` and when no type is set; takes the mode (the mean of a normal) under
    ``DETERMINISTIC``. Discrete actions are int64 [*B], continuous ones float [*B, A] and unbounded: log-probabilities
    are those of the unclipped sample, the environment clips.
    """
    head = actor_critic.policy_head
    sampler = ProbabilisticTensorDictModule(
        in_keys=list(head.out_keys),
        out_keys=[ACTION],
        distribution_class=head.distribution,
        return_log_prob=True,
        log_prob_key=LOG_PROB,
        default_interaction_type=InteractionType.RANDOM,
    )
    return Policy(actor_critic, sampler)
