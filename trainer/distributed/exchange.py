"""Adds the ranks' partial sums of each bucket, with the same bits on any number of ranks.

Each rank owns an equal slice of every bucket. It receives all ranks' partial sums of that slice, adds them along the
tree of sharding.py, and sends the total to all ranks: a reduce-scatter and an all-gather. Both are made of sends and
receives, because gloo and NCCL then accept slices of unequal length. A bucket is sent while the backward pass computes
the next one.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import sharding
from trainer.distributed.buckets import Bucket
from trainer.timer import Timer


class GradientExchange:
    """Sums buckets over all ranks. A single process uses it too, and sends nothing."""

    def __init__(self, rank: int, world_size: int, device: torch.device, communication: Timer) -> None:
        """communication: measures the time for which `wait` waits for other ranks."""
        self._rank, self._world_size, self._communication = rank, world_size, communication
        self._received = torch.empty(0)
        self._executor: _Executor = _DirectExecutor()
        if world_size > 1:
            self._executor = _StreamExecutor() if device.type == "cuda" else _ThreadExecutor()

    def send(self, bucket: Bucket, num_shards: int) -> None:
        """Starts the sum of a bucket. All ranks send the same buckets in the same order.

        bucket: its stack holds the partial sums of all of this rank's shards.
        num_shards: number of shards on all ranks together.
        """
        self._executor.submit(lambda: self._exchange(bucket, num_shards))

    def wait(self) -> None:
        """Waits until every bucket that was sent has its total."""
        if self._world_size == 1:
            return
        self._communication.begin()
        self._executor.wait()
        self._communication.end()

    @torch.no_grad()
    def _exchange(self, bucket: Bucket, num_shards: int) -> None:
        """Sets bucket.total to the sum over all ranks and empties the bucket's stack."""
        vectors = [vector for _, vector in bucket.stack]
        total = vectors[0] if vectors else bucket.allocate()
        if self._world_size > 1 and bucket.length:
            slices = [slice(*bounds) for bounds in sharding.split_evenly(bucket.length, self._world_size)]
            peers = [peer for peer in range(self._world_size) if peer != self._rank]
            sums = self._receive_sums(bucket, num_shards, slices, peers)
            own_slice = slices[self._rank]
            total[own_slice] = sharding.tree_sum(sums, num_shards, lambda left, right: left.add_(right))
            _send_and_receive(
                [(total[own_slice], peer, 0) for peer in peers], [(total[slices[peer]], peer, 0) for peer in peers]
            )
        bucket.free_vectors += vectors[1:]
        bucket.stack.clear()
        bucket.total = total

    def _receive_sums(
        self, bucket: Bucket, num_shards: int, slices: list[slice], peers: list[int]
    ) -> list[tuple[sharding.Block, Tensor]]:
        """Sends this rank's partial sums; returns all ranks' partial sums of this rank's slice, from left to right."""
        own_slice = slices[self._rank]
        length = own_slice.stop - own_slice.start
        blocks_of_rank = [
            sharding.partial_sum_blocks(first, end, num_shards)
            for first, end in sharding.split_evenly(num_shards, self._world_size)
        ]
        keys = [(peer, index) for peer in peers for index in range(len(blocks_of_rank[peer]))]
        if self._received.numel() < length * len(keys) or self._received.dtype != bucket.like.dtype:
            self._received = bucket.like.new_empty(length * len(keys))
        received = {key: self._received[length * i : length * (i + 1)] for i, key in enumerate(keys)}
        _send_and_receive(
            [(vector[slices[peer]], peer, index) for peer in peers for index, (_, vector) in enumerate(bucket.stack)],
            [(tensor, peer, index) for (peer, index), tensor in received.items()],
        )
        own = {(self._rank, index): vector[own_slice] for index, (_, vector) in enumerate(bucket.stack)}
        sums = received | own
        return [
            (block, sums[rank, index])
            for rank, blocks in enumerate(blocks_of_rank)
            for index, block in enumerate(blocks)
        ]


class _Executor(Protocol):
    """Runs exchanges in the order of submission, concurrently with the backward pass where possible."""

    def submit(self, work: Callable[[], None]) -> None: ...

    def wait(self) -> None:
        """Waits until all submitted work is done."""


class _DirectExecutor:
    """Runs the work at once; used by a single process."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def wait(self) -> None:
        pass


class _StreamExecutor:
    """Runs the work on a CUDA stream of its own, so that the backward pass goes on."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def submit(self, work: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())  # the kernels that compute the gradients come first
        with torch.cuda.stream(self._stream):
            work()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)  # or the update would read sums that are incomplete


class _ThreadExecutor:
    """Runs the work in a daemon thread.

    A ThreadPoolExecutor does not fit: Python waits for its threads at exit, and a rank that fails while its peers wait
    for it must exit at once.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        self._pending: list[Future[None]] = []
        Thread(target=self._run, name="reduction", daemon=True).start()

    def submit(self, work: Callable[[], None]) -> None:
        future: Future[None] = Future()
        self._pending.append(future)
        self._queue.put((future, work))

    def wait(self) -> None:
        for future in self._pending:
            future.result()
        self._pending.clear()

    def _run(self) -> None:
        while True:
            future, work = self._queue.get()
            try:
                work()
                future.set_result(None)
            except BaseException as error:  # wait() raises it in the main thread
                future.set_exception(error)


def _send_and_receive(sends: list[tuple[Tensor, int, int]], receives: list[tuple[Tensor, int, int]]) -> None:
    """Sends and receives (tensor, peer rank, tag) and waits for all. Skips empty tensors."""
    operations = [dist.P2POp(dist.irecv, tensor, peer, tag=tag) for tensor, peer, tag in receives if tensor.numel()]
    operations += [dist.P2POp(dist.isend, tensor, peer, tag=tag) for tensor, peer, tag in sends if tensor.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
