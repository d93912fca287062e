"""Run folders in, the facts of each run out: what its files say, whether it is held, and what SLURM says of its job."""

import difflib
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launch.runs import records
from launch.runs.records import Records
from launch.slurm.queue import Queue, QueueEntry, read_queue
from trainer.errors import UserError
from trainer.run import lock

OVER = ("finished", "stopped", "failed", "died", "not started", "unreadable")
# A run of another machine writes something in this time, unless it has died: locks may not be seen from here.
_SILENT_SECONDS = 600.0
_LOOK_SECONDS = 0.5
_ASK_SECONDS = 30.0


class NoRunError(UserError):
    """There is no such run."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is not known, or not yet, is None."""

    name: str
    path: Path
    state: str
    """running, queued (by SLURM), starting, or one of OVER"""
    reason: str = ""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    accuracy: float | None = None
    """of the last evaluation on the test set"""
    samples_per_second: float | None = None
    seconds_left: float | None = None
    world_size: int | None = None
    job: str | None = None
    """as scancel takes it"""
    restarts: int = 0
    host: str | None = None
    """where rank 0 was started last"""
    log: str = ""
    """path of what SLURM writes of the job's output"""
    has_hang_report: bool = False
    is_held: bool = False
    """a process has the folder"""
    in_queue: bool = False
    changed: float = 0.0
    """when something was last written, in seconds since 1970"""

    @property
    def is_over(self) -> bool:
        """Nobody works on it, and nothing will by itself."""
        waits_for_job = self.in_queue and self.state != "finished"  # one that failed may be started again by its job
        return self.state in OVER and not self.is_held and not waits_for_job

    def __str__(self) -> str:
        return f"{self.name}: {self.state}{f' ({self.reason})' if self.reason else ''}"


def find_run(name: str, root: Path) -> Path:
    """The folder of a run, given by its name below the root or by its path. Raises NoRunError, with near names."""
    for path in (root / name, Path(name).expanduser()):
        if records.is_run(path):
            return path
    names = [path.relative_to(root).as_posix() for path in records.find(root)]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [other for other in names if name in other][:3]
    if near:
        raise NoRunError(f"no run '{name}' under {root}; did you mean {' or '.join(near)}?")
    raise NoRunError(f"no run '{name}' under {root}; samecurve status lists what is there, --root looks elsewhere")


def has_begun(path: Path) -> bool:
    """Whether it is the folder of a run that has begun."""
    return (path / "config.yaml").is_file() and (path / "environment.json").is_file()


def find_run_or_weights(name: str, root: Path) -> Path:
    """The same, or a file of weights or a checkpoint's folder, given by its path."""
    path = Path(name).expanduser()
    return path if path.is_file() or (path / "manifest.json").is_file() else find_run(name, root)


def read_runs(paths: list[Path], root: Path) -> tuple[list[Run], Queue]:
    """The runs in these folders, the one that was written to last first; SLURM's queue is asked once, if need be."""
    loaded = [records.load(path) for path in paths]
    queue = read_queue([found.job for found in loaded if found.status.get("state") != "finished"])
    return sorted((run_state(found, root, queue) for found in loaded), key=lambda run: run.changed, reverse=True), queue


class RunPoller:
    """Called again and again by who waits for a run's end: its folder is looked at twice a second, SLURM's queue, which
    has others to answer too, twice a minute, or more often when its folder says that it is over."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path, self._root = path, root
        self._queue = Queue()
        self._run: Run | None = None
        self._looked = self._asked = -math.inf

    def __call__(self) -> Run:
        now = time.monotonic()
        if self._run is not None and now - self._looked < _LOOK_SECONDS:
            return self._run
        found = records.load(self._path)
        is_quick = self._run is None or self._run.state in OVER
        if now - self._asked >= (_ASK_SECONDS / 6 if is_quick else _ASK_SECONDS):
            self._queue, self._asked = read_queue([found.job]), now
        self._run, self._looked = run_state(found, self._root, self._queue), now
        return self._run


def run_state(found: Records, root: Path, queue: Queue) -> Run:
    """One run."""
    path, status, start, train = found.path, found.status, found.start, found.train
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else str(path)
    if found.trouble:
        return Run(name, path, "unreadable", found.trouble, changed=found.changed)
    entry, held = queue.find(found.job), lock.is_held(path)
    state, reason = _state(found, held, entry, queue)
    step = max((row["step"] for row in (status, train, found.test) if row.get("step") is not None), default=None)
    # A run of an earlier version has left no starts; a finished one has all its steps.
    total_steps = start.get("total_steps") or (step if state == "finished" else None)
    return Run(
        name=name,
        path=path,
        state=state,
        reason=reason,
        step=step,
        total_steps=total_steps,
        epoch=max((row["epoch"] for row in (train, found.test) if row.get("epoch") is not None), default=None),
        accuracy=found.test.get("accuracy"),
        samples_per_second=train.get("samples_per_second"),
        seconds_left=_seconds_left(found, step, total_steps) if state == "running" else None,
        world_size=start.get("world_size"),
        job=entry.id if entry is not None else str(found.job) if found.job is not None else None,
        restarts=max(0, len(found.starts) - 1),
        host=start.get("host"),
        log=found.job.log if found.job is not None else "",
        has_hang_report=(path / "hang-report.txt").is_file(),
        is_held=held,
        in_queue=entry is not None,
        changed=found.changed,
    )


def _state(found: Records, held: bool, entry: QueueEntry | None, queue: Queue) -> tuple[str, str]:
    """The state and the reason for it. status.json has the state that the run was in when it could last say so."""
    said, why = str(found.status.get("state", "")), str(found.status.get("reason", ""))
    if said == "finished":
        return said, why
    if held:
        # A process that has taken the folder and says nothing yet is reading its data set.
        is_new = lock.held_since(found.path) > records.modified(found.path / "status.json")
        return ("starting", "a process holds the folder and does not train yet") if is_new else (said, why)
    if entry is not None and entry.waits:
        return "queued", f"job {entry.id} waits: {entry.reason or entry.state}"
    if said not in ("", "running"):
        return said, why
    if entry is not None:
        return said or "starting", "" if said else f"job {entry.id} is {entry.state}"
    if found.job is not None and not _is_told(found.path, queue):
        return said or "queued", f"nothing is known of job {found.job} here"
    return _without_a_process(found, said)


def _without_a_process(found: Records, said: str) -> tuple[str, str]:
    """Of a run that has not come to its end, that nobody holds as far as this machine sees, and that has no job."""
    if not said:
        return "not started", f"job {found.job} has left the queue" if found.job else "it has never come to training"
    host, silent = found.start.get("host", ""), time.time() - found.changed
    if found.job is None and host not in ("", socket.gethostname()) and silent < _SILENT_SECONDS:
        return "running", f"on {host}, which is another machine; it wrote something {silent:.0f} s ago"
    where = f" on {host}" if host else ""
    return "died", f"its process{where} is gone without a word; the same command goes on from the last checkpoint"


def _is_told(path: Path, queue: Queue) -> bool:
    """Whether a job that is not in the queue is gone: squeue shows this user's jobs, and the run may be another's."""
    return queue.is_known and path.stat().st_uid == os.getuid()


def _seconds_left(found: Records, step: int | None, total_steps: int | None) -> float | None:
    train = found.train
    if not train.get("samples_per_second") or not train.get("step") or step is None or total_steps is None:
        return None
    samples_per_step = train["samples"] / train["step"]
    return float((total_steps - step) * samples_per_step / train["samples_per_second"])
