"""Losses, one to a file; and what a loss of your own is made of."""

from offtrace.modules.losses.a2c import A2CLoss
from offtrace.modules.losses.acer import ACERLoss
from offtrace.modules.losses.acer_continuous import ContinuousACERLoss
from offtrace.modules.losses.base import Loss
from offtrace.modules.losses.dqn import DQNLoss
from offtrace.modules.losses.impala import ImpalaLoss, truncated_policy_kl
from offtrace.modules.losses.mpo import MPOLoss
from offtrace.modules.losses.mpo_discrete import DiscreteMPOLoss
from offtrace.modules.losses.ppo import PPOLoss
from offtrace.modules.losses.q_actor_critic import QActorCriticLoss
from offtrace.modules.losses.reactor import ReactorLoss
from offtrace.modules.losses.recurrent_state import burn_in
from offtrace.modules.losses.sac import SACLoss
from offtrace.modules.losses.sac_discrete import DiscreteSACLoss
from offtrace.modules.losses.sac_v1 import SACv1Loss
from offtrace.modules.losses.stats import Stats
from offtrace.modules.losses.steps import Steps, read_steps
from offtrace.modules.losses.trpo import TRPOLoss
from offtrace.modules.losses.unroll import EvaluatedPolicy, evaluate_rollout, state_values
from offtrace.modules.losses.updates import FastHardUpdate, FastSoftUpdate, compile_loss
from offtrace.modules.losses.vmpo import VMPOLoss

__all__ = [
    "A2CLoss",
    "ACERLoss",
    "ContinuousACERLoss",
    "DQNLoss",
    "DiscreteMPOLoss",
    "DiscreteSACLoss",
    "EvaluatedPolicy",
    "FastHardUpdate",
    "FastSoftUpdate",
    "ImpalaLoss",
    "Loss",
    "MPOLoss",
    "PPOLoss",
    "QActorCriticLoss",
    "ReactorLoss",
    "SACLoss",
    "SACv1Loss",
    "Stats",
    "Steps",
    "TRPOLoss",
    "VMPOLoss",
    "burn_in",
    "compile_loss",
    "evaluate_rollout",
    "read_steps",
    "state_values",
    "truncated_policy_kl",
]
