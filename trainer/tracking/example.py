"""Holds an image and its prediction, for reports and trackers. No torch, because `samecurve report` starts fast."""

import base64
import io
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class Example:
    """An image of the test set and its prediction."""

    png: str
    """base64 of a PNG file"""
    label: str
    predicted: str
    probability: float
    """of the predicted class, in [0, 1]"""

    def image(self) -> Image.Image:
        """Returns the image in its stored size."""
        return Image.open(io.BytesIO(base64.b64decode(self.png)))
