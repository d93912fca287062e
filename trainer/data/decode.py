"""One picture of any size and mode in, uint8 [image_size, image_size, channels] out."""

import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, features

_PILLOW_HAS_TURBO = features.check("libjpeg_turbo")  # another library may round otherwise
# EXIF's orientations, but for the first one, which is upright.
_TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)


def fit_image(picture: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Upright, opaque, in grey or RGB, the shorter side scaled to image_size, the middle square cut out.

    Transparent pixels are laid on white: what lies under them was never meant to be seen. Raises ValueError for
    pixels that are fractions.
    """
    if "exif" in picture.info or picture.format in ("PNG", "TIFF", "MPO"):  # parsing it costs as much as a small JPEG
        picture = _upright(picture)
    picture, mode = _opaque(picture), "L" if channels == 1 else "RGB"
    if picture.mode != mode:  # or it would be copied
        picture = picture.convert(mode)
    if picture.size != (image_size, image_size):
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(image_size, image_size, channels)


def decode_plain_jpeg(stored: bytes, out: NDArray[np.uint8]) -> bool:
    """A JPEG file of just `out`'s size, [image_size, image_size, channels], decoded into it; whether it was one.

    The same pixels as by Pillow and fit, as both use libjpeg-turbo, in a seventh of the time at 32 pixels. False leaves
    to them whatever is not plain: another size, another format, colours to convert, several pictures, one that may
    have to be turned, and what is damaged.
    """
    if not _PILLOW_HAS_TURBO or not stored.startswith(b"\xff\xd8") or b"Exif\0\0" in stored or b"MPF\0" in stored:
        return False
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(stored)
        stored_as, wanted = ("Gray", "GRAY") if out.shape[2] == 1 else ("YCbCr", "RGB")
        if (height, width, colors) != (*out.shape[:2], stored_as):
            return False
        simplejpeg.decode_jpeg(stored, wanted, buffer=out)
    except (ValueError, KeyError):  # Pillow says what is wrong; KeyError: a subsampling that simplejpeg has no name for
        return False
    return True


def fit_images(images: NDArray[np.uint8], image_size: int, channels: int) -> NDArray[np.uint8]:
    """The same for an array of images: uint8 [N, H, W, C] in, [N, image_size, image_size, channels] out."""
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    pictures = (Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images)
    return np.stack([fit_image(picture, image_size, channels) for picture in pictures])


def _upright(picture: Image.Image) -> Image.Image:
    """As its EXIF block says; one that cannot be read says nothing. (Pillow's exif_transpose would write it anew.)"""
    picture.load()  # in a PNG file the block may come last
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (struct.error, SyntaxError, ValueError, TypeError, LookupError, OverflowError):
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its pixels are fractions, of which nobody says what is white")
    if picture.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion cuts them off at 255
        deep = np.asarray(picture, dtype=np.int64)
        return Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture)
