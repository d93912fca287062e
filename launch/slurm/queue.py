"""Reads SLURM's queue once for all runs, and finds the job of a run in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm import client
from trainer.run.record import Job

_TIMEOUT_SECONDS = 10.0  # the table of runs must not wait longer for an unreachable controller


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One line of squeue."""

    id: str
    """the id for scancel: 12, or 12_3 for an array task"""
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """why the job waits: Resources, Priority, ..."""
    ids: tuple[str, ...]
    """the job's own id, then the id of its array"""
    task: str
    """the array task number; empty: the job belongs to no array"""

    @property
    def is_waiting(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of this user, as far as SLURM answered."""

    entries: tuple[QueueEntry, ...] = ()
    is_known: bool = False
    """whether SLURM answered; if not, a job that is missing here may still exist"""
    problem: str = ""
    """why SLURM did not answer, in one line"""

    def find(self, job: Job | None) -> QueueEntry | None:
        """Returns the entry of a job, or None when it has left the queue."""
        task = "" if job is None or job.array_task is None else str(job.array_task)
        for entry in self.entries:
            if job is not None and (job.id in entry.ids and entry.task == task if task else job.id == entry.ids[0]):
                return entry
        return None


def read_queue(jobs: Sequence[Job | None]) -> Queue:
    """Returns this user's queue. Calls squeue only when a job is given and SLURM is installed.

    Reads the whole queue: squeue refuses a list of jobs when it no longer knows one of them.
    """
    if not any(jobs) or not client.is_available():
        return Queue()
    try:
        # -r prints one line per waiting array task; they share the array's id until they start.
        text = client.call(
            "squeue", "--me", "--noheader", "-r", "-o", "%A|%F|%K|%T|%r", timeout_seconds=_TIMEOUT_SECONDS
        )
    except client.SlurmError as error:
        return Queue(problem=str(error))
    return Queue(tuple(map(_parse_entry, text.splitlines())), is_known=True)


def _parse_entry(line: str) -> QueueEntry:
    job_id, array_id, task, state, reason = line.strip().split("|", 4)
    is_task = task.isdigit()
    entry_id = f"{array_id}_{task}" if is_task else job_id
    return QueueEntry(entry_id, state, "" if reason == "None" else reason, (job_id, array_id), task if is_task else "")
