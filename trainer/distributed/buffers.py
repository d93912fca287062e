"""A network's buffers - BatchNorm's running statistics and counters - as two vectors that can be kept and put back.

Each shard of a global batch moves the statistics from where they were before the step; the step's move is the mean of
the shards' moves. It is the moves that are added up, not the places: a buffer that is a constant stays what it is.
"""

import torch
from torch import Tensor, nn


class Buffers:
    """The float32 and int64 buffers of a module become views of `floats` and `counters`; what is in evaluation mode,
    because it is frozen, keeps its own."""

    def __init__(self, module: nn.Module) -> None:
        """To be called when the module is on its device; a later `.to()` would undo it."""
        self.floats = _flatten(module, torch.float32)
        self.counters = _flatten(module, torch.int64)
        self._floats_before, self._counters_before = self.floats.clone(), self.counters.clone()

    def begin(self) -> None:
        """Remembers where a step begins."""
        if self._floats_before.numel():
            self._floats_before.copy_(self.floats)
            self._counters_before.copy_(self.counters)

    def rewind(self, where: Tensor | None = None) -> None:
        """Back to where the step began, if `where`, float32 [] on the device, is not 0."""
        if self._floats_before.numel():
            for now, before in ((self.floats, self._floats_before), (self.counters, self._counters_before)):
                now.copy_(before if where is None else torch.where(where > 0, before, now))

    def moves(self, out: Tensor) -> None:
        """How far the statistics are from where the step began, into `out`: float32 [floats.numel()]."""
        torch.sub(self.floats, self._floats_before, out=out)

    def move(self, moves: Tensor, shards: int) -> None:
        """The statistics, from where the step began, by the mean of the shards' moves, whose sum is given."""
        torch.add(self._floats_before, moves / shards, out=self.floats)


def _flatten(module: nn.Module, dtype: torch.dtype) -> Tensor:
    trained = [part for part in module.modules() if part.training]
    found = [buffer for part in trained for buffer in part.buffers(recurse=False) if buffer.dtype == dtype]
    if not found:
        return next(module.parameters()).new_empty(0, dtype=dtype)
    flat = torch.cat([buffer.flatten() for buffer in found])
    for buffer, view in zip(found, torch.split(flat, [buffer.numel() for buffer in found]), strict=True):
        buffer.data = view.view_as(buffer)
    return flat
