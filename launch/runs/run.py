"""Determines the state of runs from three sources: the files of the run folder, its lock, and SLURM's queue."""

import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.queue import Queue, QueueEntry, read_queue
from trainer.errors import FolderError
from trainer.run import lock
from trainer.run.record import Job, RunRecord, is_file, modified_at, unreadable_file
from trainer.text.escape import escape

ENDED_STATES = ("finished", "stopped", "failed", "died", "not started", "unreadable")
# A live run writes a file at least this often. Locks of another machine may be invisible here.
_SILENCE_SECONDS = 600.0
_READ_FOLDER_SECONDS = 0.5
_READ_QUEUE_SECONDS = 30.0
_READ_QUEUE_SOON_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """The state of a run. Unknown values are None. `samecurve status --json` prints all fields."""

    name: str
    path: Path
    state: str
    """running, queued, suspended (both by SLURM), starting, or one of ENDED_STATES"""
    reason: str = ""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    accuracy: float | None = None
    """of the last evaluation on the test set, in [0, 1]"""
    validation_accuracy: float | None = None
    """of the last evaluation on the validation part, in [0, 1]; None without one"""
    samples_per_second: float | None = None
    seconds_left: float | None = None
    world_size: int | None = None
    job: str | None = None
    """id for scancel"""
    restarts: int = 0
    host: str | None = None
    """host of rank 0 in the last session"""
    log: str = ""
    """path of the SLURM job's output"""
    has_hang_report: bool = False
    is_held: bool = False
    """whether a process holds the run folder"""
    in_queue: bool = False
    """whether the SLURM job waits or runs"""
    changed: float = 0.0
    """time of the last change, in seconds since 1970"""
    problems: tuple[str, ...] = ()
    """parts of its files that were skipped because they cannot be read"""

    @property
    def is_over(self) -> bool:
        """Whether no process works on the run and none will start without a new command."""
        waits_for_job = self.in_queue and self.state != "finished"  # the job may restart a failed run
        return self.state in ENDED_STATES and not self.is_held and not waits_for_job

    def __str__(self) -> str:
        """Returns name, state and reason in one line for people."""
        return escape(f"{self.name}: {self.state}{f' ({self.reason})' if self.reason else ''}")


def read_runs(paths: list[Path], root: Path) -> tuple[list[Run], Queue]:
    """Returns the runs in these folders, last changed first, and SLURM's queue. Calls squeue at most once."""
    records = [RunRecord(path) for path in paths]
    queue = read_queue([_unfinished_job(record) for record in records])
    runs = [build_run(record, root, queue) for record in records]
    return sorted(runs, key=lambda run: run.changed, reverse=True), queue


