"""Normalization: statistics of the data set, named ones, and those of pretrained weights."""

import numpy as np
import torch

from trainer.data.normalization import Normalization, resolve_normalization

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_data_statistics_equal_numpys() -> None:
    normalization = resolve_normalization("data", IMAGES)
    pixels = IMAGES.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(normalization.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(normalization.std, pixels.std((0, 2, 3)))


def test_named_normalization_has_as_many_channels_as_the_images() -> None:
    assert resolve_normalization("half", IMAGES[:, :1]) == Normalization((0.5,), (0.5,))
    assert resolve_normalization("none", IMAGES) == Normalization((0.0,) * 3, (1.0,) * 3)
    grey = resolve_normalization("cifar10", IMAGES[:, :1])
    np.testing.assert_allclose(grey.mean, [np.mean([0.4914, 0.4822, 0.4465])])


def test_weights_normalization_is_that_of_the_weights() -> None:
    pretrained = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert resolve_normalization("weights", IMAGES, pretrained) == pretrained


def test_constant_channel_has_deviation_one() -> None:
    assert resolve_normalization("data", torch.zeros(2, 1, 4, 4, dtype=torch.uint8)).std == (1.0,)
