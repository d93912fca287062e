"""Random numbers from addresses: uniform, independent, and the same on every device and in every version."""

import torch

from trainer import rng


def test_key_depends_on_every_element_of_the_address() -> None:
    keys = {rng.key(seed, epoch, name) for seed in range(20) for epoch in range(20) for name in ("flip", "crop")}
    assert len(keys) == 20 * 20 * 2
    assert rng.key(1) != rng.key(1 + 2**8) != rng.key(1 + 2**63)
    assert rng.key(1, 2) != rng.key(2, 1) and rng.key("a", "b") != rng.key("ab")


def test_mix_matches_the_published_splitmix64() -> None:
    # The first outputs of the reference implementation from state 1234567.
    states = [(1234567 + 0x9E3779B97F4A7C15 * count + 2**63) % 2**64 - 2**63 for count in (1, 2)]
    assert rng.mix(torch.tensor(states)).tolist() == [6457827717110365317, 3203168211198807973]


def test_uniform_has_range_mean_spread_and_independent_neighbors() -> None:
    draws = rng.uniform(torch.arange(100_000), rng.key(7, "x"))
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.std() - 12**-0.5) < 0.005
    correlation = torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]
    assert abs(correlation) < 0.015


def test_integers_are_uniform() -> None:
    counts = rng.integers(torch.arange(90_000), rng.key(3, "y"), 9).bincount()
    assert len(counts) == 9 and (counts - 10_000).abs().max() < 400


def test_subset_of_ids_gets_the_same_bits() -> None:
    key = rng.key(5, 1, "flip")
    ids = torch.arange(1000)
    assert torch.equal(rng.bits(ids, key)[17::3], rng.bits(ids[17::3], key))


def test_draws_equal_those_of_the_first_version() -> None:
    # A run that one version began must continue with the next. Recorded when the first version was finished.
    key = rng.key(7, 3, "flip")
    assert (rng.key(0), rng.key(0, 0), key) == (
        16294208416658607535,  # also the first output of splitmix64 from state 0
        12035550249420947055,
        10035892210764514981,
    )
    assert rng.integers(torch.arange(5), key, 1000).tolist() == [53, 728, 60, 89, 788]
