"""Networks: encoders, a recurrent core, heads; the policy and the critics they compose; one builder of all."""

from offtrace.modules.networks.build import CRITICS, HEADS, build_critic, build_policy, build_value
from offtrace.modules.networks.core import LSTMCore, SeparateCores
from offtrace.modules.networks.critics import CategoricalCritic, Critic, DiscreteCritic, StateValue
from offtrace.modules.networks.distributions import (
    MASKED_LOGIT,
    Categorical,
    DiagonalNormal,
    EpsilonGreedy,
    FullNormal,
    TanhNormal,
    mask_logits,
)
from offtrace.modules.networks.encoders import MLP, Concatenate, ConvMLP, LayerNormMLP, ResNetConv, ShallowConv
from offtrace.modules.networks.ensembles import EnsembleLinear, EnsembleMLP
from offtrace.modules.networks.heads import (
    CategoricalHead,
    CholeskyHead,
    GaussianHead,
    GreedyHead,
    NormalHead,
    PolicyHead,
    TanhNormalHead,
)
from offtrace.modules.networks.named import NETWORKS
from offtrace.modules.networks.noise import CorrelatedNoise
from offtrace.modules.networks.normalise import (
    DictNormalizer,
    ObservationNormalizer,
    RewardNormalizer,
    share_normalizer,
)
from offtrace.modules.networks.observations import ObservationNetwork
from offtrace.modules.networks.policy import Policy
from offtrace.modules.networks.policy_network import PolicyNetwork
from offtrace.modules.networks.smoothing import ActionSmoother
from offtrace.modules.networks.value_heads import ActionValueHead, CategoricalValueHead, PopArtHead, ValueHead

__all__ = [
    "CRITICS",
    "HEADS",
    "MASKED_LOGIT",
    "MLP",
    "NETWORKS",
    "ActionSmoother",
    "ActionValueHead",
    "Categorical",
    "CategoricalCritic",
    "CategoricalHead",
    "CategoricalValueHead",
    "CholeskyHead",
    "Concatenate",
    "ConvMLP",
    "CorrelatedNoise",
    "Critic",
    "DiagonalNormal",
    "DictNormalizer",
    "DiscreteCritic",
    "EnsembleLinear",
    "EnsembleMLP",
    "EpsilonGreedy",
    "FullNormal",
    "GaussianHead",
    "GreedyHead",
    "LSTMCore",
    "LayerNormMLP",
    "NormalHead",
    "ObservationNetwork",
    "ObservationNormalizer",
    "Policy",
    "PolicyHead",
    "PolicyNetwork",
    "PopArtHead",
    "ResNetConv",
    "RewardNormalizer",
    "SeparateCores",
    "ShallowConv",
    "StateValue",
    "TanhNormal",
    "TanhNormalHead",
    "ValueHead",
    "build_critic",
    "build_policy",
    "build_value",
    "mask_logits",
    "share_normalizer",
]
