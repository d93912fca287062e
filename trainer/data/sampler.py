"""The order: (seed, epoch, position) in, sample ids out, one global batch a step. Knows nothing of ranks.

An epoch's order is a keyed bijection of positions, so position p of epoch e is found without storing or replaying
anything: a Feistel network over the next power of four, with cycle walking back into range (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains").
"""

import torch
from torch import Tensor

from trainer import rng
from trainer.config.durations import steps_per_epoch

_ROUNDS = 8


def permute(positions: Tensor, num_samples: int, key: int) -> Tensor:
    """Where a keyed bijection of [0, num_samples) sends each position: int64 [n] in, int64 [n] out."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    ids = _feistel(positions, half_bits, key)
    outside = (ids >= num_samples).nonzero().squeeze(1)
    while outside.numel():
        walked = _feistel(ids[outside], half_bits, key)
        ids[outside] = walked
        outside = outside[walked >= num_samples]
    return ids


def _feistel(x: Tensor, half_bits: int, key: int) -> Tensor:
    mask = (1 << half_bits) - 1
    left, right = x >> half_bits, x & mask
    for index in range(_ROUNDS):
        left, right = right, left ^ (rng.bits(right, rng.key(key, index)) & mask)
    return (left << half_bits) | right


class BatchSampler:
    """A run's endless sequence of global batches; batch number `step` is the one that optimizer step takes."""

    def __init__(
        self, num_samples: int, global_batch_size: int, seed: int, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        assert 0 < global_batch_size <= num_samples
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = steps_per_epoch(num_samples, global_batch_size, drop_last)
        self.samples_per_epoch = self.steps_per_epoch * global_batch_size if drop_last else num_samples

    def epoch(self, step: int) -> int:
        """The epoch that a step's batch belongs to, from 0."""
        return step // self.steps_per_epoch

    def size(self, step: int) -> int:
        """Samples in a step's batch: the global batch size, or what is left of the epoch."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return min(self.global_batch_size, self.samples_per_epoch - start)

    def samples_before(self, step: int) -> int:
        """Samples that the steps before this one have taken, all epochs together."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.samples_per_epoch + rest * self.global_batch_size

    def ids(self, step: int) -> Tensor:
        """The sample ids of a step's batch: int64 [size(step)], in [0, num_samples)."""
        return self.order(self.epoch(step), self.positions(step, 0, self.size(step)))

    def partners(self, step: int) -> Tensor:
        """For each sample of a step's batch the one that it is mixed with, of the same batch: int64 [size(step)]."""
        return self.order(self.epoch(step), self.partner_positions(step, 0, self.size(step)))

    def positions(self, step: int, first: int, end: int) -> Tensor:
        """Where samples first to end of a step's batch are in the epoch's order: int64 [end - first]."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return torch.arange(start + first, start + end)

    def partner_positions(self, step: int, first: int, end: int) -> Tensor:
        """The same of what these samples are mixed with."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return start + permute(torch.arange(first, end), self.size(step), rng.key(self.seed, step, "partners"))

    def order(self, epoch: int, positions: Tensor) -> Tensor:
        """The sample ids at these positions of an epoch's order: int64 [n] in, int64 [n] out. Nothing is stored, and
        nothing but these is computed; one call for many is cheaper than many calls."""
        if not self.shuffle:
            return positions
        return permute(positions, self.num_samples, rng.key(self.seed, epoch, "order"))
