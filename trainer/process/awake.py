"""Measures time for which this process was awake. Time in which it was suspended does not count."""

import time


class AwakeClock:
    """Counts awake time in slices between calls of tick().

    A longer gap means that the process did not run: somebody has stopped it (SIGSTOP), or the machine was suspended. It
    counts as one slice. CLOCK_MONOTONIC stops in a suspended machine, but not for a stopped process.
    """

    def __init__(self, slice_seconds: float) -> None:
        """slice_seconds: the most time between two calls that counts in full."""
        self._slice_seconds = slice_seconds
        self._last_tick = time.monotonic()
        self.seconds = 0.0
        """awake time at the last tick"""

    def tick(self) -> float:
        """Returns the awake time in seconds. Call it at least once in each slice."""
        now = time.monotonic()
        self.seconds += min(now - self._last_tick, self._slice_seconds)
        self._last_tick = now
        return self.seconds
