"""Test-time augmentation: classifies an image by the weighted mean of the logits of several views of it.

The views are the mirrored image, and both shifted by one pixel towards two opposite corners (Jordan, arXiv 2404.00498).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# (row, column) at which a shifted view starts in the image with a border of 1 pixel, for each choice of eval.tta.
_SHIFTS = {"none": [], "mirror": [], "mirror_and_shift": [(0, 0), (2, 2)]}


class View(NamedTuple):
    """A changed copy of a batch of images and the weight of its logits."""

    images: Tensor
    """uint8 [B, C, H, W]"""
    weight: float


Views = Callable[[Tensor], list[View]]


def build_views(name: str) -> Views | None:
    """Returns a function from uint8 images [B, C, H, W] to their views without the unchanged images; None for "none".

    The unchanged images have the weight that the weights of the views leave of 1.
    """
    return None if name == "none" else lambda images: _make_views(images, _SHIFTS[name])


def _make_views(images: Tensor, shifts: list[tuple[int, int]]) -> list[View]:
    height, width = images.shape[2:]
    unmirrored = [images]
    if shifts:
        padded = F.pad(images.float(), (1, 1, 1, 1), "reflect").to(images.dtype)
        unmirrored += [padded[:, :, row : row + height, column : column + width] for row, column in shifts]
    weights = [0.5 if shifts else 1.0] + [0.5 / len(shifts) for _ in shifts]
    views = [
        View(view, weight / 2)
        for batch, weight in zip(unmirrored, weights, strict=True)
        for view in (batch, batch.flip(3))
    ]
    return views[1:]
