"""Each evaluation in; evaluation.json, examples, figures and report.html out, as often as that costs little.

Rank 0 has one; the others have NoReporter.
"""

import time
from collections.abc import Callable
from dataclasses import asdict

from trainer.build import Components
from trainer.config.schema import RunConfig
from trainer.data.splits import TensorSplit
from trainer.errors import UserError
from trainer.inference.evaluation import Evaluation, Predictions
from trainer.report import examples
from trainer.report.media import MediaWriter, NullMediaWriter
from trainer.run.files import DISK_ERRORS, error_reason
from trainer.run.folder import RunFolder
from trainer.tracking.logger import MetricLogger

_LEAST_SECONDS = 2.0  # between two reports: of evaluations that come faster nobody sees each
_MOST_SHARE = 0.02  # of the time; the last evaluation is always in the report of the end


class NullReportWriter:
    def on_start(self) -> None: ...
    def on_evaluation(self, part: TensorSplit, scores: Evaluation, found: Predictions, step: int) -> None: ...
    def write(self) -> None: ...
    def on_stop(self) -> None: ...
    def on_failure(self) -> None: ...


class ReportWriter(NullReportWriter):
    def __init__(
        self,
        folder: RunFolder,
        classes: tuple[str, ...],
        log: Callable[[str], None],
        media: NullMediaWriter,
        writes_page: bool = True,
    ) -> None:
        """writes_page: report.html; media: what else there is to see, for the trackers too."""
        self._folder, self._classes, self._log = folder, classes, log
        self._media, self._writes_page = media, writes_page
        self._told = False
        self._due = time.monotonic()
        self._waiting: Callable[[], None] | None = None
        self._on_gpu = False

    def on_start(self) -> None:
        """After the run's first line of metrics."""
        try:
            self._media.on_start()
        except DISK_ERRORS as error:
            self._lose(error)

    def on_evaluation(self, part: TensorSplit, scores: Evaluation, found: Predictions, step: int) -> None:
        """Keeps and shows what a person wants to see of the test set, if that was not just done."""
        self._waiting = lambda: self._keep(part, scores, found, step)
        self._on_gpu = part.images.is_cuda
        if time.monotonic() >= self._due:
            self.write()

    def on_stop(self) -> None:
        """The run ends before its time: the last evaluation and a page, but no figures, for who asked may not wait."""
        self._media = NullMediaWriter()
        self.write()

    def on_failure(self) -> None:
        """The run ends by an error: a page of what there is. The network is let be, as is a GPU that lost its peers."""
        self._media = NullMediaWriter()
        if self._on_gpu:  # whose queue may wait for peers that never come
            self._waiting = None
        self.write()

    def _keep(self, part: TensorSplit, scores: Evaluation, found: Predictions, step: int) -> None:
        self._waiting = None
        try:
            self._folder.write_json("evaluation.json", {"step": step} | asdict(scores))
            self._folder.write_file(
                examples.EXAMPLES_FILE, lambda path: examples.write(path, part, found, self._classes, "test", step)
            )
            self._media.on_evaluation(part, found, step)
        except (*DISK_ERRORS, UserError) as error:
            self._lose(error)

    def write(self) -> None:
        """The report of the run as its files are now. What is wrong with a disk, or with a file that somebody has
        changed, costs the report, not the run."""
        began = time.monotonic()
        if not (self._folder.path / "config.yaml").is_file():  # not begun, or removed
            return
        if self._waiting is not None:
            self._waiting()
        if self._writes_page:
            self._write_page()
        now = time.monotonic()
        self._due = now + max(_LEAST_SECONDS, (now - began) / _MOST_SHARE)

    def _write_page(self) -> None:
        from trainer.report.html import (
            REPORT_FILE,
            write_report,  # late: the first line of training need not wait for it
        )

        try:
            write_report([self._folder.path], self._folder.path / REPORT_FILE)
        except (*DISK_ERRORS, UserError) as error:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if not self._told:
            self._log(
                f"the report in {self._folder.path} cannot be written ({error_reason(error)}); "
                "samecurve report makes it"
            )
        self._told = True


def build_report_writer(
    folder: RunFolder, config: RunConfig, parts: Components, metric_logger: MetricLogger, log: Callable[[str], None]
) -> NullReportWriter:
    """What log.report and log.figures ask for, on the first rank."""
    if not (config.log.report or config.log.figures):
        return NullReportWriter()
    media = MediaWriter(folder, config, parts, metric_logger) if config.log.figures else NullMediaWriter()
    return ReportWriter(folder, parts.splits.classes, log, media, config.log.report)
