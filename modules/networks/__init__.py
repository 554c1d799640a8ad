"""Networks: encoders, a recurrent core, heads, the actor-critic they compose; actors and critics for control."""

from offtrace.modules.networks.actor_critic import ActorCritic, Policy, make_policy
from offtrace.modules.networks.build import NETWORKS, build_policy
from offtrace.modules.networks.build_control import (
    ACTOR_KINDS,
    CONTROL_NETWORKS,
    build_actor,
    build_critic,
    build_value,
)
from offtrace.modules.networks.categorical_critic import CategoricalCritic
from offtrace.modules.networks.control_heads import GaussianHead, TanhNormal, TanhNormalHead
from offtrace.modules.networks.control_policy import ActionSmoother, ControlActor, ControlPolicy
from offtrace.modules.networks.core import LSTMCore
from offtrace.modules.networks.critics import Critic, DiscreteCritic, StateValue
from offtrace.modules.networks.distributions import MASKED_LOGIT, Categorical, DiagonalNormal, mask_logits
from offtrace.modules.networks.encoders import MLP, ResNetConv, ShallowConv
from offtrace.modules.networks.gaussian_heads import CholeskyHead, FullNormal
from offtrace.modules.networks.heads import ActionValueHead, CategoricalHead, NormalHead, PopArtHead, ValueHead
from offtrace.modules.networks.normalise import ObservationNormalizer, share_normalizer
from offtrace.modules.networks.torsos import EnsembleLinear, EnsembleMLP, LayerNormMLP, PixelTorso

__all__ = [
    "ACTOR_KINDS",
    "CONTROL_NETWORKS",
    "MASKED_LOGIT",
    "MLP",
    "NETWORKS",
    "ActionSmoother",
    "ActionValueHead",
    "ActorCritic",
    "Categorical",
    "CategoricalCritic",
    "CategoricalHead",
    "CholeskyHead",
    "ControlActor",
    "ControlPolicy",
    "Critic",
    "DiagonalNormal",
    "DiscreteCritic",
    "EnsembleLinear",
    "EnsembleMLP",
    "FullNormal",
    "GaussianHead",
    "LSTMCore",
    "LayerNormMLP",
    "NormalHead",
    "ObservationNormalizer",
    "PixelTorso",
    "Policy",
    "PopArtHead",
    "ResNetConv",
    "ShallowConv",
    "StateValue",
    "TanhNormal",
    "TanhNormalHead",
    "ValueHead",
    "build_actor",
    "build_critic",
    "build_policy",
    "build_value",
    "make_policy",
    "mask_logits",
    "share_normalizer",
]
