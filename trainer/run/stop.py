"""Decides at the end of each step whether a run stops: because of a signal, the end of the launcher, a file `stop` in
the run folder, or a deadline. All ranks decide the same.

The signal handler only notes the signal: saving a checkpoint inside a handler can deadlock. A thread notes it, so that
a second Ctrl-C works while the main thread waits in an exchange.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

from trainer.distributed.environment import parse_int
from trainer.process.identity import ProcessIdentity
from trainer.process.launcher import find_launcher, wait_for_end

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_STOP_FILE, _TIME_LIMIT = "the file `stop` in the run folder", "the time limit"
JOB_END = "the end of the SLURM job"
LAUNCHER_END = "the end of the launcher"
FOLDER_MOVED = "a new name of the run folder"
REASONS = (
    "", *(number.name for number in _SIGNALS), LAUNCHER_END, _STOP_FILE, _TIME_LIMIT, JOB_END, FOLDER_MOVED,
)  # fmt: skip
"""Why a run stops. The ranks agree on the highest index of any of them, so later reasons take precedence."""
# The terminal sends a Ctrl-C to the ranks, and torchrun sends it to them again: two within this time are the same one.
_SAME_INTERRUPT_SECONDS = 1.0
_CHECK_SECONDS = 0.5  # target time between two checks of several ranks
_SINGLE_RANK_CHECK_SECONDS = 0.1
_MAX_STRIDE = 20  # steps between two checks
_SLOWEST_STEP_WINDOW = 100  # a slow step counts for the next 100 to 200 steps
_TYPICAL_STEP_WINDOW = 20  # the typical time is a mean of about this many steps


class StopWhileWaiting(BaseException):
    """Raised in the main thread while it waits for data that do not come. Its text is one of REASONS."""


def handled_signals(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Returns those of some signals that this process was not started to ignore.

    `nohup` ignores SIGHUP, and a script ignores SIGINT for its background jobs: what the user asked for stays so.
    """
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


