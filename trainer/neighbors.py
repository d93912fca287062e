"""Tensors of the ranks of one machine in, their sums out, on all of them: through memory that the ranks share.

gloo takes ten times as long for the gradient of a small network (docs/benchmarks.md): its bytes go through sockets and
threads of its own, on cores that the ranks need. Here each rank lays its tensors down, says that it is there, looks
again and again whether the others are, and adds up all in the order of the ranks, so that every rank has the same bits.
"""

import contextlib
import mmap
import os
import platform
import select
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from trainer import shards
from trainer.stopwatch import Stopwatch

_LINE_BYTES = 64  # of a cache: what two ranks write lies in different ones
_SPIN_SECONDS = 0.005  # by then a rank in the same step has come; who waits longer lets others have the core
_LONGEST_NAP_SECONDS = 0.01
# Memory that one core writes is seen by another in the order of its writing: true of these, not of ARM.
_ORDERED = ("x86_64", "amd64")


class Neighbors:
    """Memory with two places a rank, used in turns: who writes the next sum's tensors disturbs nobody who still adds up
    the last one's."""

    def __init__(self, rank: int, pids: list[int], file: int, place_bytes: int, timeout: timedelta) -> None:
        """pids: of all ranks; file: open, as long as `_file_bytes` says; timeout: how long a rank is waited for."""
        self._rank, self._size = rank, len(pids)
        self._place_bytes, self._timeout = place_bytes, timeout
        self._memory = mmap.mmap(file, _file_bytes(self._size, place_bytes))
        self._heads = memoryview(self._memory)[: self._size * _LINE_BYTES].cast("q")
        self._each = _LINE_BYTES // self._heads.itemsize
        self._others = [other * self._each for other in range(self._size) if other != rank]
        self._meetings, self._turn, self._end = 0, 0, 0
        self._laid: list[tuple[Tensor, list[Tensor]]] = []
        self._views: dict[Any, list[Tensor]] = {}
        self._ends = select.poll()
        self._pid_of = {os.pidfd_open(pid): pid for pid in pids if pid != os.getpid()}
        for process in self._pid_of:
            self._ends.register(process, select.POLLIN)

    def lay(self, tensor: Tensor, factor: float = 1.0) -> None:
        """A tensor [N], times a factor, for the next sum; on all ranks in the same order, as long, of the same type."""
        views = self._views_of(tensor)
        torch.mul(tensor, factor, out=views[self._rank])
        self._laid.append((tensor, views))

    def sum(self) -> None:
        """Writes the ranks' sums into the tensors that were laid down since the last one. Raises RuntimeError when a
        rank has ended, or does not come in time."""
        self._meet()
        if self._size == 2:
            for tensor, (first, second) in self._laid:
                torch.add(first, second, out=tensor)
        else:  # each rank adds up its part of all, and all read it: little is read more than once
            for _, views in self._laid:
                _add([view[_part(view, self._rank, self._size)] for view in views], self._rank)
            self._meet()
            for tensor, views in self._laid:
                for other, view in enumerate(views):
                    part = _part(view, other, self._size)
                    tensor[part] = view[part]
        self._laid.clear()
        self._turn, self._end = 1 - self._turn, 0

    def _views_of(self, tensor: Tensor) -> list[Tensor]:
        """Where each rank lays the next tensor, if it is like this one."""
        key = (self._turn, self._end, tensor.dtype, len(tensor))
        if key not in self._views:
            first = self._size * _LINE_BYTES + self._turn * self._size * self._place_bytes + self._end
            starts = [first + rank * self._place_bytes for rank in range(self._size)]
            self._views[key] = [
                torch.frombuffer(self._memory, dtype=tensor.dtype, count=len(tensor), offset=start) for start in starts
            ]
        self._end += _rounded(tensor.nbytes)
        assert self._end <= self._place_bytes, f"{self._end} bytes laid in a place for {self._place_bytes}"
        return self._views[key]

    def _meet(self) -> None:
        """Returns when all ranks are here."""
        self._meetings += 1
        self._heads[self._rank * self._each] = self._meetings
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
                raise RuntimeError(f"connection closed by peer: process {self._pid_of[ended[0][0]]} has ended")
            if waited > self._timeout.total_seconds():
                raise RuntimeError(f"another rank did not come to a sum within {self._timeout}")

    def _all_here(self) -> bool:
        heads, meetings = self._heads, self._meetings
        return all(heads[other] >= meetings for other in self._others)


def meet(rank: int, size: int, tensors: Iterable[Tensor], timeout: timedelta) -> Neighbors | None:
    """To be called by all ranks: memory for sums of such tensors, or none where it is not shared by all. timeout: how
    long a rank is waited for."""
    ranks = gather_object([(_machine(), os.getpid())])
    machines, pids = {machine for machine, _ in ranks}, [pid for _, pid in ranks]
    if len(machines) > 1 or not all(machines):
        return None
    place_bytes = sum(_rounded(tensor.nbytes) for tensor in tensors)
    file, found = -1, None
    with contextlib.suppress(OSError):  # a machine may forbid any of it; then the ranks' group does its sums
        if rank == 0:
            file = os.memfd_create("samecurve")
            os.truncate(file, _file_bytes(size, place_bytes))
    (first,) = broadcast_object_list([file])
    with contextlib.suppress(OSError):
        if rank != 0 and first >= 0:
            file = os.open(f"/proc/{pids[0]}/fd/{first}", os.O_RDWR)
        if file >= 0:
            found = Neighbors(rank, pids, file, place_bytes, timeout)
    all_have_it = all(gather_object([found is not None]))
    if file >= 0:
        os.close(file)
    return found if all_have_it else None


def mean_of_gradients(neighbors: Neighbors, size: int, communication: Stopwatch) -> Callable[..., Future[Tensor]]:
    """For DistributedDataParallel.register_comm_hook. communication: runs while the others are waited for."""
    waiting: list[tuple[Future[Tensor], Tensor]] = []

    def exchange(_: None, bucket: GradBucket) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        waiting.append((future, bucket.buffer()))
        neighbors.lay(bucket.buffer(), 1 / size)
        if bucket.is_last():  # one meeting a step; who computes on its only core has nothing to do meanwhile
            communication.begin()
            neighbors.sum()
            communication.end()
            for done, mean in waiting:
                done.set_result(mean)
            waiting.clear()
        return future

    return exchange


def _machine() -> str:
    """What processes have in common that see each other's memory; nothing where that is not to be had."""
    has_calls = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
    if sys.platform != "linux" or not has_calls or platform.machine().lower() not in _ORDERED:
        return ""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _add(parts: list[Tensor], own: int) -> None:
    """Writes the sum of all into the one of this rank."""
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    parts[own].copy_(total)


def _part(tensor: Tensor, rank: int, size: int) -> slice:
    """What this rank adds up of a tensor [N]."""
    return slice(*shards.cut(len(tensor), size)[rank])


def _file_bytes(size: int, place_bytes: int) -> int:
    return size * (_LINE_BYTES + 2 * place_bytes)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
