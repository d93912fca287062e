"""Parameters in, buckets: their gradients side by side, for one shard after the other."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainer.distributed import sharding

_BUCKET_ELEMENTS = 1 << 21  # 8 MB of float32; half or twice as much measured the same


@dataclass
class Bucket:
    """Some parameters' gradients side by side, or the buffers' moves, for one shard after the other. Behind the
    gradients is one number a parameter: in how many shards' losses it took no part, so that it has no gradient there.
    """

    like: Tensor
    length: int = 0
    places: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """each parameter and where its gradient begins"""
    missing: set[int] = field(default_factory=set)
    """of which parameters the shard in hand has no gradient yet"""
    filling: Tensor | None = None
    stack: list[tuple[sharding.Block, Tensor]] = field(default_factory=list)
    total: Tensor | None = None
    spare: list[Tensor] = field(default_factory=list)
    _views: dict[int, tuple[Tensor, list[Tensor], Tensor]] = field(default_factory=dict)

    def take(self) -> Tensor:
        return self.spare.pop() if self.spare else self.like.new_empty(self.length)

    def views(self, flat: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of one of its vectors: each parameter's gradient, laid out as the parameter is, and the numbers behind."""
        if id(flat) not in self._views:  # they are few, and used again at each step
            parts = [(flat[place : place + parameter.numel()], parameter) for parameter, place in self.places]
            lacking = flat[self.length - len(self.places) :]
            self._views[id(flat)] = flat, [view_like(part, parameter) for part, parameter in parts], lacking
        _, gradients, lacking = self._views[id(flat)]
        return gradients, lacking

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        self.spare.append(right)
        return left.add_(right)


def make_buckets(parameters: Iterable[nn.Parameter]) -> list[Bucket]:
    """Consecutive parameters of one dtype, up to a bucket's length."""
    found: list[Bucket] = []
    for parameter in parameters:
        fits = found and found[-1].like.dtype == parameter.dtype
        if not fits or found[-1].length + parameter.numel() > _BUCKET_ELEMENTS:
            found.append(Bucket(parameter.detach()))
        found[-1].places.append((parameter, found[-1].length))
        found[-1].length += parameter.numel()
    for bucket in found:
        bucket.length += len(bucket.places)
    return found


def view_like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A view of [parameter.numel()] with the parameter's shape, and its layout: an optimizer runs over both at once."""
    return flat.as_strided(parameter.shape, parameter.stride())
