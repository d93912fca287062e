"""One process holds a run folder: with flock, without it, and with one that other machines do not see.

Missing and unshared flocks are simulated: fcntl.flock raises, or grants each lock. Another machine is simulated by
another host name.
"""

import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.process import identity
from trainer.run import lock
from trainer.run.lock import FolderLock, LockEvent

MISSING = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def locks() -> Iterator[list[FolderLock]]:
    """Locks to release at the end of a test."""
    locks: list[FolderLock] = []
    yield locks
    for each in locks:
        each.release()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_CHECK_SECONDS", 0.02)


def ignore(event: LockEvent, detail: str) -> None:
    pass


def acquire(folder: Path, locks: list[FolderLock]) -> FolderLock:
    locks.append(FolderLock(folder))
    assert locks[-1].try_acquire(ignore), locks[-1].holder
    return locks[-1]


def fail_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def unshare_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grants each lock, as to processes on machines that do not see the locks of each other."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda file, operation: None)


@pytest.mark.parametrize("number", [0, *MISSING])
def test_second_process_is_refused_and_told_the_holder(
    number: int, folder: Path, locks: list[FolderLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    if number:
        fail_flock(monkeypatch, number)
    first = acquire(folder, locks)
    second = FolderLock(folder)
    assert not second.try_acquire(ignore) and lock.is_held(folder)
    assert f"process {os.getpid()} on {os.uname().nodename} since 20" in second.holder
    first.release()
    assert not lock.is_held(folder) and not lock.read_leases(folder)
    assert second.try_acquire(ignore)
    second.release()


def test_other_errors_of_flock_are_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        FolderLock(folder).try_acquire(ignore)


def hold(folder: Path, host: str, connection: object) -> None:
    """Runs in a process: takes the lock as on `host` and holds it until the process is killed."""
    identity.socket.gethostname = lambda: host  # type: ignore[assignment]
    holder = FolderLock(folder)
    assert holder.try_acquire(lambda event, detail: connection.send((event, detail)))  # type: ignore[attr-defined]
    connection.send("held")  # type: ignore[attr-defined]
    time.sleep(600)


@pytest.fixture
def holder(folder: Path, fast: None) -> Iterator[object]:
    """Starts processes that hold the folder. Returns the process and the end of a pipe."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(host: str) -> tuple[object, object]:
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=hold, args=(folder, host, sender)))
        processes[-1].start()
        assert receiver.poll(30) and receiver.recv() == "held"
        return processes[-1], receiver

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_lock_of_a_killed_process_on_this_machine_is_free_at_once(
    folder: Path, locks: list[FolderLock], holder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    unshare_flock(monkeypatch)
    process, _ = holder(os.uname().nodename)  # type: ignore[operator]
    waiting = FolderLock(folder)
    assert not waiting.try_acquire(ignore) and f"process {process.pid} " in waiting.holder
    process.kill()
    process.join()
    assert not lock.is_held(folder)
    locks.append(waiting)
    assert waiting.try_acquire(ignore) and len(lock.read_leases(folder)) == 1


def wait_for_lock(waiting: FolderLock, seconds: float) -> float:
    """Tries for some seconds. Returns when it had the lock, in seconds from now; infinity: never."""
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        if waiting.try_acquire(ignore):
            return elapsed
        time.sleep(0.01)
    return float("inf")


def test_lock_of_another_machine_is_free_when_its_heartbeat_is_silent(
    folder: Path, locks: list[FolderLock], holder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    unshare_flock(monkeypatch)
    process, _ = holder("n2")  # type: ignore[operator]
    waiting = FolderLock(folder)
    assert wait_for_lock(waiting, 1.0) == float("inf") and f"process {process.pid} on n2 " in waiting.holder
    assert lock.is_held(folder)
    process.kill()
    locks.append(waiting)
    assert 0.4 < wait_for_lock(waiting, 10.0) < 5.0


def test_suspended_holder_learns_that_its_lock_was_taken(
    folder: Path, locks: list[FolderLock], holder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    unshare_flock(monkeypatch)
    process, receiver = holder("n2")  # type: ignore[operator]
    os.kill(process.pid, signal.SIGSTOP)
    locks.append(FolderLock(folder))
    assert wait_for_lock(locks[-1], 10.0) < 5.0
    os.kill(process.pid, signal.SIGCONT)
    assert receiver.poll(10)
    event, detail = receiver.recv()
    assert event == "taken" and f"process {os.getpid()} on " in detail


def test_clock_of_another_machine_does_not_matter(folder: Path, fast: None) -> None:
    lease = folder / ".lease-other"
    process = dataclasses.replace(identity.ProcessIdentity.of(7), host="n2")
    lease.write_text(lock.json.dumps({"process": dataclasses.asdict(process), "since": 0.0}))
    waiting = FolderLock(folder)
    for hours in (-2, 0, 2):  # its heartbeat changes, though its clock is wrong by hours
        for _ in range(10):
            now = time.time() + hours * 3600
            os.utime(lease, (now, now))
            assert not waiting.try_acquire(ignore)
            time.sleep(0.06)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": {"host": 1}, "since": "x"}', '{"since": 3}'])
def test_unreadable_lease_counts_until_it_is_silent(
    content: str, folder: Path, fast: None, locks: list[FolderLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".lease-broken").write_text(content)
    locks.append(FolderLock(folder))
    assert 0.4 < wait_for_lock(locks[-1], 10.0) < 5.0
    assert len(lock.read_leases(folder)) == 1


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_renamed_folder_is_noticed(tmp_path: Path, fast: None, locks: list[FolderLock]) -> None:
    events = []
    (tmp_path / "a" / "x").mkdir(parents=True)
    locks.append(FolderLock(tmp_path / "a" / "x"))
    assert locks[0].try_acquire(lambda event, detail: events.append((event, detail)))
    (tmp_path / "a").rename(tmp_path / "b")
    wait_until(lambda: events)
    assert events == [("moved", str(tmp_path / "b" / "x"))] and not locks[0].is_removed
    locks[0].release()
    assert not lock.read_leases(tmp_path / "b" / "x")


def test_removed_folder_and_removed_lease_are_told_apart(folder: Path, fast: None, locks: list[FolderLock]) -> None:
    run = folder / "x"
    run.mkdir()
    events: list[object] = []
    locks.append(FolderLock(run))
    assert locks[0].try_acquire(lambda event, detail: events.append(event))
    (lease,) = run.glob(lock.LEASE_PATTERN)
    lease.unlink()
    wait_until(lease.exists)  # written again
    assert not locks[0].is_removed
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert locks[0].is_removed and not events


def test_forked_process_does_not_release_the_lock(folder: Path, locks: list[FolderLock]) -> None:
    held = acquire(folder, locks)
    pid = os.fork()
    if pid == 0:
        held.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert lock.read_leases(folder) and not FolderLock(folder).try_acquire(ignore)


def contend(folder: Path, seed: int, seconds: float) -> None:
    """Runs in a process: takes the lock again and again, and checks that nobody else is inside."""
    lock.fcntl.flock = lambda file, operation: None  # type: ignore[assignment]
    generator, deadline, inside = random.Random(seed), time.monotonic() + seconds, folder / "inside"
    while time.monotonic() < deadline:
        own = FolderLock(folder)
        if not own.try_acquire(ignore):
            time.sleep(generator.random() * 0.005)
            continue
        if inside.exists() and identity.process_state(int(inside.read_text())) not in ("gone", "Z"):
            (folder / "violation").write_text(f"{os.getpid()} and {inside.read_text()}")
        inside.write_text(str(os.getpid()))
        time.sleep(generator.random() * 0.002)
        inside.unlink()
        with (folder / "entries").open("a") as file:
            file.write("x")
        own.release()


@pytest.mark.parametrize("seed", [1, 2])
def test_never_two_holders_without_flock_though_some_are_killed(seed: int, folder: Path) -> None:
    context, generator = multiprocessing.get_context("fork"), random.Random(seed)
    processes = []
    for number in range(4):
        processes.append(context.Process(target=contend, args=(folder, 10 * seed + number, 1.5)))
        processes[-1].start()
    for process in processes[:2]:
        time.sleep(generator.random() * 0.5)
        process.kill()
    for process in processes:
        process.join(30)
    assert not (folder / "violation").exists()
    assert [process.exitcode for process in processes] == [-9, -9, 0, 0]
    assert (folder / "entries").stat().st_size > 20


def test_removed_lock_file_is_created_again_and_the_lease_goes_on(
    folder: Path, fast: None, locks: list[FolderLock]
) -> None:
    held = acquire(folder, locks)
    (lease,) = folder.glob(lock.LEASE_PATTERN)
    (folder / lock.LOCK_FILE).unlink()
    wait_until((folder / lock.LOCK_FILE).exists)
    wait_until(lambda: not held.is_removed)
    before = lease.stat().st_mtime_ns
    wait_until(lambda: lease.stat().st_mtime_ns > before)
    lease.unlink()  # flock alone refuses, too
    assert not FolderLock(folder).try_acquire(ignore)


def test_holder_learns_that_its_lock_was_taken_after_both_files_were_removed(
    folder: Path, fast: None, locks: list[FolderLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    monkeypatch.setattr(lock, "_CHECK_SECONDS", 0.2)
    locks.append(FolderLock(folder))
    assert locks[0].try_acquire(lambda event, detail: events.append(event))
    for path in (folder / lock.LOCK_FILE, *folder.glob(lock.LEASE_PATTERN)):
        path.unlink()
    acquire(folder, locks)
    wait_until(lambda: events)
    assert events == ["taken"]


def test_heartbeat_goes_on_after_a_rename(tmp_path: Path, fast: None, locks: list[FolderLock]) -> None:
    events: list[object] = []
    (tmp_path / "x").mkdir()
    locks.append(FolderLock(tmp_path / "x"))
    assert locks[0].try_acquire(lambda event, detail: events.append(event))
    (tmp_path / "x").rename(tmp_path / "y")
    wait_until(lambda: events)
    (lease,) = (tmp_path / "y").glob(lock.LEASE_PATTERN)
    before = lease.stat().st_mtime_ns
    wait_until(lambda: lease.stat().st_mtime_ns > before)
    assert events == ["moved"]


def test_release_waits_for_a_lease_that_is_being_written(
    folder: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, is_writing, write = FolderLock(folder), threading.Event(), FolderLock._write_lease
    assert held.try_acquire(ignore)

    def write_slowly(self: FolderLock) -> None:
        is_writing.set()
        time.sleep(0.2)
        write(self)

    monkeypatch.setattr(FolderLock, "_write_lease", write_slowly)
    (lease,) = folder.glob(lock.LEASE_PATTERN)
    lease.unlink()
    assert is_writing.wait(10)
    held.release()
    time.sleep(0.3)
    assert not lock.read_leases(folder)


def test_lock_file_that_another_process_removes_between_open_and_flock_is_not_used(
    folder: Path, locks: list[FolderLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = lock._flock
    removed: list[bool] = []

    def remove_first(file: object) -> bool:
        if not removed:
            removed.append(True)
            (folder / lock.LOCK_FILE).unlink()
        return flock(file)  # type: ignore[arg-type]

    monkeypatch.setattr(lock, "_flock", remove_first)
    assert not acquire(folder, locks).is_removed


def test_forked_process_sets_no_event_on_release(folder: Path, locks: list[FolderLock]) -> None:
    """The thread may have held the lock of the event when the process was forked: set() would wait forever."""
    held = acquire(folder, locks)
    pid = os.fork()
    if pid == 0:
        try:
            held._closing = None  # type: ignore[assignment]
            held.release()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
