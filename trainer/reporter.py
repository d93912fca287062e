"""Each evaluation in, examples.safetensors and report.html out. Rank 0 has one; the others have NoReporter."""

import time
from collections.abc import Callable
from dataclasses import asdict

from trainer import examples
from trainer.data import Images
from trainer.errors import UserError
from trainer.evaluation import Evaluation, Predictions
from trainer.folder import DISK_ERRORS, RunFolder, reason

_LEAST_SECONDS = 2.0  # between two reports: of evaluations that come faster nobody sees each
_MOST_SHARE = 0.02  # of the time; the last evaluation is always in the report of the end


class NoReporter:
    def evaluated(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None: ...
    def write(self) -> None: ...


class Reporter(NoReporter):
    def __init__(self, folder: RunFolder, classes: tuple[str, ...], say: Callable[[str], None]) -> None:
        self._folder, self._classes, self._say = folder, classes, say
        self._told = False
        self._due = time.monotonic()
        self._waiting: Callable[[], None] | None = None

    def evaluated(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None:
        """Keeps what a person wants to see of the test set, and writes the report, if it was not just written."""
        self._waiting = lambda: self._keep(part, scores, found, step)
        if time.monotonic() >= self._due:
            self.write()

    def _keep(self, part: Images, scores: Evaluation, found: Predictions, step: int) -> None:
        self._waiting = None
        try:
            self._folder.write_json("evaluation.json", {"step": step} | asdict(scores))
            self._folder.write_file(
                examples.NAME, lambda path: examples.write(path, part, found, self._classes, "test", step)
            )
        except DISK_ERRORS as error:
            self._lose(error)

    def write(self) -> None:
        """The report of the run as its files are now. What is wrong with a disk, or with a file that somebody has
        changed, costs the report, not the run."""
        began = time.monotonic()
        if not (self._folder.path / "config.yaml").is_file():  # not begun, or removed
            return
        if self._waiting is not None:
            self._waiting()
        from trainer import report  # late: the first line of training need not wait for it

        try:
            report.write([self._folder.path], self._folder.path / report.NAME)
        except (*DISK_ERRORS, UserError) as error:
            self._lose(error)
        now = time.monotonic()
        self._due = now + max(_LEAST_SECONDS, (now - began) / _MOST_SHARE)

    def _lose(self, error: BaseException) -> None:
        if not self._told:
            self._say(
                f"the report in {self._folder.path} cannot be written ({reason(error)}); samecurve report makes it"
            )
        self._told = True
