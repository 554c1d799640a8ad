"""When an actor that failed is replaced, how soon, and when the run ends in place of it: of any backend."""

from __future__ import annotations

import time
import warnings

from offtrace.modules.envs import EnvironmentFailure

MAX_RESTARTS = 1000
_IN_A_ROW = 5
_BACK_OFF = 0.5  # seconds; the fifth comes 7.5 s after the first fault, or later where failing takes long


class Restarts:
    """Decides on each fault of a collector's actors, by what they have delivered so far.

    What fails before there was any rollout is a fault of set-up, such as a task that does not exist, and nothing that a
    new actor would mend. Later a new one takes its place: at once, and where that fails as well before it has delivered
    anything, not before 0.5, 1.5, 3.5 and 7.5 seconds after the first fault. What the starts themselves take counts, so
    that a machine under load comes to an end as soon. Five in a row without a rollout are the last.

    Args:
        most: replacements in all; 0: the first fault is the last.

    Attributes:
        count: replacements so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        # when each has failed since its last rollout; empty before the first rollout of all
        self._faults: dict[str, list[float]] = {}

    def delivered(self, *names: str) -> None:
        """These have done what they are there for."""
        self._faults.update((name, []) for name in names)

    def after(self, name: str, fault: EnvironmentFailure) -> float:
        """Counts the replacement of ``name`` and tells of it in a warning of one line.

        Returns:
            Seconds to wait before the new one is started.

        Raises:
            EnvironmentFailure: there is to be none; with the fault's own text.
        """
        if not self._faults or not self.most:
            raise fault
        faults = self._faults.setdefault(name, [])
        row = len(faults)
        what, line, rest = str(fault).partition("\n")
        if row == _IN_A_ROW or self.count == self.most:
            used = f"{row} new ones in a row delivered nothing" if row == _IN_A_ROW else f"max_restarts is {self.most}"
            raise EnvironmentFailure(f"{what}; it is not replaced, because {used}{line}{rest}") from fault
        self.count += 1
        faults.append(time.monotonic())
        warnings.warn(
            f"{what}; a new one takes its place, restart {self.count} of at most {self.most}",
            RuntimeWarning,
            stacklevel=2,
        )
        return max(0.0, faults[0] + _BACK_OFF * (2**row - 1) - faults[-1])
