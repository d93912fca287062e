"""Computes random numbers from addresses such as (seed, epoch, purpose, sample id), the same on every device.

There is no generator state, so a checkpoint saves none, and ranks, data workers and restarts cannot change a draw. The
mixing function is the finalizer of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", variant 13 of Stafford): a bijection of 64 bits that passes BigCrush on a counter.
"""

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def key(*address: int | str) -> int:
    """Returns the 64-bit key, in [0, 2**64), of an address such as (seed, epoch, "flip")."""
    state = 0
    for element in address:
        words = [element & _MASK64] if isinstance(element, int) else _words(element)
        for word in words:
            state = _mix_int((state + _GOLDEN) ^ word)
    return state


def bits(ids: Tensor, key: int) -> Tensor:
    """Returns 64 random bits for each id, int64. ids: int64 of any shape."""
    return mix(ids * _signed(_GOLDEN) + _signed(key))


def uniform(ids: Tensor, key: int) -> Tensor:
    """Returns a float32 in [0, 1) for each id, with 24 random bits: more do not fit a float32 evenly."""
    return _high_bits(bits(ids, key), 24).to(torch.float32) * 2.0**-24


def integers(ids: Tensor, key: int, end: int) -> Tensor:
    """Returns an int64 in [0, end) for each id.

    end: at most 2**31. The probabilities of two values differ by less than end / 2**32 of their size.
    """
    return (_high_bits(bits(ids, key), 32) * end) >> 32


def mix(x: Tensor) -> Tensor:
    """Returns splitmix64's finalizer of int64 bit patterns. torch's products wrap like 64-bit words."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def _high_bits(x: Tensor, num_bits: int) -> Tensor:
    return _shift_right(x, 64 - num_bits)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Shifts in zeros; torch's own shift repeats the sign bit."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix_int(x: int) -> int:
    """Returns the same as `mix` for a Python integer."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _MASK64
    return x ^ (x >> 31)


def _words(text: str) -> list[int]:
    """Returns the text's 64-bit words and its length, so that ("a", "b") and ("ab",) have different keys."""
    data = text.encode()
    return [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)] + [len(data)]


def _signed(word: int) -> int:
    """Returns the int64 with the bits of a 64-bit word: torch refuses Python integers from 2**63 up."""
    return word - (1 << 64) if word >= 1 << 63 else word
