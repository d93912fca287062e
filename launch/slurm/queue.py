"""Reads SLURM's queue once for all runs, and finds the job of a run in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm import client
from trainer.run.record import Job

# What each state of a job means (man squeue, "JOB STATE CODES"), and how the job continues.
_WAITING = {
    "PENDING": "job {id} waits: {reason}",
    "REQUEUED": "job {id} goes back into the queue: {reason}",
    "REQUEUE_FED": "job {id} goes back into the queue of another cluster",
    "REQUEUE_HOLD": "job {id} is held after a requeue; scontrol release {id} lets it start",
    "RESV_DEL_HOLD": "job {id} is held, because its reservation was deleted; scontrol release {id} lets it start",
    "SPECIAL_EXIT": "job {id} is held, because of a special exit code; scontrol release {id} lets it start",
}
_HALTED = {
    "SUSPENDED": "SLURM has suspended job {id}; scontrol resume {id} continues it, if SLURM does not do so by itself",
    "STOPPED": "SLURM has stopped job {id} and keeps its cores; scancel --signal=CONT {id} continues it",
}
_STARTING = {"CONFIGURING": "the nodes of job {id} are booting"}
_ACTIVE = {
    "RUNNING": "job {id} runs and has not started training",
    "RESIZING": "job {id} changes its number of nodes",
    "SIGNALING": "job {id} gets a signal",
    "STAGE_OUT": "job {id} copies its files back",
    "COMPLETING": "job {id} is ending on its nodes",
}
_ENDED = {
    "COMPLETED": "job {id} has ended",
    "FAILED": "job {id} has failed",
    "CANCELLED": "job {id} was cancelled",
    "TIMEOUT": "job {id} reached its time limit before it could go back into the queue",
    "DEADLINE": "job {id} ended at its deadline",
    "PREEMPTED": "job {id} was preempted: another job got its nodes",
    "NODE_FAIL": "a node of job {id} failed",
    "BOOT_FAIL": "a node of job {id} did not boot",
    "OUT_OF_MEMORY": "job {id} needed more memory than it had requested; request more with --mem",
    "REVOKED": "job {id} was started on another cluster",
}
_SENTENCES = _WAITING | _HALTED | _STARTING | _ACTIVE | _ENDED

_TIMEOUT_SECONDS = 10.0  # the table of runs must not wait longer for an unreachable controller


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One line of squeue."""

    id: str
    """the id for scancel: 12, or 12_3 for an array task"""
    state: str
    """a name in _SENTENCES"""
    reason: str
    """why the job waits: Resources, Priority, ..."""
    ids: tuple[str, ...]
    """the job's own id, then the id of its array"""
    task: str
    """the array task number; empty: the job belongs to no array"""

    @property
    def is_waiting(self) -> bool:
        """Whether the job will start, or can be released to start."""
        return self.state in _WAITING

    @property
    def is_halted(self) -> bool:
        """Whether the job has its nodes, and its processes do not run."""
        return self.state in _HALTED

    @property
    def is_booting(self) -> bool:
        """Whether the job's nodes are not ready yet."""
        return self.state in _STARTING

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    def __str__(self) -> str:
        """Returns a sentence on the state of the job."""
        reason = self.reason or self.state
        return _SENTENCES.get(self.state, "job {id} is in state " + self.state).format(id=self.id, reason=reason)


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of this user, as far as SLURM answered."""

    entries: tuple[QueueEntry, ...] = ()
    is_known: bool = False
    """whether SLURM answered; if not, a job that is missing here may still exist"""
    problem: str = ""
    """why SLURM did not answer, in one line"""

    def find(self, job: Job | None) -> QueueEntry | None:
        """Returns the entry of a job that waits or runs, or None when it has ended."""
        entry = self._find(job)
        return None if entry is None or entry.has_ended else entry

    def find_ended(self, job: Job | None) -> QueueEntry | None:
        """Returns the entry of a job that has ended, as long as SLURM remembers it: 5 minutes, by default."""
        entry = self._find(job)
        return entry if entry is not None and entry.has_ended else None

    def _find(self, job: Job | None) -> QueueEntry | None:
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
            "squeue", "--me", "--noheader", "-r", "--states=all", "-o", "%A|%F|%K|%T|%r",
            timeout_seconds=_TIMEOUT_SECONDS,
        )  # fmt: skip
    except client.SlurmError as error:
        return Queue(problem=str(error))
    return Queue(tuple(map(_parse_entry, text.splitlines())), is_known=True)


def _parse_entry(line: str) -> QueueEntry:
    job_id, array_id, task, state, reason = line.strip().split("|", 4)
    is_task = task.isdigit()
    entry_id = f"{array_id}_{task}" if is_task else job_id
    return QueueEntry(entry_id, state, "" if reason == "None" else reason, (job_id, array_id), task if is_task else "")
