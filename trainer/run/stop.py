"""Who wants the run to stop: a signal, a file named `stop` in the run folder, or a deadline. All ranks agree on it at a
step's end.

A signal's handler only notes it: to save inside a handler can deadlock. It is noted by a thread, so that a second
Ctrl-C works while the main thread is deep in an exchange.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_FILE, _TIME_LIMIT = "the file `stop` in the run folder", "the time limit"
JOB_END = "the end of the SLURM job"
REASONS = ("", *(number.name for number in _SIGNALS), _FILE, _TIME_LIMIT, JOB_END)
# torchrun passes a Ctrl-C on to ranks that the terminal has told already: two within this time are one.
_SAME_SECONDS = 1.0
_LOOK_SECONDS = 0.5
_LOOK_AGAIN_SECONDS = 0.1
_MOST_STEPS = 20
_PACE_STEPS = 100  # after so many, or twice as many, a slow step is forgotten
_TYPICAL_STEPS = 20  # of them, or so, the typical time is the mean


class StopSignals:
    """Notes the first signal that asks to stop. Made once, in the main thread, as early as can be."""

    def __init__(self, speaks: bool) -> None:
        """speaks: this process tells the user what a Ctrl-C does."""
        self.since = time.time()
        """when this process began"""
        self._speaks = speaks
        self._training = False
        self._first_interrupt: float | None = None
        self._before: dict[int, Any] = {}
        self.received = ""
        """its name, or nothing"""
        if current_thread() is not main_thread():  # called from a program that has signals of its own
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before.update({number: signal.signal(number, self._handle) for number in _SIGNALS})
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        Thread(target=self._listen, name="signals", daemon=True).start()

    @contextlib.contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """Inside, the run stops at the end of a step; outside there is nothing to save, so that SIGINT and SIGTERM end
        the process at once."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def close(self) -> None:
        """Puts back what was there before."""
        if not self._before:
            return
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, which comes to it when it is back in Python."""
        if number == signal.SIGINT and not self._training:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """In a thread of its own: the number of each signal comes through the pipe at once."""
        while received := os.read(self._read, 1):
            self._note(received[0])
        os.close(self._read)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and not self._training:
            os._exit(128 + number)
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > _SAME_SECONDS:
                os._exit(130)
            first, self._first_interrupt = self._first_interrupt is None, self._first_interrupt or now
            if first and self._speaks and self._training:
                print("stopping after this step, with a checkpoint; Ctrl-C again leaves at once", file=sys.stderr)
        if number in _SIGNALS and not self.received:
            self.received = signal.Signals(number).name


def ignore_signals_in_worker(worker: int) -> None:
    """For DataLoader's workers, which inherit the handlers: they end when the process that they serve does."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StepTimes:
    """How long the parts of a run take, as far as they have been seen in this session."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        """the slowest step of late"""
        self.typical_seconds = 0.0
        """what a step takes: a mean in which one counts the less the more came after it"""
        self.evaluation_seconds = 0.0
        self._steps = 0
        self._slowest, self._slowest_before = 0.0, 0.0

    def step(self, seconds: float) -> None:
        """The first step warms up, or compiles: it counts until there is another. One in which a GPU looks for its
        kernels counts for a hundred more at least, for two hundred at most."""
        if self._steps % _PACE_STEPS == 0:
            self._slowest_before, self._slowest = self._slowest, 0.0
        self._slowest = seconds if self._steps < 2 else max(self._slowest, seconds)
        share = 1.0 if self._steps < 2 else 1 / min(self._steps, _TYPICAL_STEPS)
        self.typical_seconds += share * (seconds - self.typical_seconds)
        self._steps += 1
        self.step_seconds = max(self._slowest, self._slowest_before)

    def evaluation(self, seconds: float) -> None:
        self.evaluation_seconds = max(self.evaluation_seconds, seconds)


class StopCheck:
    """Asked at the end of each step, by every rank alike; exchanges two numbers twice a second, or every step."""

    def __init__(
        self,
        signals: StopSignals,
        folder: Path | None,
        deadline: "Deadline | None",
        pace: StepTimes,
        world_size: int,
        largest: Callable[[list[float]], list[float]],
        lag_steps: int = 0,
    ) -> None:
        """folder: the run's, for the one rank that looks for the file; deadline: for that rank; lag_steps: so many may
        be under way on a GPU, which a save waits for."""
        self._lag_steps = lag_steps
        self._signals = signals
        self._file = folder / "stop" if folder is not None else None
        self._deadline = deadline
        self._pace = pace
        self._largest = largest
        # Steps may become slower all of a sudden; and a process alone has nothing to exchange.
        self._is_alone = world_size == 1
        self._most_steps = 1 if self._is_alone else _MOST_STEPS
        self._looked = 0.0
        self._next_step = 0
        self._stride = 1

    def __call__(self, step: int, save_seconds: float, evaluates: Callable[[int], bool]) -> str:
        """Why to stop after `step` steps, or nothing; the same on every rank.

        evaluates: whether an evaluation falls into the next so many steps.
        """
        if step < self._next_step or (self._is_alone and self._looked_just_now()):
            return ""
        slowest = self._pace.step_seconds
        margin = 2 * max(slowest, min(slowest * self._stride, _LOOK_SECONDS)) + save_seconds
        margin += self._lag_steps * slowest
        margin += self._pace.evaluation_seconds if evaluates(self._most_steps) else 0.0
        # Towards a deadline all steps of late may become as slow as one has been.
        is_near = self._due(margin + self._most_steps * slowest)
        pace = slowest if is_near else self._pace.typical_seconds
        asked, pace = self._largest([float(self._asked(margin)), pace])
        self._stride = min(self._most_steps, max(1, int(_LOOK_SECONDS / max(pace, 1e-6))))
        self._next_step = step + self._stride
        return REASONS[int(asked)]

    def _looked_just_now(self) -> bool:
        """Where steps are short a file is looked for so often and not more; a signal is seen at once."""
        now = time.monotonic()
        is_soon = max(now - self._looked, self._pace.step_seconds) < _LOOK_AGAIN_SECONDS
        if is_soon and not self._signals.received:
            return True
        self._looked = now
        return False

    def _asked(self, margin_seconds: float) -> int:
        if self._signals.received:
            return REASONS.index(self._signals.received)
        if self._file is not None and self._file.exists():
            return REASONS.index(_FILE)
        due = self._due(margin_seconds)
        return REASONS.index(due) if due else 0

    def _due(self, margin_seconds: float) -> str:
        """Why the run must have ended within so long, or nothing."""
        ends, why = self._deadline or (math.inf, "")
        return why if time.time() + margin_seconds >= ends else ""

    def done(self) -> None:
        """The run has stopped: the file has done its work."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


Deadline = tuple[float, str]
"""When the run must have ended, in time.time(), and why."""


def deadline(time_limit_seconds: float | None, started: float) -> Deadline | None:
    """The earlier of the run's own limit and that of its SLURM job."""
    ends = [] if time_limit_seconds is None else [(started + time_limit_seconds, _TIME_LIMIT)]
    job_end = os.environ.get("SLURM_JOB_END_TIME", "")
    if job_end.isdigit():
        ends.append((float(job_end), JOB_END))
    return min(ends, default=None)
