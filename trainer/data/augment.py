"""Whole blocks of uint8 images in, augmented ones out, on the device they lie on; then normalized float batches.

Every draw is a function of (seed, epoch, sample id): the same picture on any number of ranks and after any restart.
Images are stored pixel by pixel (channels last), so that a run of neighbouring pixels in a row is one run of bytes:
what is cropped or mirrored is copied by runs, not by pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import rng
from trainer.config.schema import DataSettings

_QUANTILES = 1 << 14
_PASS_BYTES = 1 << 20  # of floats written and read again: what stays in a CPU's cache in between
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


def resolve_normalization(name: str, images: Tensor, of_weights: Normalization | None = None) -> Normalization:
    """The named one for as many channels as the images have, or 'data': theirs. images: uint8 [N, C, H, W].

    of_weights: what 'weights' means.
    """
    channels = images.shape[1]
    if name == "data":
        return _measured(images)
    mean, std = NORMALIZATIONS[name] if of_weights is None else (list(of_weights.mean), list(of_weights.std))
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

    def __init__(
        self,
        data: DataSettings,
        normalization: Normalization,
        seed: int,
        device: torch.device,
        image_shape: torch.Size,
        epochs: int = 1,
    ) -> None:
        """image_shape: (C, H, W); epochs: of the whole run."""
        self._data = data
        self._names: Sequence[str] = data.augment
        self._seed = seed
        # uint8 to normalized float in one multiplication and addition; a value for each pixel, because broadcasting
        # over channels, which are innermost, costs ten times as much.
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalization.mean, normalization.std))
        self._normalizing: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        for size in {image_shape[1], *data.progressive_sizes}:
            shape = torch.Size([image_shape[0], size, size])
            scale, shift = (_for_each_pixel(value, shape).to(device) for value in (1 / (255 * std), -mean / std))
            self._normalizing[shape] = scale, shift
        self._epochs = epochs
        self.device = device
        self.mixes = not {"mixup", "cutmix"}.isdisjoint(self._names)
        self._mean_colour = (255 * mean.flatten()).round().to(device, torch.uint8)
        padding = data.crop_padding if "crop" in data.augment else 0
        self._windows = ShiftedCrop(padding, data.crop_border == "reflect")
        alphas = {"mixup": data.mixup_alpha, "cutmix": data.cutmix_alpha}
        self._shares = {name: beta_quantiles(alphas[name]).to(device) for name in alphas if name in data.augment}

    def pixels(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Flip, crop, cutout, and the size of the epoch: uint8 [N, C, H, W] and the samples' ids int64 [N] in, uint8
        [N, C, size, size] out."""
        if not len(images):
            return images
        height, width = images.shape[2:]
        flips = self._flips(ids, epoch)
        if "crop" in self._names:
            span = 2 * self._data.crop_padding + 1
            rows, columns = (self._draw(f"crop {axis}", ids, epoch, span) for axis in ("row", "column"))
            images = self._windows(images, rows, columns, flips)
        elif flips is not None:
            zeros = torch.zeros_like(ids)
            images = self._windows(images, zeros, zeros, flips)
        if "cutout" in self._names:
            rows, columns = self._draw("cutout row", ids, epoch, height), self._draw("cutout column", ids, epoch, width)
            images = cutout(images, self._data.cutout_size, rows, columns, self._mean_colour)
        if sizes := self._data.progressive_sizes:
            images = _resized(images, sizes[epoch * len(sizes) // self._epochs])
        return images

    def _flips(self, ids: Tensor, epoch: int) -> Tensor | None:
        """Which images are mirrored: bool [N]; None where none ever is."""
        if "alternating_flip" in self._names:
            # Each image as it lies or mirrored, by turns: two epochs show both. (Jordan, arXiv 2404.00498.)
            return (self._draw("flip", ids, 0, 2) + epoch) % 2 == 1
        return self._draw("flip", ids, epoch, 2) == 1 if "flip" in self._names else None

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

    def normalize(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalization, for training and evaluation: uint8 [B, C, H, W] in, float32 [B, C, H, W] out.

        out: memory for it, channels last; by default new.
        """
        if out is None:
            out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        scale, shift = self._normalizing[images.shape[1:]]
        at_once = max(1, _PASS_BYTES // (4 * images[0].numel())) if len(images) else 1
        if images.is_cuda or len(images) <= at_once:
            return torch.addcmul(shift, out.copy_(images), scale, out=out)
        for part, pixels in zip(torch.split(out, at_once), torch.split(images, at_once), strict=True):
            torch.addcmul(shift, part.copy_(pixels), scale, out=part)
        return out

    def _draw(self, purpose: str, ids: Tensor, epoch: int, end: int) -> Tensor:
        return rng.integers(ids, rng.key(self._seed, epoch, purpose), end)


class ShiftedCrop:
    """Each image padded on every side, then cut to its size from its own row and column, then mirrored or not."""

    def __init__(self, padding: int, reflect: bool = False) -> None:
        """reflect: the border mirrors the image, else it is black."""
        self._padding, self._reflect = padding, reflect
        self._memory = torch.empty(0)

    def __call__(self, images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor | None = None) -> Tensor:
        """images: uint8 [N, C, H, W]; rows, columns: int64 [N] in [0, 2 * padding], both `padding` for the image as it
        lies; flips: bool [N]."""
        number, channels, height, width = images.shape
        padding, device = self._padding, images.device
        high, wide = height + 2 * padding, width + 2 * padding
        place = torch.arange(number, device=device)  # of each image, or of its mirror image, among the padded ones
        sources = [images]
        if flips is not None:
            sources.append(images.flip(3) if images.is_cuda else _some(images, flips).flip(3))
            place = torch.where(flips, number + (place if images.is_cuda else flips.cumsum(0) - 1), place)
            columns = torch.where(flips, 2 * padding - columns, columns)
        padded = self._padded(sources, high, wide)
        # Every run of `width` pixels, wherever it begins; of these, `height` make a window.
        runs = padded.view(-1).as_strided((len(padded) * high * wide - width + 1, width * channels), (channels, 1))
        starts = ((place * high + rows) * wide + columns).unsqueeze(1) + torch.arange(height, device=device) * wide
        return runs.index_select(0, starts.view(-1)).view(number, height, width, channels).permute(0, 3, 1, 2)

    def _padded(self, sources: Sequence[Tensor], high: int, wide: int) -> Tensor:
        """uint8 [N of all sources, high, wide, C], in memory that is used again: its border stays black."""
        number, channels = sum(map(len, sources)), sources[0].shape[1]
        memory, padding = self._memory, self._padding
        if memory.shape[1:] != (high, wide, channels) or len(memory) < number or memory.device != sources[0].device:
            memory = self._memory = sources[0].new_zeros(len(sources) * len(sources[0]), high, wide, channels)
        padded, first = memory[:number], 0
        inside = padded[:, padding : high - padding, padding : wide - padding]
        for source in sources:
            inside[first : first + len(source)] = source.permute(0, 2, 3, 1)
            first += len(source)
        if self._reflect:
            _mirror_border(padded, padding)
        return padded


def _some(images: Tensor, which: Tensor) -> Tensor:
    """images[which], by whole images. Not for a GPU, which would have to tell the CPU how many there are."""
    pixels = images.permute(0, 2, 3, 1).index_select(0, which.nonzero().squeeze(1))
    return pixels.permute(0, 3, 1, 2)


def _mirror_border(padded: Tensor, padding: int) -> None:
    """Fills the border of [N, high, wide, C] from its inside; the outermost pixels of that are not repeated."""
    for distance in range(1, padding + 1):
        for axis in (1, 2):
            near, far = padding, padded.shape[axis] - 1 - padding
            padded.select(axis, near - distance).copy_(padded.select(axis, near + distance))
            padded.select(axis, far + distance).copy_(padded.select(axis, far - distance))


def cutout(images: Tensor, size: int, rows: Tensor, columns: Tensor, colour: Tensor) -> Tensor:
    """A square of one colour in each image. (DeVries and Taylor, arXiv 1708.04552, whose colour is the mean.)

    images: uint8 [N, C, H, W]; rows, columns: int64 [N], the square's centre; what hangs over an edge is cut off, as in
    the paper; colour: uint8 [C].
    """
    number, channels, height, width = images.shape
    inside_rows = _within(rows, height, size).unsqueeze(2)
    inside_columns = _within(columns, width, size).repeat_interleave(channels, 1).unsqueeze(1)
    lines = images.permute(0, 2, 3, 1).reshape(number, height, width * channels)
    blanked = torch.where(inside_rows & inside_columns, colour.repeat(width), lines)
    return blanked.view(number, height, width, channels).permute(0, 3, 1, 2)


def _resized(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] in, uint8 [N, C, size, size] out, each pixel a weighted mean of those that it covers."""
    if images.shape[2] == size:
        return images
    values = images.float() if images.is_cuda else images  # a CPU does it in whole numbers
    scaled = F.interpolate(values, (size, size), mode="bilinear", antialias=True)
    return scaled.round().to(torch.uint8) if images.is_cuda else scaled


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


def _for_each_pixel(values: Tensor, image_shape: torch.Size) -> Tensor:
    """float [1, C, 1, 1] in, [1, C, H, W] out, channels last."""
    return values.expand(1, *image_shape).contiguous(memory_format=torch.channels_last)
