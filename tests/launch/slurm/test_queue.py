"""Jobs and array tasks in the output of squeue; tests/launch/runs covers the states of runs."""

import pytest

from launch.slurm import client
from launch.slurm.queue import Job, Queue, read_queue

SQUEUE = """5|5|2|PENDING|JobArrayTaskLimit
6|5|0|RUNNING|None
7|7|N/A|REQUEUED|BeginTime
"""


@pytest.fixture
def squeue_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replaces squeue and records its calls."""
    calls: list[tuple[str, ...]] = []

    def call(*argv: str, timeout_seconds: float) -> str:
        calls.append(argv)
        return SQUEUE

    monkeypatch.setattr(client, "call", call)
    monkeypatch.setattr(client, "is_available", lambda: True)
    return calls


def test_queue_finds_jobs_and_array_tasks(squeue_calls: list[tuple[str, ...]]) -> None:
    queue = read_queue([None, Job("7")])
    entries = [
        queue.find(job) for job in (Job("5", 2), Job("6", 0), Job("5", 0), Job("7"), Job("5", 3), Job("8"), None)
    ]
    assert [entry.id if entry else None for entry in entries] == ["5_2", "5_0", "5_0", "7", None, None, None]
    assert [(entry.is_waiting, entry.reason) for entry in entries if entry] == [
        (True, "JobArrayTaskLimit"), (False, ""), (False, ""), (True, "BeginTime"),
    ]  # fmt: skip
    assert queue.is_known and len(squeue_calls) == 1


def test_queue_is_not_read_without_a_job(squeue_calls: list[tuple[str, ...]]) -> None:
    assert read_queue([None]) == Queue() and read_queue([]) == Queue() and squeue_calls == []


def test_job_id_of_an_array_task() -> None:
    assert str(Job("7")) == "7" and str(Job("5", 2)) == "5_2" and str(Job("6", 2, array="5")) == "5_2"
