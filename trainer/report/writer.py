"""Updates report.html, evaluation.json, the examples and the figures during training, in at most 2 % of its time.

Rank 0 has a ReportWriter. The other ranks have a NullReportWriter.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict

from trainer.build import Components
from trainer.config.schema import RunConfig
from trainer.data.splits import TensorSplit
from trainer.errors import UserError
from trainer.inference.evaluation import Evaluation, Predictions
from trainer.report.examples import EXAMPLES_FILE, write_examples
from trainer.report.media import MediaWriter, NullMediaWriter
from trainer.run.files import DISK_ERRORS, error_reason
from trainer.run.folder import RunFolder
from trainer.tracking.logger import MetricLogger

_MIN_INTERVAL_SECONDS = 2.0  # more frequent updates are of no use
_MAX_TIME_SHARE = 0.02  # of the training time; the final report is always written


class NullReportWriter:
    """Writes nothing."""

    def on_start(self) -> None: ...
    def on_evaluation(self, split: TensorSplit, scores: Evaluation, predictions: Predictions, step: int) -> None: ...
    def write(self) -> None: ...
    def on_stop(self) -> None: ...
    def on_failure(self) -> None: ...


class ReportWriter(NullReportWriter):
    """Writes the report. If that fails, prints one line, and the training continues."""

    def __init__(
        self,
        folder: RunFolder,
        classes: tuple[str, ...],
        log: Callable[[str], None],
        media: NullMediaWriter,
        writes_page: bool = True,
    ) -> None:
        """media: writes the figures. writes_page: whether to write report.html."""
        self._folder, self._classes, self._log = folder, classes, log
        self._media, self._writes_page = media, writes_page
        self._has_warned = False
        self._next_write_time = time.monotonic()
        self._pending_evaluation: Callable[[], None] | None = None
        self._images_on_gpu = False

    def on_start(self) -> None:
        """Writes the figure of the first batch. Call it after the first row of metrics."""
        try:
            self._media.on_start()
        except DISK_ERRORS as error:
            self._warn_once(error)

    def on_evaluation(self, split: TensorSplit, scores: Evaluation, predictions: Predictions, step: int) -> None:
        """Stores an evaluation of the test set, and writes the report unless it was written a moment ago."""
        self._pending_evaluation = lambda: self._write_evaluation(split, scores, predictions, step)
        self._images_on_gpu = split.images.is_cuda
        if time.monotonic() >= self._next_write_time:
            self.write()

    def on_stop(self) -> None:
        """Writes the last evaluation and report.html of a run that stops early. Skips the figures, to stop fast."""
        self._media = NullMediaWriter()
        self.write()

    def on_failure(self) -> None:
        """Writes report.html of a run that failed. Runs no network and reads nothing from a GPU."""
        self._media = NullMediaWriter()
        if self._images_on_gpu:  # the GPU may be stuck in a collective that waits for lost ranks
            self._pending_evaluation = None
        self.write()

    def write(self) -> None:
        """Writes the pending evaluation, if any, and report.html from the run's current files."""
        start = time.monotonic()
        if not (self._folder.path / "config.yaml").is_file():  # the run has not begun, or its folder was removed
            return
        if self._pending_evaluation is not None:
            self._pending_evaluation()
        if self._writes_page:
            self._write_page()
        end = time.monotonic()
        self._next_write_time = end + max(_MIN_INTERVAL_SECONDS, (end - start) / _MAX_TIME_SHARE)

    def _write_evaluation(self, split: TensorSplit, scores: Evaluation, predictions: Predictions, step: int) -> None:
        self._pending_evaluation = None
        try:
            self._folder.write_json("evaluation.json", {"step": step} | asdict(scores))
            self._folder.write_file(
                EXAMPLES_FILE, lambda path: write_examples(path, split, predictions, self._classes, "test", step)
            )
            self._media.on_evaluation(split, predictions, step)
        except (*DISK_ERRORS, UserError) as error:
            self._warn_once(error)

    def _write_page(self) -> None:
        from trainer.report.html import REPORT_FILE, write_report  # lazy import: it must not delay the first row

        try:
            write_report([self._folder.path], self._folder.path / REPORT_FILE)
        # UserError: a file of the run cannot be read, for example after an edit.
        except (*DISK_ERRORS, UserError) as error:
            self._warn_once(error)

    def _warn_once(self, error: BaseException) -> None:
        if not self._has_warned:
            self._log(
                f"the report in {self._folder.path} cannot be written ({error_reason(error)}). "
                f"Write it later with: {shlex.join(['samecurve', 'report', str(self._folder.path)])}"
            )
        self._has_warned = True


def build_report_writer(
    folder: RunFolder,
    config: RunConfig,
    components: Components,
    metric_logger: MetricLogger,
    log: Callable[[str], None],
) -> NullReportWriter:
    """Returns rank 0's report writer, for log.report and log.figures. log: prints a line for the user."""
    if not (config.log.report or config.log.figures):
        return NullReportWriter()
    media = MediaWriter(folder, config, components, metric_logger) if config.log.figures else NullMediaWriter()
    return ReportWriter(folder, components.splits.classes, log, media, config.log.report)
