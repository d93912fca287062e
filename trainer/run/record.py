"""Reads the files of a run folder. Imports nothing slow, because `samecurve status` reads many folders."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.errors import FolderError

_FILES = ("metrics.jsonl", "config.yaml", "status.json", "job.json")  # a run changes at least one of them
_MAX_BYTES_OF_TRAIN_ROWS = 4 << 20  # about 20,000 rows
_TRAIN_ROW_START = '{"split": "train"'
_TAIL_BYTES = (1 << 16, 1 << 22)  # read from the end of metrics.jsonl: first 64 KB, then 4 MB
_SPLIT_MARKS = {split: f'"split": "{split}"'.encode() for split in ("train", "test")}


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


class RunRecord:
    """Reads one run folder. Each attribute reads its file at first use and keeps the content.

    An attribute is empty if its file does not exist. It raises FolderError, with the file's path, if the file cannot
    be read. Create a new RunRecord to see what a running run has written since.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """name: replaces the name in config.yaml, for a report on several runs with the same name."""
        self.path = path
        self._name = name

    @property
    def name(self) -> str:
        return self._name or str(self.settings.get("run.name") or self.path.name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml, by full names such as "optim.lr". Raises FolderError also if the file does not exist."""
        import yaml  # lazy import: 15 ms, and status does not need the settings

        path = self.path / "config.yaml"
        if not path.is_file():
            raise FolderError(f"{self.path} is not a run folder: it has no config.yaml; give the path of a run folder")
        with _folder_errors(path):
            try:
                # The run checked the settings before it wrote them. A second check takes longer than all other reading.
                sections = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
            return {
                f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()
            }

    @cached_property
    def status(self) -> dict[str, Any]:
        """state, step, reason: the last state that the run itself recorded."""
        return read_json(self.path / "status.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json: versions, machine and command of the last session."""
        return read_json(self.path / "environment.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json. The run may have continued with more steps since."""
        return read_json(self.path / "summary.json")

    @property
    def current_summary(self) -> dict[str, Any]:
        """summary.json; empty if the run has trained more steps since."""
        return self.summary if self.summary.get("steps") == self.status.get("step") else {}

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The last evaluation on the test set and its step: classes, confusion matrix, step."""
        return read_json(self.path / "evaluation.json")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl. Omits most train rows if the file exceeds 4 MB, because a chart has fewer pixels."""
        path = self.path / "metrics.jsonl"
        every = 1 + (path.stat().st_size if path.is_file() else 0) // _MAX_BYTES_OF_TRAIN_ROWS
        lines = [
            line
            for index, line in enumerate(_read_lines(path))
            if index % every == 0 or not line.startswith(_TRAIN_ROW_START)
        ]
        return list(_parse_rows(path, lines))

    def points(self, split: str, metric: str) -> list[tuple[float, float]]:
        """Returns the curve of a metric: epoch and value of each row that has a value."""
        return [
            (row["epoch"], row[metric]) for row in self.rows if row["split"] == split and row.get(metric) is not None
        ]

    @property
    def last_train_row(self) -> dict[str, Any]:
        """The last train row of metrics.jsonl."""
        return self._last_rows.get("train", {})

    @property
    def last_test_row(self) -> dict[str, Any]:
        """The last test row in the last 4 MB of metrics.jsonl; empty if there is none in them."""
        return self._last_rows.get("test", {})

    @cached_property
    def _last_rows(self) -> dict[str, dict[str, Any]]:
        """The last train row and the last test row, by split. Reads the last 64 KB, or 4 MB if a row is not in them."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return {}
        lines: list[bytes] = []
        with _folder_errors(path), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for length in _TAIL_BYTES:
                file.seek(max(0, size - length))
                lines = file.read(length).split(b"\n")[1 if length < size else 0 : -1]
                if length >= size or all(any(mark in line for line in lines) for mark in _SPLIT_MARKS.values()):
                    break
            return {
                split: json.loads(line)
                for split, mark in _SPLIT_MARKS.items()
                if (line := next((line for line in reversed(lines) if mark in line), None)) is not None
            }

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """Rows of starts.jsonl, one for each start of training: step, total_steps, world_size, host, job, ..."""
        with _folder_errors(self.path / "starts.jsonl"):
            sessions = [json.loads(line) for line in self._session_lines]
            for session in sessions:
                if not all(isinstance(session.get(key), int) for key in ("step", "total_steps")):
                    raise ValueError("expected step and total_steps in each row")
            return sessions

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
        return _read_lines(self.path / "starts.jsonl")

    @cached_property
    def job_file(self) -> dict[str, Any]:
        """job.json: the SLURM job to which the run was submitted last, and its attempts."""
        return read_json(self.path / "job.json")

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
            return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

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
        path = self.path / "metrics.jsonl"
        rows = _parse_rows(path, _read_lines(path))
        return frozenset(f"{row['split']}/{name}" for row in rows for name in row if name not in ("split", "step"))

    @property
    def modified_at(self) -> float:
        """Time of the last change, in seconds since 1970."""
        return max(modified_at(self.path / name) for name in _FILES)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if there is no file. Raises FolderError if it cannot be read."""
    with _folder_errors(path):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return content


def modified_at(path: Path) -> float:
    """Returns when a file was written, in seconds since 1970; 0 if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def unreadable_file(path: Path, error: Exception) -> FolderError:
    """Returns the error for a file of a run that somebody damaged, or that this user may not read."""
    problem = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    return FolderError(f"{path} cannot be read as a file of a run ({problem}); repair or remove it")


@contextmanager
def _folder_errors(path: Path) -> Iterator[None]:
    """Turns errors of reading and of unexpected content into a FolderError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable_file(path, error) from None


def _read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file; none if there is no file."""
    with _folder_errors(path):
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _parse_rows(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the row of each line. Skips a line that a killed run has cut off."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or "split" not in row:
            raise unreadable_file(path, ValueError("expected an object with a split in each row"))
        yield row
