"""Names of the TensorDict entries, listed once.

The names are TorchRL's defaults where it has one. ``NEXT`` entries live in the ``"next"`` sub-tensordict.
"""

from __future__ import annotations

from typing import Final

OBSERVATION: Final = "observation"
ACTION: Final = "action"
ACTION_MASK: Final = "action_mask"
"""bool ``[*B, A]``, True where the action is legal."""
LOG_PROB: Final = "action_log_prob"
"""Behaviour log-probability of the action, ``[*B]``."""
TARGET_LOG_PROB: Final = "target_log_prob"
"""Target policy's log-probability of the batch's action, ``[*B]``."""
CHOSEN_ACTION_VALUE: Final = "chosen_action_value"
"""Q of the batch's action, ``[*B, 1]``."""
STATE_ACTION_VALUE: Final = "state_action_value"
"""Q of the action that was put in, by each of K critics, ``[*B, K]``."""
ACTION_VALUE: Final = "action_value"
"""Q of every discrete action, by each of K critics, ``[*B, K, A]``."""
VALUE_LOGITS: Final = "value_logits"
"""Logits of K categorical critics over their atoms: of the action that was put in, ``[*B, K, atoms]``, or of every
discrete action, ``[*B, K, A, atoms]``."""
LOGITS: Final = "logits"
LOC: Final = "loc"
SCALE: Final = "scale"
SCALE_TRIL: Final = "scale_tril"
"""Lower triangular factor of a covariance, ``[*B, A, A]``."""
PRE_TANH: Final = "pre_tanh"
"""The sample before the tanh, ``[*B, A]``: it cannot be recovered from a saturated action."""
SMOOTHED_ACTION: Final = "smoothed_action"
"""The action executed one step before, ``[*B, A]``: the state of a policy that smooths its actions."""
ACTION_NOISE: Final = "action_noise"
"""The standard noise of the step before, ``[*B, A]``: the state of a policy that explores with correlated noise."""
VALUE: Final = "state_value"
VALUE_TARGET: Final = "value_target"
ADVANTAGE: Final = "advantage"
VALID: Final = "valid"
"""bool ``[*B, 1]``: False where the successor of the step is unknown; such a step gets no weight."""

NEXT: Final = "next"
REWARD: Final = "reward"
DONE: Final = "done"
TERMINATED: Final = "terminated"
TRUNCATED: Final = "truncated"
IS_INIT: Final = "is_init"
"""bool ``[*B, 1]``: True on the first step of an episode."""

LAST_ACTION: Final = "last_action"
LAST_REWARD: Final = "last_reward"
RECURRENT_H: Final = "recurrent_h"
RECURRENT_C: Final = "recurrent_c"

EPISODE_REWARD: Final = "episode_reward"
"""Raw reward summed over the whole episode so far, across life losses, ``[*B, 1]``."""
EPISODE_LENGTH: Final = "episode_length"
"""Agent steps of the whole episode so far, ``[*B, 1]``."""
EPISODE_END: Final = "episode_end"
"""bool ``[*B, 1]``: the whole episode ends with this step (a life loss is only ``done``)."""
POLICY_VERSION: Final = "policy_version"

FINALS: Final = "finals"
"""``[B, T, K, 0]``: holds no number; its shape says that no row has more than K truncated steps before its last one. A
loss makes room for K final observations in each row. Without the entry it counts them, and waits for the device."""

INDEX: Final = "index"
"""int64 ``[*B]``: which item of a replay was sampled."""
WEIGHT: Final = "weight"
"""float32 ``[*B]``: importance weight of a sampled item."""
PRIORITY: Final = "td_error"
"""float32 ``[*B]``: mean absolute TD error of a sampled item, written by a loss."""
WORKER: Final = "worker"
"""int64 ``[*B]``: which actor made the step."""
