"""Sums the gradients of a global batch's shards in a fixed order, so that any number of ranks gives the same bits.

DDP's all-reduce adds in an order that depends on the number of ranks. Here each rank adds its own shards along the
binary tree of sharding.py, and GradientExchange adds the ranks' partial sums along the same tree. Communication
overlaps with the backward pass: a bucket is sent as soon as the rank's last shard has filled it.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from trainer.distributed import sharding
from trainer.distributed.buckets import Bucket, make_buckets
from trainer.distributed.buffers import Buffers
from trainer.distributed.exchange import GradientExchange


class OrderedReduction:
    """Sums a step's gradients and the changes of module buffers (BatchNorm's running statistics) over all shards.

    Call order in a step: `begin`; for each shard of this rank `begin_shard`, the forward pass, `end_forward`, the
    backward pass, `end_shard`; then `finish`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], buffers: Buffers, exchange: GradientExchange) -> None:
        """Registers a hook on each trainable parameter. The hook moves the gradient to a bucket."""
        self._buffers, self._exchange = buffers, exchange
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        # The first bucket has the buffer changes, known after the forward pass. The others: gradients, last layer
        # first.
        self._buffer_bucket = Bucket(buffers.floats, buffers.floats.numel())
        self._buckets = [self._buffer_bucket, *make_buckets(reversed(trainable))]
        self._num_shards, self._shard, self._is_last_shard, self._num_sent = 1, 0, False, 0
        self._local_shard_has_all_gradients = False
        for bucket in self._buckets:
            for index, (parameter, _) in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(bucket, index))

    def begin(self, num_shards: int) -> None:
        """Starts a step. num_shards: number of shards of the global batch, over all ranks."""
        self._num_shards, self._is_last_shard, self._num_sent = num_shards, False, 0
        self._local_shard_has_all_gradients = False
        for bucket in self._buckets:
            if bucket.total is not None:
                bucket.free_vectors.append(bucket.total)
                bucket.total = None

    def begin_shard(self, shard: int, is_last: bool) -> None:
        """Starts a shard of this rank, before its forward pass. is_last: whether it is the rank's last in this step."""
        self._shard, self._is_last_shard = shard, is_last
        for bucket in self._buckets:
            bucket.current = bucket.allocate()
            bucket.missing = set(range(len(bucket.parameters)))
            _, missing_counts = bucket.views(bucket.current)
            missing_counts.zero_()
        self._buffers.restore()

    def end_forward(self) -> None:
        """Records the shard's buffer changes. Call it between the forward and the backward pass."""
        assert self._buffer_bucket.current is not None
        self._buffers.write_changes(out=self._buffer_bucket.current)
        self._add_to_partial_sums(self._buffer_bucket)

    def end_shard(self) -> None:
        """Ends a shard, after its backward pass. A parameter without a gradient adds zeros and is counted."""
        has_all_gradients = True
        for bucket in self._buckets:
            if bucket.current is not None:
                has_all_gradients &= not bucket.missing
                _zero_missing_gradients(bucket, bucket.current)
                self._add_to_partial_sums(bucket)
        self._local_shard_has_all_gradients |= has_all_gradients

    def finish(self) -> None:
        """Ends a step: waits for the sums over all shards, then writes them to the parameters' .grad and the buffers.

        A parameter's gradient is the sum over all shards, or None if no shard has a gradient for it. Each buffer
        changes by the mean of the shards' changes.
        """
        self._send_filled_buckets()  # a rank without shards has sent none yet
        self._exchange.wait()
        for bucket in self._buckets:
            assert bucket.total is not None
            gradients, missing_counts = bucket.views(bucket.total)
            # If a local shard had every gradient, no count equals num_shards. Reading the counts would wait for a GPU.
            counts = [0.0] * len(gradients) if self._local_shard_has_all_gradients else missing_counts.tolist()
            for (parameter, _), gradient, count in zip(bucket.parameters, gradients, counts, strict=True):
                parameter.grad = gradient if count < self._num_shards else None
        assert self._buffer_bucket.total is not None
        self._buffers.apply_mean_change(self._buffer_bucket.total, self._num_shards)

    def _gradient_hook(self, bucket: Bucket, index: int) -> Callable[[nn.Parameter], None]:
        """Returns the hook that autograd calls when a parameter's gradient of this shard is complete."""

        def move_to_bucket(parameter: nn.Parameter) -> None:
            assert bucket.current is not None and parameter.grad is not None
            gradients, _ = bucket.views(bucket.current)
            gradients[index].copy_(parameter.grad)
            parameter.grad = None
            bucket.missing.remove(index)
            if not bucket.missing:
                self._add_to_partial_sums(bucket)

        return move_to_bucket

    def _add_to_partial_sums(self, bucket: Bucket) -> None:
        """Adds the current shard's vector to the rank's partial sums, and merges the subtrees that are complete."""
        assert bucket.current is not None
        vector, bucket.current = bucket.current, None
        sharding.push_block(bucket.stack, (self._shard, self._shard + 1), vector, self._num_shards, bucket.add)
        if self._is_last_shard:
            self._send_filled_buckets()

    def _send_filled_buckets(self) -> None:
        """Sends filled buckets in list order, because all ranks must send in the same order."""
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].current is None:
            bucket = self._buckets[self._num_sent]
            self._num_sent += 1
            self._exchange.send(bucket, self._num_shards)


def _zero_missing_gradients(bucket: Bucket, vector: Tensor) -> None:
    """Writes zeros for the parameters that autograd did not reach, and counts them as missing."""
    gradients, missing_counts = bucket.views(vector)
    for index in bucket.missing:
        gradients[index].zero_()
        missing_counts[index] = 1
