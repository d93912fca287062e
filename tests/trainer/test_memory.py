"""Freed memory stays in the process until it is released."""

import sys
from collections.abc import Callable

import pytest
from support.processes import REPOSITORY, CommandResult

PROGRAM = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
from trainer import memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 1_000_000

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert memory.keep_freed_memory()
before = megabytes()
for _ in range(2):
    tensors = [torch.ones(12_000_000) for _ in range(4)]  # 48 MB each
    tensors.clear()
freed = megabytes() - before
memory.release_freed_memory()
print(freed, megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
def test_freed_memory_stays_in_the_process_until_released(launch: Callable[..., CommandResult]) -> None:
    kept, released = map(int, launch([sys.executable, "-c", PROGRAM, "keep"]).out.split())
    assert kept > 150 and released < 30
    freed, _ = map(int, launch([sys.executable, "-c", PROGRAM, "leave"]).out.split())
    assert freed < 150
