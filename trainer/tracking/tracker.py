"""What every tracker can be told. This one keeps nothing: what every rank but the first is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.inference.evaluation import Predictions
from trainer.run.record import RunRecord

Picture = NDArray[np.uint8]
"""uint8 [H, W, 3]"""


class Histogram(NamedTuple):
    """Of the finite values of a tensor; of a large one of a million of them, evenly spread."""

    counts: list[float]
    """[bins]"""
    edges: list[float]
    """[bins + 1]"""
    sum: float
    sum_of_squares: float


@dataclass(frozen=True, slots=True)
class EvaluationMedia:
    step: int
    told: RunRecord
    """the run's files as they are now: scores by class, confusion, the surest mistakes"""
    labels: Tensor
    """int64 [N], what the samples of the test set are"""
    found: Predictions
    pictures: Mapping[str, Picture]
    """figures by name: `test/classes`, `test/confusion`, `test/mistakes`, `feature_maps/LAYER`"""
    histograms: Mapping[str, Histogram]
    """of weights and gradients, by the parameter's name"""


class Tracker:
    logs_immediately = False
    """of each row; else of some together, when a second has passed"""

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        """One row: split is train, validation or test; step is the number of optimizer steps taken; at: when that was,
        seconds since 1970, by default now."""

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Once in a run, after its first row. image: what the network takes, float32 [1, C, H, W]; pictures: of what it
        is fed with."""

    def log_media(self, media: EvaluationMedia) -> None:
        """What an evaluation of the test set has to show beyond its row, which has just been logged."""

    def alert(self, title: str, text: str, urgent: bool) -> None:
        """Something that a person may want to be called for."""

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """The run has its result. settings: by their full names; summary: as in summary.json."""

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from there will not write these rows again. By the thread that saves.
        Raises OSError."""

    def close(self, failed: bool = False) -> None: ...