class RunPoller:
    """Returns the current state of one run. Call it as often as you like.

    Reads the run folder at most twice a second. Reads SLURM's queue, which serves all users, at most twice a minute, or
    every 5 s if the folder says that the run has ended.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self._path, self._root = path, root
        self._queue = Queue()
        self._run: Run | None = None
        self._folder_time = self._queue_time = -math.inf

    def __call__(self) -> Run:
        now = time.monotonic()
        if self._run is not None and now - self._folder_time < _READ_FOLDER_SECONDS:
            return self._run
        record = RunRecord(self._path)
        seems_ended = self._run is None or self._run.state in ENDED_STATES
        if now - self._queue_time >= (_READ_QUEUE_SOON_SECONDS if seems_ended else _READ_QUEUE_SECONDS):
            self._queue, self._queue_time = read_queue([_job(record)]), now
        self._run, self._folder_time = build_run(record, self._root, self._queue), now
        return self._run


def build_run(record: RunRecord, root: Path, queue: Queue) -> Run:
    """Returns the state of a run. The state is "unreadable" if a file cannot be read, so that other runs are shown."""
    path = record.path
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else str(path)
    try:
        return _build_run(record, name, queue)
    except FolderError as error:
        return Run(name, path, "unreadable", str(error), changed=record.modified_at)
    except OSError as error:  # somebody removes the folder at this moment, or this user may not read it
        return Run(name, path, "unreadable", str(unreadable_file(path, error)), changed=record.modified_at)


def _build_run(record: RunRecord, name: str, queue: Queue) -> Run:
    """Raises FolderError if a file cannot be read."""
    session, train, test = record.last_session, record.last_train_row, record.last_test_row
    entry, is_held = queue.find(record.job), lock.is_held(record.path)
    state, reason = _state_and_reason(record, is_held, entry, queue)
    rows = (record.status, train, test)
    step = max((row["step"] for row in rows if row.get("step") is not None), default=None)
    # A run of an earlier version has no starts.jsonl. If it is finished, it has done all its steps.
    total_steps = session.get("total_steps") or (step if state == "finished" else None)
    return Run(
        name=name,
        path=record.path,
        state=state,
        reason=reason,
        step=step,
        total_steps=total_steps,
        epoch=max((row["epoch"] for row in (train, test) if row.get("epoch") is not None), default=None),
        accuracy=test.get("accuracy"),
        validation_accuracy=record.last_validation_row.get("accuracy"),
        samples_per_second=train.get("samples_per_second"),
        seconds_left=_seconds_left(record, step, total_steps) if state == "running" else None,
        world_size=session.get("world_size"),
        job=entry.id if entry is not None else str(record.job) if record.job is not None else None,
        restarts=record.restarts,
        host=session.get("host"),
        log=record.job.log if record.job is not None else "",
        has_hang_report=is_file(record.path / "hang-report.txt"),
        is_held=is_held,
        in_queue=entry is not None,
        changed=record.modified_at,
        problems=tuple(record.problems),
    )


def _job(record: RunRecord) -> Job | None:
    try:
        return record.job
    except FolderError:
        return None


def _unfinished_job(record: RunRecord) -> Job | None:
    """Returns the job of a run that is not finished."""
    try:
        return None if record.status.get("state") == "finished" else record.job
    except FolderError:
        return None


def _state_and_reason(record: RunRecord, is_held: bool, entry: QueueEntry | None, queue: Queue) -> tuple[str, str]:
    """Corrects the state in status.json, which is out of date if the run was killed or has been submitted again."""
    state, reason = str(record.status.get("state", "")), str(record.status.get("reason", ""))
    if state == "finished":
        return state, reason
    if entry is not None and entry.is_halted:
        return "suspended", str(entry)
    if is_held:
        # A process that has the lock and has written no status yet is reading its data set.
        is_starting = lock.held_since(record.path) > modified_at(record.path / "status.json")
        return (
            ("starting", "a process holds the folder and has not started training") if is_starting else (state, reason)
        )
    if entry is not None and (entry.is_waiting or entry.is_booting):
        return "queued" if entry.is_waiting else "starting", str(entry)
    if state not in ("", "running"):
        return state, reason
    if entry is not None:
        return state or "starting", "" if state and entry.state == "RUNNING" else str(entry)
    if record.job is not None and not _is_queue_complete(record.path, queue):
        return state or "queued", f"the state of job {record.job} is unknown on this machine"
    return _state_without_process(record, state, queue.find_ended(record.job))


def _state_without_process(record: RunRecord, state: str, ended: QueueEntry | None) -> tuple[str, str]:
    """Returns the state of an unfinished run that has neither a job nor a process that this machine can see.

    ended: the job that has ended, if SLURM remembers it.
    """
    if not state:
        has_left = f"job {record.job} has left the queue" if record.job else "it has never started training"
        return "not started", str(ended) if ended is not None else has_left
    host, silent_seconds = record.last_session.get("host", ""), time.time() - record.modified_at
    if record.job is None and host not in ("", socket.gethostname()) and silent_seconds < _SILENCE_SECONDS:
        return "running", f"on {host}, which is another machine; last change {silent_seconds:.0f} s ago"
    on_host = f" on {host}" if host else ""
    cause = str(ended) if ended is not None else f"its process{on_host} is gone and left no reason"
    return "died", f"{cause}; run the same command to continue from the last checkpoint"


def _is_queue_complete(path: Path, queue: Queue) -> bool:
    """Returns whether a job that is missing in the queue has ended. squeue lists only the jobs of this user."""
    return queue.is_known and path.stat().st_uid == os.getuid()


def _seconds_left(record: RunRecord, step: int | None, total_steps: int | None) -> float | None:
    train = record.last_train_row
    if not train.get("samples_per_second") or not train.get("step") or step is None or total_steps is None:
        return None
    samples_per_step = train.get("samples", math.nan) / train["step"]
    seconds = (total_steps - step) * samples_per_step / train["samples_per_second"]
    return seconds if math.isfinite(seconds) else None
