"""Channel means and standard deviations that images are normalized with.

To add a named normalization, list it in NORMALIZATIONS and add the name to `data.normalize` in config/schema.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NORMALIZATIONS: dict[str, tuple[list[float], list[float]]] = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
}
"""Mean and standard deviation of each RGB channel, for pixel values in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """Mean and standard deviation of each channel, for pixel values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def resolve_normalization(name: str, images: Tensor, pretrained: Normalization | None = None) -> Normalization:
    """Returns the normalization that `data.normalize` names, with as many channels as the images have.

    name: 'data' measures the images; 'weights' returns `pretrained`; other names are keys of NORMALIZATIONS.
    images: uint8 [N, C, H, W].
    """
    channels = images.shape[1]
    if name == "data":
        return _measure(images)
    mean, std = NORMALIZATIONS[name] if pretrained is None else (list(pretrained.mean), list(pretrained.std))
    if channels == 1:  # grey is a weighted mean of RGB; the plain mean of the three values is close enough
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    return Normalization(tuple(mean), tuple(std))


def _measure(images: Tensor) -> Normalization:
    """Computes exact statistics from a histogram of the 256 pixel values, without a float copy of the data set."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        frequencies = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = (frequencies * values).sum()
        means.append(float(mean))
        # A constant channel has deviation 0: dividing by 1 instead leaves it at 0 after the mean is subtracted.
        stds.append(float((frequencies * (values - mean) ** 2).sum().sqrt()) or 1.0)
    return Normalization(tuple(means), tuple(stds))
