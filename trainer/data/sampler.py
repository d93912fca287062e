"""Computes the sample order: which samples form the global batch of each step. It does not depend on ranks.

The order of an epoch is a keyed bijection of positions, so the sample at position p of epoch e is computed without
storing or replaying anything: a Feistel network over the next power of four, with cycle walking back into range (Black
and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import torch
from torch import Tensor

from trainer import rng
from trainer.config.durations import steps_per_epoch

_ROUNDS = 8


def permute(positions: Tensor, num_samples: int, key: int) -> Tensor:
    """Applies a keyed bijection of [0, num_samples) to each position. Takes int64 [n], returns int64 [n]."""
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    ids = _feistel(positions, half_bits, key)
    outside = (ids >= num_samples).nonzero().squeeze(1)
    while outside.numel():
        walked = _feistel(ids[outside], half_bits, key)
        ids[outside] = walked
        outside = outside[walked >= num_samples]
    return ids


def _feistel(values: Tensor, half_bits: int, key: int) -> Tensor:
    """Applies the Feistel network, a bijection of [0, 4**half_bits)."""
    mask = (1 << half_bits) - 1
    high, low = values >> half_bits, values & mask
    for index in range(_ROUNDS):
        high, low = low, high ^ (rng.bits(low, rng.key(key, index)) & mask)
    return (high << half_bits) | low


class BatchSampler:
    """The endless sequence of global batches of a run, one per optimizer step."""

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

    @property
    def sizes(self) -> set[int]:
        """The sizes of batches that occur: the last one of an epoch may be smaller."""
        return {self.batch_size(0), self.batch_size(self.steps_per_epoch - 1)}

    def epoch_of(self, step: int) -> int:
        """Returns the epoch that a step belongs to, counted from 0."""
        return step // self.steps_per_epoch

    def batch_size(self, step: int) -> int:
        """Returns the number of samples in a step's batch. The last one of an epoch may be smaller."""
        return min(self.global_batch_size, self.samples_per_epoch - self._first_position(step))

    def samples_before(self, step: int) -> int:
        """Returns the number of samples that all earlier steps have taken, over all epochs."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples_per_epoch + steps * self.global_batch_size

    def sample_ids(self, step: int) -> Tensor:
        """Returns the sample ids of a step's batch: int64 [batch_size(step)], in [0, num_samples)."""
        return self.ids_at(self.epoch_of(step), self.positions(step, 0, self.batch_size(step)))

    def partner_ids(self, step: int) -> Tensor:
        """Returns the ids of the samples that mixup and cutmix mix a step's batch with: int64 [batch_size(step)].

        The partners are the samples of the same batch in another order.
        """
        return self.ids_at(self.epoch_of(step), self.partner_positions(step, 0, self.batch_size(step)))

    def positions(self, step: int, first: int, end: int) -> Tensor:
        """Returns the positions of samples [first, end) of a step's batch in the epoch: int64 [end - first]."""
        start = self._first_position(step)
        return torch.arange(start + first, start + end)

    def partner_positions(self, step: int, first: int, end: int) -> Tensor:
        """Returns the positions of the partners of samples [first, end) in the epoch: int64 [end - first]."""
        samples = torch.arange(first, end)
        partners = permute(samples, self.batch_size(step), rng.key(self.seed, step, "partners"))
        return self._first_position(step) + partners

    def ids_at(self, epoch: int, positions: Tensor) -> Tensor:
        """Returns the sample ids at these positions of an epoch. Takes int64 [n], returns int64 [n].

        Computes only these ids and stores nothing. One call with many positions is cheaper than many calls.
        """
        if not self.shuffle:
            return positions
        return permute(positions, self.num_samples, rng.key(self.seed, epoch, "order"))

    def _first_position(self, step: int) -> int:
        """Returns the position of a step's first sample in its epoch."""
        return (step % self.steps_per_epoch) * self.global_batch_size