class StopSignals:
    """Notes the first signal that asks the run to stop, or the end of the launcher. Create it once, in the main thread,
    as early as possible."""

    def __init__(self, is_reporter: bool) -> None:
        """is_reporter: this process prints what a Ctrl-C does."""
        self.since = time.time()
        """start of this process, in seconds since 1970"""
        self._is_reporter = is_reporter
        self._is_training = self._has_trained = False
        self._first_interrupt: float | None = None
        self._original_handlers: dict[int, Any] = {}
        self._launcher: ProcessIdentity | None = None
        self._interrupts_wait: Callable[[], bool] = lambda: False
        self.received = ""
        """name of the first signal, or another one of REASONS; empty without one"""
        self._write_end = -1  # of the pipe; -1: there is none
        if current_thread() is not main_thread():  # called from a program with signal handlers of its own
            return
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._original_handlers.update(
            {number: signal.signal(number, self._handle) for number in handled_signals(_SIGNALS)}
        )
        self._original_wakeup_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        Thread(target=self._listen, name="signals", daemon=True).start()
        if pid := find_launcher():
            self._launcher = ProcessIdentity.of(pid)
            Thread(target=self._watch_launcher, args=(pid,), name="launcher watch", daemon=True).start()

    @property
    def launcher_pid(self) -> int:
        """0 for a process without a launcher."""
        return 0 if self._launcher is None else self._launcher.pid

    @property
    def has_lost_launcher(self) -> bool:
        """Whether the launcher of this process has ended before it. The store of the ranks may have ended with it."""
        return self._launcher is not None and self._launcher.is_gone

    def _watch_launcher(self, pid: int) -> None:
        """Runs in a thread. Nobody else can tell a rank that its launcher was killed."""
        wait_for_end(pid)
        if not self._is_training:
            when = "after" if self._has_trained else "before"
            print(f"samecurve: the launcher (process {pid}) has ended {when} training", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        self.request_stop(LAUNCHER_END)

    def request_stop(self, reason: str) -> None:
        """Stops the run at the end of this step. reason: one of REASONS."""
        self.received = self.received or reason

    @contextlib.contextmanager
    def stop_at_step_end(self) -> Iterator[None]:
        """Inside, signals stop the run at the end of a step. Outside, SIGINT, SIGTERM and SIGHUP end the process
        at once, because there is nothing to save."""
        self._is_training = self._has_trained = True
        try:
            yield
        finally:
            self._is_training = False

    def interrupt_wait(self, is_waiting: Callable[[], bool]) -> None:
        """Raises StopWhileWaiting in the main thread if is_waiting() is true there."""
        self._interrupts_wait = is_waiting
        wake_signals = set(self._original_handlers) - {signal.SIGINT}  # a second SIGINT would end the process
        wake_signal = min(wake_signals, default=None)
        if wake_signal is not None:
            signal.pthread_kill(main_thread().ident or 0, wake_signal)

    def close(self) -> None:
        """Restores the signal handlers."""
        if self._write_end < 0:
            return
        signal.set_wakeup_fd(self._original_wakeup_fd)
        for number, handler in self._original_handlers.items():
            signal.signal(number, handler)
        os.close(self._write_end)
        self._write_end = -1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, as soon as that runs Python code again."""
        is_waiting, self._interrupts_wait = self._interrupts_wait, lambda: False
        if is_waiting():
            raise StopWhileWaiting(self.received)
        if number == signal.SIGINT and not self._is_training:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Runs in a thread. The pipe delivers the number of each signal at once."""
        while received := os.read(self._read_end, 1):
            self._note(received[0])
        os.close(self._read_end)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number in (signal.SIGTERM, signal.SIGHUP) and not self._is_training:
            os._exit(128 + number)
        # `samecurve train` sends it to the ranks of a killed torchrun.
        if number == signal.SIGTERM and self.has_lost_launcher:
            self.request_stop(LAUNCHER_END)
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > _SAME_INTERRUPT_SECONDS:
                os._exit(130)
            is_first, self._first_interrupt = self._first_interrupt is None, self._first_interrupt or now
            if is_first and self._is_reporter and self._is_training:
                print("stopping after this step, with a checkpoint; Ctrl-C again exits at once", file=sys.stderr)
        if number in self._original_handlers:
            self.request_stop(signal.Signals(number).name)


def ignore_signals_in_worker(worker: int) -> None:
    """Ignores signals in a DataLoader worker, which inherits the handlers. A worker ends with its main process."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StepTimes:
    """Measures how long steps and evaluations take in this session."""

    def __init__(self) -> None:
        self.slowest_step_seconds = 0.0
        """the slowest of the last 100 to 200 steps"""
        self.typical_step_seconds = 0.0
        """a moving average"""
        self.slowest_evaluation_seconds = 0.0
        self._num_steps = 0
        self._slowest, self._slowest_before = 0.0, 0.0  # in this window and in the one before

    def record_step(self, seconds: float) -> None:
        """The first step warms up or compiles, so it counts only until the second. A step in which a GPU selects its
        kernels counts as a slow step."""
        if self._num_steps % _SLOWEST_STEP_WINDOW == 0:
            self._slowest_before, self._slowest = self._slowest, 0.0
        self._slowest = seconds if self._num_steps < 2 else max(self._slowest, seconds)
        weight = 1.0 if self._num_steps < 2 else 1 / min(self._num_steps, _TYPICAL_STEP_WINDOW)
        self.typical_step_seconds += weight * (seconds - self.typical_step_seconds)
        self._num_steps += 1
        self.slowest_step_seconds = max(self._slowest, self._slowest_before)

    def record_evaluation(self, seconds: float) -> None:
        self.slowest_evaluation_seconds = max(self.slowest_evaluation_seconds, seconds)


class StopCheck:
    """Checks at the end of a step whether to stop. All ranks call it; they exchange two numbers about twice a second,
    or after each step if steps are slower."""

    def __init__(
        self,
        signals: StopSignals,
        folder: Path | None,
        deadline: "Deadline | None",
        step_times: StepTimes,
        world_size: int,
        all_reduce_max: Callable[[list[float]], list[float]],
        lag_steps: int = 0,
    ) -> None:
        """folder, deadline: the run folder and the deadline on rank 0, None on the others.
        lag_steps: number of steps that a GPU may still have in its queue; a save waits for them.
        """
        self._signals = signals
        self._stop_file = folder / "stop" if folder is not None else None
        self._deadline = deadline
        self._step_times = step_times
        self._all_reduce_max = all_reduce_max
        self._lag_steps = lag_steps
        # A single rank exchanges nothing, so it can check each step. Steps can become slower at any time.
        self._is_single_rank = world_size == 1
        self._max_stride = 1 if self._is_single_rank else _MAX_STRIDE
        self._check_time = 0.0
        self._next_step = 0
        self._stride = 1

    def __call__(self, step: int, save_seconds: float, has_evaluation_within: Callable[[int], bool]) -> str:
        """Returns why to stop after `step` steps; empty to continue. The same on all ranks.

        save_seconds: time for a checkpoint.
        has_evaluation_within: returns whether one of the next n steps is followed by an evaluation.
        """
        if step < self._next_step or (self._is_single_rank and self._has_just_checked()):
            return ""
        slowest = self._step_times.slowest_step_seconds
        margin = 2 * max(slowest, min(slowest * self._stride, _CHECK_SECONDS)) + save_seconds
        margin += self._lag_steps * slowest
        margin += self._step_times.slowest_evaluation_seconds if has_evaluation_within(self._max_stride) else 0.0
        # Near the deadline, expect each step to take as long as the slowest recent one.
        is_near = self._reached_deadline(margin + self._max_stride * slowest)
        step_seconds = slowest if is_near else self._step_times.typical_step_seconds
        reason, step_seconds = self._all_reduce_max([float(self._reason_index(margin)), step_seconds])
        self._stride = min(self._max_stride, max(1, int(_CHECK_SECONDS / max(step_seconds, 1e-6))))
        self._next_step = step + self._stride
        return REASONS[int(reason)]

    def _has_just_checked(self) -> bool:
        """Returns whether a single rank can skip this check: a look at the stop file costs too much for short steps. A
        signal is never skipped."""
        now = time.monotonic()
        is_recent = max(now - self._check_time, self._step_times.slowest_step_seconds) < _SINGLE_RANK_CHECK_SECONDS
        if is_recent and not self._signals.received:
            return True
        self._check_time = now
        return False

    def _reason_index(self, margin_seconds: float) -> int:
        """Returns the index in REASONS of why this rank would stop."""
        if self._signals.received:
            return REASONS.index(self._signals.received)
        if self._stop_file is not None and self._stop_file.exists():
            return REASONS.index(_STOP_FILE)
        return REASONS.index(self._reached_deadline(margin_seconds))

    def _reached_deadline(self, margin_seconds: float) -> str:
        """Returns the reason of the deadline if it is at most this many seconds away; otherwise empty."""
        end, reason = self._deadline or (math.inf, "")
        return reason if time.time() + margin_seconds >= end else ""

    def remove_stop_file(self) -> None:
        """Removes the file `stop`, so that it does not stop the next session."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)


Deadline = tuple[float, str]
"""When the run must have ended, in seconds since 1970, and why: one of REASONS."""


def find_deadline(time_limit_seconds: float | None, start: float) -> Deadline | None:
    """Returns the earlier of the run's time limit and the end of its SLURM job. start: in seconds since 1970."""
    deadlines = [] if time_limit_seconds is None else [(start + time_limit_seconds, _TIME_LIMIT)]
    job_end = parse_int(os.environ.get("SLURM_JOB_END_TIME", ""))
    if job_end is not None and job_end > start:  # an earlier end is that of another job, left over in the shell
        deadlines.append((float(job_end), JOB_END))
    return min(deadlines, default=None)
