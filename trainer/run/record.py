"""Reads the files of a run folder. Imports nothing slow, because `samecurve status` reads many folders."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import FolderError
from trainer.run.reading import content
from trainer.text.escape import one_line

_FILES = ("metrics.jsonl", "config.yaml", "status.json", "job.json")  # a run changes at least one of them
_MAX_BYTES_OF_TRAIN_ROWS = 4 << 20  # about 20,000 rows
_TRAIN_ROW_START = '{"split": "train"'
_TAIL_BYTES = (1 << 16, 1 << 22)  # read from the end of metrics.jsonl: first 64 KB, then 4 MB
_SPLIT_MARKS = {split: f'"split": "{split}"'.encode() for split in ("train", "validation", "test")}
_TAIL_SPLITS = ("train", "test")
_MAX_DRAWN = 1e100  # differences of larger values overflow, and a chart of them shows nothing


@dataclass(frozen=True, slots=True)
class Job:
    """A SLURM job as job.json and starts.jsonl record it."""

    id: str
    """for a task of an array: the id of the array or of the task"""
    array_task: int | None = None
    log: str = ""
    """path of the job's output; empty if unknown"""
    array: str | None = None
    """id of the array, if `id` may be the id of the task"""

    def __str__(self) -> str:
        """Returns the id as SLURM's tools print it."""
        return self.id if self.array_task is None else f"{self.array or self.id}_{self.array_task}"


class BestEvaluation(NamedTuple):
    """The evaluation with the highest accuracy so far."""

    step: int
    epoch: float | None
    accuracy: float
    """in [0, 1]"""
    split: str
    """validation; test without a validation part"""


