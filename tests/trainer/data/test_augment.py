"""Augmentation: right pixels, drawn by sample id alone."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from trainer.config.schema import DataSettings
from trainer.data.augment import Augment, Normalization, ShiftedCrop, cutout, resolve_normalization

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(64) * 7


def made(*names: str, **settings: float) -> Augment:
    data = DataSettings(augment=list(names), **settings)  # type: ignore[arg-type]
    return Augment(
        data, Normalization((0.5,) * 3, (0.25,) * 3), seed=11, device=torch.device("cpu"), image_shape=IMAGES.shape[1:]
    )


def test_normalization_is_torchvisions() -> None:
    expected = v2.Normalize([0.5] * 3, [0.25] * 3)(IMAGES.float() / 255)
    torch.testing.assert_close(made().normalize(IMAGES), expected)


def test_the_data_sets_own_statistics_are_exact() -> None:
    found = resolve_normalization("data", IMAGES)
    pixels = IMAGES.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)))


def test_named_normalizations_fit_grey_images_too() -> None:
    assert resolve_normalization("half", IMAGES[:, :1]) == Normalization((0.5,), (0.5,))
    assert resolve_normalization("none", IMAGES) == Normalization((0.0,) * 3, (1.0,) * 3)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    assert resolve_normalization("data", torch.zeros(2, 1, 4, 4, dtype=torch.uint8)).std == (1.0,)


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("mixup", "cutmix")])
def test_a_mixture_depends_on_ids_and_epoch_not_on_company(names: tuple[str, ...]) -> None:
    batch, others = made().normalize(IMAGES), made().normalize(IMAGES.flip(0))
    whole, shares = made(*names).mix(batch, others, IDS, epoch=4)
    for at in (slice(0, 5), slice(5, 40), slice(40, 64)):
        mixed, share = made(*names).mix(batch[at], others[at], IDS[at], epoch=4)
        assert torch.equal(mixed, whole[at]) and torch.equal(share, shares[at])
    assert not torch.equal(made(*names).mix(batch, others, IDS, epoch=5)[0], whole)


def test_mixup_is_a_weighted_sum_with_shares_from_the_beta_distribution() -> None:
    batch, others = made().normalize(IMAGES), made().normalize(IMAGES.flip(0))
    mixed, share = made("mixup").mix(batch, others, IDS, epoch=0)
    weight = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, weight * batch + (1 - weight) * others)
    for alpha in (0.2, 1.0, 3.0):
        drawn = made("mixup", mixup_alpha=alpha)._share("mixup", torch.arange(20_000), epoch=0)
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    zeros, ones = torch.zeros(64, 3, 32, 32), torch.ones(64, 3, 32, 32)
    mixed, share = made("cutmix").mix(zeros, ones, IDS, epoch=0)
    torch.testing.assert_close(1 - mixed[:, 0].mean((1, 2)), share)
    for image in mixed[:, 0]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        if len(rows):
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one whole box
    assert 0.5 < float(share.mean()) < 0.85  # boxes that hang over an edge are cut off
    assert 0 < share.min() < 0.3 and share.max() > 0.9


def test_with_both_each_sample_gets_one() -> None:
    zeros, ones = torch.zeros(64, 3, 32, 32), torch.ones(64, 3, 32, 32)
    mixed, share = made("cutmix", "mixup").mix(zeros, ones, IDS, epoch=0)
    flat = [len(image.unique()) == 1 and 0 < image[0, 0, 0] < 1 for image in mixed]
    assert 16 < sum(flat) < 48
    torch.testing.assert_close(1 - mixed.mean((1, 2, 3)), share)


@pytest.mark.parametrize(
    "names", [("flip",), ("alternating_flip",), ("crop",), ("cutout",), ("flip", "crop", "cutout")]
)
def test_a_picture_depends_on_its_id_and_epoch_not_on_its_company(names: tuple[str, ...]) -> None:
    whole = made(*names).pixels(IMAGES, IDS, epoch=4)
    pieces = [made(*names).pixels(IMAGES[at], IDS[at], epoch=4) for at in (slice(0, 5), slice(5, 40), slice(40, 64))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(made(*names).pixels(IMAGES, IDS, epoch=5), whole)


def test_pictures_of_one_block_do_not_depend_on_the_block_before() -> None:
    used = made("flip", "crop", "cutout")
    used.pixels(255 - IMAGES, IDS + 1, epoch=3)
    assert torch.equal(
        used.pixels(IMAGES[:9], IDS[:9], 4), made("flip", "crop", "cutout").pixels(IMAGES[:9], IDS[:9], 4)
    )


def kinds(out: Tensor) -> list[bool]:
    """Which of IMAGES are mirrored; each is, or is as it lies."""
    same = [torch.equal(image, source) for image, source in zip(out, IMAGES, strict=True)]
    mirrored = [torch.equal(image, source) for image, source in zip(out, IMAGES.flip(3), strict=True)]
    assert all(one != other for one, other in zip(same, mirrored, strict=True))
    return mirrored


def test_flip_mirrors_half_of_the_images() -> None:
    assert 16 < sum(kinds(made("flip").pixels(IMAGES, IDS, epoch=0))) < 48


def test_alternating_flip_mirrors_the_other_half_in_the_next_epoch() -> None:
    epochs = [kinds(made("alternating_flip").pixels(IMAGES, IDS, epoch)) for epoch in range(3)]
    assert 16 < sum(epochs[0]) < 48
    assert epochs[1] == [not mirrored for mirrored in epochs[0]] and epochs[2] == epochs[0]


@pytest.mark.parametrize("border", ["constant", "reflect"])
def test_crop_cuts_where_it_is_told(border: str) -> None:
    rows, columns = torch.tensor([4, 0, 8, 3]), torch.tensor([4, 8, 1, 8])
    flips = torch.tensor([False, False, True, True])
    cut = ShiftedCrop(4, reflect=border == "reflect")
    cut(IMAGES[20:40], torch.zeros(20).long(), torch.zeros(20).long())  # leaves something in its memory
    for flipped in (None, flips):
        out = cut(IMAGES[:4], rows, columns, flipped)
        padded = torch.nn.functional.pad(IMAGES[:4].float(), (4, 4, 4, 4), mode=border).to(torch.uint8)
        for index, image in enumerate(out):
            expected = padded[index, :, rows[index] : rows[index] + 32, columns[index] : columns[index] + 32]
            mirrored = flipped is not None and flips[index]
            assert torch.equal(image, expected.flip(2) if mirrored else expected)
    assert torch.equal(out[0], IMAGES[0])


def test_crops_reach_every_place() -> None:
    ids = torch.arange(2000)
    rows = made("crop")._draw("crop row", ids, 0, 9)
    columns = made("crop")._draw("crop column", ids, 0, 9)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9)) and not torch.equal(rows, columns)


def test_cutout_blanks_a_square_to_a_colour() -> None:
    images, colour = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8)
    out = cutout(images, 8, torch.tensor([16, 0, 31]), torch.tensor([16, 16, 31]), colour)
    assert [int((image == colour.view(3, 1, 1)).all(0).sum()) for image in out] == [64, 4 * 8, 5 * 5]
    assert (out[0, :, 12:20, 12:20] == colour.view(3, 1, 1)).all() and (images == 200).all()
    assert int((out != 200).sum()) == 3 * (64 + 32 + 25)


def test_the_colour_of_cutout_is_next_to_the_mean() -> None:
    data = DataSettings(augment=["cutout"])
    used = Augment(data, resolve_normalization("cifar10", IMAGES), 11, torch.device("cpu"), IMAGES.shape[1:])
    blank = (used.pixels(IMAGES, IDS, 0) != IMAGES).any(1)
    values = used.normalize(used.pixels(IMAGES, IDS, 0)).permute(0, 2, 3, 1)[blank]
    assert len(values) > 1000 and values.abs().max() < 0.02


def test_images_grow_over_the_epochs_and_are_scaled_alone() -> None:
    data = DataSettings(progressive_sizes=[16, 24, 32])
    shape = IMAGES.shape[1:]
    augment = Augment(data, Normalization((0.5,) * 3, (0.25,) * 3), 11, torch.device("cpu"), shape, epochs=5)
    sizes = [augment.pixels(IMAGES, IDS, epoch).shape[2:] for epoch in range(5)]
    assert sizes == [(16, 16), (16, 16), (24, 24), (24, 24), (32, 32)]
    small = augment.pixels(IMAGES, IDS, 2)
    expected = v2.functional.resize(IMAGES, [24, 24], antialias=True)
    assert int((small.int() - expected.int()).abs().max()) <= 1
    assert torch.equal(augment.pixels(IMAGES[7:9], IDS[7:9], 2), small[7:9])
    torch.testing.assert_close(augment.normalize(small), v2.Normalize([0.5] * 3, [0.25] * 3)(small.float() / 255))
