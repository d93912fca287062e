"""SLURM's queue in, what it says of a run's job out. It is asked once for all runs, and only where it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm import client

_LOOK_SECONDS = 10.0  # a table of runs must not wait longer for a controller that is away


@dataclass(frozen=True, slots=True)
class Job:
    """As job.json and starts.jsonl have it: of an array's task, `id` is the array's or the task's own."""

    id: str
    array_task: int | None = None
    log: str = ""
    """path of what SLURM writes of its output; nothing when it is not known"""
    array: str | None = None
    """the array's id, where it is known besides"""

    def __str__(self) -> str:
        """As SLURM's tools call it, as far as it can be known when it has left the queue."""
        return self.id if self.array_task is None else f"{self.array or self.id}_{self.array_task}"


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A line of squeue."""

    id: str
    """as scancel takes it: 12, or 12_3 for an array's task"""
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """why it waits: Resources, Priority, ..."""
    ids: tuple[str, ...]
    task: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True, slots=True)
class Queue:
    entries: tuple[QueueEntry, ...] = ()
    is_known: bool = False
    """whether SLURM has answered: else a job that is not here may be there"""
    trouble: str = ""
    """why it has not, in one line"""

    def find(self, job: Job | None) -> QueueEntry | None:
        """This job, unless it has left the queue."""
        task = "" if job is None or job.array_task is None else str(job.array_task)
        for entry in self.entries:
            if job is not None and (job.id in entry.ids and entry.task == task if task else job.id == entry.ids[0]):
                return entry
        return None


def read_queue(jobs: Sequence[Job | None]) -> Queue:
    """This user's queue. Without a job among those that are asked for, or without SLURM, it is not looked at.

    All of it, and not those jobs: squeue refuses the whole list when it has forgotten one of them.
    """
    if not any(jobs) or not client.is_here():
        return Queue()
    try:
        # -r: each waiting task of an array has a line; they share the array's id until they start.
        text = client.call("squeue", "--me", "--noheader", "-r", "-o", "%A|%F|%K|%T|%r", timeout_seconds=_LOOK_SECONDS)
    except client.SlurmError as error:
        return Queue(trouble=str(error))
    return Queue(tuple(map(_entry, text.splitlines())), is_known=True)


def _entry(line: str) -> QueueEntry:
    own, array, task, state, reason = line.strip().split("|", 4)
    is_task = task.isdigit()
    name = f"{array}_{task}" if is_task else own
    return QueueEntry(name, state, "" if reason == "None" else reason, (own, array), task if is_task else "")