class RunRecord:
    """Reads one run folder. Each attribute reads its file at first use and keeps the content.

    An attribute is empty if its file does not exist. It raises FolderError, with the file's path, if the file cannot
    be read or contains something else than a run writes. The values that are there have the types of
    trainer/run/reading/content.py; any of them may be missing. Create a new RunRecord to see what a running run has
    written since.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """name: replaces the name in config.yaml, for a report on several runs with the same name."""
        self.path = path
        self._name = name
        self.problems: list[str] = []
        """lines of metrics.jsonl that were skipped because they are no rows; filled when the rows are read"""

    @property
    def name(self) -> str:
        return self._name or str(self.settings.get("run.name") or self.path.name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml, by full names such as "optim.lr". Raises FolderError also if the file does not exist."""
        import yaml  # lazy import: 15 ms, and status does not need the settings

        path = self.path / "config.yaml"
        if not is_file(path):
            raise FolderError(f"{self.path} is not a run folder: it has no config.yaml; give the path of a run folder")
        with _folder_errors(path):
            try:
                # The run checked the settings before it wrote them. A second check takes longer than all other reading.
                sections = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
            if not sections:
                raise ValueError("expected settings")
            content.check(sections, content.SETTINGS)
            return {
                f"{section}.{name}": value
                for section, values in sections.items()
                for name, value in (values or {}).items()
            }

    @cached_property
    def status(self) -> dict[str, Any]:
        """state, step, reason: the last state that the run itself recorded."""
        return read_json(self.path / "status.json", content.STATUS)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json: versions, machine and command of the last session."""
        return read_json(self.path / "environment.json", content.ENVIRONMENT)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json. The run may have continued with more steps since."""
        return read_json(self.path / "summary.json", content.SUMMARY)

    @property
    def current_summary(self) -> dict[str, Any]:
        """summary.json; empty if the run has trained more steps since."""
        return self.summary if self.summary.get("steps") == self.status.get("step") else {}

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The last evaluation on the test set and its step: classes, confusion matrix, step."""
        return read_json(self.path / "evaluation.json", content.EVALUATION)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl. Omits most train rows if the file exceeds 4 MB, because a chart has fewer pixels."""
        lines = read_lines(self.path / "metrics.jsonl")
        every = 1 + sum(map(len, lines)) // _MAX_BYTES_OF_TRAIN_ROWS
        return self._parse_rows(
            [line for index, line in enumerate(lines) if index % every == 0 or not line.startswith(_TRAIN_ROW_START)]
        )

    def _parse_rows(self, lines: list[str]) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl in these lines. Adds to `problems` how many lines are no rows.

        A last line that a kill has cut off is no problem. Raises FolderError if all lines are something else.
        """
        rows, errors = [], []
        for index, line in enumerate(lines):
            try:
                rows.append(content.parse_json(line, content.ROW))
            except ValueError as error:
                if index + 1 < len(lines) or line.endswith("}") or line[:1] not in ("{", ""):
                    errors.append(error)
        if errors and not rows:
            raise unreadable_file(self.path / "metrics.jsonl", errors[0])
        self._note_skipped_lines(errors)
        return rows

    def _note_skipped_lines(self, errors: list[ValueError]) -> None:
        if errors:
            lines = "1 line is" if len(errors) == 1 else f"{len(errors):,} lines are"
            path = self.path / "metrics.jsonl"
            self.problems.append(f"{path}: {lines} skipped ({one_line(errors[0])}); repair or remove such lines")

    def points(self, split: str, metric: str) -> list[tuple[float, float]]:
        """Returns the curve of a metric: epoch and value of each row that has a value."""
        return [
            (row["epoch"], row[metric])
            for row in self.rows
            if row["split"] == split and row.get("epoch") is not None and row.get(metric) is not None
            if abs(row[metric]) < _MAX_DRAWN
        ]

    @property
    def selection_split(self) -> str:
        """The split by whose accuracy runs and steps are compared: validation, or test without a validation part."""
        return "validation" if any(row["split"] == "validation" for row in self.rows) else "test"

    @property
    def best(self) -> BestEvaluation | None:
        """The first evaluation with the highest accuracy on selection_split; None before the first evaluation."""
        split = self.selection_split
        rows = [row for row in self.rows if row["split"] == split and row.get("accuracy") is not None]
        if not rows:
            return None
        row = max(rows, key=lambda row: float(row["accuracy"]))
        return BestEvaluation(row["step"], row.get("epoch"), row["accuracy"], split)

    @property
    def last_train_row(self) -> dict[str, Any]:
        """The last train row of metrics.jsonl."""
        return self._last_rows.get("train", {})

    @property
    def last_test_row(self) -> dict[str, Any]:
        """The last test row in the last 4 MB of metrics.jsonl; empty if there is none in them."""
        return self._last_rows.get("test", {})

    @property
    def last_validation_row(self) -> dict[str, Any]:
        """The last validation row in the last 4 MB of metrics.jsonl; empty without a validation part."""
        return self._last_rows.get("validation", {})

    @cached_property
    def _last_rows(self) -> dict[str, dict[str, Any]]:
        """The last row of each split. Reads the last 64 KB, or 4 MB if a train or test row is not in them."""
        path = self.path / "metrics.jsonl"
        with _folder_errors(path), contextlib.ExitStack() as exit_stack:
            try:
                file = exit_stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                return {}
            size = file.seek(0, os.SEEK_END)
            for length in _TAIL_BYTES:
                file.seek(max(0, size - length))
                lines = file.read(length).split(b"\n")[1 if length < size else 0 : -1]
                # A row of validation stands directly before the row of the test set.
                if length >= size or all(
                    any(_SPLIT_MARKS[split] in line for line in lines[1:]) for split in _TAIL_SPLITS
                ):
                    break
        return self._find_last_rows(lines)

    def _find_last_rows(self, lines: list[bytes]) -> dict[str, dict[str, Any]]:
        """Returns the last row of each split in these lines, which end with a newline each, without parsing others.

        Adds lines that look like rows and are none to `problems`. Raises FolderError if no line is a row.
        """
        rows: dict[str, dict[str, Any]] = {}
        errors: list[ValueError] = []
        for split, mark in _SPLIT_MARKS.items():
            for line in reversed(lines):
                if mark not in line:
                    continue
                try:
                    rows[split] = content.parse_json(line.decode(), content.ROW)
                    break
                except ValueError as error:
                    errors.append(error)
        if lines and not rows:
            errors = errors or [ValueError("expected rows of metrics")]
            raise unreadable_file(self.path / "metrics.jsonl", errors[0])
        self._note_skipped_lines(errors)
        return rows

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """Rows of starts.jsonl, one for each start of training: step, total_steps, world_size, host, job, ..."""
        with _folder_errors(self.path / "starts.jsonl"):
            return [content.parse_json(line, content.SESSION) for line in self._session_lines]

    @property
    def last_session(self) -> dict[str, Any]:
        """The last row of starts.jsonl; empty for a run that never started training."""
        return self.sessions[-1] if self.sessions else {}

    @property
    def restarts(self) -> int:
        """The number of sessions after the first one."""
        return max(0, len(self._session_lines) - 1)

    @cached_property
    def _session_lines(self) -> list[str]:
        return read_lines(self.path / "starts.jsonl")

    @cached_property
    def job_file(self) -> dict[str, Any]:
        """job.json: the SLURM job to which the run was submitted last, and its attempts."""
        return read_json(self.path / "job.json", content.JOB)

    @property
    def submitted_job(self) -> Job | None:
        """The SLURM job to which the run was submitted last."""
        if not self.job_file:
            return None
        return Job(str(self.job_file.get("job_id")), self.job_file.get("array_task"), self.job_file.get("log") or "")

    @property
    def job(self) -> Job | None:
        """The SLURM job of the last session, or the submitted job if that is newer. None if started by hand since."""
        submitted = self.submitted_job
        is_newer = modified_at(self.path / "job.json") > modified_at(self.path / "starts.jsonl")
        if not self.sessions or (submitted and is_newer):
            return submitted
        session = self.last_session
        if not session.get("job"):
            return None
        log = submitted.log if submitted and submitted.id in (session["job"], session.get("array_job")) else ""
        return Job(session["job"], session.get("array_task"), log, session.get("array_job"))

    @cached_property
    def wandb_id(self) -> str:
        """The run's id in W&B; empty if nothing was logged there."""
        path = self.path / "wandb" / "run-id"
        with _folder_errors(path):
            try:
                return path.read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return ""

    @property
    def wandb_project(self) -> str:
        """The setting log.project."""
        if "log.project" not in self.settings:
            raise unreadable_file(self.path / "config.yaml", ValueError("expected the setting log.project"))
        return str(self.settings["log.project"])

    @cached_property
    def offline_wandb_sessions(self) -> tuple[Path, ...]:
        """Folders of W&B sessions that were not uploaded yet, oldest first."""
        folders = (self.path / "wandb").glob("offline-run-*")
        return tuple(
            sorted(folder for folder in folders if folder.is_dir() and not list(folder.glob("*.wandb.synced")))
        )

    @cached_property
    def metric_names(self) -> frozenset[str]:
        """Names of all values in metrics.jsonl, with their split, as in W&B: "test/accuracy"."""
        rows = self._parse_rows(read_lines(self.path / "metrics.jsonl"))
        return frozenset(f"{row['split']}/{name}" for row in rows for name in row if name not in ("split", "step"))

    @property
    def modified_at(self) -> float:
        """Time of the last change, in seconds since 1970."""
        return max(modified_at(self.path / name) for name in _FILES)


