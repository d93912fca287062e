"""Identifies a process across machines, reboots and reused pids, and says whether it still exists."""

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process on some machine. Its fields are texts and numbers, for JSON files that other processes read."""

    host: str
    boot: str
    """differs between boots of a machine, and between containers, whose pids mean other processes"""
    pid: int
    started: str
    """start time in the machine's own unit, because pids are used again; empty: unknown"""

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Returns the identity of a process on this machine."""
        return cls(socket.gethostname(), _boot(), pid, _start_time(pid))

    @property
    def is_on_this_machine(self) -> bool:
        """Whether this process sees the same pids, so that is_gone can be trusted."""
        return self.host == socket.gethostname() and self.boot == _boot()

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended for certain. False for a process of another machine."""
        if not self.is_on_this_machine:
            return False
        return process_state(self.pid) in ("gone", "Z", "X") or self.started != _start_time(self.pid)


def process_state(pid: int) -> str:
    """Returns Linux's letter for the state of a process on this machine, "gone" if there is none.

    Without /proc, a live process has the state "?".
    """
    fields = _stat_fields(pid)
    if fields:
        return fields[0]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:  # a process of another user
        pass
    return "?"


def is_suspended(pid: int) -> bool:
    """Returns whether a signal or a debugger has suspended a process on this machine. False if that is unknown."""
    return process_state(pid) in ("T", "t")


def _start_time(pid: int) -> str:
    fields = _stat_fields(pid)
    if fields:
        return fields[19]
    import psutil  # lazy import: only machines without /proc need it

    try:
        return f"{psutil.Process(pid).create_time()}"
    except psutil.Error:
        return ""


def _stat_fields(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on; none without such a file."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@functools.cache
def _boot() -> str:
    try:
        boot_id = (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        return f"{boot_id} {(_PROC / 'self' / 'ns' / 'pid').readlink()}"
    except OSError:
        import psutil

        return f"{psutil.boot_time():.0f}"
