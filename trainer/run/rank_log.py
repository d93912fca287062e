"""What a rank has to say in, lines of `logs/rank-R.log` in the run folder out, whatever has started the rank.

Rank 0 writes what its console says, all write when they begin and end, and what went wrong. Nothing of the environment.
"""

import datetime
import errno
import os
import socket
import sys
import traceback
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType

from trainer.errors import PeerError, UserError
from trainer.run.files import error_reason


class RankLog:
    """Lines from `begins` to the end of the `with`; before, the folder may be another run's, and nothing is kept.

    Each line is written through at once. What a full disk refuses is told once, and waits for the next line.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path, self._rank = folder / "logs" / f"rank-{rank}.log", rank
        self._is_open = False
        self._file: FileIO | None = None
        self._waiting = b""
        self._lock = Lock()  # the thread that saves speaks too

    def on_start(self, step: int, world_size: int, device: str) -> None:
        """The first line of a start. Where the run folder is not to be seen, on a machine without it, there is no log:
        to be called when rank 0 has made the folder."""
        self._is_open = self._path.parent.parent.is_dir()
        place = f"rank {self._rank} of {world_size} on {device}, process {os.getpid()}"
        self.write(f"{_stamp()}: {place}, at step {step:,}")

    def write(self, text: str) -> None:
        """One line or more."""
        if not self._is_open:
            return
        with self._lock:
            was_waiting = bool(self._waiting)
            self._waiting += (text + "\n").encode(errors="replace")
            try:
                self._write_waiting()
            except OSError as error:
                if not was_waiting:  # on every rank: another one's disk may be another
                    line = f"{self._path} cannot be written ({error_reason(error)}); its lines are kept and tried again"
                    print(line, file=sys.stderr, flush=True)

    def _write_waiting(self) -> None:
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:  # the first line; removed by somebody
            before, self._file = self._file, None
            if before is not None:
                before.close()
            self._path.parent.mkdir(exist_ok=True)
            self._file = FileIO(self._path, "ab")
        written = self._file.write(self._waiting)
        self._waiting = self._waiting[written:]
        if self._waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "RankLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """What ended it early, if anything did, and the last line."""
        if isinstance(error, (UserError, PeerError)):
            self.write(f"samecurve: {error}")
        elif error is not None:
            self.write("".join(traceback.format_exception(error)).rstrip())
        self.write(f"{_stamp()}: rank {self._rank} {'ends' if error is None else 'ends early'}")
        self._is_open = False
        if self._file is not None:
            self._file.close()
            self._file = None


def _stamp() -> str:
    """When and where, so that a start is found at a glance among the lines of many."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"== {now} {socket.gethostname()}"
