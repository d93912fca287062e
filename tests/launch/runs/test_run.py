"""The state of runs from their files, locks and SLURM's queue; finding runs; reading the end of long files."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import fake_squeue, make_run_folder

from launch.runs import tail
from launch.runs.find import NoRunError, find_run, find_runs
from launch.runs.run import Run, build_run, read_runs
from launch.slurm.queue import Queue, QueueEntry, read_queue
from trainer.run import lock
from trainer.run.lock import FolderLock
from trainer.run.record import Job, RunRecord

HERE = socket.gethostname()
EMPTY = Queue(is_known=True)
# What squeue of SLURM 22.05 printed for an array with one task running and a job that is held.
SQUEUE = (
    r"5|5|1|PENDING|JobArrayTaskLimit\n5|5|2|PENDING|JobArrayTaskLimit\n"
    r"7|7|N/A|PENDING|JobHeldUser\n6|5|0|RUNNING|None\n"
)


def state_of(path: Path, queue: Queue = EMPTY) -> Run:
    return build_run(RunRecord(path), Path("runs"), queue)


def queue_with(state: str, reason: str = "") -> Queue:
    return Queue((QueueEntry("7", state, reason, ("7", "7"), ""),), is_known=True)


def row(split: str, step: int, **metrics: float) -> str:
    return json.dumps({"split": split, "step": step, "epoch": step / 10, "samples": step * 64, **metrics}) + "\n"


JOB: dict[str, Any] = {}
IN_JOB = {"job": "7"}


@pytest.mark.parametrize(
    ("status", "session", "job", "queue", "state", "reason"),
    [
        ("finished", {}, None, EMPTY, "finished", "why finished"),
        ("stopped", {}, None, EMPTY, "stopped", "why stopped"),
        ("failed", {}, None, EMPTY, "failed", "why failed"),
        ("running", {}, None, EMPTY, "died", "is gone"),
        ("running", IN_JOB, JOB, EMPTY, "died", "is gone"),
        ("running", IN_JOB, JOB, queue_with("RUNNING"), "running", ""),
        ("running", IN_JOB, JOB, Queue(), "running", "the state of job 7 is unknown on this machine"),
        ("running", {"host": "another"}, None, EMPTY, "running", "another machine"),
        ("running", IN_JOB, JOB, queue_with("PENDING", "BeginTime"), "queued", "job 7 waits: BeginTime"),
        ("stopped", IN_JOB, JOB, queue_with("PENDING", "Priority"), "queued", "job 7 waits: Priority"),
        ("finished", IN_JOB, JOB, queue_with("COMPLETING"), "finished", "why finished"),
        (None, None, JOB, queue_with("PENDING", "Resources"), "queued", "job 7 waits: Resources"),
        (None, None, JOB, queue_with("RUNNING"), "starting", "job 7 runs and has not started training"),
        (None, None, JOB, EMPTY, "not started", "job 7 has left the queue"),
        (None, None, JOB, Queue(), "queued", "the state of job 7 is unknown on this machine"),
        (None, None, None, EMPTY, "not started", "never started training"),
    ],
)
def test_state_combines_run_folder_and_queue(
    status: str | None,
    session: dict[str, Any] | None,
    job: dict[str, Any] | None,
    queue: Queue,
    state: str,
    reason: str,
) -> None:
    run = state_of(make_run_folder("x", (status, 30) if status else None, session, job), queue)
    assert run.state == state and reason in run.reason
    assert run.job == ("7" if job is not None else None)
    assert run.is_over == (state in ("finished", "stopped", "failed", "died", "not started"))


JOB_STATES = {
    "PENDING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "queued", "REQUEUE_FED": "queued",
    "RESV_DEL_HOLD": "queued", "SPECIAL_EXIT": "queued", "CONFIGURING": "starting", "RUNNING": "running",
    "COMPLETING": "running", "RESIZING": "running", "SIGNALING": "running", "STAGE_OUT": "running",
    "SUSPENDED": "suspended", "STOPPED": "suspended", "BOOT_FAIL": "died", "CANCELLED": "died", "COMPLETED": "died",
    "DEADLINE": "died", "FAILED": "died", "NODE_FAIL": "died", "OUT_OF_MEMORY": "died", "PREEMPTED": "died",
    "REVOKED": "died", "TIMEOUT": "died", "A_STATE_OF_ANOTHER_SLURM": "running",
}  # fmt: skip


@pytest.mark.parametrize("job_state", JOB_STATES)
def test_every_state_of_a_job_has_a_state_and_a_sentence(job_state: str) -> None:
    path = make_run_folder("x", ("running", 30), IN_JOB, JOB)
    run = state_of(path, queue_with(job_state))
    assert run.state == JOB_STATES[job_state]
    assert run.is_over == (run.state == "died") and run.in_queue == (run.state != "died")
    assert run.reason.count("job 7") == 1 or job_state == "RUNNING"
    new = state_of(make_run_folder("new", job={}), queue_with(job_state))
    assert "7" in new.reason and new.state in ("queued", "starting", "suspended", "not started")
    assert new.is_over == (new.state == "not started")


@pytest.mark.parametrize("job_state", ["SUSPENDED", "STOPPED"])
def test_suspended_run_has_no_time_left_although_it_holds_its_folder(job_state: str) -> None:
    rows = row("train", 10, samples_per_second=64.0)
    path = make_run_folder("x", ("running", 10), IN_JOB, JOB, rows=rows)
    with held(path):
        os.utime(path / "status.json", (time.time() + 1, time.time() + 1))
        assert state_of(path, queue_with("RUNNING")).seconds_left is not None
        run = state_of(path, queue_with(job_state))
    assert run.state == "suspended" and run.seconds_left is None and not run.is_over


def test_silent_run_on_another_machine_has_died() -> None:
    path = make_run_folder("x", ("running", 3), {"host": "another"})
    for name in ("status.json", "config.yaml"):
        os.utime(path / name, (1000, 1000))
    assert state_of(path).state == "died" and "on another" in state_of(path).reason


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a run folder as a run does."""
    folder_lock = FolderLock(path)
    assert folder_lock.try_acquire(lambda event, detail: None)
    yield
    folder_lock.release()


