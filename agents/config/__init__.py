"""The groups that configurations are made of. Imports neither torch nor Lightning."""

from offtrace.agents.config.base import Checks, Config, ConfigError, Group, count
from offtrace.agents.config.collector import CollectorConfig
from offtrace.agents.config.env import EnvConfig
from offtrace.agents.config.estimator import check_actions, check_estimator, check_truncates, samples_of
from offtrace.agents.config.fit import fit
from offtrace.agents.config.mixed import MixedConfig, MixedReplayConfig, RatioReplayConfig, ShareReplayConfig
from offtrace.agents.config.network import FeedForwardConfig, NetworkConfig, SeparateNetworksConfig
from offtrace.agents.config.off_policy import OffPolicyConfig
from offtrace.agents.config.optim import AdamConfig, OptimConfig, SeparateOptimConfig, TargetAdamConfig
from offtrace.agents.config.replay import RecurrentReplayConfig, ReplayConfig
from offtrace.agents.config.rollouts import RolloutConfig
from offtrace.agents.config.train import (
    ReplayTrainConfig,
    RolloutTrainConfig,
    SeparateTrainConfig,
    TrainConfig,
    WholeRolloutTrainConfig,
)
from offtrace.modules.machine import Machine, available_cores, may_have_gpu, this_machine

__all__ = [
    "AdamConfig",
    "Checks",
    "CollectorConfig",
    "Config",
    "ConfigError",
    "EnvConfig",
    "FeedForwardConfig",
    "Group",
    "Machine",
    "MixedConfig",
    "MixedReplayConfig",
    "NetworkConfig",
    "OffPolicyConfig",
    "OptimConfig",
    "RatioReplayConfig",
    "RecurrentReplayConfig",
    "ReplayConfig",
    "ReplayTrainConfig",
    "RolloutConfig",
    "RolloutTrainConfig",
    "SeparateNetworksConfig",
    "SeparateOptimConfig",
    "SeparateTrainConfig",
    "ShareReplayConfig",
    "TargetAdamConfig",
    "TrainConfig",
    "WholeRolloutTrainConfig",
    "available_cores",
    "check_actions",
    "check_estimator",
    "check_truncates",
    "count",
    "fit",
    "may_have_gpu",
    "samples_of",
    "this_machine",
]
