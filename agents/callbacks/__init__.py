"""What happens between updates: weights to the actors, evaluations, checkpoints, meters, and the end of a run."""

from offtrace.agents.callbacks.checkpoints import Checkpoints
from offtrace.agents.callbacks.evaluation import Evaluation
from offtrace.agents.callbacks.meters import Meters
from offtrace.agents.callbacks.stopping import GracefulStop
from offtrace.agents.callbacks.weights import WeightSync

__all__ = ["Checkpoints", "Evaluation", "GracefulStop", "Meters", "WeightSync"]
