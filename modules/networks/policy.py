"""The acting policy: a network, sampling, and optionally noise that lasts or smoothing of what is executed."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor
from torch import distributions as D

from offtrace.modules.keys import ACTION, ACTION_NOISE, IS_INIT, LOG_PROB, NEXT, PRE_TANH, SMOOTHED_ACTION
from offtrace.modules.networks.distributions import TanhNormal, safe_atanh
from offtrace.modules.networks.noise import CorrelatedNoise
from offtrace.modules.networks.observations import States
from offtrace.modules.networks.policy_network import PolicyNetwork
from offtrace.modules.networks.smoothing import ActionSmoother


class Policy(ProbabilisticTensorDictSequential):
    """``[PolicyNetwork, ProbabilisticTensorDictModule]`` whose call goes straight through.

    The same results as the base class, with less of TensorDict's own time at every environment step. Writes what the
    network writes, ``"action"``, ``"action_log_prob"`` [*B] and, of a tanh policy, ``"pre_tanh"`` [*B, A].

    Samples under ``ExplorationType.RANDOM`` and when no type is set; under ``DETERMINISTIC`` it takes the likeliest
    action, the action of the largest value (greedy head), the mean, or the tanh of the mean. Discrete actions are int64
    [*B], continuous ones float [*B, A]; those of a normal are unbounded: log-probabilities are those of the unclipped
    sample, the environment clips.

    With smoothing all entries are about the action that is executed: ``"action"`` is the low pass of the samples,
    ``"action_log_prob"`` its exact log-density given the action before, log pi(sample|x) - A log(1 - beta), and
    ``"pre_tanh"`` its inverse tanh. That is also what a replay stores, the samples nowhere, and a loss learns the
    policy without smoothing: pi(a|x) / mu(a|x, a before) is the ratio of the action that was executed, of which Retrace
    takes no more. Plain importance sampling would miss the actions that the low pass cannot reach.
    Acting then also reads ``"is_init"`` and ``"smoothed_action"``; ``in_keys`` lists what the distribution depends on.

    With correlated noise a sample follows on the one before: ``"action_log_prob"`` is its exact log-density given the
    noise before, mu(a|x, noise before), and acting also reads ``"is_init"`` and ``"action_noise"``. The loss learns the
    policy as it is without. What it costs ratios is told in :class:`CorrelatedNoise`: it is for losses that read none.

    Args:
        network: observation to parameters and values.
        smoothing: beta of :class:`ActionSmoother`; 0: none. Continuous actions only.
        noise_correlation: rho of :class:`CorrelatedNoise`; 0: independent noise. Continuous actions only.

    Attributes:
        num_actions: number of discrete actions, or None.
        action_dim: numbers in a continuous action, or None.
        acting_keys: what a call reads: ``in_keys``, and the state of smoothing or noise.

    Raises:
        ValueError: on smoothing or correlated noise of discrete actions, outside [0, 1), or both of them; on correlated
            noise of a distribution without ``at_noise``.
    """

    out_keys: list[Any]

    def __init__(self, network: PolicyNetwork, *, smoothing: float = 0.0, noise_correlation: float = 0.0) -> None:
        head = network.head
        sampler = ProbabilisticTensorDictModule(
            in_keys=list(head.out_keys),
            out_keys=[ACTION],
            distribution_class=head.distribution,
            return_log_prob=True,
            log_prob_key=LOG_PROB,
            default_interaction_type=InteractionType.RANDOM,
        )
        super().__init__(network, sampler)
        self.num_actions, self.action_dim = head.num_actions, head.action_dim
        self._squashed = issubclass(head.distribution, TanhNormal)
        if self._squashed:
            self.out_keys = [*self.out_keys, PRE_TANH]
        for name, value in (("smoothing", smoothing), ("noise_correlation", noise_correlation)):
            if value and self.action_dim is None:
                raise ValueError(f"{name}={value} needs continuous actions; discrete ones have no mean")
        if smoothing and noise_correlation:
            raise ValueError(
                f"smoothing={smoothing} and noise_correlation={noise_correlation} both make actions last: one of them "
                "must be 0"
            )
        self.acting_keys: list[Any] = list(self.in_keys)
        self.noise: CorrelatedNoise | None = None
        if noise_correlation:
            assert self.action_dim is not None
            if not hasattr(head.distribution, "at_noise"):
                raise ValueError(
                    f"noise_correlation={noise_correlation} needs a distribution with at_noise, the sample that a "
                    f"standard noise gives; {head.distribution.__name__} has none"
                )
            self._also_read(ACTION_NOISE)
            self.noise = CorrelatedNoise(self.action_dim, noise_correlation)
            self.out_keys = [*self.out_keys, (NEXT, ACTION_NOISE)]
        self.smoother: ActionSmoother | None = None
        if smoothing:
            assert self.action_dim is not None
            self._also_read(SMOOTHED_ACTION)
            self.smoother = ActionSmoother(self.action_dim, smoothing)
            self.out_keys = [*self.out_keys, (NEXT, SMOOTHED_ACTION)]

    def _also_read(self, key: str) -> None:
        self.acting_keys += [name for name in (IS_INIT, key) if name not in self.acting_keys]

    @property
    def network(self) -> PolicyNetwork:
        """The part from observation to parameters and values."""
        return self.module[0]

    def forward(self, tensordict: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Write parameters, values, action and log-probability into ``tensordict`` [*B] and return it."""
        if args or kwargs or not isinstance(tensordict, TensorDictBase):
            return super().forward(tensordict, *args, **kwargs)
        network = self.network
        params, values, state = network.compute(tensordict)
        network.write(tensordict, params, values, state)
        dist = network.head.distribution(*params)
        action, log_prob, pre_tanh = self._act(dist, tensordict)
        if self.smoother is not None:
            action, log_prob, same = self.smoother(tensordict, action, log_prob)
            if pre_tanh is not None:
                pre_tanh = torch.where(same, pre_tanh, safe_atanh(action))
        if pre_tanh is not None:
            tensordict.set(PRE_TANH, pre_tanh)
        tensordict.set(ACTION, action)
        return tensordict.set(LOG_PROB, log_prob)

    def get_dist_params(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Run the network only: writes parameters and values."""
        return self.network(tensordict)

    def get_dist(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> D.Distribution:
        """The distribution over actions; writes nothing."""
        return self.network.head.distribution(*self.network.compute(tensordict)[0])

    def parameters_at(self, states: States) -> tuple[Tensor, ...]:
        """The parameters of the distribution, each [M, ...], at ``states`` whose entries are [M, ...].

        In the order of ``self[-1].in_keys``; ``states`` are by the keys of ``in_keys``. Feed-forward networks only.
        """
        return self.network.parameters_at(states)

    def distribution_at(self, states: States) -> D.Distribution:
        """The distribution over actions at ``states`` whose entries are [M, ...]; as :meth:`parameters_at`."""
        return self.network.distribution_at(states)

    def _act(self, dist: Any, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """Action, its log-probability, and the sample before the tanh where there is one."""
        mode = interaction_type()
        if mode is None or mode is InteractionType.RANDOM:
            random = True
        elif mode in (InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.MEAN):
            random = False
        else:
            raise NotImplementedError(f"exploration type {mode} is not supported; use RANDOM or DETERMINISTIC")
        if self.noise is not None:
            noise, surplus = self.noise(tensordict, dist.loc, random=random)
            sample, log_prob, pre_tanh = self._given(dist, dist.at_noise(noise).detach())
            return sample, log_prob + surplus, pre_tanh
        if self._squashed:
            return self._given(dist, dist.sample_pre_tanh() if random else dist.loc)
        return self._given(dist, dist.sample() if random else dist.deterministic_sample)

    def _given(self, dist: Any, sample: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Action, its log-probability, and the sample before the tanh where there is one, of what was drawn."""
        if self._squashed:
            return sample.tanh(), dist.log_prob_pre_tanh(sample), sample
        return sample, dist.log_prob(sample), None
