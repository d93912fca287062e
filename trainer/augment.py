"""Whole uint8 batches in, augmented and normalized float batches out, on the device they lie on.

Every draw is a function of (seed, epoch, sample id): the same picture on any number of ranks and after any restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import randomness
from trainer.settings import Data

_QUANTILES = 1 << 14
# Mean and deviation of each channel of values in [0, 1].
NORMALIZATIONS: dict[str, tuple[list[float], list[float]]] = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
}


@dataclass(frozen=True, slots=True)
class Normalization:
    """Channel means and deviations of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalization(name: str, images: Tensor) -> Normalization:
    """The named one for as many channels as the images have, or 'data': theirs. images: uint8 [N, C, H, W]."""
    channels = images.shape[1]
    if name == "data":
        return _measured(images)
    mean, std = NORMALIZATIONS[name]
    if channels == 1:  # grey is made of the three by its usual weights, near enough their plain mean
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    return Normalization(tuple(mean), tuple(std))


def _measured(images: Tensor) -> Normalization:
    """Exact, from counts of the 256 values: no float copy of the data set."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = (share * values).sum()
        means.append(float(mean))
        stds.append(float((share * (values - mean) ** 2).sum().sqrt()) or 1.0)
    return Normalization(tuple(means), tuple(stds))


class Augment:
    """The training set's augmentations, then the normalization that every batch gets."""

    def __init__(self, data: Data, normalization: Normalization, seed: int, device: torch.device) -> None:
        self._data = data
        self._names: Sequence[str] = data.augment
        self._seed = seed
        # uint8 to normalized float in one multiplication and one addition.
        mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
        self._scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self._shift = (-mean / std).view(-1, 1, 1).to(device)
        alphas = {"mixup": data.mixup_alpha, "cutmix": data.cutmix_alpha}
        self._shares = {name: beta_quantiles(alphas[name]).to(device) for name in alphas if name in data.augment}

    def train(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """uint8 [B, C, H, W] and the samples' ids int64 [B] in, float32 [B, C, H, W] out."""
        flips = self._draw("flip", ids, epoch, 2) == 1 if "flip" in self._names else None
        if "crop" in self._names:
            span = 2 * self._data.crop_padding + 1
            rows, columns = (self._draw(f"crop {axis}", ids, epoch, span) for axis in ("row", "column"))
            images = crop(images, self._data.crop_padding, rows, columns)
        if flips is not None:
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        batch = self.plain(images)
        if "cutout" in self._names:
            height, width = images.shape[2:]
            rows, columns = self._draw("cutout row", ids, epoch, height), self._draw("cutout column", ids, epoch, width)
            batch = cutout(batch, self._data.cutout_size, rows, columns)
        return batch

    def mix(self, batch: Tensor, others: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """mixup and cutmix: two batches float32 [B, C, H, W] in; the mixture and each image's share in it, float32 [B].

        With both, a sample gets one or the other.
        """
        mixed, share = batch, torch.ones(len(batch), device=batch.device)
        cut = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        if "cutmix" in self._shares:
            cut = self._draw("cutmix or mixup", ids, epoch, 2) == 1 if "mixup" in self._shares else ~cut
            height, width = batch.shape[2:]
            rows, columns = self._draw("cutmix row", ids, epoch, height), self._draw("cutmix column", ids, epoch, width)
            box = cutmix_box(self._share("cutmix", ids, epoch), rows, columns, height, width)
            mixed = torch.where((box & cut.view(-1, 1, 1)).unsqueeze(1), others, batch)
            share = torch.where(cut, 1 - box.float().mean((1, 2)), share)
        if "mixup" in self._shares:
            share = torch.where(cut, share, self._share("mixup", ids, epoch))
            weight = torch.where(cut, 1.0, share).view(-1, 1, 1, 1)
            mixed = weight * mixed + (1 - weight) * others
        return mixed, share

    def _share(self, name: str, ids: Tensor, epoch: int) -> Tensor:
        quantiles = self._shares[name]
        return quantiles[self._draw(f"{name} share", ids, epoch, len(quantiles))]

    def plain(self, images: Tensor) -> Tensor:
        """Normalization alone, as for evaluation: uint8 [B, C, H, W] in, float32 out."""
        return images.float().mul_(self._scale).add_(self._shift)

    def _draw(self, purpose: str, ids: Tensor, epoch: int, end: int) -> Tensor:
        return randomness.integers(ids, randomness.key(self._seed, epoch, purpose), end)


def crop(images: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image padded with zeros on every side, then cut to its size from its own row and column.

    images: [B, C, H, W]; rows, columns: int64 [B] in [0, 2 * padding], both `padding` for the image itself.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]


def cutout(batch: Tensor, size: int, rows: Tensor, columns: Tensor) -> Tensor:
    """A square of zeros (the mean colour) in each normalized image. (DeVries and Taylor, arXiv 1708.04552.)

    rows, columns: int64 [B], the square's centre; what hangs over an edge is cut off, as in the paper.
    """
    height, width = batch.shape[2:]
    inside_rows = _within(rows, height, size).view(-1, 1, height, 1)
    inside_columns = _within(columns, width, size).view(-1, 1, 1, width)
    return batch.masked_fill(inside_rows & inside_columns, 0.0)


def cutmix_box(share: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Which pixels come from the other image: bool [B, height, width]. (Yun et al., arXiv 1905.04899.)

    share: float [B], the area that is kept; rows, columns: int64 [B], the box's centre; it is cut off at the edges.
    """
    side = (1 - share).sqrt()
    sizes = ((side * height).long(), (side * width).long())
    inside_rows = _within(rows, height, sizes[0].unsqueeze(1)).unsqueeze(2)
    inside_columns = _within(columns, width, sizes[1].unsqueeze(1)).unsqueeze(1)
    return inside_rows & inside_columns


def beta_quantiles(alpha: float) -> Tensor:
    """Evenly spaced quantiles of the Beta(alpha, alpha) distribution: one picked evenly is a draw from it."""
    from scipy.special import betaincinv  # late: few want it

    shares = (numpy.arange(_QUANTILES) + 0.5) / _QUANTILES
    return torch.from_numpy(betaincinv(alpha, alpha, shares)).float()


def _within(centres: Tensor, length: int, size: int | Tensor) -> Tensor:
    """size: for all, or int64 [B, 1]. bool [B, length] out."""
    start = centres.unsqueeze(1) - size // 2
    places = torch.arange(length, device=centres.device)
    return (places >= start) & (places < start + size)
