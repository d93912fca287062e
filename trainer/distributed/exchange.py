"""A rank's partial sums of buckets in, the totals over all ranks out: through the ranks' group.

Each rank owns an equal slice of every bucket, receives all ranks' sums of that slice, adds them along one tree
(shards.py), and sends the total to all: a reduce-scatter and an all-gather, made of sends and receives, which take
unequal sizes on gloo and NCCL. A bucket is sent while the backward pass goes on that fills the next one.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import sharding
from trainer.distributed.buckets import Bucket
from trainer.timer import Timer


class GradientExchange:
    """Also for a process alone, which adds up what is its own."""

    def __init__(self, rank: int, world_size: int, device: torch.device, communication: Timer) -> None:
        """communication: runs while the other ranks' sums are waited for."""
        self._rank, self._world_size, self._communication = rank, world_size, communication
        self._received = torch.empty(0)
        self._sending: list[Future[None]] = []
        on_gpu = world_size > 1 and device.type == "cuda"
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._courier = _Courier() if world_size > 1 and not on_gpu else None

    def send(self, bucket: Bucket, num_shards: int) -> None:
        """A bucket whose sums are all there; the same order of buckets on all ranks. num_shards: of all ranks."""
        if self._courier is not None:
            self._sending.append(self._courier.send(lambda: self._exchange(bucket, num_shards)))
        elif self._stream is not None:  # beside the backward pass, not after it
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._exchange(bucket, num_shards)
        else:
            self._exchange(bucket, num_shards)

    def wait(self) -> None:
        """Returns when each bucket that was sent has its total."""
        if self._world_size == 1:
            return
        self._communication.begin()
        for sending in self._sending:
            sending.result()
        self._sending.clear()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._communication.end()

    @torch.no_grad()
    def _exchange(self, bucket: Bucket, num_shards: int) -> None:
        """This rank's slice of each rank's sums in, the total of all slices out."""
        own, rank, world_size = bucket.stack, self._rank, self._world_size
        if world_size > 1 and bucket.length:
            slices = [slice(*run) for run in sharding.split_evenly(bucket.length, world_size)]
            others = [other for other in range(world_size) if other != rank]
            sums = self._receive_sums(bucket, num_shards, slices, others)
            total_slice = sharding.tree_sum(sums, num_shards, lambda left, right: left.add_(right))
            total = own[0][1] if own else bucket.take()
            total[slices[rank]] = total_slice
            _swap(
                [(total[slices[rank]], other, 0) for other in others],
                [(total[slices[other]], other, 0) for other in others],
            )
        else:
            total = own[0][1] if own else bucket.take()
        bucket.spare += [part for _, part in own if part is not total]
        own.clear()
        bucket.total = total

    def _receive_sums(
        self, bucket: Bucket, num_shards: int, slices: list[slice], others: list[int]
    ) -> list[tuple[sharding.Block, Tensor]]:
        """Every rank's sums of the slice that this rank adds up, from left to right."""
        mine = slices[self._rank]
        length = mine.stop - mine.start
        blocks = [
            sharding.partial_sum_blocks(first, end, num_shards)
            for first, end in sharding.split_evenly(num_shards, self._world_size)
        ]
        size = length * sum(len(blocks[other]) for other in others)
        if self._received.numel() < size or self._received.dtype != bucket.like.dtype:
            self._received = bucket.like.new_empty(size)
        places = [(other, index) for other in others for index in range(len(blocks[other]))]
        into = {place: self._received[length * i : length * (i + 1)] for i, place in enumerate(places)}
        _swap(
            [(part[slices[other]], other, index) for other in others for index, (_, part) in enumerate(bucket.stack)],
            [(part, other, index) for (other, index), part in into.items()],
        )
        found = []
        for rank, its_blocks in enumerate(blocks):
            for index, block in enumerate(its_blocks):
                found.append((block, bucket.stack[index][1][mine] if rank == self._rank else into[rank, index]))
        return found


class _Courier:
    """A thread that does what it is handed, in order. It is no executor: those are waited for at exit, and a rank
    that failed while its peers wait must go."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        Thread(target=self._work, name="reduction", daemon=True).start()

    def send(self, work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._queue.put((done, work))
        return done

    def _work(self) -> None:
        while True:
            done, work = self._queue.get()
            try:
                work()
                done.set_result(None)
            except BaseException as error:  # told to whoever waits for the result
                done.set_exception(error)


def _swap(sent: list[tuple[Tensor, int, int]], received: list[tuple[Tensor, int, int]]) -> None:
    """Sends and receives tensors, each to or from a rank under a tag; waits for all. Empty ones are left out."""
    operations = [dist.P2POp(dist.irecv, part, other, tag=tag) for part, other, tag in received if part.numel()]
    operations += [dist.P2POp(dist.isend, part, other, tag=tag) for part, other, tag in sent if part.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
