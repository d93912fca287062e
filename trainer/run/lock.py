"""Locks a folder for one process, in two ways at once: by flock on `.lock`, and by a lease file beside it.

flock ends with its process, but some file systems have none (Lustre, NFS without a lock service), or have one for each
machine. A lease is a file `.lease-TOKEN` that names its process. Each process first writes its own lease and then looks
for those of others, so of two that start at once at least one sees the other and withdraws.

The lease of a process that is gone counts no more. Only its own machine knows this at once. The lease of another
machine has a heartbeat: its modification time changes every 10 s. If it has not changed for 50 s while this process
watched it, its machine is taken to be gone. A holder that was only suspended finds, when it wakes up, that its lease is
gone, and must end. Clocks of machines are never compared.

Imports nothing slow, because `samecurve status` checks many folders.
"""

import datetime
import errno
import fcntl
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import IO, Literal

from trainer.process.awake import AwakeClock
from trainer.process.identity import ProcessIdentity

LOCK_FILE = ".lock"
LEASE_PATTERN = ".lease-*"
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 50.0
_CHECK_SECONDS = 1.0
_ATTEMPTS = 3  # is_held() in another process holds a shared lock for some microseconds
_RETRY_SECONDS = 0.05
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""errors of flock on a file system without it"""

LockEvent = Literal["moved", "taken"]


class Lease:
    """The lease file of some process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: ProcessIdentity | None = None
        """None: the file is not complete, because it is being written or the disk is full"""
        self.since = 0.0
        self.modified_ns = 0

    @classmethod
    def read(cls, path: Path) -> "Lease | None":
        """Returns the lease; None if the file is gone. Opens it, because NFS looks for changes only then."""
        lease = cls(path)
        try:
            with path.open() as file:
                lease.modified_ns = os.fstat(file.fileno()).st_mtime_ns
                content = json.load(file)
            lease.process = ProcessIdentity(**content["process"])
            lease.since = float(content["since"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return lease

    def __str__(self) -> str:
        if self.process is None:
            return f"the owner of {self.path.name}"
        since = datetime.datetime.fromtimestamp(self.since).isoformat(" ", "seconds")
        return f"process {self.process.pid} on {self.process.host} since {since}"


class FolderLock:
    """The lock of one folder. It ends with the process, even if the process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None
        self._lease_name = ""  # empty: this process has no lease
        self._since, self._owner_pid = 0.0, 0
        self._observed: dict[str, tuple[int, float]] = {}  # by lease of another machine: its state, since when
        self._clock = AwakeClock(2 * _CHECK_SECONDS)
        self._closing = Event()
        self._thread: Thread | None = None
        self.holder = ""
        """names the process that holds the folder, after try_acquire() has returned False"""

    def try_acquire(self, on_lost: Callable[[LockEvent, str], None]) -> bool:
        """Locks the folder and returns True; returns False if another process holds it. Raises OSError.

        To wait for a process on another machine, call it again on the same object, at least once a second: it knows
        for how long it has watched the lease.

        on_lost: called in a thread, once. Gets "moved" and the new path if somebody has renamed the folder; "taken" and
        the new holder if a process on another machine has taken the lock, because this one was suspended.
        """
        self._clock.tick()
        try:
            self._file, has_flock = _open_locked(self.folder / LOCK_FILE)
            if self._is_leased() or self._is_leased_after_own():
                self._close_file()
                return False
        except BlockingIOError:
            self.holder = next((str(lease) for lease in self._live_leases()), "another process")
            self._close_file()
            return False
        except BaseException:
            self._close_file()
            raise
        if has_flock:
            # held_since() reads the access time. The modification time stays: a start that is refused must not look
            # like a change of the run.
            os.utime(self._file.fileno(), ns=(time.time_ns(), os.fstat(self._file.fileno()).st_mtime_ns))
        self._remove_dead_leases()
        self._closing = Event()
        arguments = (self._closing, on_lost)
        self._thread = Thread(target=self._keep_lease, args=arguments, name="folder lock", daemon=True)
        self._thread.start()
        return True

    def _is_leased(self) -> bool:
        live_leases = list(self._live_leases())
        self.holder = str(live_leases[0]) if live_leases else ""
        return bool(live_leases)

    def _is_leased_after_own(self) -> bool:
        """Writes the own lease; withdraws it if another process has written one meanwhile."""
        self._since, self._owner_pid = time.time(), os.getpid()
        self._lease_name = LEASE_PATTERN.replace("*", secrets.token_hex(6))
        try:
            self._write_lease()
            if not self._is_leased():
                return False
        except BaseException:
            self._remove_lease()
            raise
        self._remove_lease()
        time.sleep(random.random() * _RETRY_SECONDS)  # the other process may have withdrawn, too: not again in step
        return True

    @property
    def _location(self) -> Path:
        """The folder's path, also after somebody has renamed it."""
        return self.moved_to() or self.folder

    def _write_lease(self) -> None:
        process = ProcessIdentity.of(os.getpid())
        content = {"process": {name: getattr(process, name) for name in process.__slots__}, "since": self._since}
        (self._location / self._lease_name).write_text(json.dumps(content))

    def _live_leases(self) -> Iterator[Lease]:
        for lease in read_leases(self._location):
            if lease.path.name != self._lease_name and not self._is_given_up(lease):
                yield lease

    def _is_given_up(self, lease: Lease) -> bool:
        """Returns whether the process of a lease is gone, or its machine has been silent for SILENCE_SECONDS."""
        if lease.process is not None and lease.process.is_on_this_machine:
            return lease.process.is_gone
        modified_ns, since = self._observed.get(lease.path.name, (0, 0.0))
        if modified_ns != lease.modified_ns:
            self._observed[lease.path.name] = (lease.modified_ns, self._clock.seconds)
            return False
        return self._clock.seconds - since >= SILENCE_SECONDS

    def _remove_dead_leases(self) -> None:
        for lease in read_leases(self.folder):
            if lease.path.name != self._lease_name:
                lease.path.unlink(missing_ok=True)

    def _keep_lease(self, closing: Event, on_lost: Callable[[LockEvent, str], None]) -> None:
        """Runs in a thread: keeps the heartbeat, and looks after the folder."""
        last_heartbeat, previous_move, is_moved, had_file = time.monotonic(), None, False, True
        while not closing.wait(_CHECK_SECONDS):
            try:
                moved_to = self.moved_to()
                if moved_to is not None and moved_to == previous_move and not is_moved:  # not about to be removed
                    is_moved = True
                    on_lost("moved", str(moved_to))
                previous_move = moved_to
                is_due = time.monotonic() - last_heartbeat >= HEARTBEAT_SECONDS
                has_lease = self._renew_lease(is_due)
                has_file = self._is_in_place() or self.moved_to() is not None
                if not (has_lease and has_file) and self._is_leased():
                    on_lost("taken", self.holder)
                    return
                if not has_lease and not has_file:  # the folder is removed; the next checkpoint creates it again
                    continue
                if not has_lease:  # somebody has removed the file by hand
                    self._write_lease()
                if not has_file and not had_file:  # and not about to be removed by this process at its end
                    self._lock_again()
                had_file = has_file
                if is_due:
                    last_heartbeat = time.monotonic()
            except OSError:  # a full or unreachable disk, which the next checkpoint reports
                continue

    def _renew_lease(self, is_due: bool) -> bool:
        """Changes the lease's modification time if that is due. Returns whether the lease is still there.

        Opens the file each time: only then does NFS ask the server whether another machine has removed it.
        """
        try:
            with (self._location / self._lease_name).open() as file:
                if is_due:
                    os.utime(file.fileno())
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return False
        return True

    def _lock_again(self) -> None:
        """Creates and locks the lock file, which somebody has removed by hand. Raises OSError."""
        assert self._file is not None
        file, _ = _open_locked(self.folder / LOCK_FILE)
        with file:
            os.dup2(file.fileno(), self._file.fileno(), inheritable=False)

    def _is_in_place(self) -> bool:
        """Returns whether the lock file of this process is still in the folder."""
        try:
            return self._file is not None and _is_same_file(self._file, self.folder / LOCK_FILE)
        except OSError:
            return False

    @property
    def is_owner(self) -> bool:
        """Whether this process has acquired the lock, and is not a fork of that process."""
        return self._owner_pid == os.getpid()

    @property
    def is_removed(self) -> bool:
        """Whether somebody has removed the folder since it was locked."""
        return not self._is_in_place() and self.moved_to() is None

    def moved_to(self) -> Path | None:
        """Returns the new path of the folder if somebody has renamed it since it was locked, else None."""
        if self._file is None or self._is_in_place():
            return None
        descriptor = self._file.fileno()
        if os.fstat(descriptor).st_nlink == 0:  # removed
            return None
        path = _path_of(descriptor)
        return path.parent if path is not None and path.name == LOCK_FILE and path.exists() else None

    def release(self) -> None:
        """Releases the lock. Does nothing without one. In a forked process, only closes the file."""
        if self.is_owner:
            self._closing.set()
            if self._thread is not None and self._thread is not current_thread():
                self._thread.join()  # it may be writing the lease
            self._remove_lease()
        self._thread = None
        self._lease_name = ""
        self._close_file()

    def _remove_lease(self) -> None:
        if self._lease_name:
            (self._location / self._lease_name).unlink(missing_ok=True)
            self._lease_name = ""

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_locked(path: Path) -> tuple[IO[str], bool]:
    """Opens and locks a file, and creates it if needed. Returns it, and whether the file system has flock.

    Raises BlockingIOError if another process holds the lock, and other OSErrors.
    """
    for _ in range(_ATTEMPTS):
        file = path.open("a")
        try:
            has_flock = _flock(file)
            if _is_same_file(file, path):
                return file, has_flock
        except BaseException:
            file.close()
            raise
        file.close()  # another process has removed the path since it was opened, at the end of its run
    raise BlockingIOError(errno.EWOULDBLOCK, "other processes remove the lock file", str(path))


def _is_same_file(file: IO[str], path: Path) -> bool:
    """Returns whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _flock(file: IO[str]) -> bool:
    """Locks a file. Returns False if the file system has no flock.

    Raises BlockingIOError if another process holds the lock.
    """
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 == _ATTEMPTS:
                raise
            time.sleep(_RETRY_SECONDS)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
    raise AssertionError


def _path_of(descriptor: int) -> Path | None:
    """Returns the current path of an open file; None if this system does not tell."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/self/fd/{descriptor}").readlink()
        if sys.platform == "darwin":
            return Path(fcntl.fcntl(descriptor, fcntl.F_GETPATH, b"\0" * 1024).rstrip(b"\0").decode())
    except OSError:
        pass
    return None


def read_leases(folder: Path) -> list[Lease]:
    """Returns the leases in a folder, live or not."""
    leases = (Lease.read(path) for path in sorted(folder.glob(LEASE_PATTERN)))
    return [lease for lease in leases if lease is not None]


def held_since(folder: Path) -> float:
    """Returns when the lock was acquired last, in seconds since 1970. Raises OSError if there is no lock file."""
    return (folder / LOCK_FILE).stat().st_atime


def is_held(folder: Path) -> bool:
    """Returns whether a process holds the lock.

    For a process on another machine without a common flock this is a guess: its heartbeat is compared with this
    machine's clock.
    """
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return any(_seems_live(lease) for lease in read_leases(folder))


def _seems_live(lease: Lease) -> bool:
    if lease.process is not None and lease.process.is_on_this_machine:
        return not lease.process.is_gone
    return abs(time.time() - lease.modified_ns / 1e9) < SILENCE_SECONDS