def test_held_folder_is_starting_running_or_ending() -> None:
    path = make_run_folder("x", ("stopped", 3), {})
    minute_ago = time.time() - 60
    (path / lock.LOCK_FILE).touch()
    os.utime(path / lock.LOCK_FILE, (minute_ago - 9, minute_ago - 9))
    os.utime(path / "status.json", (minute_ago, minute_ago))
    with held(path):
        assert state_of(path).state == "starting" and not state_of(path).is_over
        (path / "status.json").write_text('{"state": "running", "step": 3, "reason": ""}')
        time.sleep(0.02)
        os.utime(path / "status.json")
        assert state_of(path).state == "running"
        (path / "status.json").write_text('{"state": "stopped", "step": 9, "reason": "SIGTERM"}')
        os.utime(path / "status.json", (time.time() + 1, time.time() + 1))
        assert state_of(path).state == "stopped" and not state_of(path).is_over  # the process closes its trackers
    assert state_of(path).is_over


def test_reader_of_a_lock_does_not_block_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    (tmp_path / lock.LOCK_FILE).touch()
    with (tmp_path / lock.LOCK_FILE).open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        # The reader releases its shared lock while the run waits.
        monkeypatch.setattr(lock.time, "sleep", lambda _: fcntl.flock(reader, fcntl.LOCK_UN))
        with held(tmp_path):
            assert not FolderLock(tmp_path).try_acquire(lambda event, detail: None)


def test_numbers_come_from_the_last_complete_rows() -> None:
    rows = row("train", 10, samples_per_second=64.0) + row("test", 10, accuracy=0.5)
    rows += row("train", 20, samples_per_second=128.0) + row("train", 30, samples_per_second=640.0)
    path = make_run_folder("x", ("running", 0), {}, rows=rows + '{"split": "train", "step": 3')
    with held(path):
        os.utime(path / "status.json", (time.time() + 1, time.time() + 1))
        run = state_of(path)
    assert (run.step, run.total_steps, run.epoch, run.accuracy, run.world_size) == (30, 90, 3.0, 0.5, 2)
    assert run.samples_per_second == 640 and run.seconds_left == 60 * 64 / 640
    assert run.restarts == 1 and run.host == HERE and run.name == "x"


def test_long_metrics_file_is_read_from_its_end() -> None:
    path = make_run_folder("x", ("finished", 60_000), {})
    with (path / "metrics.jsonl").open("w") as file:
        file.write(row("test", 5, accuracy=0.25))
        file.writelines(row("train", step, samples_per_second=1.0) for step in range(60_000))
    assert (path / "metrics.jsonl").stat().st_size > 5e6
    run = state_of(path)
    assert (run.step, run.accuracy, run.samples_per_second) == (
        60_000,
        None,
        1.0,
    )  # the test row is further back than 4 MB
    with (path / "metrics.jsonl").open("a") as file:
        file.write(row("test", 59_000, accuracy=0.75))
        file.writelines(row("train", step, samples_per_second=2.0) for step in range(59_000, 60_001))
    run = state_of(path)
    assert (run.step, run.accuracy, run.samples_per_second) == (60_000, 0.75, 2.0)


