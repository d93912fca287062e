"""Sums the seconds spent in marked sections, by the CPU's or the GPU's clock."""

import time
from collections import deque
from typing import Any

import torch

_MAX_PENDING_SECTIONS = 64


class Timer:
    """Measures by the CPU's clock."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0

    def begin(self) -> None:
        """Starts a section."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """Ends the section that `begin` started."""
        self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        """Returns the seconds in all sections since the last call, and resets the sum."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class GpuTimer(Timer):
    """Measures by the GPU's clock, with events in its queue. The CPU waits for the GPU only in `read`.

    Not tested on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin_event: Any = None
        self._pending: deque[tuple[Any, Any]] = deque()

    def begin(self) -> None:
        self._begin_event = _record_event()

    def end(self) -> None:
        self._pending.append((self._begin_event, _record_event()))
        # Without this the queue grows until the next `read`, which may be many steps away.
        while len(self._pending) > _MAX_PENDING_SECTIONS and self._pending[0][1].query():
            self._add_oldest()

    def read(self) -> float:
        while self._pending:
            self._pending[0][1].synchronize()
            self._add_oldest()
        return super().read()

    def _add_oldest(self) -> None:
        begin_event, end_event = self._pending.popleft()
        self._seconds += begin_event.elapsed_time(end_event) / 1000  # elapsed_time is in milliseconds


def _record_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def build_timer(device: torch.device) -> Timer:
    """Returns a timer for work on `device`."""
    return GpuTimer() if device.type == "cuda" else Timer()
