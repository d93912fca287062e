"""Writes small image files for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    """Writes an image of smooth random colors. The suffix of the path selects the format.

    size: width and height in pixels.
    """
    rng = np.random.default_rng(seed)
    coarse_image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse_image.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
