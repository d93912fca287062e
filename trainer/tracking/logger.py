"""What has happened in, a row for the trackers and a line for the person at the console out.

A row of training is in metrics.jsonl at once. All others are told once a second at most, of the rows since then
together: a small network has a row every few milliseconds, and what tells it finds the caches full of something else
each time. Before anything else is told here, and before a checkpoint, no row waits.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.build import Components
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.distributed.world import World
from trainer.inference.evaluation import Evaluation
from trainer.run.checkpoint import Progress
from trainer.tracking.console import NullConsole, TrainingRow
from trainer.tracking.jsonl import NullJsonLines
from trainer.tracking.meter import Meter
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker

_SECONDS = 1.0


class MetricLogger:
    """Every rank has one; only the first one's trackers and console do anything."""

    def __init__(self, config: RunConfig, parts: Components, progress: Progress, console: NullConsole) -> None:
        self._config, self._components, self._progress = config, parts, progress
        self._console = console
        self._seconds_before, self._started = progress.seconds, time.perf_counter()
        self.trackers: list[Tracker] = []
        self.bad_steps = NullJsonLines()
        self.evaluated_before: set[str] = set()
        """The splits whose evaluation at the step where this session begins has been logged."""
        self._first_step = progress.step
        self._waiting: list[TrainingRow] = []
        self._told = -math.inf

    def start(self) -> None:
        """Starts the clock: what came before is not training time."""
        self._started = time.perf_counter()

    def on_start(self, world: World) -> None:
        """One line for the person on what is trained, and on what."""
        config, parts, step = self._config, self._components, self._progress.step
        total_steps, virtual_ranks = parts.durations.total_steps, config.train.virtual_ranks
        weights = _weights(parts.module)
        size = f" of {parts.about.image_size} pixels" if config.data.image_size == "auto" else ""
        processes = f"{world.size} x {world.device.type}"
        processes += f" for {virtual_ranks} virtual ranks" if virtual_ranks else ""
        self._console.log(
            f"{'going on with' if step else 'training'} {config.run.name}: {config.model.name}, {weights}; "
            f"{config.data.name}, {len(parts.splits.train):,} images{size}; {processes}, {world.threads} threads each, "
            f"{world.precision}; global batch {config.data.global_batch_size:,}; "
            f"step {step:,} of {total_steps:,}, {parts.durations.steps_per_epoch:,} an epoch"
        )
        self._console.start(step, total_steps)

    def position(self) -> dict[str, float]:
        """Where the run is, as every row tells it."""
        step = self._progress.step
        self._progress.seconds = self._seconds_before + time.perf_counter() - self._started
        return {
            "epoch": step / self._components.durations.steps_per_epoch,
            "samples": self._components.batches.samples_before(step),
            "seconds": self._progress.seconds,
        }

    def log_training(self, meter: Meter) -> None:
        """A line on the steps since the last one. The only place where their values leave the device."""
        step, batches = self._progress.step, self._components.batches
        values = meter.read()
        lr = self._config.optim.lr * self._components.schedule.lr_factor(step - 1)
        line = self._progress.last_line = self.position() | values | {"lr": lr}
        left = batches.samples_before(self._components.durations.total_steps) - batches.samples_before(step)
        row = TrainingRow(step, line, time.time(), left / values["samples_per_second"] if left else 0.0)
        for tracker in self.trackers:
            if tracker.logs_immediately:
                tracker.log("train", line, step, row.at)
        self._waiting.append(row)
        if time.monotonic() - self._told >= _SECONDS:
            self.flush_rows()

    def flush_rows(self) -> None:
        """Rows that wait wait no longer; each is told, whatever another one raises."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        self._told = time.monotonic()
        with ExitStack() as telling:  # the last one is told first
            telling.callback(self._console.log_training, rows)
            for tracker in reversed(self.trackers):
                if not tracker.logs_immediately:
                    telling.callback(_log, tracker, rows)

    def log_evaluation(self, split: str, found: Evaluation) -> None:
        """A line on an evaluation of a split."""
        scalars = self.position() | {"loss": found.loss, "accuracy": found.accuracy}
        if found.tta_accuracy is not None:
            scalars["tta_accuracy"] = found.tta_accuracy
        self.flush_rows()
        if self._progress.step != self._first_step or split not in self.evaluated_before:
            for tracker in self.trackers:
                tracker.log(split, scalars, self._progress.step, time.time())
        self._console.log_evaluation(split, self._progress.step, scalars)

    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None:
        """A profile's most expensive operations."""
        self.flush_rows()
        self._console.log_profile(operations, title)

    def log_first_batch(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        self.flush_rows()
        for tracker in self.trackers:
            tracker.on_start(network, image, pictures)

    def log_media(self, showing: EvaluationMedia) -> None:
        self.flush_rows()
        for tracker in self.trackers:
            tracker.log_media(showing)

    def warn(self, text: str) -> None:
        self.flush_rows()
        self._console.log(text)
        self.alert("loss or gradient not finite", text)

    def alert(self, title: str, text: str, urgent: bool = True) -> None:
        """For whoever wants to be called."""
        self.flush_rows()
        for tracker in self.trackers:
            tracker.alert(f"{self._config.run.name}: {title}", text, urgent)

    def log_summary(self, summary: Mapping[str, Any], weights: Path) -> None:
        """The result. weights: their file."""
        self.flush_rows()
        test, settings = summary["test"], flatten(self._config)
        for tracker in self.trackers:
            tracker.log_summary(settings, summary, weights)
        self.alert("finished", f"test accuracy {test['accuracy']:.2%} after {summary['steps']:,} steps", urgent=False)

    def before_checkpoint(self) -> None:
        """Before a checkpoint: it holds the time so far, and who goes on from it will not come by these rows again."""
        self.position()
        self.flush_rows()

    def flush(self) -> None:
        """All rows so far are on the disk. Raises OSError. Called by the thread that saves."""
        for tracker in self.trackers:
            tracker.flush()
        self.bad_steps.flush()

    def close(self, failed: bool) -> None:
        """All are told what waits, and closed, whatever one of them raises."""
        with ExitStack() as closing:  # the last one is closed first
            closing.callback(self.trackers.clear)
            closing.callback(self.bad_steps.close, failed)
            for tracker in reversed(self.trackers):
                closing.callback(tracker.close, failed)
            self.flush_rows()


def _log(tracker: Tracker, rows: Sequence[TrainingRow]) -> None:
    for row in rows:
        tracker.log("train", row.scalars, row.step, row.at)


def _weights(module: nn.Module) -> str:
    """How many it has, and how many of them are trained if not all are."""
    weights = list(module.parameters())
    number = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return f"{number:,} weights" + (f", {trained:,} of them trained" if trained < number else "")
