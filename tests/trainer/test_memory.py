"""What a step has freed stays with the process, until it is given back."""

import sys
from collections.abc import Callable

import pytest
from support.processes import REPOSITORY, Done

PROGRAM = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
from trainer import memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 1_000_000

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert memory.keep()
before = megabytes()
for _ in range(2):
    tensors = [torch.ones(12_000_000) for _ in range(4)]  # 48 MB each
    tensors.clear()
freed = megabytes() - before
memory.give_back()
print(freed, megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
def test_freed_memory_is_kept_until_it_is_given_back(launch: Callable[..., Done]) -> None:
    kept, given_back = map(int, launch([sys.executable, "-c", PROGRAM, "keep"]).out.split())
    assert kept > 150 and given_back < 30
    freed, _ = map(int, launch([sys.executable, "-c", PROGRAM, "leave"]).out.split())
    assert freed < 150
