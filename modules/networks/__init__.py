"""Networks: encoders, a recurrent core, heads, and the actor-critic they compose."""

from offtrace.modules.networks.actor_critic import ActorCritic, Policy, make_policy
from offtrace.modules.networks.build import NETWORKS, build_policy
from offtrace.modules.networks.core import LSTMCore
from offtrace.modules.networks.distributions import MASKED_LOGIT, Categorical, DiagonalNormal, mask_logits
from offtrace.modules.networks.encoders import MLP, ResNetConv, ShallowConv
from offtrace.modules.networks.heads import CategoricalHead, NormalHead, ValueHead

__all__ = [
    "MASKED_LOGIT",
    "MLP",
    "NETWORKS",
    "ActorCritic",
    "Categorical",
    "CategoricalHead",
    "DiagonalNormal",
    "LSTMCore",
    "NormalHead",
    "Policy",
    "ResNetConv",
    "ShallowConv",
    "ValueHead",
    "build_policy",
    "make_policy",
    "mask_logits",
]
