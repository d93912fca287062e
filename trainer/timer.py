"""When something is begun and ended in, the seconds that it has taken since the last reading out."""

import time
from collections import deque
from typing import Any

import torch

_MOST_PAIRS = 64


class Timer:
    """By the CPU's clock."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        """Only after `begin`."""
        self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        """Seconds since the last reading; begins anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class GpuTimer(Timer):
    """By the GPU's clock, from marks among its work; the CPU waits for it at a reading alone. Not run on a GPU yet."""

    def __init__(self) -> None:
        super().__init__()
        self._first: Any = None
        self._pairs: deque[tuple[Any, Any]] = deque()

    def begin(self) -> None:
        self._first = _mark()

    def end(self) -> None:
        self._pairs.append((self._first, _mark()))
        while len(self._pairs) > _MOST_PAIRS and self._pairs[0][1].query():  # the next reading may be far away
            self._take()

    def read(self) -> float:
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._take()
        return super().read()

    def _take(self) -> None:
        first, last = self._pairs.popleft()
        self._seconds += first.elapsed_time(last) / 1000  # of milliseconds


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def build_timer(device: torch.device) -> Timer:
    return GpuTimer() if device.type == "cuda" else Timer()
