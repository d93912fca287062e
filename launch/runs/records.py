"""A run folder in, what its files say of the run out. Only reads, and of long files only the end."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from launch.slurm.queue import Job

MARKS = ("config.yaml", "status.json", "job.json")
"""One of these makes a folder a run's."""
# Large, and no place for runs.
_INSIDES = {"checkpoints", "tensorboard", "wandb", "logs"}
_TAILS = (1 << 16, 1 << 22)  # bytes from the end of metrics.jsonl; evaluations may be rare
_MARK_OF = {split: f'"split": "{split}"'.encode() for split in ("train", "test")}


@dataclass(frozen=True, slots=True)
class Records:
    """What is not there is empty."""

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    """the last line of training"""
    test: dict[str, Any] = field(default_factory=dict)
    """the last line of an evaluation on the test set"""
    job: Job | None = None
    trouble: str = ""
    """why the files could not be read"""

    @property
    def start(self) -> dict[str, Any]:
        """The last one."""
        return self.starts[-1] if self.starts else {}

    @property
    def changed(self) -> float:
        """When something was last written, in seconds since 1970."""
        return max(modified(self.path / name) for name in ("metrics.jsonl", *MARKS))


def is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in MARKS)


def find(root: Path) -> list[Path]:
    """The run folders at and below a folder, those of sweeps too."""
    found = []
    for place, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in _INSIDES and not name.startswith("."))
        if any(mark in files for mark in MARKS):
            found.append(Path(place))
    return found


def load(path: Path) -> Records:
    """A folder whose files cannot be read, or are not ours, is told as such: it must not hide the others."""
    try:
        status = _json(path / "status.json")
        starts = list(_starts(path))
        rows = dict(_last_rows(path / "metrics.jsonl"))
        return Records(path, status, starts, rows.get("train", {}), rows.get("test", {}), _job(path, starts))
    except (OSError, ValueError) as error:
        return Records(path, trouble=f"{type(error).__name__}: {error}")


def modified(path: Path) -> float:
    """When a file was written; 0 when it is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _json(path: Path) -> dict[str, Any]:
    """Nothing when there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _starts(path: Path) -> Iterator[dict[str, Any]]:
    """What trainer/starts.py has left there."""
    file = path / "starts.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        found = json.loads(line)
        if not isinstance(found, dict) or not all(isinstance(found.get(name), int) for name in ("step", "total_steps")):
            raise ValueError(f"{file.name} holds a line that is no start")
        yield found


def _job(path: Path, starts: list[dict[str, Any]]) -> Job | None:
    """The SLURM job that the run was given to last. A start by hand, later than that, has none."""
    found = _json(path / "job.json")
    given = None
    if found:
        given = Job(str(found.get("job_id")), found.get("array_task"), found.get("log") or "")
    if not starts or (given and modified(path / "job.json") > modified(path / "starts.jsonl")):
        return given
    last = starts[-1]
    if not last.get("job"):
        return None
    log = given.log if given and given.id in (last["job"], last.get("array_job")) else ""
    return Job(last["job"], last.get("array_task"), log, last.get("array_job"))


def _last_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The last whole line of training, and of evaluation."""
    if not path.is_file():
        return
    lines: list[bytes] = []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for length in _TAILS:
            file.seek(max(0, size - length))
            lines = file.read(length).split(b"\n")[1 if length < size else 0 : -1]
            if length >= size or all(any(mark in line for line in lines) for mark in _MARK_OF.values()):
                break
    for split, mark in _MARK_OF.items():
        line = next((line for line in reversed(lines) if mark in line), None)
        if line is not None:
            yield split, json.loads(line)


def start_of_last(file: BinaryIO, count: int) -> int:
    """Where the last `count` lines of a file of any length begin."""
    newlines = count + 1  # the one that ends the line before them too
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        begin = max(0, position - _TAILS[0])
        file.seek(begin)
        block = file.read(position - begin)
        at = len(block)
        while newlines and (at := block.rfind(b"\n", 0, at)) >= 0:
            newlines -= 1
        if not newlines:
            return begin + at + 1
        position = begin
    return 0


def last_lines(path: Path, count: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(start_of_last(file, count))
        return file.read().decode(errors="replace").splitlines()[-count:]
