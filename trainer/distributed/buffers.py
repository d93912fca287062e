"""Stores a network's buffers (BatchNorm statistics and counters) as two flat vectors that a step can save and restore.

Each shard of a global batch updates the statistics from their values before the step. The step's change is the mean of
the shards' changes. Changes are averaged, not values, so that a buffer that holds a constant keeps its exact value.
"""

import torch
from torch import Tensor, nn


class Buffers:
    """Turns a module's float32 and int64 buffers into views of `floats` and `counters`.

    Modules in evaluation mode are frozen; their buffers are left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        """Call this after the module is on its device: a later `.to()` replaces the views."""
        self.floats = _flatten(module, torch.float32)
        self.counters = _flatten(module, torch.int64)
        self._floats_before, self._counters_before = self.floats.clone(), self.counters.clone()

    def save(self) -> None:
        """Saves the values at the start of a step."""
        if self._floats_before.numel():
            self._floats_before.copy_(self.floats)
            self._counters_before.copy_(self.counters)

    def restore(self, condition: Tensor | None = None) -> None:
        """Restores the values saved by `save`.

        condition: float32 [] on the device; if given, the values are restored only where it is not 0.
        """
        if self._floats_before.numel():
            for current, before in ((self.floats, self._floats_before), (self.counters, self._counters_before)):
                current.copy_(before if condition is None else torch.where(condition > 0, before, current))

    def write_changes(self, out: Tensor) -> None:
        """Writes the change of the statistics since `save` to `out`, float32 [floats.numel()]."""
        torch.sub(self.floats, self._floats_before, out=out)

    def apply_mean_change(self, change_sum: Tensor, num_shards: int) -> None:
        """Sets the statistics to the saved values plus `change_sum / num_shards`.

        change_sum: float32 [floats.numel()], the sum of the shards' changes.
        """
        torch.add(self._floats_before, change_sum / num_shards, out=self.floats)


def _flatten(module: nn.Module, dtype: torch.dtype) -> Tensor:
    training_modules = [submodule for submodule in module.modules() if submodule.training]
    buffers = [
        buffer for submodule in training_modules for buffer in submodule.buffers(recurse=False) if buffer.dtype == dtype
    ]
    if not buffers:
        return next(module.parameters()).new_empty(0, dtype=dtype)
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    for buffer, view in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = view.view_as(buffer)
    return flat
