"""The gradients of a global batch's shards in, their sum out: the same bits on any number of ranks.

DDP's all-reduce adds in an order that depends on the number of ranks. Here each rank owns an equal slice of every
bucket of gradients, receives all ranks' sums of that slice, adds them along one tree (shards.py), and sends the total
to all: a reduce-scatter and an all-gather, made of sends and receives, which take unequal sizes on gloo and NCCL. A
bucket is sent as soon as the last shard's backward pass has filled it, while that pass goes on.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import shards
from trainer.buffers import Buffers
from trainer.stopwatch import Stopwatch

_BUCKET_ELEMENTS = 1 << 21  # 8 MB of float32; half or twice as much measured the same


@dataclass
class _Bucket:
    """Some parameters' gradients side by side, or the buffers' moves, for one shard after the other."""

    like: Tensor
    length: int = 0
    places: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """each parameter and where its gradient begins"""
    missing: dict[int, int] = field(default_factory=dict)
    """where the shard in hand has no gradient yet, and its length"""
    filling: Tensor | None = None
    stack: list[tuple[shards.Block, Tensor]] = field(default_factory=list)
    total: Tensor | None = None
    spare: list[Tensor] = field(default_factory=list)

    def take(self) -> Tensor:
        return self.spare.pop() if self.spare else self.like.new_empty(self.length)

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        self.spare.append(right)
        return left.add_(right)


class OrderedReduction:
    """Adds up the gradients, and the moves of the buffers, of a step's shards."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        buffers: Buffers,
        rank: int,
        world_size: int,
        communication: Stopwatch | None = None,
    ) -> None:
        """communication: runs while the other ranks' sums are waited for."""
        self._rank, self._world_size = rank, world_size
        self._buffers, self._communication = buffers, communication or Stopwatch()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # The first bucket is filled by the forward pass; the others in the order in which a backward pass comes by.
        self._buckets = [_Bucket(buffers.floats, buffers.floats.numel()), *_in_buckets(reversed(trained))]
        self._num_shards, self._shard, self._is_last, self._num_sent = 1, 0, False, 0
        self._received = torch.empty(0)
        self._sending: list[Future[None]] = []
        on_gpu = trained[0].device.type == "cuda"
        self._stream = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
        self._courier = _Courier() if world_size > 1 and not on_gpu else None
        for bucket in self._buckets:
            for parameter, place in bucket.places:
                hook = self._filler(bucket, place)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, num_shards: int) -> None:
        """A step of so many shards, on all ranks together."""
        self._num_shards, self._is_last, self._num_sent = num_shards, False, 0
        for bucket in self._buckets:
            if bucket.total is not None:
                bucket.spare.append(bucket.total)
                bucket.total = None

    def begin_shard(self, shard: int, is_last: bool) -> None:
        """Before the forward pass of one of this rank's shards; is_last: it has no more in this step."""
        self._shard, self._is_last = shard, is_last
        for bucket in self._buckets:
            bucket.missing = {place: parameter.numel() for parameter, place in bucket.places}
            bucket.filling = bucket.take()
        self._buffers.rewind()

    def forward_done(self) -> None:
        """Between the forward and the backward pass of a shard."""
        moved = self._buckets[0]
        assert moved.filling is not None
        self._buffers.moves(out=moved.filling)
        self._filled(moved)

    def end_shard(self) -> None:
        """After the backward pass; a parameter that took no part in it has a gradient of zero."""
        for bucket in self._buckets:
            if bucket.filling is not None:
                for place, length in bucket.missing.items():
                    bucket.filling[place : place + length].zero_()
                self._filled(bucket)

    def finish(self) -> None:
        """Leaves the sum over all shards in the parameters' gradients, and the mean move in the buffers."""
        self._is_last = True  # also where this rank had no shard at all
        self._send_filled()
        if self._world_size > 1:
            self._communication.begin()
        for sending in self._sending:
            sending.result()
        self._sending.clear()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if self._world_size > 1:
            self._communication.end()
        for bucket in self._buckets:
            assert bucket.total is not None
            for parameter, place in bucket.places:
                parameter.grad = _as_laid_out(bucket.total[place : place + parameter.numel()], parameter)
        moves = self._buckets[0].total
        assert moves is not None
        self._buffers.move(moves, self._num_shards)

    def _filler(self, bucket: _Bucket, place: int) -> Callable[[nn.Parameter], None]:
        """What autograd calls when a parameter's gradient is there."""

        def fill(parameter: nn.Parameter) -> None:
            assert bucket.filling is not None and parameter.grad is not None
            _as_laid_out(bucket.filling[place : place + parameter.numel()], parameter).copy_(parameter.grad)
            parameter.grad = None
            del bucket.missing[place]
            if not bucket.missing:
                self._filled(bucket)

        return fill

    def _filled(self, bucket: _Bucket) -> None:
        """Adds a shard's part to those left of it, as far as the tree allows."""
        assert bucket.filling is not None
        filling, bucket.filling = bucket.filling, None
        shards.join(bucket.stack, (self._shard, self._shard + 1), filling, self._num_shards, bucket.add)
        if self._is_last:
            self._send_filled()

    def _send_filled(self) -> None:
        """Hands over the buckets that are ready, in the order that is the same on all ranks."""
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].filling is None:
            bucket = self._buckets[self._num_sent]
            self._num_sent += 1
            if self._courier is not None:
                self._sending.append(self._courier.send(self._exchange, bucket))
            elif self._stream is not None:  # beside the backward pass, not after it
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    self._exchange(bucket)
            else:
                self._exchange(bucket)

    @torch.no_grad()
    def _exchange(self, bucket: _Bucket) -> None:
        """This rank's slice of each rank's sums in, the total of all slices out."""
        own, rank, world_size = bucket.stack, self._rank, self._world_size
        if world_size > 1 and bucket.length:
            slices = [slice(*run) for run in shards.cut(bucket.length, world_size)]
            others = [other for other in range(world_size) if other != rank]
            sums = self._receive_sums(bucket, slices, others)
            total_slice = shards.add_up(sums, self._num_shards, lambda left, right: left.add_(right))
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
        self, bucket: _Bucket, slices: list[slice], others: list[int]
    ) -> list[tuple[shards.Block, Tensor]]:
        """Every rank's sums of the slice that this rank adds up, from left to right."""
        mine = slices[self._rank]
        length = mine.stop - mine.start
        blocks = [
            shards.blocks(first, end, self._num_shards) for first, end in shards.cut(self._num_shards, self._world_size)
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
        self._queue: SimpleQueue[tuple[Future[None], Callable[[_Bucket], None], _Bucket]] = SimpleQueue()
        Thread(target=self._work, name="reduction", daemon=True).start()

    def send(self, work: Callable[[_Bucket], None], bucket: _Bucket) -> Future[None]:
        done: Future[None] = Future()
        self._queue.put((done, work, bucket))
        return done

    def _work(self) -> None:
        while True:
            done, work, bucket = self._queue.get()
            try:
                work(bucket)
                done.set_result(None)
            except BaseException as error:  # told to whoever waits for the result
                done.set_exception(error)


def _in_buckets(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """Consecutive parameters of one dtype, up to a bucket's length."""
    found: list[_Bucket] = []
    for parameter in parameters:
        fits = found and found[-1].like.dtype == parameter.dtype
        if not fits or found[-1].length + parameter.numel() > _BUCKET_ELEMENTS:
            found.append(_Bucket(parameter.detach()))
        found[-1].places.append((parameter, found[-1].length))
        found[-1].length += parameter.numel()
    return found


def _as_laid_out(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A view of [parameter.numel()] with the parameter's shape, and its layout: an optimizer runs over both at once."""
    return flat.as_strided(parameter.shape, parameter.stride())


def _swap(sent: list[tuple[Tensor, int, int]], received: list[tuple[Tensor, int, int]]) -> None:
    """Sends and receives tensors, each to or from a rank under a tag; waits for all. Empty ones are left out."""
    operations = [dist.P2POp(dist.irecv, part, other, tag=tag) for part, other, tag in received if part.numel()]
    operations += [dist.P2POp(dist.isend, part, other, tag=tag) for part, other, tag in sent if part.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
