"""Augmentation: correct pixels, and draws that depend only on seed, epoch and sample id."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from trainer.config.schema import DataSettings
from trainer.data.augment import Augment, ShiftedCrop, cutout
from trainer.data.normalization import Normalization, resolve_normalization

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(64) * 7


def make_augment(*names: str, epochs: int = 1, seed: int = 11, **settings: object) -> Augment:
    data = DataSettings(augment=list(names), **settings)  # type: ignore[arg-type]
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    return Augment(data, normalization, seed, torch.device("cpu"), IMAGES.shape[1:], epochs)


def normalized_pair() -> tuple[Tensor, Tensor]:
    """A batch and its partners."""
    augment = make_augment()
    return augment.normalize(IMAGES), augment.normalize(IMAGES.flip(0))


def test_normalize_equals_torchvision() -> None:
    expected = v2.Normalize([0.5] * 3, [0.25] * 3)(IMAGES.float() / 255)
    torch.testing.assert_close(make_augment().normalize(IMAGES), expected)


def test_normalize_of_batch_larger_than_cpu_cache_equals_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.augment._CACHED_BYTES", 4 * 5 * IMAGES[0].numel())  # 5 images, of 64
    expected = v2.Normalize([0.5] * 3, [0.25] * 3)(IMAGES.float() / 255)
    torch.testing.assert_close(make_augment().normalize(IMAGES), expected)


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("mixup", "cutmix")])
def test_mix_depends_on_ids_and_epoch_not_on_batch(names: tuple[str, ...]) -> None:
    batch, partners = normalized_pair()
    mixed, shares = make_augment(*names).mix(batch, partners, IDS, epoch=4)
    for samples in (slice(0, 5), slice(5, 40), slice(40, 64)):
        mixed_slice, share = make_augment(*names).mix(batch[samples], partners[samples], IDS[samples], epoch=4)
        assert torch.equal(mixed_slice, mixed[samples]) and torch.equal(share, shares[samples])
    assert not torch.equal(make_augment(*names).mix(batch, partners, IDS, epoch=5)[0], mixed)


def test_mixup_is_weighted_sum_with_beta_distributed_shares() -> None:
    batch, partners = normalized_pair()
    mixed, share = make_augment("mixup").mix(batch, partners, IDS, epoch=0)
    weight = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, weight * batch + (1 - weight) * partners)
    for alpha in (0.2, 1.0, 3.0):
        shares = make_augment("mixup", mixup_alpha=alpha)._draw_share("mixup", torch.arange(20_000), epoch=0)
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_share_is_area_outside_the_box() -> None:
    zeros, ones = torch.zeros(64, 3, 32, 32), torch.ones(64, 3, 32, 32)
    mixed, share = make_augment("cutmix").mix(zeros, ones, IDS, epoch=0)
    torch.testing.assert_close(1 - mixed[:, 0].mean((1, 2)), share)
    for image in mixed[:, 0]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        if len(rows):
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one filled rectangle
    assert 0.5 < float(share.mean()) < 0.85  # above 0.5: boxes are cut off at the image's edge
    assert 0 < share.min() < 0.3 and share.max() > 0.9


def test_mix_with_mixup_and_cutmix_applies_one_of_them_to_each_sample() -> None:
    zeros, ones = torch.zeros(64, 3, 32, 32), torch.ones(64, 3, 32, 32)
    mixed, share = make_augment("cutmix", "mixup").mix(zeros, ones, IDS, epoch=0)
    has_mixup = [len(image.unique()) == 1 and 0 < image[0, 0, 0] < 1 for image in mixed]
    assert 16 < sum(has_mixup) < 48
    torch.testing.assert_close(1 - mixed.mean((1, 2, 3)), share)


@pytest.mark.parametrize(
    "names", [("flip",), ("alternating_flip",), ("crop",), ("cutout",), ("flip", "crop", "cutout")]
)
def test_transform_depends_on_ids_and_epoch_not_on_batch(names: tuple[str, ...]) -> None:
    images = make_augment(*names).transform(IMAGES, IDS, epoch=4)
    slices = (slice(0, 5), slice(5, 40), slice(40, 64))
    pieces = [make_augment(*names).transform(IMAGES[samples], IDS[samples], epoch=4) for samples in slices]
    assert torch.equal(torch.cat(pieces), images)
    assert not torch.equal(make_augment(*names).transform(IMAGES, IDS, epoch=5), images)


@pytest.mark.parametrize("name", ["flip", "alternating_flip", "crop", "cutout"])
def test_transform_depends_on_seed(name: str) -> None:
    images = make_augment(name, seed=11).transform(IMAGES, IDS, epoch=4)
    assert not torch.equal(make_augment(name, seed=12).transform(IMAGES, IDS, epoch=4), images)


def test_transform_does_not_depend_on_previous_batch() -> None:
    names = ("flip", "crop", "cutout")
    augment = make_augment(*names)
    augment.transform(255 - IMAGES, IDS + 1, epoch=3)
    expected = make_augment(*names).transform(IMAGES[:9], IDS[:9], epoch=4)
    assert torch.equal(augment.transform(IMAGES[:9], IDS[:9], epoch=4), expected)


def is_flipped(images: Tensor) -> list[bool]:
    """Which of IMAGES are flipped. Checks that the others are unchanged."""
    unchanged = [torch.equal(image, source) for image, source in zip(images, IMAGES, strict=True)]
    flipped = [torch.equal(image, source) for image, source in zip(images, IMAGES.flip(3), strict=True)]
    assert all(is_same != is_mirrored for is_same, is_mirrored in zip(unchanged, flipped, strict=True))
    return flipped


def test_flip_mirrors_half_of_the_images() -> None:
    assert 16 < sum(is_flipped(make_augment("flip").transform(IMAGES, IDS, epoch=0))) < 48


def test_alternating_flip_mirrors_the_other_half_in_the_next_epoch() -> None:
    epochs = [is_flipped(make_augment("alternating_flip").transform(IMAGES, IDS, epoch)) for epoch in range(3)]
    assert 16 < sum(epochs[0]) < 48
    assert epochs[1] == [not flipped for flipped in epochs[0]] and epochs[2] == epochs[0]


@pytest.mark.parametrize("border", ["constant", "reflect"])
def test_shifted_crop_equals_padding_and_slicing(border: str) -> None:
    rows, columns = torch.tensor([4, 0, 8, 3]), torch.tensor([4, 8, 1, 8])
    flip_mask = torch.tensor([False, False, True, True])
    crop = ShiftedCrop(4, reflect=border == "reflect")
    crop(IMAGES[20:40], torch.zeros(20).long(), torch.zeros(20).long())  # fills its buffer with other images
    for flips in (None, flip_mask):
        crops = crop(IMAGES[:4], rows, columns, flips)
        padded = torch.nn.functional.pad(IMAGES[:4].float(), (4, 4, 4, 4), mode=border).to(torch.uint8)
        for index, image in enumerate(crops):
            expected = padded[index, :, rows[index] : rows[index] + 32, columns[index] : columns[index] + 32]
            flipped = flips is not None and flips[index]
            assert torch.equal(image, expected.flip(2) if flipped else expected)
    assert torch.equal(crops[0], IMAGES[0])  # a shift equal to the padding changes nothing


def test_crop_draws_every_shift_and_rows_independent_of_columns() -> None:
    ids = torch.arange(2000)
    rows = make_augment("crop")._draw("crop row", ids, 0, 9)
    columns = make_augment("crop")._draw("crop column", ids, 0, 9)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9)) and not torch.equal(rows, columns)


def test_cutout_fills_square_and_cuts_it_off_at_the_edge() -> None:
    images, color = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8)
    filled = cutout(images, 8, torch.tensor([16, 0, 31]), torch.tensor([16, 16, 31]), color)
    assert [int((image == color.view(3, 1, 1)).all(0).sum()) for image in filled] == [64, 4 * 8, 5 * 5]
    assert (filled[0, :, 12:20, 12:20] == color.view(3, 1, 1)).all() and (images == 200).all()
    assert int((filled != 200).sum()) == 3 * (64 + 32 + 25)


def test_cutout_color_normalizes_to_zero() -> None:
    data = DataSettings(augment=["cutout"])
    augment = Augment(data, resolve_normalization("cifar10", IMAGES), 11, torch.device("cpu"), IMAGES.shape[1:])
    images = augment.transform(IMAGES, IDS, 0)
    is_filled = (images != IMAGES).any(1)
    values = augment.normalize(images).permute(0, 2, 3, 1)[is_filled]
    assert len(values) > 1000 and values.abs().max() < 0.02


def test_progressive_sizes_grow_over_epochs_and_equal_torchvisions_resize() -> None:
    augment = make_augment(progressive_sizes=[16, 24, 32], epochs=5)
    sizes = [augment.transform(IMAGES, IDS, epoch).shape[2:] for epoch in range(5)]
    assert sizes == [(16, 16), (16, 16), (24, 24), (24, 24), (32, 32)]
    small = augment.transform(IMAGES, IDS, 2)
    expected = v2.functional.resize(IMAGES, [24, 24], antialias=True)
    assert int((small.int() - expected.int()).abs().max()) <= 1
    assert torch.equal(augment.transform(IMAGES[7:9], IDS[7:9], 2), small[7:9])
    torch.testing.assert_close(augment.normalize(small), v2.Normalize([0.5] * 3, [0.25] * 3)(small.float() / 255))
