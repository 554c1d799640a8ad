"""What the off-policy MPO losses share: the states they look at, and the critic's targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictParams, dispatch
from torch import Tensor, nn

from offtrace.modules import keys as k
from offtrace.modules.losses.replayed import ReplayedLoss
from offtrace.modules.losses.sites import Sites, States, evaluate
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.traces import told_of

LOSSES = ("loss_policy", "loss_dual", "loss_critic")


class Proposal(NamedTuple):
    """S actions tried in R states: ``value`` [S, R]; what the critic ``bootstrap``s from, [R] or [R, atoms].

    Of sampled ones the ``noise`` [S, R, A] they were made of, and their ``cost`` [S, R].
    """

    value: Tensor
    bootstrap: Tensor
    noise: Tensor | None = None
    cost: Tensor | None = None

    def behind(self, size: int) -> Proposal:
        """Of the states behind the first ``size``."""
        noise, cost = (None if x is None else x[:, size:] for x in (self.noise, self.cost))
        return Proposal(self.value[:, size:], self.bootstrap[size:], noise, cost)


class MPOBase(ReplayedLoss):
    """Networks, targets and the critic's term; subclasses add the step that improves the policy.

    Args are those of the subclasses.
    """

    policy: ProbabilisticTensorDictSequential
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams
    critic: TensorDictModule
    critic_params: TensorDictParams
    target_critic_params: TensorDictParams
    support: Tensor | None

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        critic: TensorDictModule,
        *,
        value_keys: Sequence[str],
        diagnostics: Sequence[str],
        gamma: float,
        target: str,
        n_step: int,
        lmbda: float,
        policy_states: str,
        reduction: str,
    ) -> None:
        super().__init__(
            target=target,
            discrete=k.ACTION_VALUE in value_keys,
            n_step=n_step,
            gamma=gamma,
            lmbda=lmbda,
            reduction=reduction,
            reward_scale=1.0,
        )
        if policy_states not in ("next", "root"):
            raise ValueError(f"policy_states must be 'next' or 'root', got {policy_states!r}")
        self.policy_states = policy_states
        self.add_network("policy", policy, target=True)
        self.add_network("critic", critic, target=True)
        self._dist_keys = list(policy[-1].in_keys)
        # of a policy only the part before the sampling runs here: what else it reads when it acts is of no concern
        self._policy_keys = list(policy.det_part.in_keys)
        self._state_keys = list(dict.fromkeys([*self._policy_keys, *(x for x in critic.in_keys if x != k.ACTION)]))
        self._value_key = next((key for key in value_keys if key in critic.out_keys), None)
        if self._value_key is None:
            raise ValueError(f"{type(self).__name__} needs a critic that writes {value_keys}, got {critic.out_keys}")
        self.register_buffer("support", self._support(critic) if self._value_key == k.VALUE_LOGITS else None)
        values = ["q_value", "target_value", "td_error"]
        self.out_keys = [*LOSSES, *diagnostics, *values, *told_of(target), "valid_count"]

    @staticmethod
    def _support(critic: TensorDictModule) -> Tensor:
        for name, buffer in critic.named_buffers():
            if name.rpartition(".")[2] == "support":
                return buffer.detach().clone()
        raise ValueError(f"a critic that writes {k.VALUE_LOGITS!r} must have a buffer 'support' [atoms]")

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they belong to, for different learning rates: ``"actor"``, ``"critic"``, ``"duals"``."""
        groups = {"actor": list(self.policy_params.parameters()), "critic": list(self.critic_params.parameters())}
        taken = {id(p) for parameters in groups.values() for p in parameters}
        return groups | {"duals": [p for p in self.parameters() if id(p) not in taken]}

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics, all scalars, of transitions [N] or sequences [N, T]."""
        batch, sites = self._read(tensordict)
        size, at_root = len(sites.reward), self.policy_states == "root"
        stats = Stats(sites.valid, sites.reward)
        out = {"valid_count": stats.count}
        with torch.no_grad():
            known = self._has_behaviour(tensordict)
            both = at_root or known
            states = (
                {key: torch.cat([sites.after[key], sites.root[key]]) for key in sites.root} if both else sites.after
            )
            policy = self._policy_at(self.target("policy"), states)
            proposed = policy
            if both and not at_root:
                states, proposed = sites.after, tuple(x[:size] for x in policy)
            proposal = self._propose(states, proposed)
            bootstrap = proposal.bootstrap[:size]
            value = self._targets(
                out,
                tensordict,
                batch,
                sites,
                log_pi=self._log_prob([x[size:] for x in policy], sites.action) if known else None,
                chosen=lambda: self._pessimist(self._chosen(self.target("critic"), sites.root, sites.action))[1],
                following=bootstrap,
                support=self.support,
            )
        self._add_critic(out, sites, value, stats)
        if at_root:
            states, proposed = sites.root, tuple(x[size:] for x in proposed)
            proposal = proposal.behind(size)
        online = self._policy_at(self.policy, states)
        self._add_policy(out, online, proposed, proposal, stats)
        return TensorDict(out, [])

    # what subclasses define
    def _propose(self, states: States, policy: Sequence[Tensor]) -> Proposal:
        raise NotImplementedError

    def _chosen(self, critic: Any, states: States, action: Tensor) -> Tensor:
        """Value [M, K] or logits [M, K, atoms] of the batch's actions."""
        raise NotImplementedError

    def _log_prob(self, policy: Sequence[Tensor], action: Tensor) -> Tensor:
        raise NotImplementedError

    def _add_policy(
        self,
        out: dict[str, Tensor],
        online: Sequence[Tensor],
        target: Sequence[Tensor],
        proposal: Proposal,
        stats: Stats,
    ) -> None:
        raise NotImplementedError

    def _policy_at(self, policy: Any, states: States) -> tuple[Tensor, ...]:
        """Parameters of the action distribution in ``states`` [M]."""
        size = len(next(iter(states.values())))
        found = policy.get_dist_params(TensorDict({key: states[key] for key in self._policy_keys}, [size]))
        return tuple(found.get(key) for key in self._dist_keys)

    def _critic_at(self, critic: Any, states: States, action: Tensor | None = None) -> Tensor:
        """What the critic writes for ``states`` [M], or for ``action`` [M, A] or [S, M, A] in them."""
        assert self._value_key is not None
        return evaluate(critic, self._value_key, states, action)

    def _pessimist(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Of [*, K] or logits [*, K, atoms]: the least value [*]; that again, or its distribution [*, atoms]."""
        if self.support is None:
            value = found.squeeze(-1) if found.shape[-1] == 1 else found.amin(-1)
            return value, value
        probs = found.softmax(-1)
        means = probs @ self.support
        if found.shape[-2] == 1:
            return means.squeeze(-1), probs.squeeze(-2)
        value, which = means.min(-1)
        index = which[..., None, None].expand(*which.shape, 1, probs.shape[-1])
        return value, probs.gather(-2, index).squeeze(-2)

    def _add_critic(self, out: dict[str, Tensor], sites: Sites, target: Tensor, stats: Stats) -> None:
        """Adds ``loss_critic``, summed over the K critics, and its diagnostics."""
        found = self._chosen(self.critic, sites.root, sites.action)
        if self.support is None:
            value = found.detach()
            loss = 0.5 * (target.unsqueeze(-1) - found).square().sum(-1)
        else:
            loss = -(target.unsqueeze(-2) * found.log_softmax(-1)).sum((-2, -1))
            value, target = found.detach().softmax(-1) @ self.support, target @ self.support
        out["loss_critic"] = self._reduce(loss, stats)
        with torch.no_grad():
            out["q_value"] = stats.mean(value.mean(-1))
            out["target_value"] = stats.mean(target)
            out["td_error"] = stats.mean((target.unsqueeze(-1) - value).abs().mean(-1))
