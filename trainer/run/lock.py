"""Locks a run folder for one process. The lock ends with the process, even if the process is killed.

Imports nothing slow, because `samecurve status` checks many folders.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
_ATTEMPTS = 3  # is_held() in another process holds a shared lock for some microseconds
_RETRY_SECONDS = 0.05


def acquire(folder: Path) -> IO[str]:
    """Locks a folder and returns the open lock file; closing it releases the lock.

    Raises BlockingIOError if another process holds the lock, OSError if the file cannot be written.
    """
    file = (folder / LOCK_FILE).open("a")
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt + 1 == _ATTEMPTS:
                file.close()
                raise
            time.sleep(_RETRY_SECONDS)
    # held_since() reads the access time. The modification time stays: a start that is refused must not look like a
    # change of the run.
    os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
    return file


def held_since(folder: Path) -> float:
    """Returns when the lock was acquired last, in seconds since 1970. Raises OSError if there is no lock file."""
    return (folder / LOCK_FILE).stat().st_atime


def is_held(folder: Path) -> bool:
    """Returns whether a process holds the lock. Some network file systems do not show locks of other machines."""
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
