"""Replaces sys.stdout and sys.stderr by streams whose errors end nothing.

In Python's own streams a closed pipe, a full disk, a terminal that is gone, a closed stream or a character that the
encoding lacks raises in whatever line happens to print: ours, a warning's, a library's. A training of days must not end
for that. Here such text is lost instead; what was meant for stderr is kept for the rank's log file.
"""

import contextlib
import io
import os
import select
import sys
from collections import deque
from typing import TextIO

_STDERR = 2
_MAX_KEPT_WRITES = 1000
_kept: "deque[bytes]" = deque(maxlen=_MAX_KEPT_WRITES)
_closed_descriptors: list[int] = []


class _Output(io.FileIO):
    """Writes to a file descriptor. Takes what cannot be written for written."""

    def __init__(self, descriptor: int, ends_on_closed_pipe: bool, is_closed: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost_error: OSError | None = None
        """the last error of a write; None after a closed pipe, which every reader may close"""
        self._ends_on_closed_pipe, self._is_closed = ends_on_closed_pipe, is_closed

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Raises BrokenPipeError once if ends_on_closed_pipe; otherwise raises nothing."""
        rest = memoryview(data)
        try:
            while rest and not self._is_closed:
                num_written = super().write(rest)
                if num_written is None:  # another program has made this pipe or terminal non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[num_written:]
        except BrokenPipeError:
            if self._ends_on_closed_pipe:
                self._ends_on_closed_pipe = False
                raise
        except OSError as error:
            self.lost_error = error
        if rest and self.fileno() == _STDERR:
            _kept.append(bytes(rest))
        return len(data)


def protect_streams(ends_on_closed_pipe: bool = False) -> None:
    """Replaces sys.stdout and sys.stderr, and sys.stdin if it is closed. Call it once, first, in a process's main().

    ends_on_closed_pipe: a closed pipe on stdout raises BrokenPipeError once, so that a process that only prints ends.
    Without it, nothing that is printed raises an OSError or a UnicodeError.
    A stream of another kind, such as a notebook's, stays.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get its number, and lines of C++ libraries
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            _closed_descriptors.append(descriptor)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = _protected(sys.stdout, 1, ends_on_closed_pipe)
    sys.stderr = _protected(sys.stderr, _STDERR, False)


def _protected(stream: TextIO | None, descriptor: int, ends_on_closed_pipe: bool) -> TextIO:
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
        descriptor = stream.fileno()
    output = _Output(descriptor, ends_on_closed_pipe, is_closed=stream is None)
    is_unbuffered = stream is not None and stream.write_through
    return io.TextIOWrapper(
        output if is_unbuffered else io.BufferedWriter(output),  # type: ignore[type-var]
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=stream is None or stream.line_buffering,
        write_through=is_unbuffered,
    )


def stdout_error() -> OSError | None:
    """Flushes stdout and returns the error that has lost some of its text, or None. A closed pipe is none."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    output = getattr(buffer, "raw", buffer)
    return output.lost_error if isinstance(output, _Output) else None


def take_lost_text() -> bytes:
    """Returns the text that stderr has lost since the last call."""
    taken = []
    while _kept:
        taken.append(_kept.popleft())
    return b"".join(taken)


def close_again() -> None:
    """Closes the descriptors that were closed at the start. Call it before another program replaces this one."""
    while _closed_descriptors:
        os.close(_closed_descriptors.pop())
