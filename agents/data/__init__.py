"""Where a learner's batches come from: fresh rollouts, a replay, or both in one stream."""

from offtrace.agents.data.acting import ActingData, EpisodeMeter, Learner, PlainData
from offtrace.agents.data.mixed import MixedData
from offtrace.agents.data.replay import Batches, ReplayData
from offtrace.agents.data.rollouts import RolloutData

__all__ = ["ActingData", "Batches", "EpisodeMeter", "Learner", "MixedData", "PlainData", "ReplayData", "RolloutData"]
