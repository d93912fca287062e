"""Each evaluation in; evaluation.json, examples, figures and report.html out, as often as that costs little.

Rank 0 has one; the others have NoReporter.
"""

import time
from collections.abc import Callable
from dataclasses import asdict

from trainer import examples
from trainer.data import Images
from trainer.errors import UserError
from trainer.evaluation import Evaluation, Predictions
from trainer.folder import DISK_ERRORS, RunFolder, reason
from trainer.journal import Journal
from trainer.parts import Parts
from trainer.settings import RunConfig
from trainer.visuals import NoVisuals, Visuals

_LEAST_SECONDS = 2.0  # between two reports: of evaluations that come faster nobody sees each
_MOST_SHARE = 0.02  # of the time; the last evaluation is always in the report of the end


class NoReporter:
    def begins(self) -> None: ...
    def evaluated(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None: ...
    def write(self) -> None: ...
    def stops(self) -> None: ...
    def fails(self) -> None: ...


class Reporter(NoReporter):
    def __init__(
        self,
        folder: RunFolder,
        classes: tuple[str, ...],
        say: Callable[[str], None],
        visuals: NoVisuals,
        writes_page: bool = True,
    ) -> None:
        """writes_page: report.html; visuals: what else there is to see, for the trackers too."""
        self._folder, self._classes, self._say = folder, classes, say
        self._visuals, self._writes_page = visuals, writes_page
        self._told = False
        self._due = time.monotonic()
        self._waiting: Callable[[], None] | None = None
        self._on_gpu = False

    def begins(self) -> None:
        """After the run's first line of metrics."""
        try:
            self._visuals.begins()
        except DISK_ERRORS as error:
            self._lose(error)

    def evaluated(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None:
        """Keeps and shows what a person wants to see of the test set, if that was not just done."""
        self._waiting = lambda: self._keep(part, scores, found, step)
        self._on_gpu = part.images.is_cuda
        if time.monotonic() >= self._due:
            self.write()

    def stops(self) -> None:
        """The run ends before its time: the last evaluation and a page, but no figures, for who asked may not wait."""
        self._visuals = NoVisuals()
        self.write()

    def fails(self) -> None:
        """The run ends by an error: a page of what there is. The network is let be, as is a GPU that lost its peers."""
        self._visuals = NoVisuals()
        if self._on_gpu:  # whose queue may wait for peers that never come
            self._waiting = None
        self.write()

    def _keep(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None:
        self._waiting = None
        try:
            self._folder.write_json("evaluation.json", {"step": step} | asdict(scores))
            self._folder.write_file(
                examples.NAME, lambda path: examples.write(path, part, found, self._classes, "test", step)
            )
            self._visuals.evaluated(part, found, step)
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
        from trainer import report  # late: the first line of training need not wait for it

        try:
            report.write([self._folder.path], self._folder.path / report.NAME)
        except (*DISK_ERRORS, UserError) as error:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if not self._told:
            self._say(
                f"the report in {self._folder.path} cannot be written ({reason(error)}); samecurve report makes it"
            )
        self._told = True


def build(
    folder: RunFolder, config: RunConfig, parts: Parts, journal: Journal, say: Callable[[str], None]
) -> NoReporter:
    """What log.report and log.figures ask for, on the first rank."""
    if not (config.log.report or config.log.figures):
        return NoReporter()
    visuals = Visuals(folder, config, parts, journal) if config.log.figures else NoVisuals()
    return Reporter(folder, parts.splits.classes, say, visuals, config.log.report)
