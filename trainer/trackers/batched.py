"""Rows in, the same rows out some at once: a tracker's threads and processes want the cores on which training runs."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.figures import Picture
from trainer.showing import Showing
from trainer.trackers.tracker import Tracker

_SECONDS = 1.0


class _Row(NamedTuple):
    split: str
    scalars: dict[str, float]
    step: int
    at: float | None


class Batched(Tracker):
    """Another tracker, told of training once a second at most. Before anything else it is told what waits."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: list[_Row] = []
        self._handed_on = -_SECONDS

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        self._waiting.append(_Row(split, scalars, step, at))
        if split != "train" or time.monotonic() - self._handed_on >= _SECONDS:
            self.hand_on()

    def hand_on(self) -> None:
        while self._waiting:
            self._handed_on = time.monotonic()
            self._tracker.log(*self._waiting.pop(0))

    def begins(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        self.hand_on()
        self._tracker.begins(network, image, pictures)

    def show(self, showing: Showing) -> None:
        self.hand_on()
        self._tracker.show(showing)

    def alert(self, title: str, text: str, urgent: bool) -> None:
        self.hand_on()
        self._tracker.alert(title, text, urgent)

    def finished(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        self.hand_on()
        self._tracker.finished(settings, summary, weights)

    def flush(self) -> None:
        self._tracker.flush()

    def close(self, failed: bool = False) -> None:
        try:
            self.hand_on()
        finally:
            self._tracker.close(failed)
