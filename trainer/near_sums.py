"""Tensors of the ranks of one machine in, their sums out, the same bits on all of them: through memory that they share.

What DDP and group_exchange.py do by messages. Sums are taken along one tree (shards.py), of which a rank may have added
some branches already. Two ranks read all of each other's, and both add up all; more of them add up a slice each, which
then all read.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer import shards
from trainer.buckets import Bucket
from trainer.neighbors import Neighbors, rounded
from trainer.stopwatch import Stopwatch

_Part = tuple[Tensor, bool]
"""a sum, and whether it may be added to: nobody else reads it"""


class NearSums:
    def __init__(self, neighbors: Neighbors, communication: Stopwatch, most_parts: int = 1) -> None:
        """communication: runs while the other ranks are waited for; most_parts: that a rank lays down of one sum."""
        self._neighbors, self._communication, self._most_parts = neighbors, communication, most_parts
        self._laid: list[tuple[Tensor, int, int]] = []
        self._end = 0

    def lay(self, parts: Sequence[Tensor], total: Tensor, num_shards: int) -> None:
        """What this rank has of a sum: as many [N] as shards.py leaves it of so many shards. total: [N], where the sum
        goes; it may be one of the parts. On all ranks in one order."""
        near, start = self._neighbors, self._end
        assert len(parts) <= self._most_parts, f"{len(parts)} parts of a sum, where {self._most_parts} have a place"
        for index, part in enumerate(parts):
            self._place(total, start, near.rank, index).copy_(part)
        self._laid.append((total, start, num_shards))
        self._end += self._most_parts * rounded(total.nbytes)

    @torch.no_grad()
    def add(self) -> None:
        """Takes the sums of what was laid down since the last time."""
        near, in_slices = self._neighbors, self._neighbors.size > 2
        self._meet()
        for total, start, num_shards in self._laid:
            mine = slice(*shards.cut(len(total), near.size)[near.rank]) if in_slices else slice(None)
            self._add(total, start, num_shards, mine)
            if in_slices:  # nobody else reads this slice of what this rank has laid down
                self._place(total, start, near.rank, 0)[mine] = total[mine]
        if in_slices:
            self._meet()
            for total, start, _ in self._laid:
                for rank, run in enumerate(shards.cut(len(total), near.size)):
                    if rank != near.rank:
                        total[slice(*run)] = self._place(total, start, rank, 0)[slice(*run)]
        near.turn()
        self._laid.clear()
        self._end = 0

    def _meet(self) -> None:
        self._communication.begin()
        self._neighbors.meet()
        self._communication.end()

    def _add(self, total: Tensor, start: int, num_shards: int, mine: slice) -> None:
        parts = [
            (block, (self._place(total, start, rank, index)[mine], False))
            for rank, index, block in _blocks(num_shards, self._neighbors.size)
        ]
        into = total[mine]
        unused = [into]

        def add(left: _Part, right: _Part) -> _Part:
            """What the ranks have laid down is not written over."""
            free = [value for value, may_change in (left, right) if may_change] or unused or [torch.empty_like(into)]
            return torch.add(left[0], right[0], out=free.pop(0)), True

        found, _ = shards.add_up(parts, num_shards, add)
        if found is not into:
            into.copy_(found)

    def _place(self, total: Tensor, start: int, rank: int, index: int) -> Tensor:
        """Where a rank lays one of its parts of a sum: [N]."""
        return self._neighbors.place(rank, start + index * rounded(total.nbytes), total.dtype, len(total))


class NearExchange:
    """group_exchange.py's GroupExchange among neighbors: the partial sums of buckets in, the totals out."""

    is_early = False

    def __init__(self, sums: NearSums) -> None:
        self._sums = sums

    def send(self, bucket: Bucket, num_shards: int) -> None:
        parts = [part for _, part in bucket.stack]
        bucket.total = parts[0] if parts else bucket.take()
        if bucket.length:
            self._sums.lay(parts, bucket.total, num_shards)
        bucket.spare += parts[1:]
        bucket.stack.clear()

    def wait(self) -> None:
        self._sums.add()


def parts_of(most_shards: int) -> int:
    """At least as many as shards.py leaves a rank of its run of so many shards: one for each level and side."""
    return 2 * most_shards.bit_length()


def place_bytes(tensors: Iterable[Tensor], parts: int) -> int:
    """What a rank may lay down at once, in whatever buckets: so many parts of each tensor's sum and of its count."""
    return parts * sum(rounded(tensor.nbytes + tensor.itemsize) for tensor in tensors)


@functools.cache
def _blocks(num_shards: int, size: int) -> list[tuple[int, int, shards.Block]]:
    """The parts of a sum from left to right: whose each is, which of its, and of which shards."""
    return [
        (rank, index, block)
        for rank, run in enumerate(shards.cut(num_shards, size))
        for index, block in enumerate(shards.blocks(*run, num_shards))
    ]
