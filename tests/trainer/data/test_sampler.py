"""Sample order: each sample once per epoch, well shuffled, computed for any step without the steps before it."""

import pytest
import torch

from trainer import rng
from trainer.data.sampler import BatchSampler, permute


def epoch_ids(batches: BatchSampler, epoch: int) -> list[int]:
    first = epoch * batches.steps_per_epoch
    return torch.cat([batches.sample_ids(step) for step in range(first, first + batches.steps_per_epoch)]).tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(num_samples: int) -> None:
    samples = torch.arange(num_samples)
    assert permute(samples, num_samples, rng.key(1, num_samples)).sort().values.equal(samples)


def test_permute_is_uniform_over_keys() -> None:
    # Over many keys each element is at each position equally often, and neighbors stay together only by chance.
    num_samples, num_keys = 12, 6000
    orders = torch.stack([permute(torch.arange(num_samples), num_samples, rng.key(9, key)) for key in range(num_keys)])
    for position in range(num_samples):
        counts = orders[:, position].bincount(minlength=num_samples).double()
        chi_squared = ((counts - num_keys / num_samples) ** 2 / (num_keys / num_samples)).sum()
        assert chi_squared < 40, (position, chi_squared)  # 11 degrees of freedom: beyond 40 once in 28,000
    adjacent = (orders[:, 1:] - orders[:, :-1] == 1).double().mean()
    assert abs(adjacent - 1 / num_samples) < 0.004


@pytest.mark.parametrize("drop_last", [False, True])
def test_epoch_has_each_sample_once(drop_last: bool) -> None:
    batches = BatchSampler(1003, 100, seed=3, drop_last=drop_last)
    for epoch in (0, 1, 7):
        ids = epoch_ids(batches, epoch)
        assert len(ids) == len(set(ids)) == (1000 if drop_last else 1003)
    assert batches.steps_per_epoch == (10 if drop_last else 11)
    assert [batches.batch_size(step) for step in (9, 10, 11)] == ([100] * 3 if drop_last else [100, 3, 100])


def test_order_depends_on_epoch_and_seed() -> None:
    batches, batches_of_seed_1 = BatchSampler(500, 50, seed=0), BatchSampler(500, 50, seed=1)
    assert epoch_ids(batches, 0) != epoch_ids(batches, 1) != epoch_ids(batches_of_seed_1, 1)
    assert epoch_ids(BatchSampler(500, 50, seed=0), 3) == epoch_ids(batches, 3)


@pytest.mark.slow
def test_sample_ids_of_a_step_do_not_need_earlier_steps() -> None:
    batches = BatchSampler(70_000, 32, seed=5)
    steps_per_epoch = 2188
    epoch = torch.cat([batches.sample_ids(step) for step in range(steps_per_epoch)])
    assert epoch.equal(batches.ids_at(0, torch.arange(70_000)))
    for step in (0, 1, 2047, 2048, 2187, steps_per_epoch + 17):
        head, tail = batches.positions(step, 0, 9), batches.positions(step, 9, batches.batch_size(step))
        ids = batches.ids_at(step // steps_per_epoch, torch.cat([tail, head]))
        assert ids.equal(torch.cat([batches.sample_ids(step)[9:], batches.sample_ids(step)[:9]]))


def test_order_without_shuffle_is_that_of_the_data_set() -> None:
    assert epoch_ids(BatchSampler(10, 4, seed=0, shuffle=False), 2) == list(range(10))


def test_samples_before_counts_short_batches() -> None:
    batches = BatchSampler(10, 4, seed=0)
    assert [batches.samples_before(step) for step in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]
    assert [batches.epoch_of(step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_order_is_the_same_in_every_version() -> None:
    # A run that one version started must continue in the next. The numbers are from the first version.
    ids = BatchSampler(50_000, 8, seed=0).sample_ids(0)
    assert ids.tolist() == [40002, 29591, 31526, 7258, 14124, 29103, 3632, 35609]


def test_partners_are_the_batch_in_another_order() -> None:
    batches = BatchSampler(103, 16, seed=2)
    for step in range(14):
        ids, partners = batches.sample_ids(step), batches.partner_ids(step)
        assert partners.sort().values.tolist() == ids.sort().values.tolist()
        assert torch.equal(partners, BatchSampler(103, 16, seed=2).partner_ids(step))
    assert not torch.equal(batches.partner_ids(0).argsort(), batches.partner_ids(1).argsort())
