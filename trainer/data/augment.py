"""Augments batches of uint8 images on their own device, and normalizes them to float.

Every random number is a function of (seed, epoch, sample id), so a sample gets the same augmentation on any number of
ranks and after any restart. Images are stored channels last, so neighboring pixels of a row are one run of bytes: crops
and flips copy runs, not pixels.

To add an augmentation:
1. Add its name to AUGMENTATIONS in config/schema.py, and its options to DataSettings.
2. Write a function here that takes a batch and the drawn numbers, such as `cutout`.
3. Call it in `Augment.transform` (uint8 images), or in `Augment.mix` if it combines two samples (normalized images).
   Draw its numbers with `self._draw` and a `purpose` of its own: draws with the same purpose are the same numbers.
"""

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import rng
from trainer.config.schema import DataSettings
from trainer.data.normalization import Normalization

_NUM_QUANTILES = 1 << 14
_CACHED_BYTES = 1 << 20  # of floats: normalize() writes them twice, and a CPU's cache keeps this much in between


class Augment:
    """Augments the training images of a run, and normalizes all images."""

    def __init__(
        self,
        data: DataSettings,
        normalization: Normalization,
        seed: int,
        device: torch.device,
        image_shape: torch.Size,
        epochs: int = 1,
    ) -> None:
        """image_shape: (C, H, W). epochs: number of epochs in the run. data.progressive_sizes are spread over them."""
        self._data = data
        self._names: Sequence[str] = data.augment
        self._seed = seed
        # Normalizes with one multiplication and one addition. The factors have a value for each pixel, because
        # broadcasting over channels, the innermost dimension, takes ten times as long.
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalization.mean, normalization.std))
        self._scale_and_shift: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        for size in {image_shape[1], *data.progressive_sizes}:
            shape = torch.Size([image_shape[0], size, size])
            scale, shift = (_expand_to_pixels(value, shape).to(device) for value in (1 / (255 * std), -mean / std))
            self._scale_and_shift[shape] = scale, shift
        self._epochs = epochs
        self.device = device
        self.uses_partners = not {"mixup", "cutmix"}.isdisjoint(self._names)
        """Whether `mix` needs a second batch."""
        self._mean_color = (255 * mean.flatten()).round().to(device, torch.uint8)
        padding = data.crop_padding if "crop" in data.augment else 0
        self._shifted_crop = ShiftedCrop(padding, data.crop_border == "reflect")
        alphas = {"mixup": data.mixup_alpha, "cutmix": data.cutmix_alpha}
        self._share_quantiles = {
            name: beta_quantiles(alphas[name]).to(device) for name in alphas if name in data.augment
        }

    def transform(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Applies flip, crop and cutout, and scales the images to the size of the epoch.

        images: uint8 [N, C, H, W]. ids: int64 [N], sample ids. Returns uint8 [N, C, size, size].
        """
        if not len(images):
            return images
        height, width = images.shape[2:]
        flips = self._draw_flips(ids, epoch)
        if "crop" in self._names:
            num_shifts = 2 * self._data.crop_padding + 1
            rows = self._draw("crop row", ids, epoch, num_shifts)
            columns = self._draw("crop column", ids, epoch, num_shifts)
            images = self._shifted_crop(images, rows, columns, flips)
        elif flips is not None:
            zeros = torch.zeros_like(ids)
            images = self._shifted_crop(images, zeros, zeros, flips)
        if "cutout" in self._names:
            rows, columns = self._draw("cutout row", ids, epoch, height), self._draw("cutout column", ids, epoch, width)
            images = cutout(images, self._data.cutout_size, rows, columns, self._mean_color)
        if sizes := self._data.progressive_sizes:
            images = _resize(images, sizes[epoch * len(sizes) // self._epochs])
        return images

    def mix(self, batch: Tensor, partners: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Applies mixup and cutmix. If both are set, each sample gets one of them.

        batch, partners: normalized, float32 [B, C, H, W]. ids: int64 [B], sample ids of the batch.
        Returns the mixed batch and the share of `batch` in each image, float32 [B] in [0, 1].
        """
        mixed, share = batch, torch.ones(len(batch), device=batch.device)
        gets_cutmix = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        if "cutmix" in self._share_quantiles:
            has_both = "mixup" in self._share_quantiles
            gets_cutmix = self._draw("cutmix or mixup", ids, epoch, 2) == 1 if has_both else ~gets_cutmix
            height, width = batch.shape[2:]
            rows, columns = self._draw("cutmix row", ids, epoch, height), self._draw("cutmix column", ids, epoch, width)
            box = cutmix_box(self._draw_share("cutmix", ids, epoch), rows, columns, height, width)
            mixed = torch.where((box & gets_cutmix.view(-1, 1, 1)).unsqueeze(1), partners, batch)
            share = torch.where(gets_cutmix, 1 - box.float().mean((1, 2)), share)
        if "mixup" in self._share_quantiles:
            share = torch.where(gets_cutmix, share, self._draw_share("mixup", ids, epoch))
            weight = torch.where(gets_cutmix, 1.0, share).view(-1, 1, 1, 1)
            mixed = weight * mixed + (1 - weight) * partners
        return mixed, share

    def normalize(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalizes images for training and evaluation. Takes uint8 [B, C, H, W], returns float32 [B, C, H, W].

        out: memory for the result, channels last. Allocated by default.
        """
        if out is None:
            out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        scale, shift = self._scale_and_shift[images.shape[1:]]
        num_cached = max(1, _CACHED_BYTES // (4 * images[0].numel())) if len(images) else 1
        if images.is_cuda or len(images) <= num_cached:
            return torch.addcmul(shift, out.copy_(images), scale, out=out)
        for out_slice, image_slice in zip(torch.split(out, num_cached), torch.split(images, num_cached), strict=True):
            torch.addcmul(shift, out_slice.copy_(image_slice), scale, out=out_slice)
        return out

    def _draw(self, purpose: str, ids: Tensor, epoch: int, end: int) -> Tensor:
        """Draws an integer in [0, end) for each sample: int64 [N]."""
        return rng.integers(ids, rng.key(self._seed, epoch, purpose), end)

    def _draw_flips(self, ids: Tensor, epoch: int) -> Tensor | None:
        """Returns a mask of the images to flip, bool [N], or None without a flip augmentation."""
        if "alternating_flip" in self._names:
            # Flips each image in every second epoch, so that two epochs show both forms. (Jordan, arXiv 2404.00498.)
            return (self._draw("flip", ids, 0, 2) + epoch) % 2 == 1
        return self._draw("flip", ids, epoch, 2) == 1 if "flip" in self._names else None

    def _draw_share(self, name: str, ids: Tensor, epoch: int) -> Tensor:
        """Draws the share that each image keeps, from the Beta distribution of mixup or cutmix: float32 [N]."""
        quantiles = self._share_quantiles[name]
        return quantiles[self._draw(f"{name} share", ids, epoch, len(quantiles))]


class ShiftedCrop:
    """Pads images on every side, crops each to its original size at its own row and column, and flips some of them."""

    def __init__(self, padding: int, reflect: bool = False) -> None:
        """padding: in pixels. reflect: fills the border with the mirrored image instead of black."""
        self._padding, self._reflect = padding, reflect
        self._buffer = torch.empty(0)

    def __call__(self, images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor | None = None) -> Tensor:
        """Returns the crops, uint8 [N, C, H, W].

        images: uint8 [N, C, H, W]. rows, columns: int64 [N] in [0, 2 * padding]; `padding` leaves an image unshifted.
        flips: bool [N], the images to flip from left to right.
        """
        num_images, channels, height, width = images.shape
        padding, device = self._padding, images.device
        padded_height, padded_width = height + 2 * padding, width + 2 * padding
        index = torch.arange(num_images, device=device)  # position of each image, or its flipped copy, in `padded`
        sources = [images]
        if flips is not None:
            if images.is_cuda:  # flips all: selecting some would make the CPU wait for their number
                sources.append(images.flip(3))
                index_of_flipped = num_images + index
            else:
                sources.append(_select(images, flips).flip(3))
                index_of_flipped = num_images + flips.cumsum(0) - 1
            index = torch.where(flips, index_of_flipped, index)
            columns = torch.where(flips, 2 * padding - columns, columns)
        padded = self._pad(sources, padded_height, padded_width)
        # A view of every run of `width` pixels, at any start. A crop consists of `height` of these runs.
        num_runs = len(padded) * padded_height * padded_width - width + 1
        runs = padded.view(-1).as_strided((num_runs, width * channels), (channels, 1))
        first_runs = ((index * padded_height + rows) * padded_width + columns).unsqueeze(1)
        crop_runs = first_runs + torch.arange(height, device=device) * padded_width
        crops = runs.index_select(0, crop_runs.view(-1)).view(num_images, height, width, channels)
        return crops.permute(0, 3, 1, 2)

    def _pad(self, sources: Sequence[Tensor], padded_height: int, padded_width: int) -> Tensor:
        """Returns all sources padded: uint8 [N, padded_height, padded_width, C].

        Reuses one buffer, whose border stays black.
        """
        num_images, channels = sum(map(len, sources)), sources[0].shape[1]
        buffer, padding = self._buffer, self._padding
        image_shape = (padded_height, padded_width, channels)
        if buffer.shape[1:] != image_shape or len(buffer) < num_images or buffer.device != sources[0].device:
            buffer = self._buffer = sources[0].new_zeros(len(sources) * len(sources[0]), *image_shape)
        padded, first = buffer[:num_images], 0
        inside = padded[:, padding : padded_height - padding, padding : padded_width - padding]
        for source in sources:
            inside[first : first + len(source)] = source.permute(0, 2, 3, 1)
            first += len(source)
        if self._reflect:
            _reflect_border(padded, padding)
        return padded


def cutout(images: Tensor, size: int, rows: Tensor, columns: Tensor, color: Tensor) -> Tensor:
    """Fills a square of each image with one color. (DeVries and Taylor, arXiv 1708.04552: the mean color.)

    images: uint8 [N, C, H, W]. size: side of the square in pixels. rows, columns: int64 [N], center of the square;
    squares are cut off at the image's edge, as in the paper. color: uint8 [C]. Returns uint8 [N, C, H, W].
    """
    num_images, channels, height, width = images.shape
    inside_rows = _is_within(rows, height, size).unsqueeze(2)
    inside_columns = _is_within(columns, width, size).repeat_interleave(channels, 1).unsqueeze(1)
    lines = images.permute(0, 2, 3, 1).reshape(num_images, height, width * channels)
    filled = torch.where(inside_rows & inside_columns, color.repeat(width), lines)
    return filled.view(num_images, height, width, channels).permute(0, 3, 1, 2)


def cutmix_box(share: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Returns a mask of the pixels to take from the partner: bool [B, height, width]. (Yun et al., arXiv 1905.04899.)

    share: float [B], the share of the area to keep. rows, columns: int64 [B], center of the box; boxes are cut off at
    the image's edge.
    """
    side = (1 - share).sqrt()
    sizes = ((side * height).long(), (side * width).long())
    inside_rows = _is_within(rows, height, sizes[0].unsqueeze(1)).unsqueeze(2)
    inside_columns = _is_within(columns, width, sizes[1].unsqueeze(1)).unsqueeze(1)
    return inside_rows & inside_columns


def beta_quantiles(alpha: float) -> Tensor:
    """Returns evenly spaced quantiles of the Beta(alpha, alpha) distribution: float32 [16384].

    A quantile with a uniformly drawn index is a draw from the distribution.
    """
    from scipy.special import betaincinv  # lazy import: only mixup and cutmix need it

    probabilities = (numpy.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    return torch.from_numpy(betaincinv(alpha, alpha, probabilities)).float()


def _select(images: Tensor, mask: Tensor) -> Tensor:
    """Returns images[mask], copying whole images."""
    pixels = images.permute(0, 2, 3, 1).index_select(0, mask.nonzero().squeeze(1))
    return pixels.permute(0, 3, 1, 2)


def _reflect_border(padded: Tensor, padding: int) -> None:
    """Fills the border of [N, H, W, C] with the mirrored image, without repeating the image's outermost pixels."""
    for distance in range(1, padding + 1):
        for axis in (1, 2):
            first, last = padding, padded.shape[axis] - 1 - padding
            padded.select(axis, first - distance).copy_(padded.select(axis, first + distance))
            padded.select(axis, last + distance).copy_(padded.select(axis, last - distance))


def _resize(images: Tensor, size: int) -> Tensor:
    """Scales images with antialiasing. Takes uint8 [N, C, H, W], returns uint8 [N, C, size, size]."""
    if images.shape[2] == size:
        return images
    values = images.float() if images.is_cuda else images  # only the CPU's kernel takes uint8
    scaled = F.interpolate(values, (size, size), mode="bilinear", antialias=True)
    return scaled.round().to(torch.uint8) if images.is_cuda else scaled


def _is_within(centers: Tensor, length: int, size: int | Tensor) -> Tensor:
    """Returns a mask of the positions in the interval around each center: bool [B, length].

    centers: int64 [B]. size: length of the intervals, one for all or int64 [B, 1].
    """
    start = centers.unsqueeze(1) - size // 2
    positions = torch.arange(length, device=centers.device)
    return (positions >= start) & (positions < start + size)


def _expand_to_pixels(values: Tensor, image_shape: torch.Size) -> Tensor:
    """Repeats channel values for each pixel. Takes float [1, C, 1, 1], returns [1, C, H, W], channels last."""
    return values.expand(1, *image_shape).contiguous(memory_format=torch.channels_last)
