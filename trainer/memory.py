"""Memory that a step has freed is kept for the next one.

glibc gives blocks of 32 MB and more, and the end of its heap, back to the system as soon as they are free; the next
step asks for the same again and touches 200,000 fresh pages (ResNet-18, batch 128), which costs a tenth of its time.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BLOCK_BYTES = 1 << 30
_MOST_KEPT_BYTES = (1 << 31) - 1


def keep() -> bool:
    """For this process, from now on; whether this system's C library can."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    done = [mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES), mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)]
    return all(done)  # each does some good without the other


def give_back() -> None:
    """What is free now, to the system: evaluation wants blocks of other sizes than steps, and would add to theirs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
