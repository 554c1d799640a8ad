"""When an actor that failed is replaced, how soon, and when the run ends in place of it: of any backend."""

from __future__ import annotations

import warnings

from offtrace.modules.envs import EnvironmentFailure

MAX_RESTARTS = 1000
_IN_A_ROW = 5  # with the waiting in between they take less than 10 s, plus what it takes to fail
_BACK_OFF = 0.5  # seconds


class Restarts:
    """Decides on each fault of a collector's actors, by what they have delivered so far.

    What fails before there was any rollout is a fault of set-up, such as a task that does not exist, and nothing that a
    new actor would mend. Later a new one takes its place: at once, and where that fails as well before it has delivered
    anything, after 0.5, 1, 2 and 4 seconds. Five in a row without a rollout are the last.

    Args:
        most: replacements in all; 0: the first fault is the last.

    Attributes:
        count: replacements so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self._in_a_row: dict[str, int] = {}  # since the last rollout of each; empty before the first of all

    def delivered(self, *names: str) -> None:
        """These have done what they are there for."""
        self._in_a_row.update(dict.fromkeys(names, 0))

    def after(self, name: str, fault: EnvironmentFailure) -> float:
        """Counts the replacement of ``name`` and tells of it in a warning of one line.

        Returns:
            Seconds to wait before the new one is started.

        Raises:
            EnvironmentFailure: there is to be none; with the fault's own text.
        """
        if not self._in_a_row or not self.most:
            raise fault
        row = self._in_a_row.get(name, 0)
        what, line, rest = str(fault).partition("\n")
        if row == _IN_A_ROW or self.count == self.most:
            used = f"{row} new ones in a row delivered nothing" if row == _IN_A_ROW else f"max_restarts is {self.most}"
            raise EnvironmentFailure(f"{what}; it is not replaced, because {used}{line}{rest}") from fault
        self.count += 1
        self._in_a_row[name] = row + 1
        warnings.warn(
            f"{what}; a new one takes its place, restart {self.count} of at most {self.most}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _BACK_OFF * 2 ** (row - 1) if row else 0.0
