"""The steps to be profiled in, a trace of them and a table of what took longest out, by torch.profiler."""

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
_MOST_OPERATIONS = 10
_END_BYTES = 1 << 12
_STEP, _WAIT = "step ", "waiting for data"


class NullProfiler:
    """For a run of which nothing is asked."""

    def before_batch(self, step: int) -> None:
        """The run has taken so many steps, and is about to wait for the next one's batch."""

    def after_batch(self) -> None:
        """It is in hand."""

    def after_step(self) -> None:
        """The step has been taken, and nothing else yet: no line of metrics, no evaluation."""

    def close(self, failed: bool = False) -> None:
        """Writes what there is, if it has not been written."""


class Profiler(NullProfiler):
    """Every rank has one, and writes its own trace. It looks on: the weights are what they are without it."""

    def __init__(
        self,
        steps: tuple[int, int],
        folder: RunFolder,
        rank: int,
        device: torch.device,
        paused: Callable[[], AbstractContextManager[None]],
        log: Callable[[str], None],
        show: Callable[[list[dict[str, Any]], str], None] | None,
    ) -> None:
        """steps: the first and the last one, counted from 1; paused: what happens inside is not training time; show:
        takes the most expensive operations and a title, on one rank."""
        self._first, self._last = steps
        self._reached = 0
        self._path = folder.path / PROFILE_FOLDER / f"rank-{rank}.json.gz"
        self._on_gpu = device.type == "cuda"
        self._paused, self._log, self._show = paused, log, show
        self._recording: Any = None
        self._marks: list[record_function] = []

    def before_batch(self, step: int) -> None:
        if self._recording is None and self._first <= step + 1 <= self._last:
            self._first = step + 1  # later than was asked for where a run goes on
            with self._paused():
                self._start()
        if self._recording is not None:
            self._reached = step + 1
            self._mark(_STEP + str(self._reached))
            self._mark(_WAIT)

    def after_batch(self) -> None:
        if self._recording is not None:
            self._unmark()

    def after_step(self) -> None:
        if self._recording is not None:
            self._unmark()
            if self._reached == self._last:
                self.close()

    def close(self, failed: bool = False) -> None:
        """A GPU that lost its peers may never come to the end of its work, which a trace waits for: no trace then."""
        recording, self._recording, self._last = self._recording, None, 0
        if recording is None or (failed and self._on_gpu):
            return
        while self._marks:
            self._unmark()
        with self._paused():
            recording.__exit__(None, None, None)  # waits for the GPU
            self._write(recording)
            if self._show is not None:
                clock, field = ("GPU", "self_device_time_total") if self._on_gpu else ("CPU", "self_cpu_time_total")
                title = f"steps {self._first}-{self._reached} on rank 0, by the {clock} time of each operation"
                self._show(_most_expensive(recording, field), title)

    def _start(self) -> None:
        """By what lies under torch.profiler.profile, which imports PyTorch's compiler, for 3 s, to ask it something."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks to itself on stderr
        if self._on_gpu:
            torch.cuda.synchronize()
        self._recording = profile(use_device="cuda" if self._on_gpu else None, use_kineto=True)
        self._recording.__enter__()

    def _mark(self, name: str) -> None:
        self._marks.append(record_function(name))
        self._marks[-1].__enter__()

    def _unmark(self) -> None:
        self._marks.pop().__exit__(None, None, None)

    def _write(self, recording: Any) -> None:
        """What is wrong with a disk costs the trace, not the run."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            replace_file(self._path, lambda path: _pack(recording, path))
        except DISK_ERRORS as error:
            self._log(f"{self._path} cannot be written ({error_reason(error)}); the run goes on without it")


def build_profiler(
    train: TrainSettings,
    total_steps: int,
    folder: RunFolder,
    rank: int,
    device: torch.device,
    paused: Callable[[], AbstractContextManager[None]],
    log: Callable[[str], None],
    show: Callable[[list[dict[str, Any]], str], None] | None,
) -> NullProfiler:
    """What train.profile asks for, of a run of so many steps."""
    steps = train.profile_steps
    if steps is None:
        return NullProfiler()
    if steps[0] > total_steps:
        log(f"train.profile={train.profile}: the run has {total_steps:,} steps, no profile")
    return Profiler((steps[0], min(steps[1], total_steps)), folder, rank, device, paused, log, show)


def _most_expensive(recording: Any, microseconds: str) -> list[dict[str, Any]]:
    """Operations by the time that they themselves took in the steps, without those that they called."""
    # A GPU's kernels are there too, besides the operations that they belong to.
    events = [event for event in recording.function_events if event.device_type.name == "CPU"]
    marks = [event for event in events if event.name.startswith(_STEP)]
    steps = sorted((mark.time_range.start, mark.time_range.end) for mark in marks)
    calls, took = Counter[str](), Counter[str]()
    for event in events:
        before = bisect.bisect(steps, (event.time_range.start, math.inf))
        if before and event.time_range.start < steps[before - 1][1] and not event.name.startswith((_STEP, _WAIT)):
            calls[event.name] += 1
            took[event.name] += getattr(event, microseconds)
    return [
        {
            "name": name,
            "share": spent / max(took.total(), 1),
            "milliseconds_per_step": spent / 1000 / len(steps),
            "calls_per_step": calls[name] / len(steps),
        }
        for name, spent in took.most_common(_MOST_OPERATIONS)
    ]


def _pack(recording: Any, path: Path) -> None:
    """A trace, packed. torch.profiler writes it plain first, and raises nothing when it cannot, or not all of it."""
    with tempfile.TemporaryDirectory(prefix="samecurve-profile-") as place:
        plain = Path(place) / "trace.json"
        recording.export_chrome_trace(str(plain))
        if not plain.is_file() or not _is_whole(plain):
            raise OSError(errno.EIO, f"torch.profiler could not write to {place}")
        with plain.open("rb") as source, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(source, packed)


def _is_whole(trace: Path) -> bool:
    with trace.open("rb") as file:
        file.seek(-min(_END_BYTES, trace.stat().st_size), os.SEEK_END)
        return b'"traceName"' in file.read()  # the last that is written
