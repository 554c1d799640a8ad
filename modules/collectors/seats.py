"""The places of actors, of any backend: who is there, and whether it moves."""

from __future__ import annotations

import math

from offtrace.modules.collectors.weights import SharedWeights
from offtrace.modules.envs import EnvironmentFailure

GOODBYE = 1.0  # seconds for an actor that has told of an error to close its environments
_START_ALLOWANCE = 120.0  # seconds for importing the libraries, on top of the time one step may take


class Seat:
    """A place for one actor (or server) after another, each in place of the last.

    Args:
        what: its name in messages.
        shared: the weights, with the signs of life.
        place: its place in those.

    Attributes:
        running: whether there is one, as far as is known.
        up: whether it has told that it is ready.
        due: when the next one is to be started, as of ``time.monotonic``; never, while there is one.
        idle: seconds for which it has been waited for since its last sign of life.
        owes: whether it has something to do, and hangs where it shows no sign of life.
    """

    def __init__(self, what: str, shared: SharedWeights, place: int) -> None:
        self.what = what
        self.running = self.up = self.owes = False
        self.due = 0.0
        self.idle, self._beat = 0.0, 0.0
        self._shared, self._place = shared, place
        self._starts = 0

    def occupy(self) -> int:
        """Somebody comes; how many were there before."""
        self.running, self.up, self.due, self.idle = True, False, math.inf, 0.0
        self._shared.steps[self._place] = 0
        self._starts += 1
        return self._starts - 1

    def came_up(self) -> None:
        """It has told that it is ready; what it does from now on is measured anew."""
        self.up, self.idle = True, 0.0

    def check_moving(self, seconds: float, limit: float) -> None:
        """Called after each ``seconds`` of waiting: look whether it has shown a sign of life within ``limit``.

        Of all that owe something, not only of the one whose turn it is: what hangs together is found together. Who has
        delivered may stand still.

        Raises:
            EnvironmentFailure: it hangs.
        """
        if self.up and not self.owes:
            return
        allowed = limit if self.up else limit + _START_ALLOWANCE
        if self.wait_for_beat(seconds) > allowed:
            raise EnvironmentFailure(
                self.hanging(limit) if self.up else f"{self.what} did not come up within {allowed:.0f} s"
            )

    def hanging(self, limit: float) -> str:
        """What to say of it when it hangs."""
        return (
            f"{self.what} has made no step for {self.idle:.1f} s (step {self.step} hangs; the limit step_timeout is "
            f"{limit:g} s)"
        )

    def wait_for_beat(self, seconds: float) -> float:
        """Called after each ``seconds`` of waiting for it: how long it has been waited for since its last sign of life.

        A time in which this process itself stood still, suspended with the others, does not count.
        """
        beat = float(self._shared.beats[self._place])
        self.idle = seconds + (self.idle if beat == self._beat else 0.0)
        self._beat = beat
        return self.idle

    @property
    def step(self) -> int:
        """The number of its last step."""
        return int(self._shared.steps[self._place])