def read_json(path: Path, shape: content.Shape = content.OBJECT) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if there is no file. Raises FolderError if it cannot be read.

    shape: the types that its values must have.
    """
    with _folder_errors(path):
        try:
            return content.parse_json(path.read_text(encoding="utf-8"), shape)
        except FileNotFoundError:
            return {}


def is_file(path: Path) -> bool:
    """Returns whether there is a file. Path.is_file() raises OSError for a folder that this user may not enter."""
    try:
        return path.is_file()
    except OSError:
        return False


def modified_at(path: Path) -> float:
    """Returns when a file was written, in seconds since 1970; 0 if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def unreadable_file(path: Path, error: Exception) -> FolderError:
    """Returns the error for a file of a run that somebody damaged, or that this user may not read."""
    problem = getattr(error, "strerror", None) or one_line(error)
    return FolderError(f"{path} cannot be read as a file of a run ({problem}); repair it, or restore it from a copy")


@contextlib.contextmanager
def _folder_errors(path: Path) -> Iterator[None]:
    """Turns errors of reading and of unexpected content into a FolderError."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise unreadable_file(path, error) from None


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file; none if there is no file. Raises FolderError if it cannot be read."""
    with _folder_errors(path):
        try:
            # A damaged byte makes its own line unreadable, not the file.
            return path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
