"""Sends metrics, media and alerts of a run to the trackers and the console.

metrics.jsonl receives each training row at once. The console and the other trackers receive the rows of up to a second
together: with a small network there can be hundreds of rows per second, and a call for each would slow down training.
Pending rows are sent before any other event and before a checkpoint.
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
from trainer.models.inspect import count_parameters
from trainer.run.checkpoint import Progress
from trainer.run.record import BestEvaluation
from trainer.tracking.console import NullConsole, TrainingRow
from trainer.tracking.jsonl import NullJsonLines
from trainer.tracking.meter import Meter
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker

_FLUSH_INTERVAL_SECONDS = 1.0


class MetricLogger:
    """Logs a run. Every rank has one; only rank 0 has trackers and a console that print or write."""

    def __init__(self, config: RunConfig, components: Components, progress: Progress, console: NullConsole) -> None:
        self._config, self._components, self._progress = config, components, progress
        self._console = console
        self._previous_seconds, self._started = progress.seconds, time.perf_counter()
        self.trackers: list[Tracker] = []
        self.bad_steps_file = NullJsonLines()
        self.logged_splits: set[str] = set()
        """splits whose evaluation at the first step of this session is in metrics.jsonl already"""
        self.best: BestEvaluation | None = None
        """the best evaluation so far, for the console"""
        self._first_step = progress.step
        self._pending_rows: list[TrainingRow] = []
        self._last_flush = -math.inf

    def start(self) -> None:
        """Starts the clock. Time before this call is not training time."""
        self._started = time.perf_counter()

    def on_start(self, world: World) -> None:
        """Prints one line about the model, the data set and the ranks, and starts the progress bar."""
        config, components, step = self._config, self._components, self._progress.step
        total_steps, virtual_ranks = components.durations.total_steps, config.train.virtual_ranks
        image_size = components.model_metadata.image_size
        size = f" of {image_size} pixels" if config.data.image_size == "auto" else ""
        processes = f"{world.size} x {world.device.type}"
        processes += f" for {virtual_ranks} virtual ranks" if virtual_ranks else ""
        self._console.log(
            f"{'resuming' if step else 'training'} {config.run.name}: "
            f"{config.model.name}, {_count_weights(components.module)}; "
            f"{config.data.name}, {len(components.splits.train):,} images{size}; "
            f"{processes}, {world.threads} threads each, {world.precision}; "
            f"global batch {config.data.global_batch_size:,}; "
            f"step {step:,} of {total_steps:,}, {components.durations.steps_per_epoch:,} steps per epoch"
        )
        self._console.start(step, total_steps)

    def position(self) -> dict[str, float]:
        """Returns the position of the run for a row: epoch, samples and training seconds so far."""
        step = self._progress.step
        self._progress.seconds = self._previous_seconds + time.perf_counter() - self._started
        return {
            "epoch": step / self._components.durations.steps_per_epoch,
            "samples": self._components.batches.samples_before(step),
            "seconds": self._progress.seconds,
        }

    def log_training(self, meter: Meter) -> None:
        """Logs a row about the steps since the last row. Only here do training metrics leave the device."""
        step, batches = self._progress.step, self._components.batches
        metrics = meter.read()
        lr = self._config.optim.lr * self._components.schedule.lr_factor(step - 1)
        scalars = self._progress.last_line = self.position() | metrics | {"lr": lr}
        samples_left = batches.samples_before(self._components.durations.total_steps) - batches.samples_before(step)
        seconds_left = samples_left / metrics["samples_per_second"] if samples_left else 0.0
        row = TrainingRow(step, scalars, time.time(), seconds_left)
        for tracker in self.trackers:
            if tracker.logs_immediately:
                tracker.log("train", scalars, step, row.wall_time)
        self._pending_rows.append(row)
        if time.monotonic() - self._last_flush >= _FLUSH_INTERVAL_SECONDS:
            self.flush_rows()

    def flush_rows(self) -> None:
        """Sends the pending rows to the console and to every tracker, even if one of them raises an error."""
        rows, self._pending_rows = self._pending_rows, []
        if not rows:
            return
        self._last_flush = time.monotonic()
        with ExitStack() as calls:  # an ExitStack calls in reverse order: first tracker first, console last
            calls.callback(self._console.log_training, rows)
            for tracker in reversed(self.trackers):
                if not tracker.logs_immediately:
                    calls.callback(_log_rows, tracker, rows)

    def log_evaluation(self, split: str, evaluation: Evaluation) -> None:
        """Logs a row about the evaluation of a split."""
        scalars = self.position() | {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
        if evaluation.tta_accuracy is not None:
            scalars["tta_accuracy"] = evaluation.tta_accuracy
        self.flush_rows()
        if self._progress.step != self._first_step or split not in self.logged_splits:
            for tracker in self.trackers:
                tracker.log(split, scalars, self._progress.step, time.time())
        self._console.log_evaluation(split, self._progress.step, scalars, self._update_best(split, scalars))

    def _update_best(self, split: str, scalars: Mapping[str, float]) -> str:
        """Returns the best evaluation so far as text: of the validation part, or of the test set without one."""
        selection_split = "validation" if self._config.data.validation_fraction else "test"
        if split == selection_split and (self.best is None or scalars["accuracy"] > self.best.accuracy):
            self.best = BestEvaluation(self._progress.step, scalars["epoch"], scalars["accuracy"], split)
        return "" if self.best is None else f"{self.best.split} {self.best.accuracy:.2%} at step {self.best.step:,}"

    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None:
        """Prints the most expensive operations of a profile."""
        self.flush_rows()
        self._console.log_profile(operations, title)

    def log_first_batch(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Logs the network, one input (float32 [1, C, H, W]) and pictures of the first batch."""
        self.flush_rows()
        for tracker in self.trackers:
            tracker.on_start(network, image, pictures)

    def log_media(self, media: EvaluationMedia) -> None:
        """Logs the media of a test evaluation."""
        self.flush_rows()
        for tracker in self.trackers:
            tracker.log_media(media)

    def warn(self, text: str) -> None:
        """Prints a warning about a loss or gradient that is not finite, and sends it as an alert."""
        self.flush_rows()
        self._console.log(text)
        self.alert("loss or gradient not finite", text)

    def alert(self, title: str, text: str, urgent: bool = True) -> None:
        """Sends a notification through the trackers that can."""
        self.flush_rows()
        for tracker in self.trackers:
            tracker.alert(f"{self._config.run.name}: {title}", text, urgent)

    def log_summary(self, summary: Mapping[str, Any], weights: Path) -> None:
        """Logs the result of the run. weights: path of model.safetensors."""
        self.flush_rows()
        test, settings = summary["test"], flatten(self._config)
        for tracker in self.trackers:
            tracker.log_summary(settings, summary, weights)
        self.alert("finished", f"test accuracy {test['accuracy']:.2%} after {summary['steps']:,} steps", urgent=False)

    def before_checkpoint(self) -> None:
        """Updates the training seconds and sends the pending rows. A run that resumes does not log these rows again."""
        self.position()
        self.flush_rows()

    def flush(self) -> None:
        """Writes all rows to the disk. The thread that writes checkpoints calls this. Raises OSError."""
        for tracker in self.trackers:
            tracker.flush()
        self.bad_steps_file.flush()

    def close(self, failed: bool) -> None:
        """Sends the pending rows and closes every tracker, even if one of them raises an error."""
        with ExitStack() as calls:  # an ExitStack calls in reverse order: first tracker first
            calls.callback(self.trackers.clear)
            calls.callback(self.bad_steps_file.close, failed)
            for tracker in reversed(self.trackers):
                calls.callback(tracker.close, failed)
            self.flush_rows()


def _log_rows(tracker: Tracker, rows: Sequence[TrainingRow]) -> None:
    for row in rows:
        tracker.log("train", row.scalars, row.step, row.wall_time)


def _count_weights(module: nn.Module) -> str:
    """Returns the number of weights as text, and the number of trained weights if some are frozen."""
    total, trained = count_parameters(module)
    return f"{total:,} weights" + (f", {trained:,} of them trained" if trained < total else "")
