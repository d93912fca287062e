"""The gradients of a global batch's shards in, their sum out: the same bits on any number of ranks.

DDP's all-reduce adds in an order that depends on the number of ranks. Here a rank adds its own shards along one tree
(shards.py) and exchanges what is left with the others, who go on along that tree. It is handed over bucket by bucket,
as soon as the last shard's backward pass has filled one, while that pass goes on.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from trainer.distributed import sharding
from trainer.distributed.buckets import Bucket, make_buckets
from trainer.distributed.buffers import Buffers
from trainer.distributed.exchange import GradientExchange


class OrderedReduction:
    """Adds up the gradients, and the moves of the buffers, of a step's shards."""

    def __init__(self, parameters: Iterable[nn.Parameter], buffers: Buffers, exchange: GradientExchange) -> None:
        self._buffers, self._exchange = buffers, exchange
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # The first bucket is filled by the forward pass; the others in the order in which a backward pass comes by.
        self._buckets = [Bucket(buffers.floats, buffers.floats.numel()), *make_buckets(reversed(trained))]
        self._num_shards, self._shard, self._is_last, self._num_sent = 1, 0, False, 0
        self._has_all = False
        for bucket in self._buckets:
            for index, (parameter, _) in enumerate(bucket.places):
                hook = self._filler(bucket, index)
                parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, num_shards: int) -> None:
        """A step of so many shards, on all ranks together."""
        self._num_shards, self._is_last, self._num_sent = num_shards, False, 0
        self._has_all = False  # no shard of this rank yet, that has a gradient of each parameter
        for bucket in self._buckets:
            if bucket.total is not None:
                bucket.spare.append(bucket.total)
                bucket.total = None

    def begin_shard(self, shard: int, is_last: bool) -> None:
        """Before the forward pass of one of this rank's shards; is_last: it has no more in this step."""
        self._shard, self._is_last = shard, is_last
        for bucket in self._buckets:
            bucket.filling = bucket.take()
            bucket.missing = set(range(len(bucket.places)))
            bucket.views(bucket.filling)[1].zero_()
        self._buffers.rewind()

    def forward_done(self) -> None:
        """Between the forward and the backward pass of a shard."""
        moved = self._buckets[0]
        assert moved.filling is not None
        self._buffers.moves(out=moved.filling)
        self._filled(moved)

    def end_shard(self) -> None:
        """After the backward pass; where a parameter took no part in it, zeros are added, and that is counted."""
        has_all = True
        for bucket in self._buckets:
            if bucket.filling is not None:
                has_all &= _fill_rest(bucket, bucket.filling)
                self._filled(bucket)
        self._has_all |= has_all

    def finish(self) -> None:
        """Leaves the sum over all shards in the parameters' gradients, none where no shard has any, and the mean move
        in the buffers."""
        self._is_last = True  # also where this rank had no shard at all
        self._send_filled()
        self._exchange.wait()
        for bucket in self._buckets:
            assert bucket.total is not None
            views, lacking = bucket.views(bucket.total)
            lack = [0.0] * len(views) if self._has_all else lacking.tolist()
            for (parameter, _), view, shards_without in zip(bucket.places, views, lack, strict=True):
                parameter.grad = view if shards_without < self._num_shards else None
        moves = self._buckets[0].total
        assert moves is not None
        self._buffers.move(moves, self._num_shards)

    def _filler(self, bucket: Bucket, index: int) -> Callable[[nn.Parameter], None]:
        """What autograd calls when a parameter's gradient is there."""

        def fill(parameter: nn.Parameter) -> None:
            assert bucket.filling is not None and parameter.grad is not None
            bucket.views(bucket.filling)[0][index].copy_(parameter.grad)
            parameter.grad = None
            bucket.missing.remove(index)
            if not bucket.missing:
                self._filled(bucket)

        return fill

    def _filled(self, bucket: Bucket) -> None:
        """Adds a shard's part to those left of it, as far as the tree allows."""
        assert bucket.filling is not None
        filling, bucket.filling = bucket.filling, None
        sharding.push_block(bucket.stack, (self._shard, self._shard + 1), filling, self._num_shards, bucket.add)
        if self._is_last:
            self._send_filled()

    def _send_filled(self) -> None:
        """Hands over the buckets that are ready, in the order that is the same on all ranks."""
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].filling is None:
            bucket = self._buckets[self._num_sent]
            self._num_sent += 1
            self._exchange.send(bucket, self._num_shards)


def _fill_rest(bucket: Bucket, filling: Tensor) -> bool:
    """What autograd has not called for. Returns whether that was nothing."""
    views, lacking = bucket.views(filling)
    for index in bucket.missing:
        views[index].zero_()
        lacking[index] = 1
    return not bucket.missing
