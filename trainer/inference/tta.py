"""Test-time augmentation: several views of each image, and the weighted mean of what the network makes of them.

Mirrored, and both of these shifted by a pixel towards two opposite corners. (As Jordan uses it, arXiv 2404.00498.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

_SHIFTS = {"none": [], "mirror": [], "mirror_and_shift": [(0, 0), (2, 2)]}  # where the cut begins, of a border of 1


class View(NamedTuple):
    images: Tensor
    """uint8 [B, C, H, W]"""
    weight: float


Views = Callable[[Tensor], list[View]]


def build_views(name: str) -> Views | None:
    """The views besides the image itself, whose weight is what theirs leave of 1; None when there are none."""
    return None if name == "none" else lambda images: _views(images, _SHIFTS[name])


def _views(images: Tensor, shifts: list[tuple[int, int]]) -> list[View]:
    height, width = images.shape[2:]
    places = [images]
    if shifts:
        padded = F.pad(images.float(), (1, 1, 1, 1), "reflect").to(images.dtype)
        places += [padded[:, :, row : row + height, column : column + width] for row, column in shifts]
    weights = [0.5 if shifts else 1.0] + [0.5 / len(shifts) for _ in shifts]
    views = [
        View(view, weight / 2) for place, weight in zip(places, weights, strict=True) for view in (place, place.flip(3))
    ]
    return views[1:]
