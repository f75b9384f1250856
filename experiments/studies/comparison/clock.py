"""The budget of a run, on the CPU time of its process, and the learning rate as a function of what is spent.

A run is one process on one core, with one thread of computation. On an idle core its CPU time is wall-clock time, and
it does not count what other programs take. Building, initialisation on data and compilation count; imports, reading of
data, validation and evaluation do not. Candidates of the search have their budget for updates alone: it is short, and
compilation would leave little of it to tell settings apart.
"""

import math
import time
from collections.abc import Callable

WARMUP = 0.05  # part of the time for updates in which the learning rate rises


class Clock:
    """CPU seconds of this process inside `with clock:`, against a budget.

    Args:
      seconds: the budget.
      now: seconds that have passed, by default those of CPU time that this process has used.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.process_time):
        self.seconds, self._now = seconds, now
        self._before, self._began, self._start = 0.0, None, 0.0

    def __enter__(self) -> "Clock":
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self._before, self._began = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._began is None else self._now() - self._began)

    def start_updates(self, *, set_up_counts: bool = True) -> None:
        """Says that what has passed was the set-up, and that updates follow.

        With `set_up_counts` the budget has to serve for both; else all of it is left for updates.
        """
        self._start = self.elapsed
        if not set_up_counts:
            self.seconds += self._start

    @property
    def fraction(self) -> float:
        """Which part of the time for updates is spent, from 0 to 1; 1 if the set-up has left none."""
        left = self.seconds - self._start
        return min(1.0, (self.elapsed - self._start) / left) if left > 0 else 1.0


def rate_factor(fraction: float) -> float:
    """The factor on the peak learning rate: it rises linearly from 0 to 1, and falls to 0 as half a cosine."""
    if fraction < WARMUP:
        return fraction / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARMUP) / (1 - WARMUP))))
