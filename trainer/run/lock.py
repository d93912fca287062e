"""A run folder in, whether a process holds it out. A lock ends with its process, however that ends.

Imports nothing heavy: `samecurve status` asks about many folders at once.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import IO

NAME = ".lock"
_LOOKS = 3  # whoever looks holds the lock too, for some microseconds
_LOOK_SECONDS = 0.05


def acquire(folder: Path) -> IO[str]:
    """Holds a folder until the file is closed. Raises BlockingIOError when another process does, OSError when it cannot
    be written."""
    file = (folder / NAME).open("a")
    for look in range(_LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if look + 1 == _LOOKS:
                file.close()
                raise
            time.sleep(_LOOK_SECONDS)
    # Since when, for held_since(), in the date of access: a start that is refused must not look like a change.
    os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
    return file


def held_since(folder: Path) -> float:
    """When it was taken last, in seconds since 1970."""
    return (folder / NAME).stat().st_atime


def is_held(folder: Path) -> bool:
    """Whether a run is on in it, as far as this machine can tell."""
    try:
        with (folder / NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
