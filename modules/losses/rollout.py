"""What the losses on rollouts share: one call of the network over the whole unroll."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch.distributions import Distribution

from offtrace.modules import keys as k
from offtrace.modules.losses.offpolicy import Batch, OffPolicyLoss, cleared
from offtrace.modules.losses.unroll import Unroll


class Reading(NamedTuple):
    """A rollout as the network sees it now: its ``output`` over ``unroll``, the steps' ``params`` and ``dist`` [B, T].

    ``log_pi`` carries gradient; ``log_rho`` is log pi - log mu, detached, 0 where not valid.
    """

    batch: Batch
    action: Tensor
    unroll: Unroll
    output: TensorDictBase
    params: dict[Any, Tensor]
    dist: Distribution
    log_pi: Tensor
    log_rho: Tensor


class RolloutLoss(OffPolicyLoss):
    """A loss over one shared actor-critic, called on rollouts [B, T]."""

    @dataclass
    class _AcceptedKeys:
        action: Any = k.ACTION
        sample_log_prob: Any = k.LOG_PROB
        value: Any = k.VALUE
        action_value: Any = k.ACTION_VALUE
        valid: Any = k.VALID
        reward: Any = k.REWARD
        done: Any = k.DONE
        terminated: Any = k.TERMINATED

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def __init__(self, policy: ProbabilisticTensorDictSequential) -> None:
        super().__init__()
        self.policy = policy
        self._state_keys = list(policy.in_keys)

    @property
    def functional(self) -> bool:
        """The policy is a plain submodule; its parameters are not copied."""
        return False

    def _read(self, tensordict: TensorDictBase) -> Reading:
        shape = tensordict.batch_size
        if len(shape) != 2:
            raise ValueError(f"the batch must be [B, T], environments then time; got {list(shape)}")
        names, sampler = self.tensor_keys, self.policy[-1]
        batch = self._ends(tensordict)
        log_mu = self._entry(tensordict, names.sample_log_prob, shape)
        unroll = Unroll(tensordict, self.policy, terminated=batch.terminated, done=batch.done, valid=batch.valid)
        output = self.policy.get_dist_params(unroll.inputs)
        params = {key: unroll.at(output.get(key)) for key in sampler.in_keys}
        dist = sampler.build_dist_from_params(TensorDict(params, shape))
        action = cleared(self._entry(tensordict, names.action), batch.valid)
        if action.shape != (expected := dist.batch_shape + dist.event_shape):
            raise ValueError(f"{names.action!r} must be {list(expected)}, got {list(action.shape)}")
        log_pi = dist.log_prob(action)
        log_rho = cleared(log_pi.detach() - log_mu, batch.valid).to(log_pi.dtype)
        return Reading(batch, action, unroll, output, params, dist, log_pi, log_rho)