def test_failed_run_is_not_over_while_its_job_runs() -> None:
    path = make_run_folder("x", ("failed", 3), IN_JOB, JOB)
    run = state_of(path, queue_with("RUNNING"))  # the job may restart the ranks
    assert run.state == "failed" and not run.is_over and state_of(path).is_over


@pytest.mark.parametrize("count", [0, 1, 2, 5000, 9999, 20000])
def test_last_lines_of_a_file_of_many_blocks(count: int, tmp_path: Path) -> None:
    lines = [f"line {number} of many" for number in range(10_000)]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    assert tail.last_lines(tmp_path / "log", count) == (lines[-count:] if count else [])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "run'])
def test_unreadable_run_does_not_hide_the_others(content: str) -> None:
    (make_run_folder("bad", ("running", 1), {}) / "status.json").write_text(content)
    make_run_folder("good", ("finished", 9), {})
    runs, _ = read_runs(find_runs(Path("runs")), Path("runs"))
    assert {run.name: run.state for run in runs} == {"bad": "unreadable", "good": "finished"}
    assert all("bad/status.json" in run.reason for run in runs if run.name == "bad")


def test_runs_are_found_at_any_depth() -> None:
    for name in ("a", "sweep/point-1", "sweep/point-2", "sweep/deep/er"):
        make_run_folder(name, ("finished", 1), {})
    (Path("runs") / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (Path("runs") / "a" / "checkpoints" / "step-1" / "config.yaml").touch()
    (Path("runs") / "refused").mkdir()
    (Path("runs") / "refused" / ".lock").touch()
    root = Path("runs")
    names = [path.relative_to(root).as_posix() for path in find_runs(root)]
    assert names == ["a", "sweep/deep/er", "sweep/point-1", "sweep/point-2"]
    os.utime(root / "a" / "config.yaml", (time.time() + 9, time.time() + 9))
    assert read_runs(find_runs(root), root)[0][0].name == "a"
    assert find_run("sweep/point-1", root) == find_run("runs/sweep/point-1", root) == root / "sweep/point-1"
    with pytest.raises(NoRunError, match=r"no run 'sweep/pont-1' under runs; did you mean sweep/point-1 or"):
        find_run("sweep/pont-1", root)
    with pytest.raises(NoRunError, match=r"did you mean sweep/point-. or sweep/point-."):
        find_run("point", root)


def test_job_is_the_last_one_of_session_and_submission() -> None:
    path = make_run_folder("x", ("stopped", 3), {"job": None}, job={})
    assert state_of(path).job is None  # started by hand after the submission
    os.utime(path / "job.json", (time.time() + 9, time.time() + 9))
    assert state_of(path).job == "7" and state_of(path).log == "logs/7.out"  # submitted after that
    path = make_run_folder("task", ("stopped", 3), {"job": "6", "array_job": "5", "array_task": 0}, job={"job_id": "6"})
    assert state_of(path).job == "5_0" and state_of(path).log == "logs/7.out"


def test_queue_distinguishes_tasks_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, f"printf '{SQUEUE}'")
    queue = read_queue([Job("7")])
    runs = [queue.find(Job(name, task)) for name, task in (("5", 2), ("6", 0), ("5", 0), ("7", None), ("5", 3))]
    assert [entry.id if entry else None for entry in runs] == ["5_2", "5_0", "5_0", "7", None]
    assert runs[0] is not None and runs[0].is_waiting and runs[0].reason == "JobArrayTaskLimit"
    assert runs[1] is not None and not runs[1].is_waiting and runs[1].reason == ""


def test_squeue_is_called_once_and_only_for_unfinished_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "")
    make_run_folder("done", ("finished", 3), IN_JOB, JOB)
    make_run_folder("by hand", ("running", 3), {})
    read_runs(find_runs(Path("runs")), Path("runs"))
    assert not Path("squeue-calls").exists()
    for name in "abc":
        make_run_folder(name, ("running", 3), IN_JOB, JOB)
    runs, queue = read_runs(find_runs(Path("runs")), Path("runs"))
    assert Path("squeue-calls").read_text() == "--me --noheader -r --states=all -o %A|%F|%K|%T|%r\n"
    assert queue.is_known and sum(run.state == "died" for run in runs) == 4


def test_unreachable_slurm_controller_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    make_run_folder("x", ("running", 3), IN_JOB, JOB)
    (run,), queue = read_runs(find_runs(Path("runs")), Path("runs"))
    assert run.state == "running" and "Unable to contact slurm controller" in queue.problem


def test_queue_is_empty_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert read_queue([Job("7")]) == Queue()
