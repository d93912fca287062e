"""The order: every sample once an epoch, well shuffled, found from anywhere, unaware of ranks."""

import pytest
import torch

from trainer import rng
from trainer.data.sampler import BatchSampler, permute


def epoch_of(batches: BatchSampler, epoch: int) -> list[int]:
    first = epoch * batches.steps_per_epoch
    return torch.cat([batches.ids(step) for step in range(first, first + batches.steps_per_epoch)]).tolist()


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(samples: int) -> None:
    assert permute(torch.arange(samples), samples, rng.key(1, samples)).sort().values.equal(torch.arange(samples))


def test_permute_shuffles_as_well_as_torch_does() -> None:
    # Over many keys each element visits each place equally often, and pairs stay together no more than by chance.
    samples, keys = 12, 6000
    table = torch.stack([permute(torch.arange(samples), samples, rng.key(9, key)) for key in range(keys)])
    for place in range(samples):
        counts = table[:, place].bincount(minlength=samples).double()
        chi_squared = ((counts - keys / samples) ** 2 / (keys / samples)).sum()
        assert chi_squared < 40, (place, chi_squared)  # 11 degrees of freedom: beyond 40 once in 28,000
    adjacent = (table[:, 1:] - table[:, :-1] == 1).double().mean()
    assert abs(adjacent - 1 / samples) < 0.004


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_each_sample_once(drop_last: bool) -> None:
    batches = BatchSampler(1003, 100, seed=3, drop_last=drop_last)
    for epoch in (0, 1, 7):
        ids = epoch_of(batches, epoch)
        assert len(ids) == len(set(ids)) == (1000 if drop_last else 1003)
    assert batches.steps_per_epoch == (10 if drop_last else 11)
    assert [batches.size(step) for step in (9, 10, 11)] == ([100] * 3 if drop_last else [100, 3, 100])


def test_epochs_and_seeds_have_their_own_order() -> None:
    batches, other = BatchSampler(500, 50, seed=0), BatchSampler(500, 50, seed=1)
    assert epoch_of(batches, 0) != epoch_of(batches, 1) != epoch_of(other, 1)
    assert epoch_of(BatchSampler(500, 50, seed=0), 3) == epoch_of(batches, 3)


def test_any_step_is_found_without_those_before_it() -> None:
    straight = BatchSampler(70_000, 32, seed=5)
    epoch = torch.cat([straight.ids(step) for step in range(2188)])
    assert epoch.equal(straight.order(0, torch.arange(70_000)))
    for step in (0, 1, 2047, 2048, 2187, 2188 + 17):
        parts = [straight.positions(step, 0, 9), straight.positions(step, 9, straight.size(step))]
        ids = straight.order(step // 2188, torch.cat(parts[::-1]))
        assert ids.equal(torch.cat([straight.ids(step)[9:], straight.ids(step)[:9]]))


def test_without_shuffle_the_order_is_the_data_sets_own() -> None:
    assert epoch_of(BatchSampler(10, 4, seed=0, shuffle=False), 2) == list(range(10))


def test_the_count_of_samples_is_exact() -> None:
    batches = BatchSampler(10, 4, seed=0)
    assert [batches.samples_before(step) for step in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]
    assert [batches.epoch(step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_order_stays_what_it_is() -> None:
    # A run begun with one version must go on with the next: written down when the first version was finished.
    assert BatchSampler(50_000, 8, seed=0).ids(0).tolist() == [40002, 29591, 31526, 7258, 14124, 29103, 3632, 35609]


def test_partners_are_the_batch_in_another_order() -> None:
    batches = BatchSampler(103, 16, seed=2)
    for step in range(14):
        ids, partners = batches.ids(step), batches.partners(step)
        assert partners.sort().values.tolist() == ids.sort().values.tolist()
        assert torch.equal(partners, BatchSampler(103, 16, seed=2).partners(step))
    assert not torch.equal(batches.partners(0).argsort(), batches.partners(1).argsort())
