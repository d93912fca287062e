"""Random numbers as addresses: (seed, epoch or step, purpose, sample id) in, the same number out, on any device.

Nothing is drawn from a stream, so there is no state to save, and neither ranks nor workers nor a restart can change
a draw. The mixing function is splitmix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", variant 13 of Stafford): a bijection of 64 bits that passes BigCrush on a counter.
"""

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def key(*address: int | str) -> int:
    """An address such as (seed, epoch, "flip") as 64 bits, in [0, 2**64)."""
    state = 0
    for part in address:
        words = [part & _MASK64] if isinstance(part, int) else _words(part)
        for word in words:
            state = _mix_int((state + _GOLDEN) ^ word)
    return state


def bits(ids: Tensor, key: int) -> Tensor:
    """64 random bits for each id: int64 of any shape in, int64 of the same shape and device out."""
    return mix(ids * _signed(_GOLDEN) + _signed(key))


def uniform(ids: Tensor, key: int) -> Tensor:
    """A float32 in [0, 1) for each id; 24 bits, all that a float32 holds evenly."""
    return _high_bits(bits(ids, key), 24).to(torch.float32) * 2.0**-24


def integers(ids: Tensor, key: int, end: int) -> Tensor:
    """An int64 in [0, end) for each id, end at most 2**31; uneven by less than end / 2**32."""
    return (_high_bits(bits(ids, key), 32) * end) >> 32


def mix(x: Tensor) -> Tensor:
    """The finalizer itself, a bijection of int64 bit patterns; torch's products wrap as 64-bit words do."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def _high_bits(x: Tensor, count: int) -> Tensor:
    return _shift_right(x, 64 - count)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros; torch's own brings in the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix_int(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _MASK64
    return x ^ (x >> 31)


def _words(text: str) -> list[int]:
    data = text.encode()
    return [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)] + [len(data)]


def _signed(word: int) -> int:
    """The int64 of the same bits: torch refuses Python numbers from 2**63 up."""
    return word - (1 << 64) if word >= 1 << 63 else word
