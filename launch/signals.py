"""A command is run; the first signal that asks it to stop is passed on, once, and nothing is left behind.

A terminal sends Ctrl-C to all its processes, SLURM sends SIGTERM twice, and torchrun ends without waiting for its ranks
when a second signal comes while it waits for them. So the command gets a process group of its own and one signal.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import psutil

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ORPHAN_SECONDS = 60.0
# A terminal, and whoever watches it, may send the same Ctrl-C more than once; a person who means it again waits.
_SAME_SECONDS = 1.0


def _as_a_rank_knows_it(number: signal.Signals) -> signal.Signals:
    """A terminal that is closed is a stop like any other."""
    return signal.SIGTERM if number == signal.SIGHUP else number


class SignalForwarder:
    """Made in the main thread; `received` is the first signal that came, or None."""

    def __init__(self, translate: Callable[[signal.Signals], signal.Signals] = _as_a_rank_knows_it) -> None:
        """translate: which signal the command gets for one that came."""
        self.received: signal.Signals | None = None
        self._received_at, self._is_told = 0.0, False
        self._translate = translate
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":  # a killed torchrun's ranks become this process's children
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in _STOPS:
            signal.signal(number, self._pass_on)

    def run(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs a command to its end; its exit code, 128 + n when signal n ended it. Not started once a signal came."""
        if self.received is not None:
            return 128 + self.received
        launcher = os.getpid()
        command = subprocess.Popen(
            argv, env=dict(environment), process_group=0, preexec_fn=lambda: _stop_when_gone(launcher)
        )
        self._process = command
        if self.received is not None:  # it came before there was one to tell
            self._tell(self.received)
        code = command.wait()
        self._process = None
        end_orphans()
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            self._tell(self.received)
        elif number == signal.SIGINT and now - self._received_at > _SAME_SECONDS and self._process is not None:
            end(self._process)

    def _tell(self, number: signal.Signals) -> None:
        """Once: of this and a signal's handler both may come to it."""
        if self._process is not None and not self._is_told:
            self._is_told = True
            self._process.send_signal(self._translate(number))


def end_orphans() -> None:
    """What a command has left when it was killed itself: told to stop, and then made to."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(left, timeout=_ORPHAN_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a command and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()


def _stop_when_gone(launcher: int) -> None:
    """In the child: when the launcher is killed with SIGKILL the command is asked to stop, with a checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before that
            os.kill(os.getpid(), signal.SIGTERM)
