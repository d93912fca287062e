"""Defines the interface of all trackers, the images and histograms that an evaluation gives them, and their guard.

The guard keeps a failure of a tracker away from the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.inference.evaluation import Predictions
from trainer.text.escape import one_line
from trainer.tracking.example import Example

Picture = NDArray[np.uint8]
"""uint8 [H, W, 3]"""


class Histogram(NamedTuple):
    """Histogram of the finite values of a tensor. A large tensor is sampled at a million evenly spaced positions."""

    counts: list[float]
    """[bins]"""
    edges: list[float]
    """[bins + 1]"""
    sum: float
    sum_of_squares: float


@dataclass(frozen=True, slots=True)
class EvaluationMedia:
    """Images, curves and histograms of one evaluation of the test set."""

    step: int
    evaluation: Mapping[str, Any]
    """evaluation.json: scores by class, confusion matrix"""
    mistakes: Sequence[Example]
    """the most confident mistakes"""
    labels: Tensor
    """int64 [N], true classes of the test set"""
    predictions: Predictions
    pictures: Mapping[str, Picture]
    """figures by name: `test/classes`, `test/confusion`, `test/mistakes`, `feature_maps/LAYER`"""
    histograms: Mapping[str, Histogram]
    """weights and gradients, by parameter name"""


class Tracker:
    """Records metrics. This base class records nothing."""

    logs_immediately = False
    """True: receives each row at once. False: receives the rows of about one second together."""

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        """Records one row.

        split: train, validation or test.
        step: number of optimizer steps so far.
        wall_time: time of the measurement in seconds since 1970; None means now.
        """

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Records the network and its input. Called once in a run, after the first row.

        image: input of the network, float32 [1, C, H, W].
        pictures: pictures of the first batch, by name.
        """

    def log_media(self, media: EvaluationMedia) -> None:
        """Records the media of a test evaluation. Called directly after the row of that evaluation."""

    def alert(self, title: str, text: str, urgent: bool) -> None:
        """Sends a notification to the user."""

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """Records the result of the run.

        settings: values by full name, such as `optim.lr`.
        summary: content of summary.json.
        weights: path of model.safetensors.
        """

    def flush(self) -> None:
        """Writes all rows to the disk before a checkpoint, because a resumed run does not log them again.

        The thread that writes checkpoints calls this. Raises OSError.
        """

    def close(self, failed: bool = False) -> None:
        """Releases all resources. failed: the run ends with an error."""


class GuardedTracker(Tracker):
    """Passes each call on to a tracker until one raises an error. Prints one line about it."""

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        """name: of the tracker, for the message. warn: prints a line for the user."""
        self._name, self._tracker, self._warn = name, tracker, warn
        self._has_failed = False
        self.logs_immediately = tracker.logs_immediately

    def _guard(self, call: Callable[[], object]) -> None:
        if self._has_failed:
            return
        try:
            call()
        except Exception as error:  # every error: a tracker must not fail a run whose training succeeds
            self._has_failed = True
            self._warn(describe_failure(self._name, error))

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        self._guard(lambda: self._tracker.log(split, scalars, step, wall_time))

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        self._guard(lambda: self._tracker.on_start(network, image, pictures))

    def log_media(self, media: EvaluationMedia) -> None:
        self._guard(lambda: self._tracker.log_media(media))

    def alert(self, title: str, text: str, urgent: bool) -> None:
        self._guard(lambda: self._tracker.alert(title, text, urgent))

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        self._guard(lambda: self._tracker.log_summary(settings, summary, weights))

    def flush(self) -> None:
        self._guard(self._tracker.flush)

    def close(self, failed: bool = False) -> None:
        self._guard(lambda: self._tracker.close(failed))


def describe_failure(name: str, error: Exception) -> str:
    """Returns the line for the user. name: of the tracker."""
    return (
        f"{name} has failed ({type(error).__name__}: {one_line(error)}); this session logs no more to {name}; "
        "metrics.jsonl has every row"
    )
