"""Memory that the ranks of one machine share, and their meetings in it.

gloo takes ten times as long for the gradient of a small network (docs/benchmarks.md): its bytes go through sockets and
threads of its own, on cores that the ranks need. Here each rank lays its tensors down, says that it is there, and looks
again and again whether the others are; then all may read.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import secrets
import select
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

LEAST_BYTES = 4096
"""of a place, for `largest`"""
_LINE_BYTES = 64  # of a cache: what two ranks write lies in different ones
_SPIN_SECONDS = 0.005  # by then a rank in the same step has come; who waits longer lets others have the core
_LONGEST_NAP_SECONDS = 0.01
_TOKEN_BYTES = 16
_MFD_CLOEXEC, _PIDFD_OPEN = 1, 434  # Linux's numbers on x86-64
# What one core writes is seen by another in the order of its writing: true of these, not of ARM, and of PyTorch's
# operations, whose writes are ordinary ones.
_ORDERED = ("x86_64", "amd64")


class Neighbors:
    """Memory with two places a rank, used in turns: who lays down tensors anew disturbs nobody who still reads the last
    ones."""

    def __init__(self, rank: int, pids: list[int], file: int, place_bytes: int, timeout: timedelta) -> None:
        """pids: of all ranks; file: open, as long as `_file_bytes` says; timeout: how long a rank is waited for."""
        self.rank, self.size = rank, len(pids)
        self._place_bytes, self._timeout = place_bytes, timeout
        self._memory = mmap.mmap(file, _file_bytes(self.size, place_bytes))
        self._heads = memoryview(self._memory)[: self.size * _LINE_BYTES].cast("q")
        self._each = _LINE_BYTES // self._heads.itemsize
        self._heads_of_others = [other * self._each for other in range(self.size) if other != rank]
        self._meetings, self._turn = 0, 0
        self._views: dict[Any, Tensor] = {}
        self._ends = select.poll()
        self._pid_of = {_end_of(pid): pid for pid in pids if pid != os.getpid()}
        for process in self._pid_of:
            self._ends.register(process, select.POLLIN)

    def place(self, rank: int, start: int, dtype: torch.dtype, length: int) -> Tensor:
        """[length], from this byte on of a rank's place. Only that rank writes there, and before all have met."""
        key = (self._turn, rank, start, dtype, length)
        if key not in self._views:
            assert start + length * dtype.itemsize <= self._place_bytes, "more is laid down than a place has bytes"
            head, turn = self.size * _LINE_BYTES, self._turn * self.size * self._place_bytes
            offset = head + turn + rank * self._place_bytes + start
            self._views[key] = torch.frombuffer(self._memory, dtype=dtype, count=length, offset=offset)
        return self._views[key]

    def turn(self) -> None:
        """Called when this rank has read all: what it writes from now on is for the next meeting."""
        self._turn = 1 - self._turn

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each value over the ranks."""
        places = [self.place(rank, 0, torch.float64, len(values)) for rank in range(self.size)]
        places[self.rank].copy_(torch.tensor(values, dtype=torch.float64))
        self.meet()
        found: list[float] = torch.stack(places).amax(dim=0).tolist()
        self.turn()
        return found

    def meet(self) -> None:
        """Returns when all ranks are here. Raises RuntimeError when one has ended, or does not come in time."""
        self._meetings += 1
        self._heads[self.rank * self._each] = self._meetings
        if self._all_here():
            return
        began = time.perf_counter()
        while time.perf_counter() - began < _SPIN_SECONDS:
            os.sched_yield()
            if self._all_here():
                return
        while not self._all_here():
            waited = time.perf_counter() - began
            ended = self._ends.poll(1000 * min(waited / 16, _LONGEST_NAP_SECONDS))
            if ended and not self._all_here():
                # In gloo's words, by which the watch knows that a rank is lost (watch.py).
                raise RuntimeError(f"connection closed by peer: process {self._pid_of[ended[0][0]]} has ended")
            if waited > self._timeout.total_seconds():
                raise RuntimeError(f"another rank did not come within {self._timeout}")

    def close(self) -> None:
        """Before any place was asked for."""
        for process in self._pid_of:
            os.close(process)
        self._heads.release()
        self._memory.close()

    def _all_here(self) -> bool:
        heads, meetings = self._heads, self._meetings
        return all(heads[head] >= meetings for head in self._heads_of_others)


def find(rank: int, size: int, place_bytes: int, timeout: timedelta) -> Neighbors | None:
    """To be called by all ranks: memory with places of so many bytes; or none, where not all can share it. timeout: how
    long a rank is waited for."""
    ranks = gather_object([(_machine(), os.getpid())])
    machines, pids = {machine for machine, _ in ranks}, [pid for _, pid in ranks]
    if len(machines) > 1 or not all(machines):
        return None
    num_bytes = _file_bytes(size, place_bytes)
    file = _made(num_bytes) if rank == 0 else -1
    # What is opened under rank 0's number must be what rank 0 has made: machines may only look like one.
    token = secrets.token_bytes(_TOKEN_BYTES)
    if file >= 0:
        os.pwrite(file, token, num_bytes - _TOKEN_BYTES)
    first, token = broadcast_object_list([file, token])
    found = None
    with contextlib.suppress(OSError):  # a machine may forbid any of it; then the ranks' group does its sums
        if rank != 0 and first >= 0:
            file = os.open(f"/proc/{pids[0]}/fd/{first}", os.O_RDWR | os.O_NONBLOCK)
        if file >= 0 and os.pread(file, _TOKEN_BYTES, num_bytes - _TOKEN_BYTES) == token:
            found = Neighbors(rank, pids, file, place_bytes, timeout)
    all_have_it = all(gather_object([found is not None]))
    if file >= 0:
        os.close(file)
    if found is not None and not all_have_it:
        found.close()
        return None
    return found


def _made(num_bytes: int) -> int:
    """A file of so many bytes that is memory only and gone with its processes; -1 where there is none to be had."""
    file = _call("memfd_create", b"samecurve", _MFD_CLOEXEC)
    try:
        if file >= 0:
            os.truncate(file, num_bytes)
    except OSError:
        os.close(file)
        return -1
    return file


def _machine() -> str:
    """What processes have in common that see each other's memory; nothing where that is not to be had."""
    if sys.platform != "linux" or platform.machine().lower() not in _ORDERED:
        return ""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115  # another namespace's
            return ""
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _call(name: str, *arguments: object) -> int:
    """One of the C library, or of Linux by number: many a Python was built where neither had them. -1 if it fails."""
    library = ctypes.CDLL(None)
    function = getattr(library, name, None)
    if function is None:
        return -1
    found: int = function(*arguments)
    return found


def _end_of(pid: int) -> int:
    """A file that is ready to be read when that process has ended. Raises OSError."""
    file = _call("syscall", _PIDFD_OPEN, pid, 0)
    if file < 0:
        raise OSError(f"no pidfd of process {pid}")
    return file


def _file_bytes(size: int, place_bytes: int) -> int:
    return size * (_LINE_BYTES + 2 * place_bytes) + _TOKEN_BYTES


def rounded(num_bytes: int) -> int:
    """What so many bytes take of a place: other tensors begin in another line of the cache."""
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
