"""What every tracker can be told. This one keeps nothing: what every rank but the first is given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.figures import Picture
from trainer.showing import Showing


class Tracker:
    is_told_at_once = False
    """of each row; else of some together, when a second has passed"""

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        """One row: split is train, validation or test; step is the number of optimizer steps taken; at: when that was,
        seconds since 1970, by default now."""

    def begins(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Once in a run, after its first row. image: what the network takes, float32 [1, C, H, W]; pictures: of what it
        is fed with."""

    def show(self, showing: Showing) -> None:
        """What an evaluation of the test set has to show beyond its row, which has just been logged."""

    def alert(self, title: str, text: str, urgent: bool) -> None:
        """Something that a person may want to be called for."""

    def finished(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """The run has its result. settings: by their full names; summary: as in summary.json."""

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from there will not write these rows again. By the thread that saves.
        Raises OSError."""

    def close(self, failed: bool = False) -> None: ...
