"""Writes logs/rank-R.log in the run folder, for every rank and under every launcher.

Rank 0 logs the lines of its console. Each rank logs its start, its end and its errors, and never the environment.
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
from trainer.text.streams import take_lost_text


class RankLog:
    """The log of one rank, from on_start() to the end of the `with` block. Before, the folder may be another run's.

    Writes each line at once, after what stderr has lost (trainer/text/streams.py). If the disk is full, prints one
    warning and keeps the lines for the next write.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """folder: the run folder."""
        self._path, self._rank = folder / "logs" / f"rank-{rank}.log", rank
        self._is_open = False
        self._file: FileIO | None = None
        self._pending = b""
        self._lock = Lock()  # the thread that writes checkpoints logs too

    def on_start(self, step: int, world_size: int, device: str) -> None:
        """Logs the start. Call it after rank 0 has created the folder: on a machine without it there is no log."""
        self._is_open = self._path.parent.parent.is_dir()
        process = f"rank {self._rank} of {world_size} on {device}, process {os.getpid()}"
        self.write(f"{_stamp()}: {process}, at step {step:,}")

    def write(self, text: str) -> None:
        """Logs one or more lines."""
        if not self._is_open:
            return
        warning = ""
        with self._lock:
            had_pending_lines = bool(self._pending)
            self._pending += take_lost_text() + (text + "\n").encode(errors="backslashreplace")
            try:
                self._write_pending()
            except OSError as error:
                if not had_pending_lines:  # each rank prints this: it may have a disk of its own
                    warning = f"{self._path} cannot be written ({error_reason(error)}); its lines are kept for later"
        if warning:
            print(warning, file=sys.stderr, flush=True)

    def _write_pending(self) -> None:
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:  # not open yet, or somebody removed it
            removed_file, self._file = self._file, None
            if removed_file is not None:
                removed_file.close()
            self._path.parent.mkdir(exist_ok=True)
            self._file = FileIO(self._path, "ab")
        num_written = self._file.write(self._pending)
        self._pending = self._pending[num_written:]
        if self._pending:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "RankLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Logs the error, if there is one, and the end."""
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
    """Returns time and host, marked so that the start of a session stands out."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"== {now} {socket.gethostname()}"
