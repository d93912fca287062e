"""Rows in, lines of JSON out, each of them whole on the disk before a checkpoint is."""

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
    """Takes rows and keeps none: what every rank but the first is given."""

    def write(self, row: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, failed: bool = False) -> None: ...


class JsonLines(NullJsonLines):
    """One object a line, written through at once. What a full disk refuses waits for the next line."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._file: FileIO | None = None
        self._waiting = b""
        self._lock = Lock()  # the thread that saves flushes

    def write(self, row: dict[str, Any]) -> None:
        with self._lock:
            was_waiting = bool(self._waiting)
            self._waiting += (json.dumps(finite_json(row), allow_nan=False) + "\n").encode()
            try:
                self._write_waiting()
            except OSError as error:
                if not was_waiting:
                    self._warn(
                        f"{self._path} cannot be written ({error_reason(error)}); its lines are kept and tried again"
                    )

    def flush(self) -> None:
        """All lines so far are on the disk. Raises OSError."""
        with self._lock:
            self._write_waiting()
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        with disk_errors_as_user_errors(str(self._path)), self._lock:
            self._write_waiting()
        if self._file is not None:
            self._file.close()

    def _write_waiting(self) -> None:
        """All that waits, in whole lines."""
        if not self._waiting:
            return
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:  # the first line; removed by somebody
            self._path.parent.mkdir(parents=True, exist_ok=True)
            before, self._file = self._file, FileIO(self._path, "ab")
            if before is not None:
                before.close()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._waiting) != len(self._waiting):
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""


class MetricsFile(Tracker):
    """metrics.jsonl, which tells whoever asks where a run is, or was."""

    logs_immediately = True

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._lines = JsonLines(path, warn)

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        self._lines.write({"split": split, "step": step, **scalars})

    def flush(self) -> None:
        self._lines.flush()

    def close(self, failed: bool = False) -> None:
        self._lines.close()
