"""Runs a command, forwards the first stop signal to it exactly once, and leaves no process behind.

A terminal sends Ctrl-C to all of its processes, SLURM sends SIGTERM twice, and torchrun stops waiting for its ranks
when a second signal arrives. So the command gets its own process group and only one signal.
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

from trainer.run.stop import handled_signals

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ORPHAN_TIMEOUT_SECONDS = 600.0  # time to finish a step and save a checkpoint
_POLL_SECONDS = 0.5
# A terminal and its parent may both send the same Ctrl-C. A later one comes from a user who wants to kill the command.
_DUPLICATE_SECONDS = 1.0


class SignalForwarder:
    """Handles the stop signals of this process, except those that it was started to ignore. Create it in the main
    thread.

    `received` is the first stop signal, or None. A second Ctrl-C more than a second later kills the command.
    """

    def __init__(self, translate: Callable[[signal.Signals], signal.Signals] = lambda number: number) -> None:
        """translate: returns the signal to send to the command for a received signal."""
        self.received: signal.Signals | None = None
        self._received_at, self._is_forwarded, self._is_impatient = 0.0, False, False
        self._translate = translate
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":  # the ranks of a killed torchrun become children of this process
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in handled_signals(_STOP_SIGNALS):
            signal.signal(number, self._handle)

    def run(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs a command to its end and returns its exit code, or 128 + n if signal n ended it.

        Does not start the command if a stop signal has already arrived.
        """
        if self.received is not None:
            return 128 + self.received
        launcher_pid = os.getpid()
        process = subprocess.Popen(
            argv, env=dict(environment), process_group=0, preexec_fn=lambda: _stop_with_launcher(launcher_pid)
        )
        self._process = process
        if self.received is not None:  # the signal arrived before self._process was set
            self._forward(self.received)
        code = process.wait()
        self._process = None
        self._stop_orphans()
        return code if code >= 0 else 128 - code

    def _stop_orphans(self) -> None:
        """Terminates the processes that a killed command left behind, and kills what is left when the time is over or
        the user presses Ctrl-C again."""
        orphans = psutil.Process().children()
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        deadline = time.monotonic() + _ORPHAN_TIMEOUT_SECONDS
        while orphans and time.monotonic() < deadline and not self._is_impatient:
            _, orphans = psutil.wait_procs(orphans, timeout=_POLL_SECONDS)
        _kill_all(psutil.Process().children(recursive=True))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            self._forward(self.received)
        elif number == signal.SIGINT and now - self._received_at > _DUPLICATE_SECONDS:
            self._is_impatient = True
            if self._process is not None:
                _kill_tree(self._process)

    def _forward(self, number: signal.Signals) -> None:
        """Sends the signal to the command once: run() and the signal handler may both call this."""
        if self._process is not None and not self._is_forwarded:
            self._is_forwarded = True
            self._process.send_signal(self._translate(number))


def _kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kills a command and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        _kill_all(psutil.Process(process.pid).children(recursive=True))
    process.kill()


def _kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _stop_with_launcher(launcher_pid: int) -> None:
    """Runs in the child: a launcher killed by SIGKILL stops the command by SIGTERM, so that it saves a checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher_pid:  # the launcher died before the call above
            os.kill(os.getpid(), signal.SIGTERM)
