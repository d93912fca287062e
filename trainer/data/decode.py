"""Decodes one image of any size and mode to uint8 [image_size, image_size, channels]."""

import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, features

_PILLOW_HAS_TURBO = features.check("libjpeg_turbo")  # another JPEG library may round pixels differently
_TRANSPOSE_OF_ORIENTATION = {
    # EXIF orientation 1 is upright.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def fit_image(image: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Returns the image upright, opaque, in grey or RGB: scales its shorter side to image_size and crops the center.

    Transparent pixels become white, because the colors stored under them are arbitrary. Returns uint8
    [image_size, image_size, channels]. Raises ValueError for an image with floating-point pixels.
    """
    if "exif" in image.info or image.format in ("PNG", "TIFF", "MPO"):  # parsing EXIF costs as much as a small JPEG
        image = _rotate_upright(image)
    image, mode = _remove_transparency(image), "L" if channels == 1 else "RGB"
    if image.mode != mode:  # convert() copies the image even where the mode is right
        image = image.convert(mode)
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_size, image_size, channels)


def fit_images(images: NDArray[np.uint8], image_size: int, channels: int) -> NDArray[np.uint8]:
    """Applies fit_image to each image of an array.

    Takes uint8 [N, H, W, C], returns uint8 [N, image_size, image_size, channels].
    """
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    pil_images = (Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images)
    return np.stack([fit_image(image, image_size, channels) for image in pil_images])


def decode_plain_jpeg(content: bytes, out: NDArray[np.uint8]) -> bool:
    """Decodes a plain JPEG file of exactly the size of `out` into it. Returns False when the file is not plain.

    The pixels equal those of Pillow and fit_image, because both use libjpeg-turbo; at 32 pixels it takes a seventh of
    the time. The caller leaves everything else to Pillow: another size or format, colors that need conversion, several
    images in a file, an EXIF block that may rotate the image, and damaged files.

    out: uint8 [image_size, image_size, channels].
    """
    if not _PILLOW_HAS_TURBO or not content.startswith(b"\xff\xd8") or b"Exif\0\0" in content or b"MPF\0" in content:
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        required_colorspace, output_colorspace = ("Gray", "GRAY") if out.shape[2] == 1 else ("YCbCr", "RGB")
        if (height, width, colorspace) != (*out.shape[:2], required_colorspace):
            return False
        simplejpeg.decode_jpeg(content, output_colorspace, buffer=out)
    except (ValueError, KeyError):  # ValueError: damaged; KeyError: a chroma subsampling unknown to simplejpeg
        return False
    return True


def _rotate_upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation and ignores an unreadable EXIF block.

    Pillow's exif_transpose does not serve: it also writes the EXIF block again.
    """
    image.load()  # in a PNG file the EXIF block may follow the pixels
    try:
        transpose = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (struct.error, SyntaxError, ValueError, TypeError, LookupError, OverflowError):
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def _remove_transparency(image: Image.Image) -> Image.Image:
    """Lays transparent pixels on white, and reduces 16-bit grey to 8 bits."""
    if image.mode == "F":
        raise ValueError("expected integer pixels, got fractions of unknown range; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion clips them at 255
        sixteen_bits = np.asarray(image, dtype=np.int64)
        return Image.fromarray((sixteen_bits >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)
