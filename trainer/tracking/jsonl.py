"""Writes rows to JSON Lines files. Every row is on the disk before the checkpoint that follows it."""

import errno
import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from trainer.run.files import disk_errors_as_user_errors, error_reason, finite_json
from trainer.tracking.tracker import Tracker


class NullJsonLines:
    """Discards all rows. Every rank except rank 0 has this writer."""

    def write(self, row: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, failed: bool = False) -> None: ...


class JsonLines(NullJsonLines):
    """Appends one JSON object a line, without a buffer. Lines that do not fit on a full disk are retried later."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._file: FileIO | None = None
        self._pending = b""
        self._lock = Lock()  # the thread that writes checkpoints calls flush()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. Numbers that are not finite become null. A full disk causes one warning, not an error."""
        with self._lock:
            had_pending = bool(self._pending)
            self._pending += (json.dumps(finite_json(row), allow_nan=False) + "\n").encode()
            try:
                self._write_pending()
            except OSError as error:
                if not had_pending:
                    self._warn(
                        f"{self._path} cannot be written ({error_reason(error)}); its lines stay in memory and are "
                        "written when the disk has room"
                    )

    def flush(self) -> None:
        """Writes all rows to the disk. Raises OSError if that fails."""
        with self._lock:
            self._write_pending()
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Writes the pending rows and closes the file. Raises FolderError if the disk is full or missing."""
        with disk_errors_as_user_errors(str(self._path)), self._lock:
            self._write_pending()
        if self._file is not None:
            self._file.close()

    def _write_pending(self) -> None:
        """Writes all pending lines or none. Raises OSError."""
        if not self._pending:
            return
        # Opened with the first line, and again if the file was deleted during training.
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            deleted_file, self._file = self._file, FileIO(self._path, "ab")
            if deleted_file is not None:
                deleted_file.close()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._pending) != len(self._pending):
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending = b""


class MetricsFile(Tracker):
    """Writes metrics.jsonl, from which other commands read the progress of a run."""

    logs_immediately = True

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._lines = JsonLines(path, warn)

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        self._lines.write({"split": split, "step": step, **scalars})

    def flush(self) -> None:
        self._lines.flush()

    def close(self, failed: bool = False) -> None:
        self._lines.close()
