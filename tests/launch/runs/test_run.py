"""The facts of runs: what their files, their locks and SLURM's queue say, whatever state they were left in."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import fake_squeue, make

from launch.runs import records
from launch.runs.run import NoRunError, Run, find_run, read_runs, run_state
from launch.slurm.queue import Job, Queue, QueueEntry, read_queue
from trainer.run import lock

HERE = socket.gethostname()
EMPTY = Queue(is_known=True)
# What squeue of SLURM 22.05 printed for an array with one task running and a job that is held.
SQUEUE = (
    r"5|5|1|PENDING|JobArrayTaskLimit\n5|5|2|PENDING|JobArrayTaskLimit\n"
    r"7|7|N/A|PENDING|JobHeldUser\n6|5|0|RUNNING|None\n"
)


def look(path: Path, queue: Queue = EMPTY) -> Run:
    return run_state(records.load(path), Path("runs"), queue)


def queue_with(state: str, reason: str = "") -> Queue:
    return Queue((QueueEntry("7", state, reason, ("7", "7"), ""),), is_known=True)


def row(split: str, step: int, **more: float) -> str:
    return json.dumps({"split": split, "step": step, "epoch": step / 10, "samples": step * 64, **more}) + "\n"


JOB: dict[str, Any] = {}
IN_JOB = {"job": "7"}


@pytest.mark.parametrize(
    ("status", "start", "job", "queue", "state", "reason"),
    [
        ("finished", {}, None, EMPTY, "finished", "why finished"),
        ("stopped", {}, None, EMPTY, "stopped", "why stopped"),
        ("failed", {}, None, EMPTY, "failed", "why failed"),
        ("running", {}, None, EMPTY, "died", "is gone"),
        ("running", IN_JOB, JOB, EMPTY, "died", "is gone"),
        ("running", IN_JOB, JOB, queue_with("RUNNING"), "running", ""),
        ("running", IN_JOB, JOB, Queue(), "running", "nothing is known of job 7 here"),
        ("running", {"host": "another"}, None, EMPTY, "running", "another machine"),
        ("running", IN_JOB, JOB, queue_with("PENDING", "BeginTime"), "queued", "job 7 waits: BeginTime"),
        ("stopped", IN_JOB, JOB, queue_with("PENDING", "Priority"), "queued", "job 7 waits: Priority"),
        ("finished", IN_JOB, JOB, queue_with("COMPLETING"), "finished", "why finished"),
        (None, None, JOB, queue_with("PENDING", "Resources"), "queued", "job 7 waits: Resources"),
        (None, None, JOB, queue_with("RUNNING"), "starting", "job 7 is RUNNING"),
        (None, None, JOB, EMPTY, "not started", "job 7 has left the queue"),
        (None, None, JOB, Queue(), "queued", "nothing is known of job 7 here"),
        (None, None, None, EMPTY, "not started", "never come to training"),
    ],
)
def test_the_state_is_what_folder_and_queue_say_together(
    status: str | None,
    start: dict[str, Any] | None,
    job: dict[str, Any] | None,
    queue: Queue,
    state: str,
    reason: str,
) -> None:
    run = look(make("x", (status, 30) if status else None, start, job), queue)
    assert run.state == state and reason in run.reason
    assert run.job == ("7" if job is not None else None)
    assert run.is_over == (state in ("finished", "stopped", "failed", "died", "not started"))


def test_a_run_of_another_machine_that_is_silent_has_died() -> None:
    path = make("x", ("running", 3), {"host": "another"})
    for name in ("status.json", "config.yaml"):
        os.utime(path / name, (1000, 1000))
    assert look(path).state == "died" and "on another" in look(path).reason


def test_a_folder_that_is_held_is_starting_running_or_at_its_end() -> None:
    path = make("x", ("stopped", 3), {})
    before = time.time() - 60
    (path / lock.NAME).touch()
    os.utime(path / lock.NAME, (before - 9, before - 9))
    os.utime(path / "status.json", (before, before))
    with lock.acquire(path):
        assert look(path).state == "starting" and not look(path).is_over
        (path / "status.json").write_text('{"state": "running", "step": 3, "reason": ""}')
        time.sleep(0.02)
        os.utime(path / "status.json")
        assert look(path).state == "running"
        (path / "status.json").write_text('{"state": "stopped", "step": 9, "reason": "SIGTERM"}')
        os.utime(path / "status.json", (time.time() + 1, time.time() + 1))
        assert look(path).state == "stopped" and not look(path).is_over  # it closes its trackers
    assert look(path).is_over


def test_who_looks_does_not_keep_a_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    (tmp_path / lock.NAME).touch()
    with (tmp_path / lock.NAME).open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        # It looks no longer while the run waits.
        monkeypatch.setattr(lock.time, "sleep", lambda _: fcntl.flock(looker, fcntl.LOCK_UN))
        lock.acquire(tmp_path).close()
        with lock.acquire(tmp_path), pytest.raises(BlockingIOError):
            lock.acquire(tmp_path)


def test_the_numbers_are_those_of_the_last_whole_lines() -> None:
    rows = row("train", 10, samples_per_second=64.0) + row("test", 10, accuracy=0.5)
    rows += row("train", 20, samples_per_second=128.0) + row("train", 30, samples_per_second=640.0)
    path = make("x", ("running", 0), {}, rows=rows + '{"split": "train", "step": 3')
    with lock.acquire(path):
        os.utime(path / "status.json", (time.time() + 1, time.time() + 1))
        run = look(path)
    assert (run.step, run.total_steps, run.epoch, run.accuracy, run.world_size) == (30, 90, 3.0, 0.5, 2)
    assert run.samples_per_second == 640 and run.seconds_left == 60 * 64 / 640
    assert run.restarts == 1 and run.host == HERE and run.name == "x"


def test_a_long_file_is_read_from_its_end() -> None:
    path = make("x", ("finished", 60_000), {})
    with (path / "metrics.jsonl").open("w") as file:
        file.write(row("test", 5, accuracy=0.25))
        file.writelines(row("train", step, samples_per_second=1.0) for step in range(60_000))
    assert (path / "metrics.jsonl").stat().st_size > 5e6
    run = look(path)
    assert (run.step, run.accuracy, run.samples_per_second) == (60_000, None, 1.0)  # 4 MB back and no more
    with (path / "metrics.jsonl").open("a") as file:
        file.write(row("test", 59_000, accuracy=0.75))
        file.writelines(row("train", step, samples_per_second=2.0) for step in range(59_000, 60_001))
    run = look(path)
    assert (run.step, run.accuracy, run.samples_per_second) == (60_000, 0.75, 2.0)


def test_a_run_that_failed_is_not_over_while_its_job_is_on() -> None:
    path = make("x", ("failed", 3), IN_JOB, JOB)
    run = look(path, queue_with("RUNNING"))  # which may start the ranks again
    assert run.state == "failed" and not run.is_over and look(path).is_over


@pytest.mark.parametrize("count", [0, 1, 2, 5000, 9999, 20000])
def test_the_last_lines_of_a_file_of_many_blocks(count: int, tmp_path: Path) -> None:
    lines = [f"line {number} of many" for number in range(10_000)]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    assert records.last_lines(tmp_path / "log", count) == (lines[-count:] if count else [])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "run'])
def test_a_folder_that_is_unreadable_does_not_hide_the_others(content: str) -> None:
    (make("bad", ("running", 1), {}) / "status.json").write_text(content)
    make("good", ("finished", 9), {})
    found, _ = read_runs(records.find(Path("runs")), Path("runs"))
    assert {run.name: run.state for run in found} == {"bad": "unreadable", "good": "finished"}


def test_runs_are_found_at_any_depth_and_only_runs() -> None:
    for name in ("a", "sweep/point-1", "sweep/point-2", "sweep/deep/er"):
        make(name, ("finished", 1), {})
    (Path("runs") / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (Path("runs") / "a" / "checkpoints" / "step-1" / "config.yaml").touch()
    (Path("runs") / "refused").mkdir()
    (Path("runs") / "refused" / ".lock").touch()
    root = Path("runs")
    names = [path.relative_to(root).as_posix() for path in records.find(root)]
    assert names == ["a", "sweep/deep/er", "sweep/point-1", "sweep/point-2"]
    os.utime(root / "a" / "config.yaml", (time.time() + 9, time.time() + 9))
    assert read_runs(records.find(root), root)[0][0].name == "a"
    assert find_run("sweep/point-1", root) == find_run("runs/sweep/point-1", root) == root / "sweep/point-1"
    with pytest.raises(NoRunError, match=r"no run 'sweep/pont-1' under runs; did you mean sweep/point-1 or"):
        find_run("sweep/pont-1", root)
    with pytest.raises(NoRunError, match=r"did you mean sweep/point-. or sweep/point-."):
        find_run("point", root)


def test_the_job_is_the_last_one_that_the_run_was_given_to() -> None:
    path = make("x", ("stopped", 3), {"job": None}, job={})
    assert look(path).job is None  # started by hand after the job
    os.utime(path / "job.json", (time.time() + 9, time.time() + 9))
    assert look(path).job == "7" and look(path).log == "logs/7.out"  # given to SLURM after that
    path = make("task", ("stopped", 3), {"job": "6", "array_job": "5", "array_task": 0}, job={"job_id": "6"})
    assert look(path).job == "5_0" and look(path).log == "logs/7.out"


def test_tasks_of_an_array_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, f"printf '{SQUEUE}'")
    queue = read_queue([Job("7")])
    found = [queue.find(Job(name, task)) for name, task in (("5", 2), ("6", 0), ("5", 0), ("7", None), ("5", 3))]
    assert [entry.id if entry else None for entry in found] == ["5_2", "5_0", "5_0", "7", None]
    assert found[0] is not None and found[0].waits and found[0].reason == "JobArrayTaskLimit"
    assert found[1] is not None and not found[1].waits and found[1].reason == ""


def test_squeue_is_asked_once_and_only_when_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "")
    make("done", ("finished", 3), IN_JOB, JOB)
    make("by hand", ("running", 3), {})
    read_runs(records.find(Path("runs")), Path("runs"))
    assert not Path("asked").exists()
    for name in "abc":
        make(name, ("running", 3), IN_JOB, JOB)
    found, queue = read_runs(records.find(Path("runs")), Path("runs"))
    assert Path("asked").read_text() == "--me --noheader -r -o %A|%F|%K|%T|%r\n"
    assert queue.is_known and sum(run.state == "died" for run in found) == 4


def test_a_controller_that_is_down_is_told_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    make("x", ("running", 3), IN_JOB, JOB)
    (run,), queue = read_runs(records.find(Path("runs")), Path("runs"))
    assert run.state == "running" and "Unable to contact slurm controller" in queue.trouble


def test_without_slurm_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert read_queue([Job("7")]) == Queue()
