"""Profiles some training steps: writes a trace for each rank and reports the most expensive operations."""

import bisect
import errno
import gzip
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

from trainer.config.schema import TrainSettings
from trainer.run.files import DISK_ERRORS, error_reason, replace_file
from trainer.run.folder import RunFolder

PROFILE_FOLDER = "profile"
_MAX_OPERATIONS = 10
_TAIL_BYTES = 1 << 12
_STEP_PREFIX, _DATA_WAIT = "step ", "waiting for data"  # names of our marks in the trace


class NullProfiler:
    """Profiles nothing."""

    def before_batch(self, step: int) -> None:
        """Call before the loop waits for a batch. step: number of steps so far."""

    def after_batch(self) -> None:
        """Call as soon as the batch has arrived."""

    def after_step(self) -> None:
        """Call after the optimizer step, before metrics, evaluation or a checkpoint."""

    def close(self, failed: bool = False) -> None:
        """Writes the trace if it is not written yet. failed: the run ends with an error."""


class Profiler(NullProfiler):
    """Records a range of steps with torch.profiler. Every rank writes its own trace. The weights do not change."""

    def __init__(
        self,
        steps: tuple[int, int],
        folder: RunFolder,
        rank: int,
        device: torch.device,
        paused: Callable[[], AbstractContextManager[None]],
        log: Callable[[str], None],
        log_profile: Callable[[list[dict[str, Any]], str], None] | None,
    ) -> None:
        """Creates a profiler that starts at the first of the steps.

        steps: first and last step, both included, counted from 1.
        paused: context manager that stops the clock of the training time.
        log: prints a line for the user.
        log_profile: receives the most expensive operations and a title; None on all ranks but rank 0.
        """
        self._first_step, self._last_step = steps
        self._current_step = 0
        self._path = folder.path / PROFILE_FOLDER / f"rank-{rank}.json.gz"
        self._use_gpu = device.type == "cuda"
        self._paused, self._log, self._log_profile = paused, log, log_profile
        self._recording: Any = None
        self._open_marks: list[record_function] = []

    def before_batch(self, step: int) -> None:
        if self._recording is None and self._first_step <= step + 1 <= self._last_step:
            self._first_step = step + 1  # a resumed run may start in the middle of the range
            with self._paused():
                self._start()
        if self._recording is not None:
            self._current_step = step + 1
            self._open_mark(_STEP_PREFIX + str(self._current_step))
            self._open_mark(_DATA_WAIT)

    def after_batch(self) -> None:
        if self._recording is not None:
            self._close_mark()

    def after_step(self) -> None:
        if self._recording is not None:
            self._close_mark()
            if self._current_step == self._last_step:
                self.close()

    def close(self, failed: bool = False) -> None:
        """Writes the trace and reports the most expensive operations.

        After a failure on a GPU no trace is written: the trace waits for the GPU, and a GPU that lost its peers may
        never finish its work.
        """
        recording, self._recording, self._last_step = self._recording, None, 0
        if recording is None or (failed and self._use_gpu):
            return
        while self._open_marks:
            self._close_mark()
        with self._paused():
            recording.__exit__(None, None, None)  # waits for the GPU
            self._write(recording)
            if self._log_profile is not None:
                clock, field = ("GPU", "self_device_time_total") if self._use_gpu else ("CPU", "self_cpu_time_total")
                title = (
                    f"steps {self._first_step}-{self._current_step} on rank 0, by the {clock} time of each operation"
                )
                self._log_profile(_most_expensive_operations(recording, field), title)

    def _start(self) -> None:
        """Starts to record. torch.profiler.profile is a wrapper that imports PyTorch's compiler, which takes 3 s."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # kineto prints to stderr otherwise
        if self._use_gpu:
            torch.cuda.synchronize()
        self._recording = profile(use_device="cuda" if self._use_gpu else None, use_kineto=True)
        self._recording.__enter__()

    def _open_mark(self, name: str) -> None:
        self._open_marks.append(record_function(name))
        self._open_marks[-1].__enter__()

    def _close_mark(self) -> None:
        self._open_marks.pop().__exit__(None, None, None)

    def _write(self, recording: Any) -> None:
        """Writes the trace. If the disk fails, training continues without the trace."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            replace_file(self._path, lambda path: _write_compressed_trace(recording, path))
        except DISK_ERRORS as error:
            self._log(f"{self._path} cannot be written ({error_reason(error)}); training continues without the trace")


def build_profiler(
    train: TrainSettings,
    total_steps: int,
    folder: RunFolder,
    rank: int,
    device: torch.device,
    paused: Callable[[], AbstractContextManager[None]],
    log: Callable[[str], None],
    log_profile: Callable[[list[dict[str, Any]], str], None] | None,
) -> NullProfiler:
    """Returns the profiler that train.profile selects. See Profiler for the arguments."""
    steps = train.profile_steps
    if steps is None:
        return NullProfiler()
    if steps[0] > total_steps:
        log(f"train.profile={train.profile}: the run has only {total_steps:,} steps, so there is no profile")
    return Profiler((steps[0], min(steps[1], total_steps)), folder, rank, device, paused, log, log_profile)


def _most_expensive_operations(recording: Any, time_field: str) -> list[dict[str, Any]]:
    """Returns the operations with the most self time inside the recorded steps, the most expensive first.

    time_field: event attribute with the self time in microseconds, without the time of called operations.
    """
    # A recording of a GPU also lists the kernels, whose time already belongs to the operations that launched them.
    events = [event for event in recording.function_events if event.device_type.name == "CPU"]
    marks = [event for event in events if event.name.startswith(_STEP_PREFIX)]
    steps = sorted((mark.time_range.start, mark.time_range.end) for mark in marks)
    calls, microseconds = Counter[str](), Counter[str]()
    for event in events:
        index = bisect.bisect(steps, (event.time_range.start, math.inf))  # of the first step that starts later
        is_in_step = index > 0 and event.time_range.start < steps[index - 1][1]
        if is_in_step and not event.name.startswith((_STEP_PREFIX, _DATA_WAIT)):
            calls[event.name] += 1
            microseconds[event.name] += getattr(event, time_field)
    total = max(microseconds.total(), 1)
    return [
        {
            "name": name,
            "share": self_time / total,
            "milliseconds_per_step": self_time / 1000 / len(steps),
            "calls_per_step": calls[name] / len(steps),
        }
        for name, self_time in microseconds.most_common(_MAX_OPERATIONS)
    ]


def _write_compressed_trace(recording: Any, path: Path) -> None:
    """Writes a gzip-compressed Chrome trace. Raises OSError.

    torch.profiler writes plain JSON and raises no error if the disk is full, so the file is checked.
    """
    with tempfile.TemporaryDirectory(prefix="samecurve-profile-") as folder:
        plain = Path(folder) / "trace.json"
        recording.export_chrome_trace(str(plain))
        if not plain.is_file() or not _is_complete(plain):
            raise OSError(errno.EIO, f"torch.profiler could not write to {folder}")
        with plain.open("rb") as source, gzip.open(path, "wb") as compressed:
            shutil.copyfileobj(source, compressed)


def _is_complete(trace: Path) -> bool:
    with trace.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, trace.stat().st_size), os.SEEK_END)
        return b'"traceName"' in file.read()  # the last key that torch.profiler writes
