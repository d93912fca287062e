"""Augmentation: right pixels, drawn by sample id alone."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from trainer import augment
from trainer.augment import Augment, Normalization
from trainer.settings import Data

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(64) * 7


def made(*names: str, **settings: float) -> Augment:
    data = Data(augment=list(names), **settings)  # type: ignore[arg-type]
    return Augment(data, Normalization((0.5,) * 3, (0.25,) * 3), seed=11, device=torch.device("cpu"))


def test_normalization_is_torchvisions() -> None:
    expected = v2.Normalize([0.5] * 3, [0.25] * 3)(IMAGES.float() / 255)
    torch.testing.assert_close(made().plain(IMAGES), expected)


def test_the_data_sets_own_statistics_are_exact() -> None:
    found = augment.normalization("data", IMAGES)
    pixels = IMAGES.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)))


def test_named_normalizations_fit_grey_images_too() -> None:
    assert augment.normalization("half", IMAGES[:, :1]) == Normalization((0.5,), (0.5,))
    assert augment.normalization("none", IMAGES) == Normalization((0.0,) * 3, (1.0,) * 3)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    assert augment.normalization("data", torch.zeros(2, 1, 4, 4, dtype=torch.uint8)).std == (1.0,)


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("mixup", "cutmix")])
def test_a_mixture_depends_on_ids_and_epoch_not_on_company(names: tuple[str, ...]) -> None:
    batch, others = made().plain(IMAGES), made().plain(IMAGES.flip(0))
    whole, shares = made(*names).mix(batch, others, IDS, epoch=4)
    for at in (slice(0, 5), slice(5, 40), slice(40, 64)):
        mixed, share = made(*names).mix(batch[at], others[at], IDS[at], epoch=4)
        assert torch.equal(mixed, whole[at]) and torch.equal(share, shares[at])
    assert not torch.equal(made(*names).mix(batch, others, IDS, epoch=5)[0], whole)


def test_mixup_is_a_weighted_sum_with_shares_from_the_beta_distribution() -> None:
    batch, others = made().plain(IMAGES), made().plain(IMAGES.flip(0))
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


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("cutout",), ("flip", "crop", "cutout")])
def test_a_picture_depends_on_its_id_and_epoch_not_on_its_company(names: tuple[str, ...]) -> None:
    whole = made(*names).train(IMAGES, IDS, epoch=4)
    pieces = [made(*names).train(IMAGES[at], IDS[at], epoch=4) for at in (slice(0, 5), slice(5, 40), slice(40, 64))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(made(*names).train(IMAGES, IDS, epoch=5), whole)


def test_flip_mirrors_half_of_the_images() -> None:
    out = made("flip").train(IMAGES, IDS, epoch=0)
    plain, mirrored = made().plain(IMAGES), made().plain(IMAGES.flip(3))
    kinds = [(torch.equal(image, a), torch.equal(image, b)) for image, a, b in zip(out, plain, mirrored, strict=True)]
    assert all(one != other for one, other in kinds)
    assert 16 < sum(other for _, other in kinds) < 48


def test_crop_cuts_where_it_is_told() -> None:
    rows, columns = torch.tensor([4, 0, 8]), torch.tensor([4, 8, 1])
    out = augment.crop(IMAGES[:3], 4, rows, columns)
    padded = torch.nn.functional.pad(IMAGES[:3], (4, 4, 4, 4))
    for image, row, column, source in zip(out, rows, columns, padded, strict=True):
        assert torch.equal(image, source[:, row : row + 32, column : column + 32])
    assert torch.equal(out[0], IMAGES[0])


def test_crops_reach_every_place() -> None:
    ids = torch.arange(2000)
    rows = made("crop")._draw("crop row", ids, 0, 9)
    columns = made("crop")._draw("crop column", ids, 0, 9)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9)) and not torch.equal(rows, columns)


def blank(batch: Tensor) -> list[int]:
    return [int((image == 0).all(0).sum()) for image in batch]


def test_cutout_blanks_a_square_to_the_mean() -> None:
    batch = torch.ones(3, 3, 32, 32)
    out = augment.cutout(batch, 8, torch.tensor([16, 0, 31]), torch.tensor([16, 16, 31]))
    assert blank(out) == [64, 4 * 8, 5 * 5]
    assert (out[0, :, 12:20, 12:20] == 0).all() and (batch == 1).all()
