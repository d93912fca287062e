"""Groups parameters into buckets, whose gradients lie side by side in one vector per shard."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainer.distributed import sharding

_BUCKET_ELEMENTS = 1 << 21  # 8 MB of float32; half and twice this size measured the same


@dataclass
class Bucket:
    """Collects the gradients of some parameters, or the buffer changes, for one shard after another.

    Each vector of a bucket ends with one number per parameter: the number of shards whose loss does not depend on that
    parameter, so that autograd computes no gradient for it.
    """

    like: Tensor
    """tensor with the dtype and device of the bucket's vectors"""
    length: int = 0
    """elements of a vector, including the counts at its end"""
    parameters: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """each parameter with the offset of its gradient"""
    missing: set[int] = field(default_factory=set)
    """indices of the parameters that have no gradient of the current shard yet"""
    current: Tensor | None = None
    """vector of the current shard; None once it is on the stack"""
    stack: list[tuple[sharding.Block, Tensor]] = field(default_factory=list)
    """this rank's partial sums, from left to right"""
    total: Tensor | None = None
    """sum over all shards of all ranks"""
    free_vectors: list[Tensor] = field(default_factory=list)
    """vectors that the next shard can use again"""
    _views: dict[int, tuple[Tensor, list[Tensor], Tensor]] = field(default_factory=dict)

    def allocate(self) -> Tensor:
        """Returns a vector of the bucket's length with undefined contents."""
        return self.free_vectors.pop() if self.free_vectors else self.like.new_empty(self.length)

    def views(self, vector: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns views of one of the bucket's vectors: each parameter's gradient, with the parameter's shape and
        strides, and the counts of shards without a gradient."""
        if id(vector) not in self._views:  # a bucket has few vectors, and each step uses them again
            gradients = [
                view_like(vector[offset : offset + parameter.numel()], parameter)
                for parameter, offset in self.parameters
            ]
            self._views[id(vector)] = vector, gradients, vector[self.length - len(self.parameters) :]
        _, gradients, missing_counts = self._views[id(vector)]
        return gradients, missing_counts

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Adds `right` to `left` in place, frees `right`, and returns `left`."""
        self.free_vectors.append(right)
        return left.add_(right)


def make_buckets(parameters: Iterable[nn.Parameter]) -> list[Bucket]:
    """Returns buckets of consecutive parameters of one dtype, each up to `_BUCKET_ELEMENTS` long."""
    buckets: list[Bucket] = []
    for parameter in parameters:
        has_same_dtype = buckets and buckets[-1].like.dtype == parameter.dtype
        if not has_same_dtype or buckets[-1].length + parameter.numel() > _BUCKET_ELEMENTS:
            buckets.append(Bucket(parameter.detach()))
        buckets[-1].parameters.append((parameter, buckets[-1].length))
        buckets[-1].length += parameter.numel()
    for bucket in buckets:
        bucket.length += len(bucket.parameters)
    return buckets


def view_like(vector: Tensor, parameter: nn.Parameter) -> Tensor:
    """Returns a view of `vector` [parameter.numel()] with the parameter's shape and strides.

    Fused optimizers read gradient and parameter in memory order, so both need the same strides.
    """
    return vector.as_strided(parameter.shape, parameter.stride())
